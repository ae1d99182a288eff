"""What TABOM is compared with, in objectives.py: transition, traj, T3D, dParallel and the NELBO against plain loops and
their expectations by enumeration.

python -m pytest tests/test_baselines.py
"""

import itertools
import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_objectives import (
    base_of,
    close,
    combined,
    fits,
    generators,
    log_p,
    make_batch,
    mean,
    naive_tabom,
    needs,
    number,
    quick,
    single,
    some_batches,
)

import baselines
import lora
import objectives

# ------------------------------------------------------------------------------------- random states: traj and T3D


@quick
@given(some_batches)
def test_traj_asks_for_all_that_is_masked_in_a_reachable_state(toy, spec):
    lengths, seed = spec
    batch, m = make_batch(lengths, seed), toy()
    seeds = range(seed, seed + len(lengths))
    states = baselines.draw_state(batch["length"], generator=generators(*seeds)).tolist()
    out = baselines.traj(m, batch, generator=generators(*seeds))
    ((ids, _, positions),) = m.calls
    P = batch["prompt_ids"].shape[1]
    for b, (n, t) in enumerate(zip(lengths, states)):
        assert 0 <= t < n  # never empty
        order = batch["order"][b, :n].tolist()
        masked = [order.index(k) for k in range(t, n)]
        assert (positions[b, : n - t] - P).tolist() == masked
        assert sorted(masked) == [r for r in range(n) if ids[b, P + r] == m.config.mask_id]
        alone = baselines.draw_state(torch.tensor([n]), generator=generators(seeds[b]))
        assert alone.tolist() == [t]  # without the others
    rows = [naive_tabom(m, single(batch, b), t, n - t, 0.2) for b, (n, t) in enumerate(zip(lengths, states))]
    close(out, combined(rows, 0.0))


def test_states_are_uniform_and_traj_averages_over_them(toy):
    drawn = baselines.draw_state(torch.full((6000,), 5), generator=generators(0)[0])
    assert fits(Counter(drawn.tolist()), range(5), 6000)
    m, batch = toy(), make_batch([5] * 400, seed=1)
    batch = {k: v[:1].expand(400, -1) if v.dim() > 1 else v for k, v in batch.items()}  # one response, 400 times
    exact = sum(naive_tabom(m, single(batch, 0), t, 5 - t, 0.2)["ce"] for t in range(5)) / 5
    average = sum(number(baselines.traj(m, batch, generator=generators(s)[0])["ce"]) for s in range(20)) / 20
    assert average == pytest.approx(exact, abs=0.05)
    start = torch.arange(400) % 5  # each state equally often: no chance left
    close(baselines.traj(m, batch, start=start), dict(ce=exact))


def test_transition_averages_over_all_pairs_of_timesteps(toy):
    """Enumeration: every pair of timesteps once is the exact expectation of what is drawn uniformly."""
    m, one = toy(), make_batch([5], seed=2)
    pairs = list(itertools.combinations(range(6), 2))
    exact = sum(naive_tabom(m, single(one, 0), a, b - a, 0.2)["ce"] for a, b in pairs) / len(pairs)
    batch = {k: v.expand(len(pairs), *v.shape[1:]) for k, v in one.items()}
    close(baselines.transition(m, batch, start=torch.tensor(pairs)), dict(ce=exact))
    batch = {k: v.expand(4000, *v.shape[1:]) for k, v in one.items()}
    drawn = baselines.transition(m, batch, generator=generators(0)[0])
    assert number(drawn["ce"]) == pytest.approx(exact, rel=0.05)


def test_traj_from_nothing_is_the_transition_over_the_whole_response(toy):
    batch = make_batch([8, 5])
    traj = baselines.traj(toy(), batch, start=torch.tensor([0, 0]))
    close(baselines.transition(toy(), batch, start=torch.tensor([[0, 8], [0, 5]])), traj, 1e-6)


@pytest.mark.parametrize("start", [[-1, 0], [8, 0], [0, 5]])
def test_states_refuse_an_impossible_start(toy, start):
    for objective in (objectives.OBJECTIVES["traj"], objectives.OBJECTIVES["t3d"]):
        with pytest.raises(ValueError, match="leave no target"):
            objective.loss(toy(), make_batch([8, 5]), start=torch.tensor(start), **needs(objective, toy()))


def naive_t3d(m, reference, row, t, alpha, beta, path_weight, preference="ddo", reduction="mean"):
    """Formulas of the docstring for one row, in float64 and loops."""
    order, response = row["order"][0].tolist(), row["response_ids"][0].tolist()
    n, visible = len(order), [r for r, k in enumerate(order) if k < t]
    p, q = log_p(m, row, visible), log_p(reference, row, visible)
    targets = [r for r in range(n) if order[r] >= t]
    fake = {r: int(q[r].argmax()) for r in targets}
    count = len(targets) if reduction == "mean" else 1
    d_real = sum(float(p[r, response[r]] - q[r, response[r]]) for r in targets) / count
    d_fake = sum(float(p[r, fake[r]] - q[r, fake[r]]) for r in targets) / count
    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    ddo = -math.log(sigmoid(beta * d_real)) - alpha * math.log(1 - sigmoid(beta * d_fake))
    path = sum(-(n - order[r]) / n * float(p[r, response[r]]) for r in targets) / count
    ce = sum(-float(p[r, response[r]]) for r in targets)
    if preference == "none":
        return dict(loss=ce / count + path_weight * path, path=path, ce=ce / len(targets))
    return dict(loss=ddo + path_weight * path, ddo=ddo, path=path, ce=ce / len(targets))


FORMS = ("ddo", "none"), ("mean", "sum")  # preference, reduction


@quick
@given(some_batches, st.floats(0, 1), st.floats(0, 2), st.floats(0, 2), *map(st.sampled_from, FORMS))
def test_t3d_is_the_mean_of_its_rows_in_plain_loops(toy, spec, alpha, beta, path_weight, preference, reduction):
    lengths, seed = spec
    batch, m, reference = make_batch(lengths, seed), toy(), toy(seed=1)
    states = baselines.draw_state(batch["length"], generator=generators(seed)[0]).tolist()
    options = dict(alpha=alpha, beta=beta, path_weight=path_weight, preference=preference, reduction=reduction)
    out = baselines.t3d(m, batch, reference=reference, generator=generators(seed)[0], **options)
    rows = [naive_t3d(m, reference, single(batch, b), t, **options) for b, t in enumerate(states)]
    close(out, mean(rows))


def test_t3d_with_beta_0_has_no_gradient_from_the_preference(golden):
    m = lora.load(golden.load(), golden.folder / "adapter")
    batch, start = make_batch([8, 5], vocab=300), torch.tensor([3, 0])
    out = baselines.t3d(m, batch, beta=0.0, start=start, reference=base_of(m))
    assert number(out["ddo"]) == pytest.approx(1.5 * math.log(2))
    alone = baselines.t3d(m, batch, beta=0.0, path_weight=0.0, start=start, reference=base_of(m))
    alone["loss"].backward()
    assert all(p.grad is None or not p.grad.any() for p in lora.tensors(m).values())
    out["loss"].backward()
    assert all(p.grad.any() for p in lora.tensors(m).values())


def test_t3d_without_preference_path_and_random_tokens_is_naive_distillation(toy):
    """And it asks no reference."""
    batch, start = make_batch([8, 5, 1]), torch.tensor([3, 0, 0])
    out = baselines.t3d(toy(), batch, start=start, preference="none", path_weight=0.0, random_tokens=0)
    close(baselines.traj(toy(), batch, start=start), dict(loss=out["loss"], ce=out["ce"]), 1e-5)
    assert "ddo" not in out
    entry, parameters = objectives.OBJECTIVES["t3d"], dict(preference="none", path="linear", fake="argmax")
    assert entry.reference(toy(), None, parameters) is None
    assert entry.check(dict(parameters, reduction="mean")) == ("alpha", "beta", "fake", "reference_steps")


@pytest.mark.parametrize("preference", ["ddo", "none"])
@pytest.mark.parametrize("path_weight", [0.0, 0.2])
@pytest.mark.parametrize("random_tokens", [0.0, 0.9])
def test_the_cells_of_t3ds_ablation(toy, preference, path_weight, random_tokens):
    """Its Tables 5 to 7: naive TD or DDO, each alone, + path, + random, + both."""
    batch, m, reference = make_batch([8, 5, 9]), toy(), toy(seed=1)
    m.config.vocab_size, m.training = 12, True
    options = dict(preference=preference, path_weight=path_weight, random_tokens=random_tokens)
    out = baselines.t3d(m, batch, reference=reference, generator=generators(1, 2, 3), **options)
    alone = out["ce"] if preference == "none" else out["ddo"]
    close(out, dict(loss=alone + path_weight * out["path"]), 1e-6)
    ((ids, _, positions),) = m.calls
    shown = ids.gather(1, positions)  # at the targets, and for shorter rows elsewhere
    assert ((shown != m.config.mask_id).sum() > 8) == (random_tokens > 0)
    assert len(reference.calls) == (preference == "ddo")


def test_a_row_without_a_target_gives_t3d_no_gradient(toy):
    """A mask is given, and nothing of one row was decoded."""
    batch, table, added = make_batch([4, 3]), toy(), torch.zeros(13, requires_grad=True)
    batch["order"][1] = -1

    def m(ids, attention_mask=None, positions=None):
        return table(ids, attention_mask, positions) + added

    m.config, found = table.config, []
    for rows in (batch, {name: x[:1] for name, x in batch.items()}):
        mask = torch.ones_like(rows["order"], dtype=torch.bool)
        out = baselines.t3d(m, rows, reference=toy(seed=1), mask=mask, random_tokens=0)
        found.append(torch.autograd.grad(out["loss"], added)[0])
    assert found[1].any()
    torch.testing.assert_close(2 * found[0], found[1])


def test_the_fakes_of_t3d_are_drawn_from_the_reference(toy):
    """A response of one token, many times: the tokens have the probabilities of the reference, and the loss its mean
    over them."""
    m, reference, n, V = toy(scale=0.5), toy(seed=1, scale=0.5), 4000, 12
    one = make_batch([1])
    batch = {key: value.expand(n, -1) if value.dim() > 1 else value.expand(n) for key, value in one.items()}
    p, q = (log_p(each, single(one, 0), [])[0] for each in (m, reference))  # [V + 1], the last one never
    token = baselines.preference.draw_tokens(q.float().expand(n, 1, -1), torch.ones(n, 1).bool(), generators(0)[0])
    counts = torch.bincount(token[:, 0], minlength=V + 1)
    expected = n * q.exp()
    assert counts[V] == 0 and expected[:V].min() > 5
    statistic = float(((counts - expected)[:V] ** 2 / expected[:V]).sum())
    assert abs(statistic - (V - 1)) < 5 * math.sqrt(2 * (V - 1))
    options = dict(alpha=0.8, beta=0.7, random_tokens=0, reference=reference, fake="sample")
    real = int(one["response_ids"][0, 0])
    fakes = -torch.nn.functional.logsigmoid(-0.7 * (p - q))
    exact = float((q.exp() * fakes)[:V].sum() * 0.8 - torch.nn.functional.logsigmoid(0.7 * (p - q))[real])
    found = number(baselines.t3d(m, batch, generator=generators(1)[0], **options)["ddo"])
    spread = float((q.exp() * fakes**2)[:V].sum() - (q.exp() * fakes)[:V].sum() ** 2) ** 0.5
    assert found == pytest.approx(exact, abs=4 * 0.8 * spread / math.sqrt(n) + 1e-5)


def test_the_fakes_of_a_row_do_not_depend_on_the_others(toy):
    batch, m, reference = make_batch([9, 3, 6]), toy(), toy(seed=1, scale=0.3)
    options = dict(reference=reference, fake="sample", reduction="sum")
    together = baselines.t3d(m, batch, generator=generators(1, 2, 3), **options)
    rows = []
    for b, g in enumerate(generators(1, 2, 3)):
        rows.append(baselines.t3d(m, single(batch, b), generator=g, **options))
    close(together, mean(rows), 1e-4)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(preference="dpo"), "preference 'dpo' is neither 'ddo' nor 'none'"),
        (dict(fake="best"), "fake 'best' is neither 'argmax' nor 'sample'"),
        (dict(reduction="max"), "reduction 'max' is neither 'mean' nor 'sum'"),
        (dict(path="levels", reduction="sum"), "reduction 'sum' needs path 'linear'"),
    ],
    ids=str,
)
def test_t3d_refuses(toy, options, message):
    with pytest.raises(ValueError, match=message):
        baselines.t3d(toy(), make_batch([8, 5]), reference=toy(), **options)


def test_t3d_shows_random_tokens_in_training_only(toy):
    batch, m, reference = make_batch([9] * 300), toy(), toy(seed=1)
    m.config.vocab_size = 13
    P, mask_id = batch["prompt_ids"].shape[1], m.config.mask_id
    start = torch.full((300,), 4)
    seeds = range(300)
    baselines.t3d(m, batch, start=start, reference=reference, generator=generators(*seeds))
    m.training = True
    baselines.t3d(m, batch, start=start, reference=reference, generator=generators(*seeds))
    (clean, *_), (noisy, _, asked) = m.calls
    assert all(torch.equal(a[0], b[0]) for a, b in zip(m.calls, reference.calls))  # both see the same
    hidden = clean[:, P:] == mask_id
    assert torch.equal(clean[:, P:][~hidden], noisy[:, P:][~hidden])  # what is decoded stays as it is
    assert asked.shape == (300, 5)  # and all that is not is still a target
    changed = noisy[:, P:][hidden] != mask_id
    assert 0.05 < changed.float().mean() < 0.13  # 0.1 times 12 of 13 tokens, of 1,500
    assert set(noisy[:, P:][hidden].tolist()) == set(range(13))
    alone = toy()
    alone.config.vocab_size, alone.training = 13, True
    baselines.t3d(alone, single(batch, 7), start=start[:1], reference=reference, generator=generators(7))
    assert torch.equal(alone.calls[0][0][0, -9:], noisy[7, P:])  # a row's noise does not depend on its batch


# ---------------------------------------------------------------------------------------------- T3D's reference


def test_a_reference_is_the_model_as_it_was(golden):
    ids = torch.arange(12).reshape(1, 12)
    base = golden.load()(ids)
    m = lora.load(golden.load(), golden.folder / "adapter").train()
    for layer in lora.layers(m).values():
        layer.dropout = 0.5  # does not act in the reference
    reference = baselines.Reference(m)
    assert torch.equal(reference(ids), base)
    reference.update()
    before = reference(ids)
    torch.testing.assert_close(before, lora.load(golden.load(), golden.folder / "adapter")(ids))
    with torch.no_grad():
        for p in lora.tensors(m).values():
            p.add_(1)
    assert torch.equal(reference(ids), before) and not torch.equal(m.eval()(ids), before)
    assert not reference(ids).requires_grad and m(ids).requires_grad
    assert m.train().training and reference(ids) is not None and m.training
    reference.update()
    assert torch.equal(reference(ids), m.eval()(ids))


def test_a_reference_holds_one_adapter_and_no_base(golden):
    m = lora.load(golden.load(), golden.folder / "adapter")
    reference = baselines.Reference(m)
    for _ in range(3):
        reference.update()
    adapter = sum(p.numel() for p in lora.tensors(m).values())
    assert sum(p.numel() for p in reference.kept.values()) == adapter < sum(p.numel() for p in m.parameters()) / 4
    with pytest.raises(ValueError, match="needs an adapter on the model, or load="):
        baselines.Reference(golden.load())


def test_a_reference_of_a_student_without_an_adapter_is_a_second_model(golden):
    ids = torch.arange(1, 9)[None]
    student, base = golden.load().train().requires_grad_(True), golden.load()(ids)
    reference = baselines.Reference(student, golden.load)
    with torch.no_grad():
        for p in student.parameters():
            p.mul_(1.1)
    assert torch.equal(reference(ids), base) and not reference.kept
    reference.update()
    now = student.eval()(ids)
    with torch.no_grad():
        for p in student.parameters():
            p.mul_(1.1)
    assert torch.equal(reference(ids), now) and not torch.equal(student(ids), now)
    assert not reference(ids).requires_grad and student(ids).requires_grad
    other = baselines.Reference(student, golden.load)
    other.restore(reference.kept)
    assert torch.equal(other(ids), now)


def test_the_student_becomes_the_reference_every_few_steps(golden):
    m = lora.load(golden.load(), golden.folder / "adapter")
    reference = objectives.OBJECTIVES["t3d"].reference(m, None, dict(reference_steps=3, preference="ddo"))
    kept = []
    for step in range(1, 8):
        reference.step_done(step)
        kept.append(bool(reference.kept))
        reference.kept = {}
    assert kept == [False, False, True, False, False, True, False]


# -------------------------------------------------------------------------------------------------- dParallel


def naive_dparallel(m, row, block, mask, block_length, weight, temperature):
    """One row, loops, float64; mask: what the first of the two passes hides inside the block."""
    response = row["response_ids"][0].tolist()
    n, begin = len(response), block * block_length
    inside = range(begin, min(begin + block_length, n))
    passes = []
    for hidden in ([r for r in inside if mask[r]], [r for r in inside if not mask[r]]):
        if hidden:
            logp = log_p(m, row, [r for r in range(inside.stop) if r not in hidden])
            ce = sum(-float(logp[r, response[r]]) for r in hidden) / len(hidden)
            right = [r for r in hidden if int(logp[r].argmax()) == response[r]]
            h = 0.0
            for r in right:
                p = (logp[r] / temperature).softmax(-1)
                h -= float((p * p.log()).sum()) / len(right)
            passes.append(dict(loss=ce + weight * h, ce=ce, certainty=h, right=len(right) / len(hidden)))
    return mean(passes)


@quick
@given(some_batches, st.integers(1, 5), st.floats(0, 3))
def test_dparallel_is_the_mean_of_its_rows_in_plain_loops(toy, spec, block_length, weight):
    lengths, seed = spec
    batch, m = make_batch(lengths, seed), toy()
    asked = m(batch["prompt_ids"])  # some answers as the model would give them, so that some are right
    batch["response_ids"][:, :1] = asked.argmax(-1)[:, -1:]
    g = generators(seed)[0]
    block = [int(torch.randint(0, (n - 1) // block_length + 1, (), generator=g)) for n in lengths]
    mask = torch.rand(batch["response_ids"].shape, generator=g) < 0.5
    options = dict(block_length=block_length, weight=weight, temperature=0.5)
    out = baselines.dparallel(m, batch, block=block, mask=mask, **options)
    rows = [naive_dparallel(m, single(batch, b), block[b], mask[b].tolist(), **options) for b in range(len(lengths))]
    close(out, mean(rows))


@quick
@given(some_batches, st.integers(1, 5))
def test_dparallel_draws_a_block_and_two_complementary_masks(toy, spec, block_length):
    lengths, seed = spec
    batch, m = make_batch(lengths, seed), toy()
    seeds = range(seed, seed + len(lengths))
    baselines.dparallel(m, batch, block_length=block_length, generator=generators(*seeds))
    P = batch["prompt_ids"].shape[1]
    first, second = (ids[:, P:] == m.config.mask_id for ids, _, _ in m.calls)
    for b, n in enumerate(lengths):
        one, two = first[b, :n], second[b, :n]
        after = (one & two).int()
        begin = int((one | two).int().argmax())
        end = int(after.argmax()) if after.any() else n
        assert begin % block_length == 0 or begin == end  # everything before the block is visible
        assert end == min(begin + block_length, n)
        assert not (one & two)[:end].any() and (one | two)[begin:].all()  # a half each; all after it is masked
        alone = toy()
        baselines.dparallel(alone, single(batch, b), block_length=block_length, generator=generators(seeds[b]))
        assert torch.equal(alone.calls[0][0][0, -n:] == m.config.mask_id, one)


def test_dparallel_blocks_and_masks_are_uniform(toy):
    m, batch = toy(), make_batch([6] * 2000)
    baselines.dparallel(m, batch, block_length=2, generator=generators(0)[0])
    hidden = (m.calls[0][0][:, 4:] == m.config.mask_id).int()
    counts = Counter(map(tuple, hidden.tolist()))
    outcomes = [(0,) * b + inside + (1,) * (4 - b) for b in (0, 2, 4) for inside in itertools.product((0, 1), repeat=2)]
    equal = {o: outcomes.count(o) for o in outcomes}  # (0, 0, 1, 1, 1, 1) comes from two blocks
    expected = {o: 2000 * times / len(outcomes) for o, times in equal.items()}
    assert set(counts) <= set(expected)
    statistic = sum((counts[o] - e) ** 2 / e for o, e in expected.items())
    degrees = len(expected) - 1
    assert abs(statistic - degrees) < 5 * math.sqrt(2 * degrees)


def test_dparallel_averages_over_all_blocks_and_masks(toy):
    m, one = toy(), make_batch([6], seed=2)
    options = dict(block_length=2, weight=1.0, temperature=0.5)
    states = [(b, mask) for b in range(3) for mask in itertools.product([False, True], repeat=6)]
    exact = mean([naive_dparallel(m, single(one, 0), b, mask, **options) for b, mask in states])
    batch = {k: v.expand(len(states), *v.shape[1:]) for k, v in one.items()}
    blocks, masks = [b for b, _ in states], torch.tensor([mask for _, mask in states])
    close(baselines.dparallel(m, batch, block=blocks, mask=masks, **options), exact)
    batch = {k: v.expand(3000, *v.shape[1:]) for k, v in one.items()}
    drawn = baselines.dparallel(m, batch, generator=generators(0)[0], **options)
    assert number(drawn["loss"]) == pytest.approx(exact["loss"], rel=0.05)


def test_dparallel_with_weight_0_is_its_cross_entropy(toy):
    batch = make_batch([8, 5])
    out = baselines.dparallel(toy(), batch, weight=0.0, block_length=4, generator=generators(0)[0])
    assert number(out["loss"]) == number(out["ce"])
    # a block as long as the response, everything hidden at once: the transition from nothing to all of it
    everything = dict(block=[0, 0], mask=torch.ones(2, 8, dtype=torch.bool), weight=0.0)
    whole = baselines.transition(toy(), batch, start=torch.tensor([[0, 8], [0, 5]]))
    close(baselines.dparallel(toy(), batch, **everything), dict(loss=whole["loss"]), 1e-5)


def test_certainty_lowers_the_entropy_of_right_answers_only(toy):
    m, batch = toy(), make_batch([1])
    best = int(m(torch.cat((batch["prompt_ids"], torch.tensor([[m.config.mask_id]])), 1))[0, -1].argmax())
    batch["response_ids"][0, 0], batch["prompt_mask"][:] = best, 1
    assert number(baselines.dparallel(m, batch, generator=generators(0)[0])["certainty"]) > 0
    batch["response_ids"][0, 0] = (best + 1) % 12
    assert number(baselines.dparallel(m, batch, generator=generators(0)[0])["certainty"]) == 0


def test_dparallel_refuses_a_block_behind_the_response(toy):
    with pytest.raises(ValueError, match=r"blocks \[4, 8\] of 4 begin beyond the end of responses of \[8, 5\]"):
        baselines.dparallel(toy(), make_batch([8, 5]), block_length=4, block=[1, 2])


# -------------------------------------------------------------------------------------------------- Eq. 1, the NELBO


def exact_probability(k, N):
    """Of one mask of k of N tokens: integral of t^k (1 - t)^(N - k) over t in 0..1, given that k > 0."""
    integral = math.factorial(k) * math.factorial(N - k) / math.factorial(N + 1)
    return integral / (1 - 1 / (N + 1))


MASKS = [mask for mask in itertools.product([False, True], repeat=6) if any(mask)]


def naive_nelbo(m, row, mask):
    logp = log_p(m, row, [r for r, hidden in enumerate(mask) if not hidden])
    return sum(-float(logp[r, row["response_ids"][0, r]]) for r, hidden in enumerate(mask) if hidden) / sum(mask)


def test_average_over_every_mask_is_the_exact_expectation(toy):
    assert sum(exact_probability(sum(mask), 6) for mask in MASKS) == pytest.approx(1)
    m, batch = toy(), make_batch([6])
    exact = sum(exact_probability(sum(mask), 6) * naive_nelbo(m, single(batch, 0), mask) for mask in MASKS)
    average = 0.0
    for mask in MASKS:  # as nelbo says that it draws: the count uniform, then the subset
        loss = objectives.nelbo(m, batch, mask=torch.tensor([mask]))["loss"]
        average += float(loss) / 6 / math.comb(6, sum(mask))
    assert average == pytest.approx(exact, abs=1e-5)


def test_masks_are_drawn_with_the_exact_probability(toy):
    m, batch = toy(), make_batch([6] * 500)
    for seed in range(8):
        objectives.nelbo(m, batch, generator=generators(seed)[0])
    hidden = torch.cat([ids[:, 4:] == m.config.mask_id for ids, _, _ in m.calls])
    counts = Counter(map(tuple, hidden.tolist()))
    expected = {mask: 4000 * exact_probability(sum(mask), 6) for mask in MASKS}
    assert set(counts) <= set(expected)
    statistic = sum((counts[mask] - e) ** 2 / e for mask, e in expected.items())
    assert abs(statistic - 62) < 5 * math.sqrt(2 * 62)


@quick
@given(some_batches)
def test_nelbo_is_the_mean_of_its_rows_in_plain_loops(toy, spec):
    lengths, seed = spec
    batch, m = make_batch(lengths, seed), toy()
    seeds = range(seed, seed + len(lengths))
    out = objectives.nelbo(m, batch, generator=generators(*seeds))
    ((ids, attention_mask, positions),) = m.calls
    losses, shares, P = [], [], batch["prompt_ids"].shape[1]
    for b, n in enumerate(lengths):
        mask = (ids[b, P : P + n] == m.config.mask_id).tolist()
        assert any(mask)
        assert torch.equal(attention_mask[b, P:], torch.arange(ids.shape[1] - P) < n)
        losses.append(naive_nelbo(m, single(batch, b), mask))
        shares.append(sum(mask) / n)
        alone = toy()  # the same generator hides the same tokens without the other rows
        objectives.nelbo(alone, single(batch, b), generator=generators(seeds[b]))
        assert (alone.calls[0][0][0, -n:] == m.config.mask_id).tolist() == mask
    assert positions.shape[1] == max(round(share * n) for share, n in zip(shares, lengths))
    close(out, dict(loss=sum(losses) / len(losses), masked=sum(shares) / len(shares)))
