"""Decoding from a queue: a row that is done is given the next prompt. python -m pytest tests/test_queue.py"""

import dataclasses

import pytest
import torch
from helpers import FOLDER
from hypothesis import given, settings
from hypothesis import strategies as st

import decode
import model
from runs import loading, queue

FAMILIES = ("llada", "dream", "sdar", "a2d")


@pytest.fixture(scope="module")
def models():
    return {family: model.load(FOLDER / f"{family}-tiny") for family in FAMILIES}


def prompts_of(lengths):
    g = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(0, 290, (n,), generator=g) for n in lengths]


def seeded(number):
    return torch.Generator().manual_seed(number)


def alone(m, prompts, **options):
    """The slow way: each prompt in a batch of its own."""
    found = []
    for i, prompt in enumerate(prompts):
        found.append(decode.generate(m, prompt[None], generator=[seeded(i)], **options))
    return found


def streamed(m, prompts, batch_size, **options):
    """queue.stream -> a Trajectory [1, N] for each prompt, and the numbers in the order in which they finished."""
    found, order = {}, []
    for numbers, t in queue.stream(m, prompts, batch_size, generator=seeded, **options):
        order += numbers
        for row, number in enumerate(numbers):
            found[number] = decode.Trajectory(*(field[row : row + 1] for field in t))
    assert sorted(order) == list(range(len(prompts)))  # each of them once
    return [found[i] for i in range(len(prompts))], order


def same(a, b):
    for name in ("response", "step", "order"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    for name in ("entropy", "confidence"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=0, atol=1e-4, equal_nan=True)


DRAWN = dict(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=7),  # in any order: room is made, and given back
    batch_size=st.integers(1, 4),
    strategy=st.sampled_from(["confidence", "entropy", "margin", "left", "random"]),
    temperature=st.sampled_from([0.0, 1.0]),
    stop=st.none() | st.just(tuple(range(60))),
    suppress=st.sampled_from([None, (305,)]),
)
PACE = [
    dict(),
    dict(threshold=0.2),
    dict(threshold=0.2, block_length=4),
    dict(tokens_per_step=3),
    dict(block_length=4),
    dict(steps=6, block_length=4),
    dict(steps=5),
]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(family=st.sampled_from(["llada", "dream"]), schedule=st.sampled_from(["llada", "dream"]),
       pace=st.sampled_from(PACE), **DRAWN)  # fmt: skip
def test_each_row_equals_its_single_run(models, family, lengths, batch_size, pace, **options):
    m, prompts = models[family], prompts_of(lengths)
    options.update(pace, max_new_tokens=12)
    for ours, own in zip(streamed(m, prompts, batch_size, **options)[0], alone(m, prompts, **options), strict=True):
        same(ours, own)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    family=st.sampled_from(["sdar", "a2d"]),
    schedule=st.sampled_from(["sdar", "a2d"]),
    block=st.sampled_from([1, 3, 4, 8]),
    max_new_tokens=st.integers(1, 13),
    steps=st.none() | st.integers(1, 13),
    threshold=st.none() | st.sampled_from([0.2, 0.6, 1.0]),
    cached=st.booleans(),
    **DRAWN | dict(temperature=st.just(0.0)),  # rounding falls between two of 320 tokens once in a thousand draws
)
def test_each_row_of_a_model_with_blocks_equals_its_single_run(
    models, family, lengths, batch_size, block, cached, **options
):
    m, prompts = models[family], prompts_of(lengths)
    m.config = dataclasses.replace(m.config, block_length=block)

    def plain(ids, **more):  # in which the decoder finds no cache
        return m(ids, **more)

    plain.config = m.config
    ours = streamed(m if cached else plain, prompts, batch_size, **options)[0]
    for one, own in zip(ours, alone(plain, prompts, **options), strict=True):
        same(one, own)


def test_a_row_that_is_done_makes_room_at_once(toy):
    """While prompts wait, every step has a full batch; and no pass is made that is not needed."""
    m, prompts = toy(), prompts_of([5] * 9)
    prompts = [p % 12 for p in prompts]
    options = dict(max_new_tokens=12, threshold=0.6, block_length=6)
    ours, order = streamed(m, prompts, 3, **options)
    sizes, steps = [len(ids) for ids, _, _ in m.calls], [int(t.step.max()) + 1 for t in ours]
    assert len(set(steps)) > 1
    assert sum(sizes) == sum(steps)
    begun = max(i for i in range(len(sizes)) if sizes[i] == 3)
    assert sizes[: begun + 1] == [3] * (begun + 1)  # it shrinks only once the queue is empty
    assert len(sizes) < sum(max(steps[i : i + 3]) for i in (0, 3, 6))  # fewer passes than batch by batch
    for one, own in zip(ours, alone(toy(), prompts, **options), strict=True):
        same(one, own)


def test_rows_of_the_same_number_of_steps_are_batches_as_ever(toy):
    m, prompts = toy(), [p % 12 for p in prompts_of([5] * 6)]
    _, order = streamed(m, prompts, 2, max_new_tokens=8, schedule="llada", block_length=4)
    assert order == [0, 1, 2, 3, 4, 5]
    assert [len(ids) for ids, _, _ in m.calls] == [2] * 24


def test_padding_follows_the_prompts(toy):
    """Room for a prompt is made when one comes, and given back where it is no longer needed by far."""
    m, prompts = toy(), [p % 12 for p in prompts_of([90, 80, 50, 15, 40])]
    streamed(m, prompts, 1, max_new_tokens=2, schedule="llada")
    assert [ids.shape[1] for ids, _, _ in m.calls][::2] == [92, 92, 52, 17, 42]
    assert m.calls[0][1] is None  # no padding, no mask


def test_on_step_is_told_the_step_of_each_row(toy):
    seen, prompts = [], [p % 12 for p in prompts_of([5] * 4)]
    options = dict(max_new_tokens=6, threshold=0.6, on_step=lambda now, *_: seen.append(now.tolist()))
    ours, _ = streamed(toy(), prompts, 2, **options)
    assert seen[0] == [0, 0]
    assert sum(map(len, seen)) == sum(int(t.step.max()) + 1 for t in ours)


def test_nothing_to_decode(toy):
    assert list(queue.stream(toy(), [], 2, max_new_tokens=4)) == []
    with pytest.raises(ValueError, match="max_new_tokens 0"):
        list(queue.stream(toy(), [], 2, max_new_tokens=0))


def test_what_is_done_is_given_out_before_the_next_step(toy):
    """A caller that stops in between has lost nothing: the model has not been asked since."""
    m, prompts = toy(), [p % 12 for p in prompts_of([5] * 4)]
    stream = queue.stream(m, prompts, 2, max_new_tokens=6, threshold=0.6)
    numbers, t = next(stream)
    assert len(m.calls) == int(t.step.max()) + 1
    assert len(numbers) < 4


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_compiled_anew_while_rows_finish(family):
    """One batch, whose rows leave one by one, has needed all that a long queue needs; a cache of finished blocks also
    has rows that leave alone and others that come, of which a first queue has all kinds."""
    compiled, m = [], model.load(FOLDER / f"{family}-tiny")

    def compiler(graph, inputs):
        compiled.append(graph)
        return graph.forward

    loading.compile_blocks(m, backend=compiler)
    prompts = sorted(prompts_of(range(11, 43)), key=len, reverse=True)
    schedule = family if family in ("sdar", "a2d") else "llada"
    options = dict(max_new_tokens=16, schedule=schedule, strategy="confidence", threshold=0.2)
    streamed(m, prompts if family == "sdar" else prompts[:4], 4, **options)
    before = len(compiled)
    ours, order = streamed(m, prompts[::-1] if family == "sdar" else prompts, 4, **options)
    assert len({int(t.step.max()) for t in ours}) > 3 and order != sorted(order)
    assert len(compiled) == before <= 9
