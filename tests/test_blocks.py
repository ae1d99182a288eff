"""Training where attention is block-causal, SDAR's and A2D's ways: the official losses and gradients, the clean copy
against one block after the other, what every objective sees there, and the whole loop.

python -m pytest tests/test_blocks.py
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from helpers import FOLDER, changed_model, decoded, fails, flags, meta, metrics, run
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_objectives import generators, single

import baselines
import data
import decode
import model
import objectives
import tabom
from baselines import preference, weighted
from blocks.data import whole_blocks
from experiments import tiny as tiny_model

quick = settings(max_examples=25, deadline=None)
FAMILIES = ("sdar", "a2d")


def golden_objectives(family):
    """(cases, tensors): the full files beside TABOM_DATA where they are, else our copies, which have the gradients of
    the norms and of one matrix alone."""
    folder = FOLDER / f"{family}-tiny"
    full = Path(os.environ.get("TABOM_DATA", "")).parent / "golden" / folder.name
    if (full / "objective.safetensors").is_file():
        folder = full
    return json.loads((folder / "objective.json").read_text()), load_file(folder / "objective.safetensors")


CASES = []  # (family, number, kind)
for family in FAMILIES:
    for k, case in enumerate(golden_objectives(family)[0]):
        CASES.append((family, k, case["kind"]))


def load(family, block_length=None):
    m = model.load(FOLDER / f"{family}-tiny")
    m.config.block_length = block_length
    return m


def batch_of(ids, start, length, mask, order=None):
    """A batch of rows ids [B, L] (lists of tensors) whose responses begin at `start` and are `length` long."""
    records = []
    for row, P, n in zip(ids, start, length):
        records.append(dict(prompt_ids=row[:P].tolist(), response_ids=row[P : P + n].tolist()))
    batch = data.collate(records, 300)
    masked = torch.zeros_like(batch["order"], dtype=torch.bool)
    for b, (row, P, n) in enumerate(zip(mask, start, length)):
        masked[b, :n] = row[P : P + n].bool()
    return batch, masked


# -------------------------------------------------------------------------------------------- the official values


def rows_of(case, e, name):
    """The rows of an SFT case, unpacked: ids, masked (of each row), where its response begins, how long it is, and the
    mask ratio that it is weighted with."""
    ids, labels, masked = (e[f"{name}.{x}"] for x in ("ids", "labels", "masked"))
    begins = e.get(f"{name}.position_ids", torch.arange(ids.shape[1]).expand_as(ids)) == 0
    found, left = [], e[f"{name}.p"].tolist() if f"{name}.p" in e else None
    for b in range(len(ids)):
        cuts = [*begins[b].nonzero()[:, 0].tolist(), ids.shape[1]]
        for one, end in zip(cuts, cuts[1:]):
            target = labels[b, one:end] >= 0
            P, n = int(target.int().argmax()), int(target.sum())
            count = int(masked[b, one:end].sum())
            if left is None:
                ratio = 1 / float(e[f"{name}.weight"][b])
            else:
                ratio, left = left[0], left[count:]
            found.append((ids[b, one:end], masked[b, one:end], P, n, ratio))
    return zip(*found)


def t3d_batch(case, e, name):
    """The batch of a T3D case, and its other tensors."""
    get = {x: e[f"{name}.{x}"] for x in ("prompt", "prompt_mask", "response", "step_map", "noisy", "masked", "length")}
    B, N = get["response"].shape
    batch = dict(
        prompt_ids=get["prompt"],
        prompt_mask=get["prompt_mask"],
        response_ids=get["response"],
        order=torch.where(get["step_map"] > 0, get["step_map"] - 1, -1),
        length=torch.full((B,), N),  # padding fills up the last block, visible and no target
        origin=get["prompt_mask"].sum(1),
    )
    return batch, get


def official_t3d(m, case, e, name):
    batch, get = t3d_batch(case, e, name)
    reference = model.load(FOLDER / "sdar-tiny")
    reference.config.block_length = case["block"]
    if case["reference"] == "halved":
        with torch.no_grad():
            reference.layers[0].mlp.down_proj.weight *= 0.5
            reference.layers[-1].attn.o_proj.weight *= 0.5
    options = {x: case[x] for x in ("alpha", "beta", "path_weight", "path_k")}
    options.update(reference=reference, mask=get["masked"].bool(), noise=get["noisy"], path="levels")
    return baselines.t3d(m, batch, **options)


@pytest.mark.parametrize("family, k, kind", CASES)
def test_official_losses_and_gradients(family, k, kind):
    cases, e = golden_objectives(family)
    case, name = cases[k], f"{kind}.{k}"
    m = load(family, case.get("block"))
    if kind == "t3d":
        out = official_t3d(m, case, e, name)
        for x in ("ddo", "path", "ce"):
            assert float(out[x].detach()) == pytest.approx(case[x], abs=1e-4), x
    else:
        ids, masked, start, length, ratio = rows_of(case, e, name)
        batch, mask = batch_of(ids, start, length, masked)
        options = {x: case[x] for x in ("norm", "weighting") if x in case}
        options = dict(weighting="scheduler", norm="token") | options
        out = baselines.nelbo(m, batch, mask=mask, ratio=torch.tensor(ratio), **options)
    assert float(out["loss"].detach()) == pytest.approx(case["loss"], abs=1e-4)
    out["loss"].backward()
    compared = 0
    for ours, p in m.named_parameters():
        official = e.get(f"{name}.grad.{m.checkpoint_name(ours)}")
        if official is not None:
            assert (p.grad - official).norm() <= 1e-5 * official.norm(), ours
            compared += 1
    assert compared >= 5


def test_official_states():
    """Those that the code of T3D draws by ratio mask the tokens that were decoded first."""
    cases, e = golden_objectives("sdar")
    compared = 0
    for k, case in enumerate(cases):
        if case["kind"] == "t3d" and case["ratios"] is not None:
            batch, get = t3d_batch(case, e, f"t3d.{k}")
            mask = preference.draw_block_mask(batch, case["block"], "earlier", ratio=torch.tensor(case["ratios"]))
            assert torch.equal(mask, get["masked"].bool())
            compared += 1
    assert compared == 3


# ------------------------------------------------------------------------------------------------- the clean copy


@pytest.fixture(scope="module")
def qwen3():
    return {family: load(family) for family in FAMILIES}


def random_batch(lengths, seed, P=6, vocab=299):
    """Responses of these lengths in a random decode order, left-padded prompts of 1..P tokens."""
    g = torch.Generator().manual_seed(seed)
    records = []
    for n in lengths:
        prompt = torch.randint(0, vocab, (int(torch.randint(1, P + 1, (), generator=g)),), generator=g)
        response = torch.randint(0, vocab, (n,), generator=g)
        order = torch.randperm(n, generator=g)
        records.append(dict(prompt_ids=prompt.tolist(), response_ids=response.tolist(), order=order.tolist()))
        records[-1]["entropy"] = (order / 10).tolist()
    return data.collate(records, 300)


def with_origin(batch, grid):
    if grid == "prompt":
        batch["origin"] = batch["prompt_mask"].sum(1)
    return batch


def row_of(batch, b):
    """Row b alone, without padding, on its own grid."""
    one = single(batch, b)
    if "origin" in batch:
        one["origin"] = batch["origin"][b : b + 1]
    return one


def block_by_block(m, row, visible, b):
    """log p at every position of one row without padding: for each block a plain pass over the true tokens before it
    and its own masked ones."""
    origin = int(row.get("origin", torch.zeros(1))[0])
    P = row["prompt_ids"].shape[1]
    clean = torch.cat((row["prompt_ids"][0], row["response_ids"][0]))
    noisy = torch.cat((row["prompt_ids"][0], torch.where(visible, row["response_ids"][0], m.config.mask_id)))
    block = (torch.arange(len(clean)) - origin) // b
    found = []
    for k in block.unique():
        ids = torch.cat((clean[block < k], noisy[block == k]))
        found.append(m(ids[None], origin=origin)[0, int((block < k).sum()) :])
    return torch.cat(found)[P:].log_softmax(-1)


lengths = st.lists(st.integers(1, 14), min_size=1, max_size=3)
grids = st.sampled_from(["start", "prompt"])


@quick
@given(st.sampled_from(FAMILIES), lengths, st.sampled_from([1, 2, 4, 5, 32]), grids, st.integers(0, 99))
def test_every_block_is_predicted_from_its_own_tokens_and_a_clean_past(qwen3, family, lengths, b, grid, seed):
    m, batch = qwen3[family], with_origin(random_batch(lengths, seed), grid)
    m.config.block_length = b
    visible = torch.rand(batch["order"].shape, generator=generators(seed)[0]) < 0.5
    positions = objectives.place_of(visible)
    with torch.no_grad():
        found = objectives.log_probs(m, batch, visible, positions)
        for r, n in enumerate(lengths):
            slow = block_by_block(m, row_of(batch, r), visible[r, :n], b)
            torch.testing.assert_close(found[r, :n], slow, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_the_clean_copy_a_block_sees_the_masks_of_earlier_ones(qwen3, family):
    m, batch = qwen3[family], random_batch([12], 0)
    m.config.block_length = 4
    nothing = torch.zeros(1, 12, dtype=torch.bool)
    with torch.no_grad():
        clean = objectives.log_probs(m, batch, nothing, objectives.place_of(nothing))
        masks = objectives.log_probs(m, batch, nothing, objectives.place_of(nothing), clean=False)
    begin = int(batch["prompt_mask"].sum()) % 4
    torch.testing.assert_close(clean[:, : 4 - begin], masks[:, : 4 - begin], rtol=0, atol=1e-4)  # the first block
    assert ((clean - masks)[:, 4 - begin :].abs().amax(-1) > 0.1).all()


# ----------------------------------------------------------------------------------------- every objective on blocks

# Arguments that draw nothing at random but from the generators.
WAYS = [
    ("tabom", dict(window=5)),
    ("tabom", dict(window=4, entropy_context="step")),
    ("transition", {}),
    ("traj", {}),
    ("nelbo", {}),
    ("nelbo", dict(weighting="scheduler", norm="token")),
    ("nelbo", dict(weighting="scheduler", norm="sequence")),
    ("nelbo", dict(weighting="uniform", norm="batch")),
    ("dparallel", dict(block_length=3)),
    ("ideal", dict(window=4)),
    ("ideal", dict(masks="subset")),
    ("t3d", {}),
    ("t3d", dict(path="levels", path_k=2, masked="earlier")),
    ("t3d", dict(preference="none", fake="sample", reduction="sum")),
]
way = pytest.mark.parametrize("name, options", WAYS, ids=[f"{name}-{i}" for i, (name, _) in enumerate(WAYS)])


def more_of(name, family):
    """What t3d cannot do without: a reference that differs from the model."""
    if name != "t3d":
        return {}
    reference = load(family, 4)
    with torch.no_grad():
        reference.layers[0].mlp.down_proj.weight *= 0.5
    return dict(reference=reference)


@way
@pytest.mark.parametrize("grid", ["start", "prompt", None])
def test_a_batch_is_the_mean_of_its_rows(qwen3, name, options, grid):
    """Padding on both sides changes nothing, nor do the other rows; parts of a batch add up."""
    m, batch = qwen3["sdar"], with_origin(random_batch([13, 6, 1, 9], 3), grid)
    m.config.block_length = 4 if grid else None
    objective, options = objectives.OBJECTIVES[name].loss, {**options, **more_of(name, "sdar")}
    seeds = (5, 6, 7, 8)
    if name == "tabom":
        options["pair_share"] = objectives.share_with_pairs(batch, options["window"], generator=generators(*seeds))
    if options.get("norm") == "token":
        options["targets"] = float(batch["length"].float().mean())
    with torch.no_grad():
        whole = objective(m, batch, generator=generators(*seeds), **options)
        total = 0.0
        for b, seed in enumerate(seeds):
            total += float(objective(m, row_of(batch, b), generator=generators(seed), **options)["loss"]) / 4
    assert float(whole["loss"]) == pytest.approx(total, abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@way
def test_one_block_for_all_is_attention_over_everything(qwen3, family, name, options):
    m, batch = qwen3[family], random_batch([13, 6, 9], 4)
    objective, options = objectives.OBJECTIVES[name].loss, {**options, **more_of(name, family)}
    if name == "t3d":
        options = more_of(name, family)  # the levels of a path depend on the block length
        options["start"] = torch.tensor([2, 0, 5])  # the same state for both
    found = []
    for block_length in (64, None):
        m.config.block_length = block_length
        if name == "t3d":
            options["reference"].config.block_length = block_length
        with torch.no_grad():
            found.append(objective(m, batch, generator=generators(1, 2, 3), **options))
    for key, value in found[0].items():
        assert float(value) == pytest.approx(float(found[1][key]), abs=1e-4), key


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("grid", ["start", "prompt"])
def test_a_block_of_dparallel_is_one_of_the_attentions(qwen3, family, grid, monkeypatch):
    """What its pass masks is seen by no token that it asks for, wherever the response begins in the grid."""
    m, batch, seen, asked = qwen3[family], with_origin(random_batch([11, 9, 10], 4), grid), [], []

    def watched(m, batch, visible, positions, mask_id):
        seen.append((visible, objectives.log_probs(m, batch, visible, positions, mask_id)))
        return seen[-1][1]

    def selected(masked, key):
        positions, real = objectives.select(masked, key)
        asked.append(real)
        return positions, real

    monkeypatch.setattr(baselines.certainty, "log_probs", watched)
    monkeypatch.setattr(baselines.certainty, "select", selected)
    m.config.block_length = 4
    mask = torch.arange(batch["order"].shape[1]).expand(3, -1) % 2 == 0
    with torch.no_grad():
        baselines.dparallel(m, batch, mask=mask, generator=generators(1, 2, 3))
        (visible, before), _ = seen
        batch["response_ids"] = torch.where(visible, batch["response_ids"], batch["response_ids"] + 1)
        baselines.dparallel(m, batch, mask=mask, generator=generators(1, 2, 3))
    assert torch.equal(seen[2][0], visible) and torch.equal(asked[2], asked[0]) and asked[0].any()
    assert torch.allclose(seen[2][1][asked[0]], before[asked[0]], atol=1e-5)


def test_blocks_of_one_token_are_a_causal_model(qwen3):
    """Each token is predicted from a mask behind the true tokens before it."""
    m, batch = qwen3["sdar"], random_batch([7], 5)
    m.config.block_length = 1
    with torch.no_grad():
        out = baselines.traj(m, batch, start=torch.tensor([0]))
        ids = torch.cat((batch["prompt_ids"], batch["response_ids"]), dim=1)[0]
        loss, P = 0.0, batch["prompt_ids"].shape[1]
        for i in range(P, len(ids)):
            row = torch.cat((ids[:i], torch.tensor([305])))[None]
            loss -= float(m(row)[0, -1].log_softmax(-1)[ids[i]]) / 7
    assert float(out["loss"]) == pytest.approx(loss, abs=1e-4)


def test_a_callable_without_config_can_be_the_reference(qwen3):
    m, batch = qwen3["sdar"], random_batch([8, 5], 6)
    m.config.block_length = 4
    with torch.no_grad():
        plain = baselines.t3d(m, batch, reference=lambda *x, **more: m(*x, **more), generator=generators(0, 1))
        own = baselines.t3d(m, batch, reference=m, generator=generators(0, 1))
    assert float(plain["loss"]) == pytest.approx(float(own["loss"]), abs=1e-5)


# --------------------------------------------------------------------------------------------- SFT with a mask ratio


def test_sft_by_ratio_divides_as_it_says(qwen3):
    m, batch = qwen3["a2d"], random_batch([6, 3], 7)
    m.config.block_length = 4
    mask = torch.tensor([[1, 0, 1, 1, 0, 0], [0, 1, 0, 0, 0, 0]]).bool()
    ratio = torch.tensor([0.5, 0.25])
    with torch.no_grad():
        mean = objectives.masked_nll(m, batch, mask)  # [2]
        sums = (mean * torch.tensor([3, 1])).tolist()

        def loss(weighting, norm, **more):
            out = baselines.nelbo(m, batch, mask=mask, ratio=ratio, weighting=weighting, norm=norm, **more)
            return float(out["loss"])

        assert loss("scheduler", "token") == pytest.approx((sums[0] / 0.5 + sums[1] / 0.25) / 9)
        assert loss("scheduler", "sequence") == pytest.approx((sums[0] / 0.5 / 6 + sums[1] / 0.25 / 3) / 2)
        assert loss("uniform", "batch") == pytest.approx(sum(sums) / 2)
        assert loss("uniform", "token", targets=4.5) == loss("uniform", "token")
        assert loss("mean", "token") == pytest.approx(float(mean.mean()))  # today's, whatever the norm
    for options in (dict(weighting="other"), dict(norm="other")):
        with pytest.raises(ValueError, match="'other' is none of"):
            baselines.nelbo(m, batch, **options)
    with pytest.raises(ValueError, match="divides by the ratio"):
        baselines.nelbo(m, batch, mask=mask, weighting="scheduler")


def test_mask_ratios_are_uniform_and_masks_follow_them():
    batch = random_batch([40] * 2000, 8)
    ratio, mask = weighted.draw_ratio_mask(batch, generators(0)[0])
    assert ratio.min() >= 0.001 and ratio.max() <= 1
    assert float(ratio.mean()) == pytest.approx(0.5, abs=0.03)
    assert float((mask.float().mean(1) - ratio).mean()) == pytest.approx(0, abs=0.01)
    assert float((mask.float().mean(1) - ratio).std()) < 0.1
    # SFT's loss is Eq. 1's: over the ratios, each number of masked tokens is equally likely (0 has no loss)
    counts = torch.bincount(mask.sum(1), minlength=41)
    assert counts.max() < 3 * 2000 / 41


def test_a_row_in_which_nothing_is_masked_has_no_loss(qwen3):
    m, batch = qwen3["sdar"], random_batch([3, 2], 9)
    m.config.block_length = 4
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    out = baselines.nelbo(m, batch, mask=nothing, weighting="uniform")
    out["loss"].backward()
    assert out["loss"].item() == 0


# ------------------------------------------------------------------------------------------------------ T3D's states


@quick
@given(lengths, st.integers(1, 6), grids, st.integers(0, 99))
def test_places_in_a_block_by_plain_loops(lengths, b, grid, seed):
    batch = with_origin(random_batch(lengths, seed), grid)
    batch["order"][torch.rand(batch["order"].shape, generator=generators(seed)[0]) < 0.2] = -1  # never decoded
    place, count = preference.ranks_in_block(batch, b)
    for r, n in enumerate(lengths):
        P, order = int(batch["prompt_mask"][r].sum()), batch["order"][r].tolist()
        origin = P if grid == "prompt" else 0
        blocks = {}
        for i in range(n):
            if order[i] >= 0:
                blocks.setdefault((P + i - origin) // b, []).append((order[i], i))
        for members in blocks.values():
            for k, (_, i) in enumerate(sorted(members)):
                assert (int(place[r, i]), int(count[r, i])) == (k, len(members))


@pytest.mark.parametrize("masked", ["later", "earlier"])
def test_a_state_masks_a_share_of_every_block(masked):
    batch = random_batch([10] * 4000, 1, P=3)
    mask = preference.draw_block_mask(batch, 4, masked, generators(2)[0])
    place, count = preference.ranks_in_block(batch, 4)
    shares = {1.0: 0, 0.75: 0, 0.5: 0, 0.25: 0}
    for row, k, n in zip(mask, place.tolist(), count.tolist()):
        fits = []
        for ratio in shares:
            wanted = []
            for place_, n_ in zip(k, n):
                m_ = int(n_ * ratio)
                wanted.append(place_ < m_ if masked == "earlier" else place_ >= n_ - m_)
            if wanted == row.tolist():
                fits.append(ratio)
        assert fits
        shares[fits[0]] += 1
    total = sum(r**8 for r in shares)
    assert shares[1.0] / 4000 == pytest.approx(1 / total, abs=0.02)
    assert shares[0.75] / 4000 == pytest.approx(0.75**8 / total, abs=0.02)
    assert torch.equal(mask[:5], preference.draw_block_mask(batch, 4, masked, generators(2)[0])[:5])


def test_states_of_blocks_of_one_token_are_never_empty():
    batch = random_batch([5] * 300, 2)
    assert preference.draw_block_mask(batch, 1, generator=generators(0)[0]).all()
    with pytest.raises(ValueError, match="'other' is neither 'later' nor 'earlier'"):
        preference.draw_block_mask(batch, 1, "other")


def test_two_of_a_rows_masked_ends_are_targets(qwen3):
    m, batch = qwen3["a2d"], random_batch([9], 3)
    m.config.block_length = 4
    batch["response_ids"][0, 4:] = torch.tensor([302, 300, 302, 7, 300])  # EOS, padding, EOS, a token, padding
    everything = torch.ones(1, 9, dtype=torch.bool)
    mask, target = preference.t3d_state(m, batch, mask=everything)
    assert mask.all() and target[0].tolist() == [True] * 6 + [False, True, False]
    m.config.block_length = None
    assert preference.t3d_state(m, batch, mask=everything)[1].all()


def test_the_path_by_levels_is_the_mean_of_its_levels(qwen3):
    m, batch = qwen3["a2d"], random_batch([8], 4)
    m.config.block_length = 4
    batch["origin"] = batch["prompt_mask"].sum(1)
    batch["order"] = torch.tensor([[0, 1, 2, 3, 7, 6, 5, 4]])
    batch["response_ids"][0, 7] = 302  # the EOS, first of its block: it does not count
    ce = torch.arange(8.0)[None]
    positions, real = objectives.select(torch.ones(1, 8, dtype=torch.bool), batch["order"])
    at = ce.gather(1, positions)
    first = (0 + 1 + 6) / 3  # positions 0, 1 and, of 7 and 6, only 6
    every = (0 + 1 + 2 + 3 + 4 + 5 + 6) / 7
    found = preference.path_by_levels(m, batch, at, positions, real, 2)
    assert found.tolist() == pytest.approx([(first + every) / 2])
    with pytest.raises(ValueError, match="path 'other' is neither"):
        baselines.t3d(m, batch, path="other", reference=m)


# ------------------------------------------------------------------------------------ what decoding logged, replayed


@pytest.mark.parametrize("family, steps", [("sdar", 1), ("sdar", 2), ("a2d", 1), ("a2d", 2)])
def test_a_replay_has_the_entropies_that_decoding_logged(qwen3, family, steps):
    """At each token's own step; with one step a block several tokens have the same."""
    m, batch = qwen3[family], random_batch([1, 1, 1], 11, P=9)
    m.config.block_length = b = 4
    prompts = [torch.arange(1, n) for n in (5, 10, 3)]
    ids, mask = data.pad_left([p.tolist() for p in prompts], 300)
    N = 12
    t = decode.generate(
        m,
        ids,
        mask,
        max_new_tokens=N,
        schedule=family,
        strategy="confidence",
        steps=N // b * (b // steps),
        suppress=[305],
    )
    order = t.step  # decode steps: equal numbers were decoded together
    batch = dict(prompt_ids=ids, prompt_mask=mask, response_ids=t.response, order=order, length=torch.full((3,), N))
    if family == "a2d":
        batch["origin"] = mask.sum(1)
    own = baselines.entropies_when_decoded(objectives.replay(m, batch), batch)
    logged = objectives.in_decode_order(t.entropy, batch)
    # SDAR's last block may end beyond N: tokens that were cut off were seen by the others in it
    whole = objectives.in_decode_order(objectives.place_of(order), batch)
    end = N - ((mask.sum(1) + N) % b if family == "sdar" else torch.zeros(3, dtype=torch.long))
    inside = whole < end[:, None]
    assert inside.sum() >= 30 and inside.sum(1).max() == N
    torch.testing.assert_close(own[inside], logged[inside], rtol=0, atol=1e-4)
    # and tabom's "step" context has them, too
    out = objectives.tabom(m, batch, window="global", start=torch.tensor([[0, 2]] * 3), entropy_context="step")
    early = order < 2
    expected = torch.where(early, t.entropy, 0.0).sum(1) / early.sum(1)
    assert float(out["entropy"]) == pytest.approx(float(expected.mean()), abs=1e-4)


# ------------------------------------------------------------------------------------------------------ the command


def test_records_end_with_a_whole_block():
    record = dict(id=0, prompt_ids=[1, 2, 3], response_ids=[4, 5, 6], order=None)
    assert whole_blocks(record, 4, "start", 9)["response_ids"] == [4, 5, 6, 9, 9]
    assert whole_blocks(record, 4, "prompt", 9)["response_ids"] == [4, 5, 6, 9]
    assert whole_blocks(record, 3, "start", 9) == record
    # of a trajectory, the blocks in which nothing was decoded go
    order, ids = [0, 2, 1, -1, -1, -1, -1, -1], list(range(4, 12))
    record = dict(id=0, prompt_ids=[1, 2, 3], response_ids=ids, order=order, entropy=[0.5] * 8, non_ltr=[1, 7])
    shorter = whole_blocks(record, 4, "start", 9)
    assert shorter["non_ltr"] == [1]
    assert (shorter["response_ids"], shorter["order"]) == (ids[:5], order[:5]) and len(shorter["entropy"]) == 5
    assert whole_blocks(record, 4, "prompt", 9)["order"] == order[:4]
    assert whole_blocks(record, 32, "start", 9) == record


@pytest.fixture(scope="module")
def small(tiny, puzzles, tmp_path_factory):
    """family -> the flags of a random model with the tiny model's tokenizer, and its trajectories."""
    found = {}
    for family in FAMILIES:
        folder = tmp_path_factory.mktemp(family)
        raw = json.loads((FOLDER / f"{family}-tiny" / "config.json").read_text())
        raw |= dict(vocab_size=len(tiny_model.vocabulary()), mask_token_id=0, eos_token_id=1, pad_token_id=2)
        raw |= dict(bos_token_id=2, initializer_range=0.3, num_hidden_layers=2)
        changed = changed_model(folder, tiny, lambda f: (f / "generation_config.json").unlink())
        model.save(model.create(raw, generators(0)[0]), changed)
        own = dict(model=changed, block_causal=8 if family == "a2d" else 4)
        out = folder / "T"
        options = dict(own, data=puzzles, out=out, max_new_tokens=24, check="exact")
        assert tabom.main(["distill", *flags(**options)]) == 0
        found[family] = own, out
    return found


LOOP = dict(keep="all", epochs=8, global_batch=12, batch_size=4, lr=1e-2, warmup=0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rank", [4, 0], ids=["lora", "full"])
@pytest.mark.parametrize(
    "more",
    [
        dict(objective="tabom", window=8),
        dict(objective="t3d", reference_steps=3, path="levels"),
        dict(objective="nelbo", weighting="scheduler"),
    ],
    ids=lambda more: more["objective"],
)
@pytest.mark.slow
def test_the_whole_loop(small, puzzles, tmp_path, capsys, family, rank, more):
    """Distil, train, be killed and continue, decode with what was trained; merge an adapter."""
    own, trajectories = small[family]
    setting = dict(own, data=trajectories, lora_rank=rank, held_out=2, **LOOP, **more)
    setting["lr"] = 1e-2 if rank else 1e-3
    once, again = tmp_path / "once", tmp_path / "again"
    result = run(capsys, "train", out=once, **setting)[0]
    losses = [line["ce"] for line in metrics(once)]
    assert sum(losses[-3:]) < sum(losses[:3])
    assert meta(once)["grid"] == ("prompt" if family == "a2d" else "start")
    shutil.copytree(once, again)
    shutil.rmtree(again / "epoch-8")
    assert run(capsys, "train", out=again, **setting)[0]["loss"] == result["loss"]
    for file in (once / "epoch-8").glob("*.safetensors"):
        assert file.read_bytes() == (again / "epoch-8" / file.name).read_bytes()
    fails(capsys, "grid was", "train", out=again, **setting, grid="start" if family == "a2d" else "prompt")
    trained = dict(own, adapter=once / "epoch-8") if rank else dict(own, model=once / "epoch-8")
    decoding = dict(data=puzzles, max_new_tokens=24, limit=3)
    found = run(capsys, "distill", out=tmp_path / "T", **trained, **decoding)[0]
    assert found["trajectories"] == 3
    if rank:
        run(capsys, "merge", model=own["model"], adapter=once / "epoch-8", out=tmp_path / "M")
        merged = dict(own, model=tmp_path / "M")
        run(capsys, "distill", out=tmp_path / "T2", **merged, **decoding)
        assert decoded(tmp_path / "T2").keys() == decoded(tmp_path / "T").keys()


@pytest.mark.parametrize("name", ["tabom", "nelbo", "traj"])
def test_a_step_does_not_depend_on_how_its_batch_is_split(small, tmp_path, capsys, name):
    own, trajectories = small["sdar"]
    more = dict(nelbo=dict(weighting="scheduler"), tabom=dict(window=8)).get(name, {})
    found = []
    for size in (1, 5):
        out = tmp_path / f"{size}"
        options = dict(own, data=trajectories, out=out, objective=name, **more)
        run(capsys, "train", **options, **{**LOOP, "batch_size": size, "epochs": 2})
        terms = ("loss", "ce", "ranking", "in_order", "entropy", "masked")
        for line in metrics(out):
            found.append({term: line[term] for term in terms if term in line})
    steps = len(found) // 2
    for one, other in zip(found[:steps], found[steps:]):
        assert one == pytest.approx(other, abs=1e-4)


def test_a_grid_is_for_models_with_blocks(tiny, trajectories, tmp_path, capsys):
    options = dict(model=tiny, data=trajectories, out=tmp_path / "R", grid="start", keep="all")
    fails(capsys, "--grid start: .* sees everything, without blocks", "train", **options)


def test_answers_of_a_dataset_fill_their_last_block(small, puzzles, tmp_path, capsys):
    own, _ = small["sdar"]
    options = dict(own, data=puzzles, out=tmp_path / "R", objective="nelbo", norm="batch", **LOOP)
    result, errors = run(capsys, "train", **options)
    assert result["steps"] == 8
    assert "--norm: not used by --objective nelbo" in errors  # of the mean
