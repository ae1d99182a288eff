"""Decoding in blocks, SDAR's and A2D's ways: the official trajectories, a plain decoder, and the exact cache.

python -m pytest tests/test_sdar.py
"""

import dataclasses
import itertools
import json
import math

import pytest
import torch
from helpers import FOLDER
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import decode
import model

EXPECTED = {}  # family -> expected.json
for family in ("sdar", "a2d"):
    EXPECTED[family] = json.loads((FOLDER / f"{family}-tiny" / "expected.json").read_text())
CASES = []  # (family, list in expected.json, number, cached)
for family, part in (("sdar", "cases"), ("a2d", "cases"), ("a2d", "rounded"), ("a2d", "bd3lm")):
    CASES += itertools.product([family], [part], range(len(EXPECTED[family][part])))


@pytest.fixture(scope="module")
def qwen3():
    """family -> a tiny model; and what the official decoders did with it."""
    found = {}
    for family in EXPECTED:
        folder = FOLDER / f"{family}-tiny"
        found[family] = model.load(folder), load_file(folder / "expected.safetensors")
    return found


def uncached(m):
    """The same model for a decoder that finds no cache in it."""

    def plain(ids, **more):
        return m(ids, **more)

    plain.config = m.config
    return plain


def in_blocks(m, block):
    m.config = dataclasses.replace(m.config, block_length=block)
    return m


def seeds(*numbers):
    return [torch.Generator().manual_seed(n) for n in numbers]


def same(a, b, tolerance=1e-4):
    for name in ("response", "step", "order"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    for name in ("entropy", "confidence"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=0, atol=tolerance, equal_nan=True)


# ------------------------------------------------------------------------------------------------ official trajectories

STRATEGIES = dict(static="confidence", dynamic="confidence", sequential="left", entropy_bounded="entropy")


def options_of(family, part, case):
    """The arguments of decode.generate for a case of expected.json."""
    new, block, steps = case["new"], case["block"], case["steps"]
    if family == "a2d":
        own = dict(schedule="a2d", strategy="confidence")
    else:
        own = dict(schedule="sdar", strategy=STRATEGIES[case["strategy"]])
        own["threshold"] = case.get("threshold", case.get("eb_threshold"))
        steps *= math.ceil(new / block)  # of a block there, of the response here
    return dict(own, max_new_tokens=new, block_length=block, steps=steps, stop=case.get("stop"))


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("family, part, k", CASES)
def test_official_trajectories(qwen3, family, part, k, cached):
    case, name = EXPECTED[family][part][k], "decode" if part == "cases" else part
    m, e = qwen3[family]
    in_blocks(m, case["block"] if family == "sdar" or part == "bd3lm" else None)
    official = {x: e.get(f"{name}.{k}.{x}") for x in ("prompt", "prompt_mask", *decode.Trajectory._fields)}
    prompt, mask = official["prompt"], official["prompt_mask"]
    options = options_of(family, part, case)
    t = decode.generate(m if cached else uncached(m), prompt, mask, **options)
    decoded = official["step"] >= 0
    assert torch.equal(t.response, official["response"])
    assert torch.equal(t.step[decoded], official["step"][decoded])
    assert (t.step[~decoded] == decode.Settings(**options).limit).all()
    assert torch.equal(t.order[decoded], official["order"][decoded])
    torch.testing.assert_close(t.entropy[decoded], official["entropy"][decoded], rtol=0, atol=1e-4)
    torch.testing.assert_close(t.confidence[decoded], official["confidence"][decoded], rtol=0, atol=1e-4)
