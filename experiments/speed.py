"""Speed and memory: ours, the plain way and the release's way, in one run.

    python -m experiments.speed                                   # a table, and a last line of JSON
    python -m experiments.speed --device cuda --dtype bfloat16
    python -m experiments.speed --batch-size 8 --new 256 --release    # only against the release's way

The plain way is what a straightforward script does: the logits of every position at every step,
softmax in float64 (LLaDA's decoder), a sort of the vocabulary at every masked position (Dream's),
and training losses from the logits of the whole sequence. The release's way is what the authors' own
code (tonyckc/TABOM) does, written anew: logits of every position in float32, copied once more to
shift Dream's; LLaDA's decoder logs the variance of the entropies at each step, Dream's sorts the
vocabulary and takes the most probable token; training takes softmax and log at every response
position, with adapters as PEFT computes them. All ways run the same transformer on the same prompts
for the same number of steps.

    a   a small model whose head costs the share of a forward pass that it costs in LLaDA-8B (7 %)
    b   the same body with the real vocabularies: 126,464 (LLaDA) and 152,064 (Dream)

Time and memory of each are measured in processes of their own; the memory is the peak above what the
process held with the weights loaded.

How to read the JSON. All ratios are of measurements of one run, so that a slow or busy machine
cancels out in part; on a machine that others use, only a factor means anything, not a tenth.

    outside_body_FAMILY     the share of our decoding step, on model a, that is not the transformer's
                            body: all that a better decoder could still save on a model of 8B
    decode_speedup_FAMILY   seconds of the plain way / seconds of ours, on model b: above 1, ours is
                            faster. The vocabulary is real there and the body small, so this is the
                            most that can be gained. On a model of 8B the body is most of a step in
                            all ways: the lines of model a in the table are closer to it
    train_speedup           the same of a training step; the smaller of both families
    decode_memory_ratio, train_memory_ratio
                            bytes of ours / bytes of the plain way, on model b: below 1, ours needs
                            less. The larger of both families
    decode_speedup_release_FAMILY, train_speedup_release_FAMILY,
    decode_memory_ratio_release_FAMILY, train_memory_ratio_release_FAMILY
                            as above, but against the release's way. Dream is decoded with the most
                            probable token there ("ours, greedy"), and with one drawn by chance
                            against the plain way
    same_tokens_FAMILY      the share of tokens of the release's way that ours decodes too, on model
                            b; near ties of random weights may fall either way

Dimensions: B batch, P prompt, N response, L = P + N, K masked positions, V vocabulary, W window.
"""

import argparse
import functools
import json
import math
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import decode
import lora
import model
import objectives
from experiments import cost

# --------------------------------------------------------------------------------------- the models

ROOT = Path(__file__).parent.parent
WIDTH, LAYERS, HEADS, MLP = 512, 8, 8, 1536
SIZES = {"a": dict(llada=3968, dream=3968), "b": dict(llada=126464, dream=152064)}  # ids of the vocabulary
PROMPT, WINDOW, RANK = 64, 32, 16
HEAD_STD = 0.2  # random weights with entropies like a trained model's (about 2 nats), not a flat distribution


def small(family, size, device, dtype):
    """A random model with the body of both sizes and the vocabulary of one of SIZES."""
    V = SIZES[size][family]
    special = dict(mask_token_id=V - 1, eos_token_id=V - 2, pad_token_id=V - 2)
    if family == "llada":
        shape = dict(d_model=WIDTH, n_layers=LAYERS, n_heads=HEADS, n_kv_heads=HEADS)
        shape.update(mlp_hidden_size=MLP, vocab_size=V, embedding_size=V)
        raw = cost.LLADA | shape | special
    else:
        shape = dict(hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS)
        shape.update(num_key_value_heads=2, intermediate_size=MLP, vocab_size=V)
        raw = cost.DREAM | shape | special
    m = model.create(raw, torch.Generator().manual_seed(0), dtype=dtype)
    torch.nn.init.normal_(m.head.weight, std=HEAD_STD, generator=torch.Generator().manual_seed(1))
    return m.to(device)


# ------------------------------------------------------------------------------------ the plain way


@torch.no_grad()
def plain_llada(m, prompt, new, steps, block_length):
    """LLaDA's decoder at temperature 0, straightforwardly: prompt [B, P] -> response [B, N]."""
    ids = torch.cat((prompt, prompt.new_full((len(prompt), new), m.config.mask_id)), dim=1)
    P, mask_id = prompt.shape[1], m.config.mask_id
    each = steps // (new // block_length)
    for end in range(P + block_length, P + new + 1, block_length):
        for i in range(each):
            masked = ids == mask_id
            logits = m(ids)  # [B, L, V]
            token = logits.argmax(-1)
            confidence = logits.double().softmax(-1).gather(-1, token[..., None])[..., 0]
            confidence[:, end:] = -torch.inf
            confidence = torch.where(masked, confidence, -torch.inf)
            quota = block_length // each + (i < block_length % each)
            best = confidence.topk(quota, dim=1).indices
            ids.scatter_(1, best, token.gather(1, best))
    return ids[:, P:]


@torch.no_grad()
def plain_dream(m, prompt, new, steps, temperature, top_p):
    """Dream's decoder with entropy as the score, straightforwardly: prompt [B, P] -> response [B,
    N]."""
    ids = torch.cat((prompt, prompt.new_full((len(prompt), new), m.config.mask_id)), dim=1)
    P, mask_id = prompt.shape[1], m.config.mask_id
    time_of = torch.linspace(1, 1e-3, steps + 1)
    for i in range(steps):
        masked = ids == mask_id
        p = plain_top_p(m(ids)[masked] / temperature, top_p)  # [K, V]
        token = torch.multinomial(p, 1)[:, 0]
        score = (p * torch.log(p + 1e-10)).sum(-1)
        count = masked.sum(1).float().mean()
        quota = int(count)  # the last step takes all that is left
        if i < steps - 1:
            quota = int(count * (1 - time_of[i + 1] / time_of[i]))
        if quota:
            all_scores = torch.full(ids.shape, -torch.inf, device=ids.device)
            all_scores[masked] = score.float()
            all_tokens = torch.full_like(ids, mask_id)
            all_tokens[masked] = token
            best = all_scores.topk(quota, dim=1).indices
            ids.scatter_(1, best, all_tokens.gather(1, best))
    return ids[:, P:]


def plain_top_p(logits, top_p):
    """What top_p leaves of the distribution of logits [K, V], by a sort of the vocabulary: [K, V]."""
    ranked, index = logits.sort(descending=True)
    removed = ranked.softmax(-1).cumsum_(-1) > top_p
    del ranked
    removed[:, 1:] = removed[:, :-1].clone()  # the token that crosses top_p stays
    removed[:, 0] = False
    removed = torch.zeros_like(removed).scatter_(-1, index, removed)
    del index
    return logits.masked_fill(removed, torch.finfo(logits.dtype).min).softmax(-1)


def plain_tabom(m, batch, start, window=32, margin=0.2):
    """Eq. 9 from the logits of the whole sequence -> scalar. start [B]: where the windows begin."""
    P = batch["prompt_ids"].shape[1]
    since = batch["order"] - start[:, None]  # [B, N], steps since the start of the window
    seen = batch["response_ids"].masked_fill(since >= 0, m.config.mask_id)
    ids = torch.cat((batch["prompt_ids"], seen), dim=1)  # [B, L]
    logp = m(ids)[:, P:].float().log_softmax(-1)  # [B, N, V]
    h = -(logp.exp() * logp).sum(-1)
    ce = -logp.gather(-1, batch["response_ids"][..., None])[..., 0]
    loss = 0
    for b in range(len(since)):
        steps, position = since[b].sort()
        inside = position[(steps >= 0) & (steps < window)]  # in decode order
        gap = h[b, inside][:, None] - h[b, inside][None] + margin
        pair = torch.ones_like(gap, dtype=torch.bool).triu(1)
        loss = loss + (ce[b, inside].mean() + gap[pair].clamp(min=0).mean()) / len(since)
    return loss


# ------------------------------------------------------------------------------ the release's way


def shifted_as_released(m, logits):
    """Logits [B, L, V] with the copy that shifts Dream's by a position, which our model never makes."""
    if m.config.shifted:
        return torch.cat((logits[:, :1], logits[:, 1:]), dim=1)
    return logits


@torch.no_grad()
def release_llada(m, prompt, new, steps, block_length):
    """The release's LLaDA decoder at temperature 0: prompt [B, P] -> response [B, N]. At each step it
    logs the variance of the entropies at the masked positions, for the TDS."""
    ids = torch.cat((prompt, prompt.new_full((len(prompt), new), m.config.mask_id)), dim=1)
    P, each, variances = prompt.shape[1], steps // (new // block_length), []
    response = ids[:, P:]  # a view
    for end in range(block_length, new + 1, block_length):
        for i in range(each):
            masked = response == m.config.mask_id  # [B, N]
            logits = m(ids).float()  # [B, L, V]
            token, score = logits.argmax(-1)[:, P:], torch.empty(response.shape, device=ids.device)
            for b in range(len(ids)):
                p = logits[b, P:].softmax(-1)  # [N, V]
                h = -(p * torch.log(p + 1e-10)).sum(-1)
                variances.append(h[masked[b]].var(unbiased=False))
                score[b] = p.gather(-1, token[b][:, None])[:, 0]
            score = score.masked_fill(~masked, -torch.inf)
            score[:, end:] = -torch.inf
            best = score.topk(block_length // each + (i < block_length % each), dim=1).indices
            response.scatter_(1, best, token.gather(1, best))
    return response


@torch.no_grad()
def release_dream(m, prompt, new, steps, temperature, top_p):
    """The release's Dream decoder, which takes the most probable token and scores it by the entropy
    after temperature and top_p: prompt [B, P] -> response [B, N]."""
    ids = torch.cat((prompt, prompt.new_full((len(prompt), new), m.config.mask_id)), dim=1)
    time_of = torch.linspace(1, 1e-3, steps + 1)
    for i in range(steps):
        masked = ids == m.config.mask_id
        logits = shifted_as_released(m, m(ids).float())  # [B, L, V]
        p = plain_top_p(logits[masked] / temperature, top_p)  # [K, V]
        score, token = torch.full(ids.shape, -torch.inf, device=ids.device), ids.clone()
        token[masked] = p.argmax(-1)
        score[masked] = (p * torch.log(p + 1e-10)).sum(-1)
        count = int(masked[0].sum())  # the same in every row
        quota = count  # the last step takes all that is left
        if i < steps - 1:
            quota = int(count * (1 - time_of[i + 1] / time_of[i]))
        best = score.argsort(dim=1, descending=True, stable=True)[:, :quota]  # of equal ones the leftmost
        ids.scatter_(1, best, token.gather(1, best))
    return ids[:, prompt.shape[1] :]


def release_tabom(m, batch, start, window=WINDOW, margin=0.2):
    """The release's loss -> scalar: softmax and log at every response position, and then the tokens of
    the window, over which the cross-entropy is a mean in the whole batch. start [B]."""
    P, target = batch["prompt_ids"].shape[1], batch["response_ids"]
    since = batch["order"] - start[:, None]  # [B, N]
    ids = torch.cat((batch["prompt_ids"], target.masked_fill(since >= 0, m.config.mask_id)), dim=1)
    logits = shifted_as_released(m, m(ids).float())[:, P:]  # [B, N, V]
    inside = (since >= 0) & (since < window)
    label = target.masked_fill(~inside, -100)  # ignored, but only after the log of all of them
    ce = F.cross_entropy(logits.flatten(0, 1), label.flatten(), ignore_index=-100)
    p = logits.softmax(-1)  # [B, N, V]
    h = -(p * torch.log(p + 1e-10)).sum(-1)  # [B, N]
    ranking = []
    for b in range(len(ids)):
        ordered = h[b, inside[b]][since[b, inside[b]].argsort()]  # [W], in decode order
        gap = ordered[:, None] - ordered[None] + margin
        pair = torch.ones_like(gap, dtype=torch.bool).triu(1)
        ranking.append(gap[pair].clamp(min=0).mean())
    return ce + torch.stack(ranking).mean()


class PlainLoRA(nn.Module):
    """An adapter as PEFT computes it: lora_B(lora_A(dropout(x))) * scaling, added to the base layer."""

    def __init__(self, base, rank=RANK, alpha=RANK, dropout=0.0):
        super().__init__()
        self.base, self.scaling = base, alpha / rank
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        where = dict(device=base.weight.device, dtype=torch.float32)
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, **where)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, **where)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x):
        y = self.base(x)
        z = self.lora_B(self.lora_A(self.dropout(x.to(self.lora_A.weight.dtype)))) * self.scaling
        return (y + z).to(y.dtype)


def plain_adapters(m, rank=RANK, alpha=RANK):
    """Freeze m and put a PlainLoRA on every q_proj and v_proj, in place."""
    m.requires_grad_(False)
    for block in m.layers:
        for name in ("q_proj", "v_proj"):
            setattr(block.attn, name, PlainLoRA(getattr(block.attn, name), rank, alpha))


# ------------------------------------------------------------------------------------- measurements


def sync(device):
    """Wait until a GPU has done what it was told."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def resident():
    """Bytes that this process holds now. From here on the peak counts anew, on Linux."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return peak_resident()


def peak_resident():
    """The most bytes that this process has held; on Linux, since resident() was called last."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Memory:
    """peak() is the most that this process, or its GPU, has held above what it holds now, in bytes."""

    def __init__(self, device):
        self.cuda = device.startswith("cuda")
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            self.before = resident()

    def peak(self):
        now = torch.cuda.max_memory_allocated() if self.cuda else peak_resident()
        return max(0, now - self.before)


class Body:
    """Seconds that a model spends up to its final norm: embedding and blocks."""

    def __init__(self, m, device):
        self.seconds, self.device = 0.0, device
        m.register_forward_pre_hook(self.start)
        m.norm.register_forward_pre_hook(self.stop)

    def start(self, *_):
        sync(self.device)
        self.begun = time.perf_counter()

    def stop(self, *_):
        sync(self.device)
        self.seconds += time.perf_counter() - self.begun


def measure(kind, family, size, way, device, dtype, steps, batch_size, new, repeat):
    """Measure one way of decoding or training on one model `repeat` times -> a dict of the fastest:
    seconds of a step, outside (the share of it outside the body), tokens_per_second, memory (the
    peak in bytes) and response.

    kind: decode or train. way: one of WAYS. outside and response are None in training."""
    m = small(family, size, device, model.DTYPES[dtype])
    g = torch.Generator().manual_seed(2)
    prompt = torch.randint(0, 1000, (batch_size, PROMPT), generator=g).to(device)
    if kind == "train":
        call, tokens = step_of(m, prompt, new, way, g), batch_size * (PROMPT + new)
        call()  # warm up: libraries set up buffers of their own, which are not ours
        found = fastest(m, device, repeat, call, calls=2)
        return dict(found, tokens_per_second=tokens / found["seconds"], outside=None, response=None)
    call = functools.partial(decoder_of(family, new, way), m, prompt)
    call(steps=new // 32)  # one for each block of LLaDA
    found = fastest(m, device, repeat, functools.partial(call, steps=steps))
    found["tokens_per_second"] = batch_size * new / found["seconds"]
    return dict(found, seconds=found["seconds"] / steps, response=found["response"].tolist())


def fastest(m, device, repeat, call, calls=1):
    """Make some calls, `repeat` times -> a dict of the fastest time: seconds of a call, outside and
    response as in measure(), and memory, the peak of all times."""
    sync(device)
    memory, body, best = Memory(device), Body(m, device), dict(seconds=math.inf)
    for _ in range(repeat):
        body.seconds, begun = 0.0, time.perf_counter()
        for _ in range(calls):
            response = call()
        sync(device)
        seconds = time.perf_counter() - begun
        if seconds / calls < best["seconds"]:
            outside = 1 - body.seconds / seconds
            best = dict(seconds=seconds / calls, outside=outside, response=response)
    return dict(best, memory=memory.peak())


def decoder_of(family, new, way):
    """A function of a model, prompts [B, P] and steps that decodes `new` tokens in one way."""
    blocks, nucleus = dict(block_length=32), dict(temperature=0.1, top_p=0.9)
    rivals = dict(
        llada=dict(plain=(plain_llada, blocks), release=(release_llada, blocks)),
        dream=dict(plain=(plain_dream, nucleus), release=(release_dream, nucleus)),
    )
    if way in rivals[family]:
        function, options = rivals[family][way]
        return functools.partial(function, new=new, **options)
    own = dict(strategy="entropy", schedule="dream", greedy=way == GREEDY, **nucleus)
    if family == "llada":
        own = dict(strategy="confidence", schedule="llada", **blocks)

    def ours(m, prompt, steps):
        g = [torch.Generator(prompt.device).manual_seed(b) for b in range(len(prompt))]
        return decode.generate(m, prompt, max_new_tokens=new, steps=steps, generator=g, **own).response

    return ours


def step_of(m, prompt, new, way, g):
    """A function that makes a TABOM step on as many examples as there are prompts, with `new` tokens
    each: forward, backward, AdamW on a LoRA."""
    if way == "release":
        plain_adapters(m)
    else:
        lora.inject(m, rank=RANK, alpha=RANK)
    weights = [p for p in m.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4)
    B, device = len(prompt), prompt.device
    response = torch.randint(0, 1000, (B, new), generator=g)
    order = [torch.randperm(new, generator=g) for _ in range(B)]
    batch = dict(
        prompt_ids=prompt,
        prompt_mask=torch.ones_like(prompt),
        response_ids=response.to(device),
        order=torch.stack(order).to(device),
        length=torch.full((B,), new, device=device),
    )
    start = torch.linspace(0, new - WINDOW, B, device=device).long()

    def ours():
        return objectives.tabom(m, batch, WINDOW, start=start)["loss"]

    losses = dict(ours=ours)
    for name, loss in dict(plain=plain_tabom, release=release_tabom).items():
        losses[name] = functools.partial(loss, m, batch, start)

    def step():
        losses[way]().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


# ----------------------------------------------------------------------------------- the comparison

FAMILIES = ("llada", "dream")
WAYS = ("ours", "plain", "release")
GREEDY = "ours, greedy"
CASES = [("decode", family, size) for size in SIZES for family in FAMILIES]
CASES += [("train", family, "b") for family in FAMILIES]


def ways_of(kind, family):
    """The ways in which a case is measured."""
    return (*WAYS, GREEDY) if (kind, family) == ("decode", "dream") else WAYS


def compared(kind, family):
    """Our way that is compared with the release's, and that."""
    return GREEDY if GREEDY in ways_of(kind, family) else "ours", "release"


def bench(c):
    """Every case in every way -> the ratios. Prints a table."""
    found = {}
    for case in CASES:
        for way in ways_of(*case[:2]):
            if not c.release or (case[-1] == "b" and way in compared(*case[:2])):
                found[*case, way] = worker(c, *case, way)
    print(speed_table(found))
    result = ratios_to_release(found) if c.release else ratios(found)
    for name, value in result.items():
        result[name] = round(value, 4)
    return result


def ratios(found):
    """The ratios that the docstring above explains. found: {(*case, way): measurement}."""
    result, memory, speed = {}, {"decode": [], "train": []}, []
    for family in FAMILIES:
        result[f"outside_body_{family}"] = found["decode", family, "a", "ours"]["outside"]
    for family in FAMILIES:
        ours, plain = found["decode", family, "b", "ours"], found["decode", family, "b", "plain"]
        result[f"decode_speedup_{family}"] = plain["seconds"] / ours["seconds"]
        memory["decode"].append(ours["memory"] / plain["memory"])
        ours, plain = found["train", family, "b", "ours"], found["train", family, "b", "plain"]
        speed.append(plain["seconds"] / ours["seconds"])
        memory["train"].append(ours["memory"] / plain["memory"])
    result["decode_memory_ratio"] = max(memory["decode"])
    result["train_speedup"] = min(speed)
    result["train_memory_ratio"] = max(memory["train"])
    return result | ratios_to_release(found)


def ratios_to_release(found):
    """Those of the release's way and ours: see ratios()."""
    result = {}
    for kind in ("decode", "train"):
        for family in FAMILIES:
            ours, release = (found[kind, family, "b", way] for way in compared(kind, family))
            result[f"{kind}_speedup_release_{family}"] = release["seconds"] / ours["seconds"]
            result[f"{kind}_memory_ratio_release_{family}"] = ours["memory"] / release["memory"]
            if kind == "decode":
                same = torch.tensor(ours["response"]) == torch.tensor(release["response"])
                result[f"same_tokens_{family}"] = same.float().mean().item()
    return result


def worker(c, kind, family, size, way, **changes):
    """measure() in processes of their own: one for the time, on a CPU another for the memory.

    Raises RuntimeError with its last words if one fails."""
    case = dict(kind=kind, family=family, size=size, way=way)
    settings = dict(device=c.device, dtype=c.dtype, steps=c.steps, batch_size=c.batch_size, new=c.new)
    settings = {**case, **settings, "repeat": c.repeat, **changes}
    # glibc gives pieces above the threshold back when they are freed. The largest that it allows keeps
    # activations for the next step; with a small one the peak is what was in use, but each step is slower.
    found = process(c, settings, threshold=2**25)
    if not c.device.startswith("cuda"):
        few = dict(steps=settings["new"] // 32, repeat=1)  # the first steps need the most
        found["memory"] = process(c, settings | few, threshold=2**20)["memory"]
    print(f"{kind} {family} {size} {way}: {found['seconds']:.3f} s", file=sys.stderr)
    return found


def process(c, settings, threshold):
    """measure(**settings) in a process with this threshold of its memory, in bytes."""
    command = [sys.executable, "-m", "experiments.speed", "--worker", json.dumps(settings)]
    env = {**os.environ, "OMP_NUM_THREADS": str(c.threads)}
    env.update(MALLOC_MMAP_THRESHOLD_=str(threshold), MALLOC_TRIM_THRESHOLD_=str(8 * threshold))
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["killed"]
        raise RuntimeError(f"{settings}: {said[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def speed_table(found):
    """A line for each measurement."""
    columns = (
        "| | vocabulary | way | s per step | outside the body % | tokens per s | peak memory above the weights, MB |"
    )
    lines = [columns, "| --- | --- | --- | --- | --- | --- | --- |"]
    for (kind, family, size, way), r in found.items():
        outside = ""
        if r["outside"] is not None:
            outside = f"{100 * r['outside']:.1f}"
        cells = [f"{kind}, {family}", str(SIZES[size][family]), way, f"{r['seconds']:.3f}", outside]
        cells += [f"{r['tokens_per_second']:.1f}", f"{r['memory'] / 1e6:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------- command line


def command_line():
    """The parser of this command."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.speed", description=__doc__.split("\n")[0], allow_abbrev=False
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or mps")
    parser.add_argument("--dtype", default="float32", choices=tuple(model.DTYPES))
    parser.add_argument("--steps", type=int, default=8, help="steps in which all tokens are decoded")
    parser.add_argument("--new", type=int, default=128, help="response tokens, a multiple of 32")
    parser.add_argument("--batch-size", type=int, default=4, help="prompts decoded, or examples trained on, together")
    parser.add_argument("--repeat", type=int, default=1, help="measure so often and take the fastest")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--release", action="store_true", help="only against the release's way, on model b")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser


def main(argv=None):
    """The command line -> exit status."""
    c = command_line().parse_args(argv)
    try:
        for name, value in vars(c).items():
            if type(value) is int and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} {value}: must be above 0")
        result = measure(**json.loads(c.worker)) if c.worker else bench(c)
    except (ValueError, OSError, RuntimeError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
