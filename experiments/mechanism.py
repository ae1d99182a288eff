"""How training changed what decoding does: a trained model against its base model, on the same puzzles.

    mechanism.against_base(loaded, processes, "R/answers.jsonl", "base/in.jsonl")    # -> a dict

Both have answered the same puzzles, one token a step. The order of the cells is compared up to where the
right answer ends; and the trained model replays trajectories of the base model, whose entropies it
had logged.
"""

import torch

import baselines
import data
import objectives
from experiments import diagnose
from runs import loading

TRAJECTORIES = 64  # of the base model, that are replayed


def against_base(loaded, processes, answers, before):
    """A trained model against its base model -> a dict:

    correlation     Spearman's correlation of the order in which the two decode a puzzle, its mean
    kl              KL of Eq. 6 (beta 1) on the base model's trajectories, nats a token
    entropy, entropy_before     of the trained and of the base model at each token's own step, on the
                    base model's trajectories, nats a token

    loaded: the trained model (loading.Loaded). answers, before: folders or files of the trajectories of both."""
    theirs, correlations = data.read_trajectories(before), []
    for ours, base in zip(data.read_trajectories(answers), theirs, strict=True):
        n = len(base["answer"][0])
        correlations.append(rank_correlation(ours["order"][:n], base["order"][:n]))
    correlation = sum(correlations) / len(correlations)
    return dict(correlation=correlation, **entropies(loaded, processes, theirs[:TRAJECTORIES]))


def rank_correlation(a, b):
    """Spearman's correlation of two orders of the same cells, given by decode steps that are all
    different."""
    n, squares = len(a), 0
    for x, y in zip(ranks(a), ranks(b)):
        squares += (x - y) ** 2
    return 1 - 6 * squares / (n * (n**2 - 1))


def ranks(steps):
    """The rank of each value among all: [40, 10, 30] -> [2, 0, 1]"""
    place = {step: i for i, step in enumerate(sorted(steps))}
    return [place[step] for step in steps]


def entropies(loaded, processes, records):
    """What a model's entropies are on the base model's trajectories, and their KL (see against_base)."""
    kl = entropy = before = count = 0.0
    for i in range(0, len(records), diagnose.BATCH):
        batch = loading.batch_of(records[i : i + diagnose.BATCH], loaded, processes)
        h = baselines.entropies_when_decoded(objectives.replay(loaded.m, batch), batch)  # [B, N]
        base_h = objectives.in_decode_order(batch["entropy"], batch)  # [B, N]
        kl += baselines.boltzmann_kl(h, base_h).sum().item()
        entropy += h.sum().item()
        before += base_h.sum().item()
        count += h.numel()
    return dict(kl=kl / count, entropy=entropy / count, entropy_before=before / count)


def states(loaded, processes, records):
    """What a model expects at every step of its trajectories: a list, for some of them at a time, of the batch and of
    the log probabilities [B, K, V] of the masked positions at each step, and which of those are real, [B, K]."""
    found = []
    for i in range(0, len(records), diagnose.BATCH):
        batch = loading.batch_of(records[i : i + diagnose.BATCH], loaded, processes)
        found.append((batch, list(log_probs_by_step(loaded.m, batch))))
    return found


@torch.no_grad()
def log_probs_by_step(m, batch):
    """Yields the log probabilities of the masked positions at each decode step, and which of them are real."""
    for step in range(int(objectives.decode_steps(batch).max())):
        masked = objectives.masked_until(batch) >= step
        positions, real = objectives.select(masked, objectives.place_of(masked))
        yield objectives.log_probs(m, batch, objectives.decoded_before(batch, step), positions), real


def kl_to(before, loaded):
    """KL(before || now) of the next token's distribution, a mean over the masked positions of every step, nats. before:
    what `states` gave."""
    total = count = 0.0
    for batch, steps in before:
        for (was, real), (now, _) in zip(steps, log_probs_by_step(loaded.m, batch)):
            kl = (was.exp() * (was - now)).nan_to_num(0.0).sum(-1)  # a token that is never chosen has -inf in both
            total += kl[real].sum().item()
            count += real.sum().item()
    return total / count
