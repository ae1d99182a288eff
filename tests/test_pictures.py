"""pictures.py: a trajectory drawn, and animated: python -m pytest tests/test_pictures.py"""

from PIL import Image

import tokenizer
from experiments import pictures
from experiments import tiny as tiny_model

PUZZLE = "L12..5" + "." * 20  # 5x5


def puzzle_record(tok):
    ids = tok.encode("1234512345") + [tok.eos_id] * 21
    steps = [*range(21, 31), *range(21)]
    entropy = [0.01 * (i + 1) for i in range(31)]
    return dict(prompt=PUZZLE, response_ids=ids, order=steps, step=steps, entropy=entropy)


def test_a_puzzle_is_drawn_as_its_grid():
    tok = tokenizer.load(tiny_model.TINY5)
    axes = pictures.draw_trajectory(tok, puzzle_record(tok)).axes[0]
    assert [patch.get_xy() for patch in axes.patches][1] == (1.04, 0.04)  # given: framed, a little smaller
    assert [patch.get_xy() for patch in axes.patches][5:7] == [(0, 1), (1, 1)]
    shown = [text.get_text() for text in axes.texts]
    assert shown[:4] == ["1", "21", "2", "22"] and shown[-2:] == ["end", "20"]


def test_an_animation_has_a_picture_for_each_step_and_holds_the_last(tmp_path):
    tok = tokenizer.load(tiny_model.TINY5)
    record = puzzle_record(tok)
    pictures.save_frames(tok, record, tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as drawn:
        assert drawn.n_frames == 1 + 31 or drawn.n_frames == 2 + 31  # nothing yet, each step; equal ones may be one
        drawn.seek(drawn.n_frames - 1)
        assert drawn.info["duration"] >= pictures.HELD
    assert (tmp_path / "a.gif").stat().st_size < 300_000
    text = dict(record, prompt="a question", order=[*range(30), -1], step=[*range(30), 31])  # one was never decoded
    pictures.save_frames(tok, text, tmp_path / "b.gif")
    assert (tmp_path / "b.gif").stat().st_size > 1000


def test_invisible_characters_are_made_visible():
    assert pictures.visible_text("a\n") == ("a↵", 2)
    assert pictures.visible_text("\t\x00") == ("→·", 2)
    assert pictures.visible_text("数") == ("数", 2)
    assert pictures.visible_text("") == ("", 1)
