"""The snippet of docs/formats.md that converts d3LLM's files, run on rows of their form.

python -m pytest tests/test_d3llm.py
"""

import re
import sys
from types import SimpleNamespace

import pytest
from helpers import ROOT

import data

PAGE = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8").partition("### d3LLM's trajectories")[2]
MASK, EOS, TURN = 126336, 126081, 126348
PROMPT = [126080, 126346, 3840]


def states(tokens, steps):
    """Prompt and response after each step."""
    found = []
    for now in range(max(steps) + 1):
        found.append(PROMPT + [token if step <= now else MASK for token, step in zip(tokens, steps)])
    return found


def row(idx, tokens, steps, **more):
    trajectory = states(tokens, steps)
    found = dict(idx=idx, question="How many?", prompt_ids=PROMPT, trajectory=trajectory, final_output=trajectory[-1])
    return found | dict(generated_text="", llm_answer="4", gt_answer="4", is_correct=True) | more


def convert(rows, folder, monkeypatch):
    """Run both blocks, with a library that has these rows -> the file that they write."""
    blocks = re.findall(r"^```py(?:thon)?\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)[:2]
    asked = []

    def load_dataset(*words, **more):
        asked.append((words, more))
        return rows

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.chdir(folder)
    exec("\n".join(blocks), {})
    assert asked == [(("d3LLM/trajectory_data_llada_32",), dict(split="train"))]
    return folder / "d3llm.jsonl"


def test_their_rows_become_ours(tmp_path, monkeypatch):
    rows = [
        row(0, [5, 6, TURN, EOS], [1, 0, 2, 3]),
        row(7, [5, 6, 8, 9], [0, 1, 3, 2], gt_answer=None),  # no answer, which they call correct
        row(9, [5, MASK, 8, EOS], [1, 2, 2, 0], is_correct=False),  # one token was never decoded, two at once
    ]
    file = convert(rows, tmp_path, monkeypatch)
    records = data.read_trajectories(file, vocab_size=126464, mask_id=MASK)
    assert [r["id"] for r in records] == [0, 7, 9]
    assert [r["order"] for r in records] == [[1, 0, 2, 3], [0, 1, 3, 2], [1, -1, 2, 0]]
    assert [r["finished"] for r in records] == [True, False, True]
    assert [r["correct"] for r in records] == [True, None, False]
    assert [data.usable(r) for r in records] == [True, False, False]
    assert records[0]["prompt_ids"] == PROMPT and records[0]["response_ids"] == [5, 6, TURN, EOS]


@pytest.mark.parametrize(
    "trajectory", [[[0, 0, 0, 1, 2], [*PROMPT, 5, EOS]], [[5, MASK], [5, EOS]]], ids=["steps and tokens", "responses"]
)
def test_another_form_is_refused(trajectory, tmp_path, monkeypatch):
    other = row(3, [5, EOS], [0, 1], trajectory=trajectory)
    with pytest.raises(ValueError, match="row 3: its trajectory is not a list of states"):
        convert([other], tmp_path, monkeypatch)
