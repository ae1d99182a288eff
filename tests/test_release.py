"""objectives.py against what the authors' own code computed on the tiny checkpoints (tests/golden/release): training
losses with every LoRA gradient, two whole trainings, and the entropy variances of decoding.

python -m pytest tests/test_release.py
"""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import lora
import model
import objectives

FAMILIES = ("llada", "dream")
MASK_ID = 300
LATER = 10**9  # after every step

# Cases of train-llada and train-dream that are not simply one call of tabom, and why.
TOKEN_MEAN = {
    "llada": {5, 6, 8, 9, 10, 15, 16},
    "dream": {6, 9, 10, 15, 16},
}  # the release averages the cross-entropy over the tokens of a batch, Eq. 9 over its rows: here the rows have
# different numbers of targets, so the test weights our rows with their tokens
NO_WINDOW = {6}  # a row with no more steps than W: no loss there, the whole response is a window here
WITHOUT_PADDING = {8, 9, 10, 16}  # padding is context, and never a target
TWO_WINDOWS = {12}  # ranks a part of what it reconstructs: two calls from the same start
RANDOM_MASKS = {15, 16, 17}  # SFT: nelbo with the masks given
CASES = {"llada": 19, "dream": 18}
EVERY_CASE = [(family, j) for family in FAMILIES for j in range(CASES[family])]
ONE_CALL = [(family, j) for family, j in EVERY_CASE if j not in TOKEN_MEAN[family]]

# Decodes whose variances are of other logits than the model's own: EOS was taken out of them (llada 2, logits_eos_inf),
# or credit was added to them (llada 15, alg credit).
CHANGED_LOGITS = {("llada", 2), ("llada", 15)}
DECODES = [(family, j) for family in FAMILIES for j in range(18)]


def read(request, kind, family):
    folder = request.config.rootpath / "tests" / "golden"
    tiny = folder / f"{family}-tiny"
    return SimpleNamespace(
        folder=tiny,
        numbers=json.loads((folder / "release" / f"{kind}-{family}.json").read_text()),
        tensors=load_file(folder / "release" / f"{kind}-{family}.safetensors"),
    )


def adapted(folder):
    return lora.load(model.load(folder), folder / "adapter")


def left_to_right(order, N):
    """The release reads a missing order, and one that is too short, as left to right."""
    return order if order is not None and len(order) == N else list(range(N))


def batch_of(release, j):
    """The batch of case j. Without padding as a target: padding that is not context is never decoded."""
    case, tensors = release.numbers[j], release.tensors
    response = tensors[f"train.{j}.response"]
    B, N = response.shape
    orders = case["decoding_order"] or [None] * B
    batch = dict(
        prompt_ids=tensors[f"train.{j}.prompt"],
        prompt_mask=tensors[f"train.{j}.prompt_mask"],
        response_ids=response,
        order=torch.tensor([left_to_right(order, N) for order in orders]),
        length=torch.full((B,), N),
    )
    if not case["include_padding"] and case["cut"]:
        padding = torch.arange(N) >= torch.tensor(case["first_padding"])[:, None]
        after = batch["order"] >= torch.tensor([LATER if cut is None else cut for cut in case["cut"]])[:, None]
        batch["order"] = torch.where(padding & after, -1, batch["order"])
    return batch


def rows_of(batch, rows):
    return {key: value[rows] for key, value in batch.items()}


class Loss:
    """ce and ranking of case j by our functions, as the release averages them."""

    def __init__(self, m, release, j):
        self.m, self.case, self.batch = m, release.numbers[j], batch_of(release, j)
        self.supervised = release.tensors[f"train.{j}.supervised"]
        self.options = dict(window=self.case["window"], margin=self.case["margin"], mask_id=MASK_ID)
        self.trained = [b for b, tokens in enumerate(self.case["supervised_tokens"]) if tokens]

    def objective(self, rows, **more):
        batch = rows_of(self.batch, rows)
        if self.case["mask_schedule"] != "td":
            return objectives.nelbo(self.m, batch, mask=self.supervised[rows], mask_id=MASK_ID)
        start = torch.tensor([self.case["cut"][b] for b in rows])
        return objectives.tabom(self.m, batch, start=start, **(self.options | more))

    def ce(self):
        """Mean over the batch's tokens: our rows, weighted with their tokens."""
        total = 0.0
        for b in self.trained:
            total = total + self.objective([b], weight=0.0)["loss"] * self.case["supervised_tokens"][b]
        return total / sum(self.case["supervised_tokens"])

    def ranking(self):
        if not self.case["ranked_rows"]:
            return torch.zeros(())
        alone = dict(window=self.case["rank_window"], ce_weight=0.0, weight=1.0)
        return self.objective(self.trained, **alone)["loss"]


def same_gradients(m, release, j):
    compared = 0
    for name, p in lora.tensors(m).items():
        official = release.tensors[f"train.{j}.grad.{name}"]
        assert (p.grad - official).norm() <= 1e-4 * official.norm(), name
        compared += 1
    assert compared == 8


def model_of(release, case):
    m = adapted(release.folder)
    if case.get("model_uses_attention_mask") is False:  # LLaDA's older official file does not know masks
        return m, lambda ids, attention_mask=None, positions=None: m(ids, positions=positions)
    return m, m


@pytest.mark.parametrize("family, j", EVERY_CASE)
def test_losses_and_gradients(request, family, j):
    """Every case: their loss, put together from ours where the release averages otherwise."""
    release = read(request, "train", family)
    case = release.numbers[j]
    m, called = model_of(release, case)
    loss = Loss(called, release, j)
    ce, ranking = loss.ce(), loss.ranking()
    whole = ce + case["weight"] * ranking
    assert ce.item() == pytest.approx(case["ce"], abs=1e-5)
    assert ranking.item() == pytest.approx(case["rank_loss"], abs=1e-5)
    assert whole.item() == pytest.approx(case["loss"], abs=1e-5)
    whole.backward()
    same_gradients(m, release, j)


@pytest.mark.parametrize("family, j", ONE_CALL)
def test_losses_and_gradients_of_one_call(request, family, j):
    """The cases in which a single call on the whole batch is the release's loss: all but TOKEN_MEAN."""
    release = read(request, "train", family)
    case = release.numbers[j]
    m, called = model_of(release, case)
    loss = Loss(called, release, j)
    if j in TWO_WINDOWS:
        out = loss.objective(loss.trained, weight=0.0)
        ranked = loss.objective(loss.trained, window=case["rank_window"], ce_weight=0.0, weight=case["weight"])
        total = out["loss"] + ranked["loss"]
    else:
        weight = case["weight"] if case["rank"] else 0.0
        total = loss.objective(loss.trained, weight=weight)["loss"]
    assert total.item() == pytest.approx(case["loss"], abs=1e-5)
    total.backward()
    same_gradients(m, release, j)


def test_the_lists_of_exceptions_name_what_they_say(request):
    for family in FAMILIES:
        cases = read(request, "train", family).numbers
        assert len(cases) == CASES[family]
        for j, case in enumerate(cases):
            windows = case["cut"] or []
            assert (None in windows) == (j in NO_WINDOW)
            assert (not case["include_padding"]) == (j in WITHOUT_PADDING)
            assert (case["window"] != case["rank_window"]) == (j in TWO_WINDOWS)
            assert (case["mask_schedule"] != "td") == (j in RANDOM_MASKS)
            unequal = len(set(case["supervised_tokens"])) > 1
            assert unequal == (j in TOKEN_MEAN[family])


@pytest.mark.parametrize("family, j", EVERY_CASE)
def test_what_is_visible_and_what_is_a_target(request, family, j):
    release = read(request, "train", family)
    case, batch = release.numbers[j], batch_of(release, j)
    if j in RANDOM_MASKS:
        assert not (release.tensors[f"train.{j}.visible"] & release.tensors[f"train.{j}.supervised"]).any()
        return
    rows = [b for b, cut in enumerate(case["cut"]) if cut is not None]
    start = torch.tensor([case["cut"][b] for b in rows])
    first, size = objectives.draw_windows(rows_of(batch, rows), case["window"], start)
    visible, positions, real = objectives.context_and_targets(rows_of(batch, rows), first, size)
    supervised = torch.zeros_like(visible)
    for b in range(len(rows)):
        supervised[b, positions[b][real[b]]] = True
    assert torch.equal(visible, release.tensors[f"train.{j}.visible"][rows])
    assert torch.equal(supervised, release.tensors[f"train.{j}.supervised"][rows])


@pytest.mark.parametrize("family, j", EVERY_CASE)
def test_entropies_and_the_ranking_of_each_row(request, family, j):
    release = read(request, "train", family)
    case = release.numbers[j]
    if not case["ranked_rows"]:
        assert j in RANDOM_MASKS or not case["rank"]
        return
    m, called = model_of(release, case)
    loss = Loss(called, release, j)
    with torch.no_grad():
        for b, expected in zip(case["ranked_rows"], case["rank_rows"]):
            out = loss.objective([b], window=case["rank_window"])
            assert float(out["ranking"]) == pytest.approx(expected, abs=1e-5)
            batch, N = rows_of(loss.batch, [b]), loss.batch["order"].shape[1]
            everywhere = torch.arange(N)[None]
            visible = release.tensors[f"train.{j}.visible"][[b]]
            h = objectives.entropy(objectives.log_probs(called, batch, visible, everywhere, MASK_ID))
            torch.testing.assert_close(h[0], release.tensors[f"train.{j}.entropy"][b], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_without_a_window_is_trained_as_a_whole_here(request, family):
    (j,) = NO_WINDOW
    release = read(request, "train", family)
    case, batch = release.numbers[j], batch_of(release, j)
    m = adapted(release.folder)
    (short,) = [b for b, cut in enumerate(case["cut"]) if cut is None]
    first, size = objectives.draw_windows(rows_of(batch, [short]), case["window"])
    assert first.tolist() == [0] and size.tolist() == [int(batch["order"][short].max()) + 1]
    everything = torch.ones(1, batch["order"].shape[1], dtype=torch.bool)
    alone = objectives.nelbo(m, rows_of(batch, [short]), mask=everything)
    start = torch.tensor([cut or 0 for cut in case["cut"]])
    out = objectives.tabom(m, batch, window=case["window"], margin=case["margin"], start=start)
    expected = (2 * case["ce"] + alone["ce"].item()) / 3
    assert out["ce"].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_starts_of_the_release_are_among_those_that_are_drawn(request, family):
    """Among the steps of marked positions where there are any in reach, anywhere otherwise."""
    release = read(request, "train", family)
    (j,) = [j for j, case in enumerate(release.numbers) if case["non_ltr_cut"]]
    case, batch = release.numbers[j], batch_of(release, j)
    N = batch["order"].shape[1]
    batch["non_ltr"] = torch.zeros_like(batch["order"], dtype=torch.bool)
    for b, marked in enumerate(case["non_ltr_positions"]):
        for r in marked or []:
            if 0 <= r < N:
                batch["non_ltr"][b, r] = True
    drawn = []
    for seed in range(200):
        g = torch.Generator().manual_seed(seed)
        drawn.append(objectives.draw_windows(batch, case["window"], starts="non-ltr", generator=g)[0])
    drawn = torch.stack(drawn)  # [200, B]
    chosen = 0
    for b, draw in enumerate(case["drawn"]):
        if draw[0] == "choice":
            assert set(drawn[:, b].tolist()) == set(draw[1])
            chosen += 1
        else:
            assert set(drawn[:, b].tolist()) == set(range(N - case["window"] + 1))  # one more than the release's
    assert chosen >= 1


# ------------------------------------------------------------------------------------------------- whole trainings


def learning_rate(run, i):
    if i < run["warmup"]:
        return run["lr"] * i / run["warmup"]
    return run["lr"] * (1 + math.cos(math.pi * (i - run["warmup"]) / (run["steps"] - run["warmup"]))) / 2


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_training_ends_in_the_same_adapter(request, family):
    release = read(request, "run", family)
    run, tensors = release.numbers, release.tensors
    m = adapted(release.folder)
    weights = lora.tensors(m)
    recipe = dict(lr=run["lr"], betas=tuple(run["betas"]), eps=run["eps"], weight_decay=run["weight_decay"])
    optimizer = torch.optim.AdamW(weights.values(), **recipe)
    whole = dict(
        prompt_ids=tensors["run.prompt"],
        prompt_mask=tensors["run.prompt_mask"],
        response_ids=tensors["run.response"],
        order=tensors["run.decoding_order"],
        length=torch.full((run["examples"],), tensors["run.response"].shape[1]),
    )
    for i, line in enumerate(run["log"]):
        batch, start = rows_of(whole, line["items"]), torch.tensor(line["cut"])
        options = dict(window=run["window"], margin=run["margin"], weight=run["weight"])
        out = objectives.tabom(m, batch, start=start, **options)
        optimizer.zero_grad()
        out["loss"].backward()
        norm = torch.nn.utils.clip_grad_norm_(weights.values(), run["clip"])
        assert learning_rate(run, i) == pytest.approx(line["lr"], rel=1e-9)
        optimizer.param_groups[0]["lr"] = learning_rate(run, i)
        optimizer.step()
        assert out["ce"].item() == pytest.approx(line["ce"], abs=1e-4)
        assert out["ranking"].item() == pytest.approx(line["rank_loss"], abs=1e-4)
        assert float(norm) == pytest.approx(line["grad_norm"], rel=1e-3)
    assert i + 1 == run["steps"] and len(weights) == 8
    for name, p in weights.items():
        torch.testing.assert_close(p.detach(), tensors[f"run.final.{name}"], atol=1e-5, rtol=0, msg=name)


# ---------------------------------------------------------------------------------------------------- the variances


@pytest.mark.parametrize("family, j", DECODES)
def test_variances_at_every_pass(request, family, j):
    release = read(request, "decode", family)
    case, tensors = release.numbers[j], release.tensors
    changed = case.get("logits_eos_inf", False) or case["alg"] == "credit"
    assert changed == ((family, j) in CHANGED_LOGITS)
    if changed:
        return
    response = tensors[f"decode.{j}.response"]
    B, N = response.shape
    prompt = tensors[f"decode.{j}.prompt"]
    batch = dict(
        prompt_ids=prompt,
        prompt_mask=tensors.get(f"decode.{j}.prompt_mask", torch.ones_like(prompt)),
        response_ids=response,
        order=tensors[f"decode.{j}.step"],
        length=torch.full((B,), N),
    )
    m = model.load(release.folder)
    h = objectives.replay(m, batch)
    var = objectives.entropy_variance(h).nanmean(0)
    torch.testing.assert_close(var, tensors[f"decode.{j}.var"], atol=1e-5, rtol=0, equal_nan=True)
    assert h.shape[1] == case["forwards"]
    if B > 1:
        assert f"decode.{j}.var_pre" not in tensors
        return
    eos_id = -1 if case["eos"] is None else case["eos"]
    before = objectives.variance_by_step(h, batch, eos_id)[0]
    torch.testing.assert_close(before, tensors[f"decode.{j}.var_pre"], atol=1e-5, rtol=0, equal_nan=True)

    found = objectives.tds(m, batch, eos_id)
    assert found["tds"] == pytest.approx(float(tensors[f"decode.{j}.var_pre"].nanmean()), abs=1e-5, nan_ok=True)
    last = case.get("first_eos_step")
    until = case["forwards"] if last is None else last + 1
    shown = tensors[f"decode.{j}.var_pre"][:until]
    assert found["per_step"] == pytest.approx(shown[~shown.isnan()].tolist(), abs=1e-5)
    first = int(objectives.first_eos_step(batch, eos_id))
    assert last is None or first == last
