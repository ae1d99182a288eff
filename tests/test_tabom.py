"""The command line, and its two short commands, generate and merge: python -m pytest tests/test_tabom.py"""

import io
import json
import math
import shutil
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from helpers import FOLDER, TRAIN, fails, flags, last_json, meta, run, shell, write_lines
from safetensors.torch import load_file

import data
import model
import tabom
import tokenizer
from experiments import tiny as tiny_model
from runs import resume
from runs.options import opt
from tools import watch

PROMPT = "L" + "123456" * 6  # a tag and 36 cells

# --------------------------------------------------------------------------------------------------------- generate


def test_generate_prints_the_answer_and_watches(tiny, trained, capsys):
    options = dict(model=tiny, adapter=trained / "epoch-2", prompt=PROMPT)
    assert tabom.main(["generate", *flags(**options, watch=True)]) == 0
    out, err = capsys.readouterr()
    result = last_json(out)
    assert out.splitlines()[0] == result["text"]
    assert (result["prompt"], result["tokens"]) == (PROMPT, tiny_model.WHOLE.answer)
    steps = err.splitlines()[: tiny_model.WHOLE.answer]  # no terminal: a plain line for each step
    assert [line.split(":")[0] for line in steps] == [f"step {i}" for i in range(tiny_model.WHOLE.answer)]
    assert [line.count("·") for line in steps] == list(range(tiny_model.WHOLE.answer - 1, -1, -1))
    assert "\x1b" not in err and err.splitlines()[-1].startswith("37 steps, 1.0 tokens a step; ")
    again, err = run(capsys, "generate", **options)
    assert again["text"] == result["text"]
    assert err == ""


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_watch_redraws_a_terminal_in_colour_below_the_turns(tiny, capsys, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert tabom.main(["generate", *flags(model=tiny, system="S1", prompt="L2", watch=True)]) == 0
    _, *frames = terminal.getvalue().split("\x1b[H\x1b[2J")
    assert len(frames) == tiny_model.WHOLE.answer
    for i, frame in enumerate(frames):
        assert frame.startswith(f"system: S1\nuser: L2\nstep {i}\n")
        assert frame.count("\x1b[2m·\x1b[0m") == tiny_model.WHOLE.answer - 1 - i
        assert " nats" in frame.splitlines()[4]
    assert "\x1b[38;5;" in frames[-1]
    assert frames[-1].splitlines()[-1].startswith("37 steps, 1.0 tokens a step; entropy by step ")


def test_the_colours_of_watch_span_the_entropies_that_occur():
    scale = watch.Scale([0.001, 0.002, 0.01, math.nan])
    assert (scale.low, scale.high) == (0.001, 0.01)
    assert [scale.of(h, watch.COLOURS) for h in (0.001, 0.01)] == [watch.COLOURS[0], watch.COLOURS[-1]]
    assert scale(0.001 * 10**0.5) == pytest.approx(0.5)
    assert watch.Scale([])(1.0) == watch.Scale([0.5])(0.5) == 0.0
    assert watch.Scale([0.0, 1.0]).low == watch.LEAST  # a logarithm needs more than 0
    assert watch.thinned([1.0, 3.0, 5.0], 2) == [2.0, 5.0] and watch.thinned([], 2) == []


def test_watch_shows_a_puzzle_as_its_grid_with_the_steps(tiny, capsys, monkeypatch):
    prompt = "L" + "." * 30 + "123456"
    _, err = run(capsys, "generate", model=tiny, prompt=prompt, watch=True)
    head, *rows, summary = err.splitlines()[tiny_model.WHOLE.answer :]
    assert head.split("   ")[0] == "the puzzle" and len(rows) == 6 and rows[-1].startswith("1 2 3 4 5 6")
    steps = " ".join(row[-17:] for row in rows).split()
    assert len(set(steps)) == 36 and set(steps) <= set(map(str, range(37)))
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert (
        tabom.main(["generate", *flags(model=tiny, prompt=prompt, watch=True, max_new_tokens=8, block_length=8)]) == 0
    )
    assert "the puzzle" not in terminal.getvalue()  # the response is shorter than the grid


def test_watch_keeps_the_line_breaks_of_a_text(monkeypatch):
    tok = SimpleNamespace(stop_ids={9}, pieces=lambda ids, mask_id: [("a\n", [0]), ("b", [1]), (None, [2])])
    for terminal, shown in ((Terminal(), "a\n"), (io.StringIO(), "a↵b·")):
        monkeypatch.setattr(sys, "stderr", terminal)
        watch.Watch(tok, 0, "a question")(3, torch.tensor([[1, 2, 0]]), torch.tensor([[0.1, 0.2, math.nan]]))
        assert shown in terminal.getvalue()


def test_the_delay_and_the_pictures_are_not_in_the_speed(tiny, capsys):
    result, _ = run(capsys, "generate", model=tiny, prompt="L2", watch=True, delay=0.05)
    assert result["seconds"] < 37 * 0.05


def test_an_answer_is_saved_as_an_animation(tiny, tmp_path, capsys):
    file = tmp_path / "new" / "x.gif"
    run(capsys, "generate", model=tiny, prompt=PROMPT, save_frames=file)
    assert file.read_bytes().startswith(b"GIF89a")
    fails(capsys, "x.gif is there already", "generate", model=tiny, prompt=PROMPT, save_frames=file)
    fails(capsys, "must end in .gif", "generate", model=tiny, prompt=PROMPT, save_frames=tmp_path / "x.mp4")
    fails(capsys, "give --prompt", "generate", model=tiny, save_frames=tmp_path / "y.gif")


def test_every_prompt_of_a_file_is_answered_by_itself(tiny, tmp_path, capsys):
    text, dataset = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    text.write_text("L12\n\n L34 \r\n")
    write_lines(dataset, [dict(prompt="L12"), dict(prompt="L34")])
    alone = [run(capsys, "generate", model=tiny, prompt=prompt)[0]["text"] for prompt in ("L12", "L34")]
    for file in (text, dataset):
        assert tabom.main(["generate", *flags(model=tiny, prompts=file)]) == 0
        *answers, result = capsys.readouterr().out.splitlines()
        assert [json.loads(line)["text"] for line in answers] == alone
        assert [json.loads(line)["prompt"] for line in answers] == ["L12", "L34"]
        result = last_json(result)  # each answer has a line of its own, and stands there once
        assert result["prompts"] == 2 and "text" not in result
        assert result["tokens"] == sum(json.loads(line)["tokens"] for line in answers)
    write_lines(dataset, [dict(prompt="L12"), dict(prompt="zzz"), dict(prompt="L34\u2028")])
    text.write_text("L12\nL3\u20284\nL34\n", encoding="utf-8")  # one line, which no token of tiny spells
    for file, message in ((dataset, "2 of 3 prompts"), (text, "1 of 3 prompts")):
        assert tabom.main(["generate", *flags(model=tiny, prompts=file)]) == 1
        captured = capsys.readouterr()
        assert json.loads(captured.out.splitlines()[0])["text"] == alone[0]
        assert f"prompt 2 of {file}: the tokenizer cannot encode" in captured.err and message in captured.err
    fails(capsys, "--prompt and --prompts: give one of them", "generate", model=tiny, prompt="L", prompts=text)
    fails(capsys, "no file|No such file", "generate", model=tiny, prompts=tmp_path / "none.txt")


def test_generate_answers_as_distill_does(tiny, puzzles, trajectories, capsys):
    record = data.read_trajectories(trajectories)[0]
    result, _ = run(capsys, "generate", model=tiny, prompt=record["prompt"])
    assert result["text"] == record["text"]
    assert result["decoder"] == meta(trajectories)["decoder"]


def test_generate_chats_from_stdin(tiny, capsys, monkeypatch):
    """An empty line is no turn. The second answer sees the first turn and its answer."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("L12\n\nL34\n"))
    assert tabom.main(["generate", *flags(model=tiny)]) == 0
    first, second, result = capsys.readouterr().out.splitlines()
    assert last_json(result)["prompt"] == "L34"
    assert last_json(result)["text"] == second
    whole, _ = run(capsys, "generate", model=tiny, raw=True, prompt="L12" + first + "L34")
    assert whole["text"] == second


def test_a_chat_goes_on_after_a_turn_that_cannot_be_read(tiny, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", Terminal("L12\nhello\n"))
    monkeypatch.setattr("builtins.input", lambda shown: sys.stdin.readline().strip() or exhausted())
    assert tabom.main(["generate", *flags(model=tiny)]) == 0
    out, err = capsys.readouterr()
    assert "error: the tokenizer cannot encode" in err
    assert last_json(out)["prompt"] == "L12"


def exhausted():
    raise EOFError


def test_turns_of_a_file_that_cannot_be_read_are_an_error_in_the_end(tiny, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\nL12\n"))
    assert tabom.main(["generate", *flags(model=tiny)]) == 1
    out, err = capsys.readouterr()
    assert "error: the tokenizer cannot encode" in err and "1 of 2 prompts of stdin were not answered" in err
    assert out.strip()  # of the other turn


def test_a_chat_without_a_turn_is_no_error(tiny, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    result, _ = run(capsys, "generate", model=tiny)
    assert set(result) == {"decoder"}


def test_a_system_turn_stands_before_the_prompt(tiny, capsys):
    """The tiny model's template puts one message behind the other."""
    with_system, _ = run(capsys, "generate", model=tiny, system="S1", prompt="L2")
    together, _ = run(capsys, "generate", model=tiny, prompt="S1L2")
    assert with_system["text"] == together["text"]


def test_a_raw_prompt_has_no_other_turns(tiny, capsys):
    for more in (dict(system="S", prompt="L"), dict()):
        fails(capsys, "--raw takes one --prompt as it is", "generate", model=tiny, raw=True, **more)


def test_a_prompt_beyond_the_context_is_named(tiny, capsys):
    _, err = run(capsys, "generate", model=tiny, prompt=PROMPT * 3, max_new_tokens=20, block_length=20)
    assert "prompt and response have up to 131 tokens; the model was trained with 128" in err


def test_bad_adapters_are_one_line(tiny, tmp_path, capsys):
    options = dict(model=tiny, prompt="L1")
    fails(capsys, "no adapter_config.json", "generate", adapter=tmp_path, **options)
    fails(capsys, "does not fit this model", "generate", adapter=FOLDER / "llada-tiny" / "adapter", **options)


# ------------------------------------------------------------------------------------------------------------ merge


@pytest.mark.parametrize("family", ["llada-tiny", "dream-tiny"])
def test_merge_gives_the_adapters_logits_in_the_bases_layout(family, tmp_path, capsys):
    base, out = FOLDER / family, tmp_path / "M"
    result, _ = run(capsys, "merge", model=base, adapter=base / "adapter", out=out)
    assert result == dict(out=str(out), merged_layers=4)
    expected = load_file(base / "expected.safetensors")
    logits = model.load(out)(expected["logits.ids"])
    assert (logits - expected["adapter.aligned"]).abs().max() < 1e-3
    assert {f.name for f in base.glob("model*")} == {f.name for f in out.glob("model*")}
    fails(capsys, "there already", "merge", model=base, adapter=base / "adapter", out=out)


def test_an_adapter_on_another_base_is_said(tiny, trained, trajectories, tmp_path, capsys):
    """On the merged model it would act twice, and nothing else would tell."""
    adapter, merged = trained / "epoch-2", tmp_path / "M"
    run(capsys, "merge", model=tiny, adapter=adapter, out=merged)
    short = dict(prompt=PROMPT, max_new_tokens=8, block_length=8)
    _, err = run(capsys, "generate", model=merged, adapter=adapter, **short)
    assert f"{adapter} was trained on another model than {merged}" in err
    _, err = run(capsys, "generate", model=tiny, adapter=adapter, **short)
    assert "another model" not in err
    _, err = run(capsys, "merge", model=merged, adapter=adapter, out=tmp_path / "M2")
    assert f"{adapter} was trained on another model than {merged}" in err
    _, err = run(
        capsys,
        "train",
        **{**TRAIN, "stop_after": 1},
        model=merged,
        data=trajectories,
        adapter=adapter,
        out=tmp_path / "R",
    )
    assert f"{adapter} was trained on another model than {merged}" in err
    alone = tmp_path / "elsewhere" / "adapter"
    shutil.copytree(adapter, alone)
    (alone.parent / "meta.json").write_text("[]")  # of something else
    _, err = run(capsys, "generate", model=merged, adapter=alone, **short)
    assert "another model" not in err


def test_merge_keeps_the_dtype_and_the_tokenizer(tiny, trained, tmp_path, capsys):
    base = tmp_path / "bf16"
    model.save(model.load(tiny, dtype=torch.bfloat16), base)
    resume.copy_extras(tiny, base)
    run(capsys, "merge", model=base, adapter=trained / "epoch-2", out=tmp_path / "M")
    assert {t.dtype for t in load_file(tmp_path / "M" / "model.safetensors").values()} == {torch.bfloat16}
    assert tokenizer.load(tmp_path / "M").size == len(tiny_model.vocabulary())


# ------------------------------------------------------------------------------------------------- the command line


@dataclass
class EchoOptions:
    """what is said"""

    word: str = opt("nothing", "a word")
    times: int = opt(1, "how often", low=1)


@pytest.fixture
def echo(monkeypatch):
    """A command that notes the options it is called with -> (the notes, a function that makes it raise)."""
    notes, errors = [], []

    def command(c):
        """Say a word."""
        notes.append(c)
        if errors:
            raise errors[0]
        return dict(said=c.word * c.times)

    module = SimpleNamespace(echo=command, EchoOptions=EchoOptions)
    monkeypatch.setitem(tabom.COMMANDS, "echo", ("tests.test_tabom", "Say a word."))
    monkeypatch.setitem(sys.modules, "tests.test_tabom", module)
    monkeypatch.delenv("TABOM_DEBUG", raising=False)
    return notes, errors.append


def test_the_last_line_is_the_result_as_json(echo, capsys):
    assert tabom.main(["echo", "--word", "für", "--times", "2"]) == 0
    assert capsys.readouterr().out == '{"said": "fürfür"}\n'
    assert echo[0] == [EchoOptions("für", 2)]


def test_options_are_made_of_the_flags_that_are_given(echo, monkeypatch):
    """So that a recipe can tell a flag from a default of the same value."""
    given = []

    class Noting(EchoOptions):
        def __init__(self, **flags):
            given.append(flags)
            super().__init__(**flags)

    monkeypatch.setattr(sys.modules["tests.test_tabom"], "EchoOptions", Noting)
    assert tabom.main(["echo"]) == 0
    assert tabom.main(["echo", "--times", "1"]) == 0
    assert given == [{}, dict(times=1)]


def test_values_are_checked_before_the_command_runs(echo, capsys):
    assert tabom.main(["echo", "--times", "0"]) == 1
    assert capsys.readouterr().err == "error: --times 0: must be a number of at least 1\n"
    assert echo[0] == []


@pytest.mark.parametrize(
    "error, line",
    [
        (ValueError("two\n  lines"), "error: two lines\n"),
        (RuntimeError(), "error: RuntimeError\n"),
        (OSError(28, "No space left on device"), "error: [Errno 28] No space left on device\n"),
        (ImportError("pip install matplotlib"), "error: pip install matplotlib\n"),
    ],
)
def test_an_error_is_one_line(echo, capsys, error, line):
    echo[1](error)
    assert tabom.main(["echo"]) == 1
    assert capsys.readouterr() == ("", line)


def test_debugging_shows_the_traceback(echo, monkeypatch):
    echo[1](ValueError("bad"))
    monkeypatch.setenv("TABOM_DEBUG", "1")
    with pytest.raises(ValueError, match="bad"):
        tabom.main(["echo"])


def test_an_error_of_no_known_kind_is_not_hidden(echo):
    echo[1](KeyError("x"))
    with pytest.raises(KeyError):
        tabom.main(["echo"])


def test_a_stopped_command_says_how_to_go_on(echo, capsys, monkeypatch):
    echo[1](KeyboardInterrupt())
    assert tabom.main(["echo"]) == 130
    assert capsys.readouterr().err == "stopped; the same command continues\n"
    monkeypatch.setattr(tabom, "ALONE", ("echo",))
    assert tabom.main(["echo"]) == 130
    assert capsys.readouterr().err == "stopped\n"


def test_only_the_first_process_prints_and_works_alone(echo, capsys, monkeypatch):
    for name, value in dict(RANK="1", WORLD_SIZE="2", MASTER_ADDR="localhost").items():
        monkeypatch.setenv(name, value)
    assert tabom.main(["echo"]) == 0
    assert len(echo[0]) == 1
    monkeypatch.setattr(tabom, "ALONE", ("echo",))
    assert tabom.main(["echo"]) == 0
    assert len(echo[0]) == 1  # the second process has nothing to do
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("words", [["train", "--windw", "8"], ["train", "--keep", "some"], ["fly"], [], ["merge"]])
def test_misspelt_options_are_refused(words, capsys):
    with pytest.raises(SystemExit) as stop:
        tabom.main(words)
    assert stop.value.code == 2
    assert "error" in capsys.readouterr().err


@pytest.mark.slow
def test_an_error_in_a_real_process_is_one_line():
    done = shell("generate", "--model", "./nowhere", "--prompt", "x")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: no model folder ./nowhere")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_generate_under_torchrun_answers_once(tiny, trained, capsys):
    options = dict(model=tiny, adapter=trained / "epoch-2", prompt="L1")
    alone, _ = run(capsys, "generate", **options)
    done = shell("generate", *flags(**options), processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("tokens_per_second") == 1
    assert last_json(done.stdout)["text"] == alone["text"]
