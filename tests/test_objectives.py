"""TABOM in objectives.py: the official losses and gradients, Eq. 9 in plain loops, windows, steps and shares; and what
holds for every objective. The others are in test_baselines.py, the rankings alone in test_ranking.py.

python -m pytest tests/test_objectives.py
"""

import inspect
import itertools
import math
import os
import shutil
import subprocess
import sys
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import baselines
import lora
import objectives

quick = settings(max_examples=50, deadline=None)
some_batches = st.tuples(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 999))


def generators(*seeds):
    return [torch.Generator().manual_seed(s) for s in seeds]


def make_batch(lengths, seed=0, vocab=12, P=4):
    """Random responses of these lengths, prompts of 1..P tokens, rubbish in all padding."""
    g = torch.Generator().manual_seed(seed)
    B, N = len(lengths), max(lengths)
    batch = dict(
        prompt_ids=torch.randint(0, vocab, (B, P), generator=g),
        prompt_mask=torch.zeros(B, P, dtype=torch.long),
        response_ids=torch.randint(0, vocab, (B, N), generator=g),
        order=torch.randint(0, N, (B, N), generator=g),
        length=torch.tensor(lengths),
    )
    for b, n in enumerate(lengths):
        batch["prompt_mask"][b, int(torch.randint(0, P, (), generator=g)) :] = 1
        batch["order"][b, :n] = torch.randperm(n, generator=g)
    batch["entropy"] = torch.rand(B, N, generator=g) * 3  # logged by a base model
    return batch


def single(batch, b):
    """Row b alone, without any padding."""
    n, start = int(batch["length"][b]), int((1 - batch["prompt_mask"][b]).sum())
    logged = {"entropy": batch["entropy"][b : b + 1, :n]} if "entropy" in batch else {}
    return dict(
        logged,
        prompt_ids=batch["prompt_ids"][b : b + 1, start:],
        prompt_mask=batch["prompt_mask"][b : b + 1, start:],
        response_ids=batch["response_ids"][b : b + 1, :n],
        order=batch["order"][b : b + 1, :n],
        length=batch["length"][b : b + 1],
    )


def log_p(m, row, visible):
    """log p(. | U) at every position of the response, [N, V] in float64: one call of the model, all its logits."""
    prompt, response = row["prompt_ids"][0].tolist(), row["response_ids"][0].tolist()
    ids = prompt + [x if r in visible else m.config.mask_id for r, x in enumerate(response)]
    return m(torch.tensor([ids]))[0, len(prompt) :].double().log_softmax(-1)


def naive_ranking(h, margin):
    """Eq. 8 -> the mean over pairs, and the share of pairs in order; None, None without a pair."""
    pairs = list(itertools.combinations([float(x) for x in h], 2))
    if not pairs:
        return None, None
    total, in_order = 0.0, 0
    for r, s in pairs:
        total += max(0.0, r - s + margin)
        in_order += r < s
    return total / len(pairs), in_order / len(pairs)


def naive_tabom(m, row, first, size, margin, context="window"):
    """Eq. 9 for one row without padding: its ce, ranking, in_order and entropy. order may hold ties and -1."""
    order, response = row["order"][0].tolist(), row["response_ids"][0].tolist()
    window = []  # positions in decode order, equal steps by position
    for step in range(first, first + size):
        window += [r for r, k in enumerate(order) if k == step]
    logp = log_p(m, row, before(order, first))
    ce, h = 0.0, []
    for r in window:
        ce -= float(logp[r, response[r]]) / len(window)
        own = logp if context == "window" else log_p(m, row, before(order, order[r]))
        h.append(-float((own[r].exp() * own[r]).sum()))
    ranking, in_order = naive_ranking(h, margin)
    return dict(ce=ce, ranking=ranking, in_order=in_order, entropy=sum(h) / max(len(h), 1))


def before(order, step):
    """The positions decoded before a step."""
    return [r for r, k in enumerate(order) if 0 <= k < step]


def combined(rows, weight):
    """What tabom says of a batch of these rows: those without a pair have no part in the ranking."""
    found = {}
    for key in rows[0]:
        values = [row[key] for row in rows if row[key] is not None]
        found[key] = sum(values) / max(len(values), 1)
    return found | dict(loss=found["ce"] + weight * found["ranking"])


def number(x):
    return float(torch.as_tensor(x).detach())


def mean(rows):
    found = dict.fromkeys(rows[0], 0.0)
    for row in rows:
        for key in found:
            found[key] += number(row[key]) / len(rows)
    return found


def close(out, expected, tolerance=1e-4):
    for key, value in expected.items():
        assert number(out[key]) == pytest.approx(number(value), abs=tolerance), key


def fits(counts, outcomes, total):
    """Pearson's statistic for equally likely outcomes, within five standard deviations of its mean."""
    assert set(counts) <= set(outcomes)
    expected, degrees = total / len(outcomes), len(outcomes) - 1
    statistic = sum((counts[x] - expected) ** 2 / expected for x in outcomes)
    return abs(statistic - degrees) < 5 * math.sqrt(2 * degrees)


def base_of(m):
    """T3D's reference at the start: the same model with its adapter off."""

    def reference(*inputs, **options):
        with lora.disabled(m):
            return m(*inputs, **options)

    return reference


def needs(objective, m):
    """What an objective of the table cannot do without, besides a model and a batch."""
    reference = base_of(m) if isinstance(m, torch.nn.Module) else m
    return {} if objective.reference is None else dict(reference=reference)


# ------------------------------------------------------------------------------------------------ the official values


def golden_batch(golden, j):
    get = {k: golden.objective[f"tabom.{j}.{k}"] for k in ("prompt", "prompt_mask", "response", "order", "start")}
    batch = dict(
        prompt_ids=get["prompt"],
        prompt_mask=get["prompt_mask"],
        response_ids=get["response"],
        order=get["order"],
        length=torch.tensor([get["response"].shape[1]] * 2),
    )
    return batch, get["start"]


@pytest.mark.parametrize("j", [0, 1])
def test_official_losses_and_gradients(golden, j):
    case, (batch, start) = golden.objective_cases[j], golden_batch(golden, j)
    m = lora.load(golden.load(), golden.folder / "adapter")
    options = dict(window=case["W"], margin=case["margin"], weight=case["weight"])
    out = objectives.tabom(m, batch, start=start, **options)
    close(out, dict(loss=case["loss"], ce=case["ce"], ranking=case["rank"]))
    out["loss"].backward()
    for name, p in lora.tensors(m).items():
        official = golden.objective[f"tabom.{j}.grad.{name}"]
        assert (p.grad - official).norm() <= 1e-3 * official.norm(), name
    for b in range(2):
        with torch.no_grad():
            out = objectives.tabom(m, single(batch, b), start=start[b : b + 1], **options)
        close(out, dict(ce=case["ce_rows"][b], ranking=case["rank_rows"][b]))


@pytest.mark.parametrize("j", [0, 1])
def test_official_t3d(golden, j):
    expected, (batch, start) = golden.objective_cases[j]["t3d"], golden_batch(golden, j)
    m = lora.load(golden.load(), golden.folder / "adapter")
    options = {k: expected[k] for k in ("alpha", "beta", "path_weight")}
    out = baselines.t3d(m, batch, start=start, reference=base_of(m), **options)
    close(out, {k: expected[k] for k in ("loss", "ddo", "path")})
    out["loss"].backward()
    compared = 0
    for name, p in lora.tensors(m).items():
        if f"t3d.{j}.grad.{name}" in golden.objective:
            official = golden.objective[f"t3d.{j}.grad.{name}"]
            assert (p.grad - official).norm() <= 1e-3 * official.norm(), name
            compared += 1
    assert compared == 1


# ------------------------------------------------------------------------------------------------- Eq. 9, the window


@quick
@given(some_batches, st.integers(2, 11) | st.just("global"))
def test_the_model_is_asked_for_the_window_and_sees_what_came_before(toy, spec, window):
    lengths, seed = spec
    batch, m = make_batch(lengths, seed), toy()
    seeds = range(seed, seed + len(lengths))
    first, size = objectives.draw_windows(batch, window, generator=generators(*seeds))
    objectives.tabom(m, batch, window=window, generator=generators(*seeds))
    ((ids, attention_mask, positions),) = m.calls  # one forward pass
    P = batch["prompt_ids"].shape[1]
    assert positions.shape == (len(lengths), int(size.max()))  # the output head runs there and nowhere else
    assert torch.equal(ids[:, :P], batch["prompt_ids"])
    assert torch.equal(attention_mask[:, :P], batch["prompt_mask"].bool())
    for b, (n, w, t) in enumerate(zip(lengths, size.tolist(), first.tolist())):
        assert w == min(window, n) if window != "global" else 1 <= w <= n
        assert 0 <= t <= n - w
        order = batch["order"][b, :n].tolist()
        asked, visible = [order.index(k) for k in range(t, t + w)], {order.index(k) for k in range(t)}
        assert (positions[b, :w] - P).tolist() == asked and not visible & set(asked)
        for r in range(ids.shape[1] - P):
            assert attention_mask[b, P + r] == (r < n)
            if r < n:
                expected = batch["response_ids"][b, r] if r in visible else m.config.mask_id
                assert ids[b, P + r] == expected


@quick
@given(some_batches, st.integers(2, 6) | st.just("global"), st.sampled_from(["window", "step"]))
def test_tabom_is_the_mean_of_its_rows_in_plain_loops(toy, spec, window, context):
    """Padding on both sides, and what it holds, changes nothing; "step" is W passes."""
    lengths, seed = spec
    batch, m = make_batch(lengths, seed), toy(scale=0.5)  # flat distributions: no two entropies as good as equal
    first, size = objectives.draw_windows(batch, window, generator=generators(seed)[0])
    options = dict(window=window, margin=0.3, weight=2.0, entropy_context=context)
    out = objectives.tabom(m, batch, generator=generators(seed)[0], **options)
    assert len(m.calls) == (1 if context == "window" else int(size.max()))
    rows = []
    for b in range(len(lengths)):
        rows.append(naive_tabom(m, single(batch, b), int(first[b]), int(size[b]), 0.3, context))
    close(out, combined(rows, 2.0))


def test_a_real_model_ignores_padding_and_the_order_of_rows(golden):
    m = lora.load(golden.load(), golden.folder / "adapter")
    batch = make_batch([9, 4, 6], vocab=300)
    batch["prompt_mask"][0] = 1
    start = torch.tensor([2, 0, 1])
    options = dict(window=4, margin=0.5, weight=1.5)

    def gradients(out):
        out["loss"].backward()
        found = {name: p.grad.clone() for name, p in lora.tensors(m).items()}
        m.zero_grad()
        return found

    # Dream predicts the first token of a response from the last of its prompt, so a prompt needs a real token
    assert (batch["prompt_mask"][:, -1] == 1).all()
    out = objectives.tabom(m, batch, start=start, **options)
    rows = [objectives.tabom(m, single(batch, b), start=start[b : b + 1], **options) for b in range(3)]
    close(out, mean(rows), 1e-5)
    turned = objectives.tabom(m, {k: v.flip(0) for k, v in batch.items()}, start=start.flip(0), **options)
    close(turned, out, 1e-5)
    by_row, whole = [gradients(row) for row in rows], gradients(out)
    for name, grad in whole.items():
        torch.testing.assert_close(grad, sum(g[name] for g in by_row) / 3, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("N", [1, 2, 5])
def test_a_short_response_is_a_window_as_a_whole(toy, N):
    batch = make_batch([N])
    out = objectives.tabom(toy(), batch, window=32)
    close(out, combined([naive_tabom(toy(), single(batch, 0), 0, N, 0.2)], 1.0))
    everything = objectives.nelbo(toy(), batch, mask=torch.ones(1, N, dtype=torch.bool))
    close(out, dict(ce=everything["ce"]))  # from nothing, all of it


def test_transition_is_tabom_with_the_global_window_and_no_ranking(toy):
    batch, start = make_batch([8, 5]), torch.tensor([[2, 7], [0, 5]])
    out = baselines.transition(toy(), batch, start=start)
    rows = [naive_tabom(toy(), single(batch, b), int(s), int(e - s), 0.2) for b, (s, e) in enumerate(start)]
    close(out, combined(rows, 0.0))
    assert number(out["loss"]) == number(out["ce"])
    drawn = baselines.transition(toy(), batch, generator=generators(3)[0])
    close(drawn, dict(loss=objectives.tabom(toy(), batch, window="global", generator=generators(3)[0])["ce"]), 1e-6)


def test_the_terms_of_tabom_alone(toy):
    batch, start = make_batch([8, 5]), torch.tensor([1, 0])
    both = objectives.tabom(toy(), batch, window=4, weight=3.0, start=start)
    masking = objectives.tabom(toy(), batch, window=4, weight=0.0, start=start)
    ranking = objectives.tabom(toy(), batch, window=4, ce_weight=0.0, weight=3.0, start=start)
    assert number(both["ranking"]) > 0
    close(masking, dict(loss=both["ce"], ce=both["ce"], ranking=both["ranking"]), 1e-6)
    close(ranking, dict(loss=3 * both["ranking"], ce=both["ce"], ranking=both["ranking"]), 1e-6)
    ends = torch.stack((start, start + 4), dim=1)
    close(masking, dict(loss=baselines.transition(toy(), batch, start=ends)["loss"]), 1e-6)


def test_starts_are_uniform():
    first, size = objectives.draw_windows(make_batch([10] * 7000), 4, generator=generators(0)[0])
    assert set(size.tolist()) == {4}
    assert fits(Counter(first.tolist()), range(7), 7000)


def test_pairs_of_timesteps_are_uniform():
    first, size = objectives.draw_windows(make_batch([5] * 6000), "global", generator=generators(0)[0])
    drawn = Counter(zip(first.tolist(), (first + size).tolist()))
    assert fits(drawn, list(itertools.combinations(range(6), 2)), 6000)


@pytest.mark.parametrize("window", [3, "global"])
def test_a_row_with_its_own_generator_does_not_depend_on_its_batch(window):
    batch, alone = make_batch([9, 30, 12]), []
    together = torch.stack(objectives.draw_windows(batch, window, generator=generators(1, 2, 3)))
    for b in range(3):
        alone.append(torch.stack(objectives.draw_windows(single(batch, b), window, generator=generators(b + 1))))
    assert torch.equal(together, torch.cat(alone, dim=1))


# ------------------------------------------------------------------------------- decode steps: ties and what is never


@st.composite
def stepped_batches(draw):
    """Batches decoded several tokens a step, with steps that decoded none, and tokens that were never decoded."""
    lengths, seed = draw(some_batches)
    batch = make_batch(lengths, seed)
    g = torch.Generator().manual_seed(seed)
    for b, n in enumerate(lengths):
        steps = torch.randint(-1, max(n - 1, 1), (n,), generator=g)
        steps[int(torch.randint(0, n, (), generator=g))] = n // 2  # one token at least
        batch["order"][b, :n] = steps
    return batch, seed


def of_row(batch, b):
    return single(batch, b)["order"][0].tolist()


@quick
@given(stepped_batches(), st.integers(2, 6) | st.just("global"), st.sampled_from(["window", "step"]))
def test_tabom_by_steps_is_the_mean_of_its_rows_in_plain_loops(toy, spec, window, context):
    batch, seed = spec
    m = toy(scale=0.5)
    first, size = objectives.draw_windows(batch, window, generator=generators(seed)[0])
    options = dict(window=window, margin=0.3, weight=2.0, entropy_context=context)
    out = objectives.tabom(m, batch, generator=generators(seed)[0], **options)
    rows = []
    for b in range(len(first)):
        rows.append(naive_tabom(m, single(batch, b), int(first[b]), int(size[b]), 0.3, context))
    close(out, combined(rows, 2.0))


@quick
@given(stepped_batches(), st.integers(2, 6))
def test_tokens_that_were_never_decoded_are_masked_and_no_target(toy, spec, window):
    batch, seed = spec
    never = (batch["order"] < 0) & objectives.valid(batch)
    P, m, reference = batch["prompt_ids"].shape[1], toy(), toy(seed=1)
    for name, objective in objectives.OBJECTIVES.items():
        options = dict(window=window) if name == "tabom" else needs(objective, reference)
        objective.loss(m, batch, generator=generators(seed)[0], **options)
    for ids, attention_mask, _ in m.calls:
        assert (ids[:, P:][never] == m.config.mask_id).all()
        assert attention_mask[:, P:][never].all()
    # what stands at these places changes nothing: it is neither context nor target
    other = dict(batch, response_ids=torch.where(never, 5, batch["response_ids"]))
    for name, objective in objectives.OBJECTIVES.items():
        options = dict(window=window) if name == "tabom" else needs(objective, reference)
        one = objective.loss(toy(), batch, generator=generators(seed)[0], **options)
        two = objective.loss(toy(), other, generator=generators(seed)[0], **options)
        close(one, two, 1e-6)


def test_a_row_in_which_nothing_was_decoded_is_refused(toy):
    batch = make_batch([8, 5])
    batch["order"][1] = -1
    with pytest.raises(ValueError, match=r"nothing was decoded \(all -1\) in rows \[1\]"):
        objectives.tabom(toy(), batch)
    with pytest.raises(ValueError, match="every row needs a masked position"):
        objectives.nelbo(toy(), batch)


def test_a_window_that_decoded_nothing_has_no_loss(toy):
    batch = make_batch([6])
    batch["order"][0] = torch.tensor([0, 9, 9, 0, 9, 9])
    out = objectives.tabom(toy(), batch, window=4, start=torch.tensor([3]))
    assert number(out["loss"]) == 0 and number(out["ranking"]) == 0
    assert number(objectives.tabom(toy(), batch, window=4, start=torch.tensor([6]))["ce"]) > 0


def test_ranks_are_steps_of_one_token_each(toy):
    """Two tokens a step: the same context and targets as the ranks of a window twice as long."""
    batch = make_batch([8])
    by_step = dict(batch, order=batch["order"] // 2)
    for t in range(3):
        one = objectives.tabom(toy(), by_step, window=2, start=torch.tensor([t]))
        two = objectives.tabom(toy(), batch, window=4, start=torch.tensor([2 * t]))
        close(one, dict(ce=two["ce"], entropy=two["entropy"]), 1e-6)


# ----------------------------------------------------------------------------------------------- where windows start


def test_starts_of_steps_are_uniform():
    batch = make_batch([20] * 4000)
    batch["order"] //= 2  # ten steps
    first, size = objectives.draw_windows(batch, 4, generator=generators(0)[0])
    assert set(size.tolist()) == {4}
    assert fits(Counter(first.tolist()), range(7), 4000)


def naive_non_ltr(order):
    """Steps of the positions that were not decoded right after their left neighbour."""
    steps = set()
    for r, step in enumerate(order):
        left = order[r - 1] if r else -1
        in_order = step - left == 1 and (left >= 0 or r == 0)
        if step >= 0 and not in_order:
            steps.add(step)
    return sorted(steps)


@quick
@given(stepped_batches(), st.booleans())
def test_the_steps_of_tokens_that_are_not_left_to_right(spec, marked):
    batch, seed = spec
    if marked:
        batch["non_ltr"] = torch.rand(batch["order"].shape, generator=torch.Generator().manual_seed(seed)) < 0.4
    found = objectives.non_ltr_steps(batch)
    for b, steps in enumerate(found):
        order = of_row(batch, b)
        expected = naive_non_ltr(order)
        if marked:
            expected = sorted({k for r, k in enumerate(order) if k >= 0 and batch["non_ltr"][b, r]})
        assert steps == expected


@pytest.mark.parametrize("given", [True, False])
def test_starts_among_tokens_that_are_not_left_to_right_are_uniform(given):
    order = torch.tensor([[0, 1, 9, 3, 5, 6, 4, 7, 8, 2]])
    batch = {k: v.expand(3000, -1) if v.dim() > 1 else v for k, v in make_batch([10]).items()}
    batch = dict(batch, order=order.expand(3000, -1), length=torch.full((3000,), 10))
    expected = [2, 3, 4, 5]  # of the steps 2, 3, 4, 5, 7, 9 those in 0..10 - 1 - 4
    if given:
        batch["non_ltr"] = torch.isin(batch["order"], torch.tensor([0, 4, 8]))
        expected = [0, 4]
    drawn, _ = objectives.draw_windows(batch, 4, starts="non-ltr", generator=generators(0)[0])
    assert fits(Counter(drawn.tolist()), expected, 3000)


def test_starts_are_uniform_where_no_such_token_is_in_reach():
    batch = make_batch([10] * 3000)
    batch["order"] = torch.arange(10).expand(3000, -1)  # left to right
    drawn, _ = objectives.draw_windows(batch, 4, starts="non-ltr", generator=generators(0)[0])
    assert fits(Counter(drawn.tolist()), range(7), 3000)
    batch["non_ltr"] = batch["order"] > 5  # only out of reach: the release's last start is 5
    drawn, _ = objectives.draw_windows(batch, 4, starts="non-ltr", generator=generators(0)[0])
    assert fits(Counter(drawn.tolist()), range(7), 3000)
    short, size = objectives.draw_windows(single(batch, 0), 12, starts="non-ltr", generator=generators(0)[0])
    assert short.tolist() == [0] and size.tolist() == [10]


def test_tabom_draws_such_starts(toy):
    batch, m = make_batch([9, 7, 8]), toy()
    first, size = objectives.draw_windows(batch, 3, starts="non-ltr", generator=generators(1, 2, 3))
    given = objectives.tabom(toy(), batch, window=3, start=first)
    drawn = objectives.tabom(m, batch, window=3, starts="non-ltr", generator=generators(1, 2, 3))
    close(drawn, given, 1e-6)
    for b in range(3):  # a row's draw does not depend on the others
        alone, _ = objectives.draw_windows(single(batch, b), 3, starts="non-ltr", generator=generators(b + 1))
        assert alone.tolist() == [int(first[b])]


# -------------------------------------------------------------------------------- a batch in parts: shares of pairs


@quick
@given(st.one_of(stepped_batches(), some_batches), st.integers(2, 5), st.integers(1, 4))
def test_the_parts_of_a_batch_add_up_to_its_loss(toy, spec, window, cut):
    batch, seed = spec if isinstance(spec[0], dict) else (make_batch(*spec), spec[1])
    B = len(batch["length"])
    own = generators(*range(seed, seed + B))
    share = objectives.share_with_pairs(batch, window, generator=own)
    whole = objectives.tabom(toy(), batch, window=window, weight=2.0, generator=own)  # the same windows
    total, shares = dict.fromkeys(whole, 0.0), 0.0
    for i in range(0, B, cut):
        part = {key: value[i : i + cut] for key, value in batch.items()}
        own, rows = generators(*range(seed + i, seed + i + len(part["length"]))), len(part["length"])
        shares += objectives.share_with_pairs(part, window, generator=own) * rows / B
        out = objectives.tabom(toy(), part, window=window, weight=2.0, generator=own, pair_share=share)
        for key in out:
            total[key] += number(out[key]) * rows / B
    assert shares == pytest.approx(share, abs=1e-6)
    close(whole, total, 1e-4)


def test_the_gradient_of_the_parts_adds_up_too(golden):
    m = lora.load(golden.load(), golden.folder / "adapter")
    batch, start = make_batch([9, 1, 6, 4], vocab=300), torch.tensor([2, 0, 1, 0])
    share = objectives.share_with_pairs(batch, 4, start=start)
    assert share == 0.75
    objectives.tabom(m, batch, window=4, start=start)["loss"].backward()
    whole = {name: p.grad.clone() for name, p in lora.tensors(m).items()}
    m.zero_grad()
    for rows in ([0, 1, 2], [3]):
        part = {key: value[rows] for key, value in batch.items()}
        out = objectives.tabom(m, part, window=4, start=start[rows], pair_share=share)
        (out["loss"] * len(rows) / 4).backward()
    for name, p in lora.tensors(m).items():
        torch.testing.assert_close(p.grad, whole[name], rtol=1e-3, atol=1e-6)


def test_a_part_and_a_whole_without_pairs(toy):
    alone = objectives.tabom(toy(), make_batch([1, 1]), generator=generators(0)[0])
    assert number(alone["ranking"]) == 0 and number(alone["loss"]) == number(alone["ce"])
    none = objectives.tabom(toy(), make_batch([1, 1]), generator=generators(0)[0], pair_share=0.0)
    assert number(none["ranking"]) == 0 and math.isfinite(number(none["loss"]))
    assert objectives.share_with_pairs(make_batch([1, 1]), generator=generators(0)[0]) == 0


def test_the_share_leaves_generators_alone_and_needs_one():
    g = generators(5)[0]
    state = g.get_state()
    objectives.share_with_pairs(make_batch([9, 8]), 3, generator=g)
    assert torch.equal(g.get_state(), state)
    with pytest.raises(ValueError, match="share_with_pairs needs the start or the generator"):
        objectives.share_with_pairs(make_batch([9, 8]), 3)


# ---------------------------------------------------------------------------------- other rankings than by a margin


@quick
@given(some_batches, st.integers(2, 6), st.sampled_from(["window", "step"]))
def test_the_listwise_ranking_of_tabom(toy, spec, window, context):
    lengths, seed = spec
    batch, m = make_batch(lengths, seed), toy(scale=0.5)
    first, size = objectives.draw_windows(batch, window, generator=generators(seed)[0])
    options = dict(window=window, ranking="listwise", beta=0.7, entropy_context=context)
    out = objectives.tabom(m, batch, generator=generators(seed)[0], **options)
    losses = []
    for b in range(len(lengths)):
        if size[b] >= 2:
            h = window_entropies(m, single(batch, b), int(first[b]), int(size[b]), context)
            losses.append(float(baselines.listwise_loss(torch.tensor(h), 0.7)))
    close(out, dict(ranking=sum(losses) / max(len(losses), 1)))


def window_entropies(m, row, first, size, context):
    """h of the window's tokens in decode order, by naive_tabom one token at a time."""
    order, found = row["order"][0].tolist(), []
    for k in range(first, first + size):
        r = order.index(k)
        logp = log_p(m, row, before(order, first if context == "window" else k))
        found.append(-float((logp[r].exp() * logp[r]).sum()))
    return found


@quick
@given(some_batches, st.integers(2, 6))
def test_the_kl_ranking_of_tabom(toy, spec, window):
    lengths, seed = spec
    batch, m = make_batch(lengths, seed), toy(scale=0.5)
    batch["entropy"] = torch.rand(batch["order"].shape, generator=generators(seed)[0]) * 3
    first, size = objectives.draw_windows(batch, window, generator=generators(seed)[0])
    out = objectives.tabom(m, batch, window=window, ranking="kl", beta=0.7, generator=generators(seed)[0])
    losses = []
    for b in range(len(lengths)):
        order, kl = of_row(batch, b), 0.0
        h = window_entropies(m, single(batch, b), int(first[b]), int(size[b]), "step")
        for k, new in enumerate(h):
            base = float(batch["entropy"][b, order.index(int(first[b]) + k)])
            p, q = 1 / (1 + math.exp(0.7 * new)), 1 / (1 + math.exp(0.7 * base))
            kl += q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))
        if size[b] >= 2:
            losses.append(kl)
    close(out, dict(ranking=sum(losses) / max(len(losses), 1)))


def test_the_exact_kl_has_no_gradient_at_the_base_model(golden):
    """With its own entropies the base model is at the minimum; with others, or by Eq. 8, it is not."""
    m = lora.inject(golden.load(), rank=4, alpha=8, generator=generators(0)[0])
    batch = make_batch([9, 6], vocab=300)
    h = objectives.replay(m, batch)
    own = baselines.entropies_when_decoded(h, batch)  # by decode order
    batch["entropy"] = own.gather(1, objectives.decode_places(batch).argsort(1)).nan_to_num()
    options = dict(window=4, start=torch.tensor([3, 1]), ce_weight=0.0)

    def gradient(batch, **more):
        m.zero_grad()
        out = objectives.tabom(m, batch, **options, **more)
        out["loss"].backward()
        return number(out["loss"]), max(float(p.grad.abs().max()) for p in lora.tensors(m).values())

    loss, steepest = gradient(batch, ranking="kl")
    assert abs(loss) < 1e-6 and steepest < 1e-6
    loss, steepest = gradient(dict(batch, entropy=batch["entropy"] + 0.5), ranking="kl")
    assert loss > 1e-4 and steepest > 1e-4
    loss, steepest = gradient(batch)
    assert loss > 0 and steepest > 1e-4


def test_the_kl_needs_what_the_base_model_logged(toy):
    batch = make_batch([8, 5])
    del batch["entropy"]
    with pytest.raises(ValueError, match=r"'kl' needs batch\['entropy'\]"):
        objectives.tabom(toy(), batch, ranking="kl")
    batch["entropy"] = torch.zeros(2, 8)
    with pytest.raises(ValueError, match="entropy_context 'window': ranking 'kl' needs step"):
        objectives.tabom(toy(), batch, ranking="kl", entropy_context="window")
    both = dict(generator=generators(0)[0], ranking="kl", entropy_context="step")
    close(
        objectives.tabom(toy(), batch, **both),
        objectives.tabom(toy(), batch, **both | dict(generator=generators(0)[0], entropy_context=None)),
    )


# ------------------------------------------------------------------------------------------ dtypes, options, errors


@pytest.mark.parametrize("name", objectives.OBJECTIVES)
def test_losses_are_float32_whatever_the_model(golden, name):
    batch, losses = make_batch([8, 5], vocab=300), []
    for dtype in (torch.float32, torch.bfloat16):
        m = lora.load(golden.load(dtype=dtype), golden.folder / "adapter")
        objective = objectives.OBJECTIVES[name]
        out = objective.loss(m, batch, generator=generators(1)[0], **needs(objective, m))
        assert {v.dtype for v in out.values()} == {torch.float32}
        out["loss"].backward()
        assert all(p.grad.isfinite().all() for p in lora.tensors(m).values())
        assert [k for k in out if out[k].requires_grad] == ["loss"]  # the others are for the log
        losses.append(number(out["loss"]))
    tolerance = 0.05 if name == "t3d" else 0.02  # an argmax of the reference may be another one in bfloat16
    assert losses[1] == pytest.approx(losses[0], rel=tolerance)


@pytest.mark.parametrize("name", objectives.OBJECTIVES)
def test_mask_id_can_be_given(toy, name):
    m, objective = toy(), objectives.OBJECTIVES[name]
    objective.loss(m, make_batch([6]), mask_id=3, generator=generators(0)[0], **needs(objective, m))
    assert (m.calls[0][0] == 3).any() and not (m.calls[0][0] == m.config.mask_id).any()


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(window=0), "window 0"),
        (dict(window=1), "window 1"),
        (dict(window=-3), "window -3"),
        (dict(window=True), "window True"),
        (dict(window=2.5), "window 2.5"),
        (dict(window="gobal"), "window 'gobal'"),
        (dict(window=4, start=torch.tensor([3, 2])), r"\[3, 2\] of \[4, 4\] .* \[8, 5\]"),
        (dict(window=4, start=torch.tensor([-1, 0])), r"\[-1, 0\]"),
        (dict(window="global", start=torch.tensor([[0, 9], [0, 5]])), r"\[9, 5\]"),
        (dict(window="global", start=torch.tensor([[3, 3], [0, 5]])), r"\[0, 5\]"),
        (dict(entropy_context="both"), "entropy_context 'both'"),
        (dict(ranking="pairs"), "ranking 'pairs'"),
        (dict(starts="ltr"), "starts 'ltr'"),
        (dict(starts="non-ltr", window="global"), "starts 'non-ltr', window 'global'"),
        (dict(generator=[None]), "generator"),
        (dict(generator=[None] * 3), "generator"),
    ],
    ids=str,
)
def test_tabom_refuses(toy, options, message):
    with pytest.raises(ValueError, match=message):
        objectives.tabom(toy(), make_batch([8, 5]), **options)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(mask=torch.tensor([[True] * 8, [False] * 8])), "every row"),
        (dict(mask=torch.tensor([[True] * 8, [False] * 5 + [True] * 3])), "every row"),  # only padding
        (dict(generator=[None]), "generator"),
        (dict(generator=[None] * 3), "generator"),
    ],
    ids=str,
)
def test_nelbo_refuses(toy, options, message):
    with pytest.raises(ValueError, match=message):
        objectives.nelbo(toy(), make_batch([8, 5]), **options)


def test_t3d_refuses_to_do_without_a_reference(toy):
    with pytest.raises(ValueError, match="t3d needs a reference"):
        baselines.t3d(toy(), make_batch([8, 5]))


# -------------------------------------------------------------------------------------------- the table of objectives


def defaults(objective):
    """Parameter -> default, for all options of an objective."""
    signature = inspect.signature(objective.loss).parameters
    return {name: signature[name].default for name in objective.options}


def test_every_objective_says_where_it_comes_from_and_what_its_options_are():
    for name, objective in objectives.OBJECTIVES.items():
        assert 0 < len(objective.source) < 40 and objective.loss.__name__ == name
        assert "dict(loss" in objective.loss.__doc__
        for option, value in defaults(objective).items():
            declared = objective.options[option]
            assert declared.help and value is not inspect.Parameter.empty
            assert declared.choices is None or value in (None, *declared.choices)


def test_options_of_one_name_are_one_flag():
    """Several objectives may have an option of one name: its kind, bounds and choices are the same in all."""
    found = {}
    for objective in objectives.OBJECTIVES.values():
        for name, option in objective.options.items():
            assert found.setdefault(name, option)[1:] == option[1:], name


# Beside the defaults, what changes how a batch in parts adds up.
IN_PARTS = [(name, {}) for name in objectives.OBJECTIVES]
IN_PARTS += [("tabom", dict(window=4, starts="non-ltr")), ("tabom", dict(window="global", ranking="listwise"))]
IN_PARTS += [("tabom", dict(window=3, ranking="kl")), ("t3d", dict(path="levels")), ("dparallel", dict(block_length=3))]
IN_PARTS += [
    ("ideal", dict(window=3)),
    ("ideal", dict(window="global", masks="subset")),
    ("nelbo", dict(masks="subset")),
]
IN_PARTS += [("t3d", dict(fake="sample", reduction="sum")), ("t3d", dict(preference="none", reduction="sum"))]
for weighting, norm in itertools.product(("scheduler", "uniform"), ("token", "sequence", "batch")):
    IN_PARTS.append(("nelbo", dict(weighting=weighting, norm=norm)))


@pytest.mark.parametrize("cuts", [(1, 2, 3, 4, 5, 6, 7), (3,), (1, 6), (4, 5)], ids=str)
@pytest.mark.parametrize("name, options", IN_PARTS, ids=str)
def test_every_term_of_every_objective_agrees_over_all_splits(toy, name, options, cuts):
    """One global batch in parts of different sizes: with the normaliser of the whole, the mean of the parts is the
    whole's, term by term. One row has one token, so no pair; and one decoded two tokens in its first step."""
    lengths = [9, 1, 5, 12, 2, 7, 1, 3]
    batch = make_batch(lengths, seed=3)
    batch["order"][3] = (batch["order"][3] - 1).clamp(min=0)
    batch["entropy"] = torch.rand(batch["order"].shape, generator=generators(5)[0])
    objective = objectives.OBJECTIVES[name]
    parameters = {**defaults(objective), **options}
    reference = {} if objective.reference is None else dict(reference=toy(seed=1))

    def loss(rows):
        part, more = {key: value[rows] for key, value in batch.items()}, {}
        if objective.normaliser:
            more = objective.normaliser(batch, parameters, generators(*range(len(lengths))))
        seeds = range(*rows.indices(len(lengths)))
        found = objective.loss(toy(scale=0.5), part, generator=generators(*seeds), **parameters, **reference, **more)
        return {key: number(value) for key, value in found.items()}, len(seeds) / len(lengths)

    whole, _ = loss(slice(None))
    total = dict.fromkeys(whole, 0.0)
    for begin, end in zip((0, *cuts), (*cuts, None)):
        found, share = loss(slice(begin, end))
        for key, value in found.items():
            total[key] += value * share
    assert total == pytest.approx(whole, rel=1e-4, abs=1e-5)


def test_the_terms_would_differ_without_the_normaliser(toy):
    """So that the test above can fail: of two rows only the first has a pair."""
    batch, start = make_batch([9, 1]), torch.tensor([[0, 9], [0, 1]])
    whole, halves = baselines.transition(toy(), batch, start=start), 0.0
    for b in range(2):
        halves += number(baselines.transition(toy(), single(batch, b), start=start[b : b + 1])["in_order"]) / 2
    assert 0 < 2 * halves == pytest.approx(number(whole["in_order"]))


ALONE = """
import torch, objectives
batch = dict(prompt_ids=torch.ones(1, 1).long(), prompt_mask=torch.ones(1, 1).long(), length=torch.tensor([3]))
batch.update(response_ids=torch.tensor([[0, 1, 2]]), order=torch.tensor([[2, 0, 1]]), entropy=torch.ones(1, 3))
def m(ids, attention_mask=None, positions=None):
    return torch.arange(4.0).expand(1, positions.shape[1], 4)
print(float(objectives.tabom(m, batch, mask_id=3)["loss"]), list(objectives.OBJECTIVES), sep=chr(10))
for options in (dict(ranking="kl"), dict(ranking="listwise"), dict(entropy_context="step")):
    try:
        objectives.tabom(m, batch, mask_id=3, **options)
    except ValueError as e:
        print(e)
"""


def test_without_the_baselines_tabom_says_what_to_import(tmp_path):
    """objectives.py alone in a folder: Eq. 9 and Eq. 1 work, what is elsewhere has a one-line error."""
    shutil.copyfile(objectives.__file__, tmp_path / "objectives.py")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", ALONE], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loss, *lines = done.stdout.splitlines()
    # Logits 0, 1, 2, 3 everywhere, at the tokens 0, 1, 2: all entropies are equal, so the ranking loss is the margin.
    assert float(loss) == pytest.approx(math.log(sum(map(math.exp, range(4)))) - 1 + 0.2, abs=1e-5)
    assert lines == [
        "['tabom', 'nelbo']",
        "ranking 'kl' is not known here: import baselines first",
        "ranking 'listwise' is not known here: import baselines first",
        "entropy_context 'step' is not known here: import baselines first",
    ]


def test_what_else_a_model_is_called_with_is_its_own_business(toy):
    """logits_at hands on what m.arguments gives, and says whether the whole response may be told."""
    asked, called = [], []

    class Curious(toy):
        def arguments(self, batch, clean=True):
            asked.append((batch["length"].tolist(), clean))
            return dict(extra=clean)

        def __call__(self, ids, attention_mask=None, positions=None, extra=None):
            called.append(extra)
            return super().__call__(ids, attention_mask, positions)

    batch = make_batch([3, 2])
    objectives.tabom(Curious(), batch)
    objectives.replay(Curious(), batch)
    baselines.t3d(Curious(), batch, reference=Curious())
    assert called == [True, False, False, False, True, True]
    plain = baselines.t3d(Curious(), batch, reference=lambda *x, **more: Curious()(*x, **more), start=[1, 0])
    close(plain, baselines.t3d(Curious(), batch, reference=Curious(), start=[1, 0]), 1e-6)
    assert asked[0] == ([3, 2], True) and asked[1] == ([3, 2], False)


def test_a_callable_without_config_can_be_the_model(toy):
    """All that is read of m.config is the mask id, where none is given."""
    batch, table = make_batch([6, 4]), toy()
    batch["entropy"] = torch.ones(2, 6)

    def m(ids, attention_mask=None, positions=None):
        return table(ids, attention_mask, positions)

    for name, options in IN_PARTS:
        objective = objectives.OBJECTIVES[name]
        out = objective.loss(m, batch, mask_id=0, generator=generators(0)[0], **options, **needs(objective, m))
        assert math.isfinite(number(out["loss"]))
    m.training = True
    with pytest.raises(ValueError, match="random_tokens 0.1 needs m.config.vocab_size"):
        baselines.t3d(m, batch, mask_id=0, reference=m)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_losses_and_replays_are_float32_whatever_the_model_is(toy, dtype):
    """And near those of a model in float32."""
    batch, table = make_batch([6, 4]), toy(scale=0.5)
    batch["entropy"] = torch.ones(2, 6)

    def m(ids, attention_mask=None, positions=None):
        return table(ids, attention_mask, positions).to(dtype)

    m.config = table.config
    for name, options in IN_PARTS:
        objective = objectives.OBJECTIVES[name]
        loss, expected = (
            objective.loss(each, batch, generator=generators(0)[0], **options, **needs(objective, table))["loss"]
            for each in (m, table)
        )
        assert loss.dtype == torch.float32, name
        torch.testing.assert_close(loss, expected, rtol=0.05, atol=0.02, msg=name)
    torch.testing.assert_close(
        objectives.replay(m, batch), objectives.replay(table, batch), rtol=0.05, atol=0.02, equal_nan=True
    )


def test_masked_positions_show_one_id_or_one_each(toy):
    batch, m = make_batch([4]), toy()
    shown = torch.tensor([[1, 2, 3, 4]])
    visible = torch.tensor([[True, False, False, True]])
    objectives.logits_at(m, batch, visible, torch.tensor([[0]]), shown)
    response = batch["response_ids"][0]
    assert m.calls[0][0][0, 4:].tolist() == [response[0], 2, 3, response[3]]


def test_the_example_of_an_order(toy):
    """Tokens A B C D, order 0 2 1 -1: A first, then C, then B; D never."""
    batch, m = make_batch([4]), toy()
    batch["order"] = torch.tensor([[0, 2, 1, -1]])
    assert objectives.decode_places(batch).tolist() == [[0, 2, 1, 3]]
    objectives.tabom(m, batch, window=2, start=torch.tensor([1]))
    ((ids, _, positions),) = m.calls
    assert (positions[0] - 4).tolist() == [2, 1]  # C, B
    assert (ids[0, 4:] == m.config.mask_id).tolist() == [False, True, True, True]  # A is visible


@pytest.mark.parametrize("name", sorted(objectives.OBJECTIVES))
def test_a_model_that_ignores_positions_is_refused(toy, name):
    """Its logits at other places would be trained in silence."""
    m, batch = toy(seed=1), make_batch([5, 6])
    batch.update(entropy=torch.rand(batch["order"].shape))

    def ignores(ids, attention_mask=None, positions=None):
        return torch.randn(*ids.shape, 12)  # [B, P + N, V]

    options = dict(mask_id=0, generator=generators(1)[0])
    if name == "t3d":
        options.update(reference=m, random_tokens=0)
    with pytest.raises(ValueError, match=r"the model returned Tensor \[2, 10, 12\] for positions \[2, \d+\]"):
        objectives.OBJECTIVES[name].loss(ignores, batch, **options)


def test_a_model_that_returns_no_tensor_is_refused(toy):
    batch = make_batch([5, 6])
    with pytest.raises(ValueError, match=r"the model returned dict \[\] for positions \[2, \d+\]"):
        objectives.tabom(lambda ids, **options: dict(logits=0), batch, mask_id=0)


@pytest.mark.parametrize("name", sorted(objectives.OBJECTIVES))
def test_a_plain_callable_needs_no_config_and_logs_carry_no_graph(name):
    weight = torch.randn(12, 12, requires_grad=True)

    def m(ids, attention_mask=None, positions=None):
        return weight[ids.gather(1, positions)]  # [B, K, V]

    batch = make_batch([5, 6])
    options = dict(mask_id=0, generator=generators(1)[0])
    if name == "t3d":
        options["reference"] = m
    out = objectives.OBJECTIVES[name].loss(m, batch, **options)
    assert out["loss"].requires_grad and not any(value.requires_grad for key, value in out.items() if key != "loss")
