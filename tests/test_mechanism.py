"""mechanism.py: decode orders and entropies against the base model: python -m pytest tests/test_mechanism.py"""

import json
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

import baselines
import objectives
from experiments import mechanism, tiny
from runs import loading, torchrun


@given(st.permutations(range(12)), st.lists(st.integers(0, 40), min_size=12, max_size=12, unique=True))
def test_the_rank_correlation_is_spearmans(a, b):
    assert mechanism.rank_correlation(a, b) == pytest.approx(scipy_stats.spearmanr(a, b).statistic)


def test_a_model_against_itself_and_against_another_order(tmp_path):
    """The base model's own trajectories have KL 0; reversed orders have the correlation -1."""
    processes = torchrun.Processes("cpu", alone=True)
    loaded = loading.load_model(loading.ModelOptions(model=str(tiny.TINY), device="cpu"), processes)
    rng, rows = random.Random(0), []
    for i in range(6):
        order = rng.sample(range(37), 37)
        prompt = [3 + rng.randrange(4) for _ in range(5)]
        response = [6 + rng.randrange(6) for _ in range(37)]
        row = dict(id=i, prompt_ids=prompt, response_ids=response, order=order, answer=["1" * 36], correct=i % 2 == 0)
        rows.append(row)
    batch = loading.batch_of(rows, loaded, processes)
    with torch.no_grad():
        h = baselines.entropies_when_decoded(objectives.replay(loaded.m, batch), batch)
    for row, values in zip(rows, h.tolist()):
        row["entropy"] = [values[step] for step in row["order"]]  # each step decoded one token
    changed = []
    for row in rows:
        turned = row["id"] in (2, 4)
        order = [36 - step for step in row["order"]] if turned else row["order"]
        changed.append(dict(row, order=order, correct=turned))
    for name, these in (("before", rows), ("after", changed)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trajectories-00000.jsonl").write_text("".join(json.dumps(r) + "\n" for r in these))

    same = mechanism.against_base(loaded, processes, tmp_path / "before", tmp_path / "before")
    assert same["correlation"] == 1 and same["kl"] == pytest.approx(0, abs=1e-6)
    assert same["entropy"] == pytest.approx(same["entropy_before"], rel=1e-5) and same["entropy"] > 0
    found = mechanism.against_base(loaded, processes, tmp_path / "after", tmp_path / "before")
    assert found["correlation"] == pytest.approx(1 / 3)


def test_the_kl_along_trajectories_is_that_of_the_masked_positions():
    processes = torchrun.Processes("cpu", alone=True)
    loaded = loading.load_model(loading.ModelOptions(model=str(tiny.TINY5), device="cpu"), processes)
    rng, rows = random.Random(0), []
    for i in range(3):
        response = [6 + rng.randrange(5) for _ in range(4)]
        rows.append(dict(id=i, prompt_ids=[4, 5, 6], response_ids=response, order=rng.sample(range(4), 4)))
    before = mechanism.states(loaded, processes, rows)
    assert mechanism.kl_to(before, loaded) == pytest.approx(0, abs=1e-7)
    with torch.no_grad():
        loaded.m.head.weight.mul_(0.5)
    found, values = mechanism.kl_to(before, loaded), []
    for r in rows:  # the same, position by position
        for step in range(4):
            seen = [t if o < step else loaded.m.config.mask_id for t, o in zip(r["response_ids"], r["order"])]
            with torch.no_grad():
                now = loaded.m(torch.tensor([r["prompt_ids"] + seen]))[0, 3:]
            p, q = (2 * now).log_softmax(-1), now.log_softmax(-1)
            kl = (p.exp() * (p - q)).sum(-1)
            values += [kl[i].item() for i, o in enumerate(r["order"]) if o >= step]
    assert found == pytest.approx(sum(values) / len(values), rel=1e-4) and found > 0
