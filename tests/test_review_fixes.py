"""Small faults of the commands, each with the input that showed it: python -m pytest tests/test_review_fixes.py"""

import dataclasses
import gzip
import json
import subprocess
import sys

import pytest
from helpers import ROOT, flags, last_json

import data
import distill
import evaluate
import lora
import tabom
import tokenizer
from runs import disk, loading, resume, torchrun

TRAIN = dict(keep="all", window=8, epochs=1, global_batch=4, lr=1e-2, warmup=0)


def error_line(capsys):
    """The last line on stderr."""
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_zero_is_a_value_of_a_decoder_flag(golden):
    loaded = loading.Loaded(golden.load(), None, golden.folder)
    c = loading.DecodeOptions(temperature=0.0, max_new_tokens=8, block_length=0)
    settings = loading.decoder_settings(c, loaded)
    assert settings["temperature"] == 0.0
    assert settings["block_length"] is None
    for name in ("max_new_tokens", "steps", "top_k"):
        with pytest.raises(ValueError, match=name):
            loading.decoder_settings(loading.DecodeOptions(**{name: 0}), loaded)


@pytest.mark.parametrize(
    "option, value, what",
    [
        ("window", "abc", "must be a whole number, or global"),
        ("lora_targets", "q_proj,", "'q_proj,' has a comma too many"),
        ("epochs", "x", "invalid int value"),
    ],
)
def test_a_value_that_cannot_be_read_is_told_what_it_must_be(option, value, what, capsys):
    with pytest.raises(SystemExit):
        tabom.main(["train", *flags(model="m", data="d", out="o", **{option: value})])
    assert what in error_line(capsys)


@pytest.mark.parametrize("option", ["window", "lora_rank", "limit"])
def test_a_number_too_large_for_torch_is_one_line(tiny, option, trajectories, tmp_path, capsys):
    options = dict(model=tiny, data=trajectories, out=tmp_path / "R", **{option: 10**30})
    assert tabom.main(["train", *flags(**options)]) == 1
    assert "must be at most" in error_line(capsys)


def test_a_prompt_may_begin_with_two_dashes(bytes_model, capsys):
    options = dict(model=bytes_model, prompt="--out is what?", max_new_tokens=2, block_length=0)
    assert tabom.main(["generate", *flags(**options)]) == 0
    assert last_json(capsys.readouterr().out)["prompt"] == "--out is what?"


def test_a_recipe_takes_more_epochs_too(tiny, trajectories, tmp_path, capsys):
    options = dict(model=tiny, data=trajectories, out=tmp_path / "R", recipe="llada-prm12k", warmup=0)
    assert tabom.main(["train", *flags(**options, epochs=1)]) == 0
    assert "for the authors' files" not in capsys.readouterr().err  # nobody gave --methods: the recipe has it
    assert tabom.main(["train", *flags(**options, epochs=2)]) == 0
    assert last_json(capsys.readouterr().out)["epoch"] == 2
    assert tabom.main(["train", *flags(**options, epochs=3, lr=1.0)]) == 1
    assert "lr was 2e-05 and is now 1.0" in error_line(capsys)


def test_options_for_the_authors_files_are_named_where_there_are_none(tiny, trajectories, tmp_path, capsys):
    options = dict(model=tiny, data=trajectories, out=tmp_path / "R", methods="entropy", **TRAIN)
    assert tabom.main(["train", *flags(**options)]) == 0
    assert "--methods: for the authors' files only, these have their prompts already" in capsys.readouterr().err


def test_targets_that_contradict_the_adapter_are_refused(tiny, trajectories, tmp_path, capsys):
    options = dict(model=tiny, data=trajectories, **TRAIN)
    assert tabom.main(["train", *flags(**options, out=tmp_path / "A")]) == 0
    options.update(adapter=tmp_path / "A" / "epoch-1", out=tmp_path / "R")
    assert tabom.main(["train", *flags(**options, lora_targets="q_proj")]) == 1
    assert "--lora-targets ('q_proj',)" in error_line(capsys)
    assert not (tmp_path / "R").exists()
    assert tabom.main(["train", *flags(**options, lora_targets="v_proj,q_proj")]) == 0
    assert set(lora.settings(tmp_path / "R" / "epoch-1").targets) == {"q_proj", "v_proj"}


@pytest.mark.parametrize("damage", ["empty", "gone"])
def test_a_finished_run_needs_no_log(tiny, trajectories, tmp_path, capsys, damage):
    words = ["train", *flags(model=tiny, data=trajectories, out=tmp_path / "R", **TRAIN)]
    assert tabom.main(words) == 0
    log = tmp_path / "R" / "metrics.jsonl"
    log.write_text("") if damage == "empty" else log.unlink()
    assert tabom.main(words) == 0
    assert last_json(capsys.readouterr().out)["checkpoint"] == str(tmp_path / "R" / "epoch-1")


def test_held_out_needs_a_decoder_and_says_so_before_an_epoch(tiny, trajectories, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loading, "DECODERS", {})  # as for a family that this project trains and does not decode
    options = dict(model=tiny, data=trajectories, out=tmp_path / "R", held_out=2, **TRAIN)
    assert tabom.main(["train", *flags(**options)]) == 1
    assert "no decoder for" in error_line(capsys)
    assert not (tmp_path / "R").exists()


def test_the_held_out_loss_does_not_depend_on_the_batch_size(tiny, tmp_path, capsys):
    file, losses = tmp_path / "t.jsonl", []
    with open(file, "w") as f:
        for i in range(8):
            n = 1 if i % 2 else 6  # a response of one token has no pair to rank
            row = dict(id=i, prompt_ids=[3, 4], response_ids=[5 + i % 3] * n, order=list(range(n)))
            f.write(disk.json_line(row))
    for size in (1, 3, 7):
        options = dict(TRAIN, window=4, held_out=7, lr=0, batch_size=size)
        assert tabom.main(["train", *flags(model=tiny, data=file, out=tmp_path / str(size), **options)]) == 0
        losses.append(last_json(capsys.readouterr().out)["held_out_loss"])
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


def test_looking_at_a_lock_neither_writes_nor_gives_it_back(tmp_path):
    ours, theirs = torchrun.Processes("cpu", alone=True), torchrun.Processes("cpu", alone=True)
    assert not ours.locked_by_another(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert ours.lock(tmp_path)
    assert not ours.locked_by_another(tmp_path)
    look = (
        f"from runs import torchrun; print(torchrun.Processes('cpu', alone=True).locked_by_another({str(tmp_path)!r}))"
    )
    done = subprocess.run([sys.executable, "-c", look], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr
    ours.unlock()
    assert not theirs.locked_by_another(tmp_path)


def test_trajectories_in_a_folder_that_cannot_be_written_to_are_read(trajectories, tmp_path, monkeypatch):
    (tmp_path / torchrun.LOCK).touch(0o444)
    really = open

    def read_only(file, mode="r", *more, **named):
        if str(file).startswith(str(tmp_path)) and set(mode) & set("wa+"):
            raise PermissionError(13, "Permission denied", str(file))
        return really(file, mode, *more, **named)

    monkeypatch.setattr("builtins.open", read_only)
    assert not torchrun.Processes("cpu", alone=True).locked_by_another(tmp_path)


def test_grade_refuses_a_folder_before_it_grades(tmp_path, monkeypatch, capsys):
    (tmp_path / "r.jsonl").write_text(disk.json_line(dict(answer="#### 3", response="3")))
    monkeypatch.setattr(evaluate, "verdicts", None)  # not reached
    options = dict(task="gsm8k", responses=tmp_path / "r.jsonl", out=tmp_path)
    assert tabom.main(["grade", *flags(**options)]) == 1
    assert f"{tmp_path} is a folder, not a file" in error_line(capsys)


def test_prompts_from_a_dataset_keep_their_earlier_turns(bytes_model, tmp_path, monkeypatch, capsys):
    file, seen = tmp_path / "d.jsonl", []
    with open(file, "w") as f:
        f.write(disk.json_line(dict(prompt="hi", system="Be terse.", history=[["a", "b"]])))
        f.write(disk.json_line(dict(prompt="ho")))
    encode = tokenizer.encode_prompt

    def seeing(tok, talk, *more):
        seen.append(list(talk))
        return encode(tok, talk, *more)

    monkeypatch.setattr(tokenizer, "encode_prompt", seeing)
    options = dict(model=bytes_model, prompts=file, max_new_tokens=2, block_length=0)
    assert tabom.main(["generate", *flags(**options)]) == 0
    assert [turn["content"] for turn in seen[0]] == ["Be terse.", "a", "b", "hi"]
    assert [turn["content"] for turn in seen[1]] == ["ho"]
    *answers, result = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["prompt"] for line in answers] == ["hi", "ho"] and last_json(result)["prompts"] == 2


def test_a_file_without_prompts_is_an_error(bytes_model, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("\n \n")
    assert tabom.main(["generate", *flags(model=bytes_model, prompts=tmp_path / "p.txt")]) == 1
    assert "p.txt: no prompts" in error_line(capsys)


def test_a_record_beyond_the_context_is_named_in_training(golden):
    row = dict(id=0, prompt_ids=[3] * 5000, response_ids=[4, 5], order=[0, 1])
    config, said = dataclasses.replace(golden.load().config, max_length=4096), []
    distill.check_context([row, dict(row, prompt_ids=[3])], None, config, said.append)
    distill.check_context([dict(row, prompt_ids=[3])], None, config, said.append)
    assert said == ["prompt and response have up to 5002 tokens; the model was trained with 4096"]


def test_a_strangers_meta_json_beside_trajectories_is_no_traceback(tiny, trajectories, tmp_path, capsys):
    folder = tmp_path / "T"
    folder.mkdir()
    for file in data.trajectory_files(trajectories):
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "meta.json").write_text('{"prompts": "a.jsonl"}')
    assert tabom.main(["train", *flags(model=tiny, data=folder, out=tmp_path / "R", **TRAIN)]) == 0


@pytest.mark.parametrize("rank, size", [("x", "2"), ("2", "2"), ("-1", "2"), ("0", "")])
def test_a_place_among_processes_that_is_none_is_one_line(monkeypatch, capsys, rank, size):
    for name, value in dict(RANK=rank, WORLD_SIZE=size, MASTER_ADDR="localhost").items():
        monkeypatch.setenv(name, value)
    assert tabom.main(["grade", *flags(task="gsm8k", responses="r.jsonl", out="v.jsonl")]) == 1
    assert "RANK" in error_line(capsys)


@pytest.mark.parametrize(
    "options", [dict(window="global", starts="non-ltr"), dict(ranking="kl", entropy_context="window")]
)
def test_options_that_exclude_each_other_leave_no_folder(tiny, trajectories, tmp_path, options, capsys):
    options = {**TRAIN, **options}
    assert tabom.main(["train", *flags(model=tiny, data=trajectories, out=tmp_path / "R", **options)]) == 1
    assert "--starts non-ltr" in (line := error_line(capsys)) or "--ranking kl" in line
    assert not (tmp_path / "R").exists()


def test_a_damaged_checkpoint_is_named_by_the_first_process_alone(tiny, trajectories, tmp_path, capsys):
    options = dict(TRAIN, epochs=2)
    assert tabom.main(["train", *flags(model=tiny, data=trajectories, out=tmp_path / "R", **options)]) == 0
    (tmp_path / "R" / "epoch-2" / "optimizer.safetensors").unlink()
    said, processes = [], torchrun.Processes("cpu", alone=True)
    assert resume.last_checkpoint(tmp_path / "R", said.append) == tmp_path / "R" / "epoch-1"
    assert len(said) == 1 and "epoch-2 is damaged" in said[0]
    processes.index = 1
    capsys.readouterr()
    resume.last_checkpoint(tmp_path / "R", torchrun.warner(processes))
    assert capsys.readouterr().err == ""


def test_a_question_that_cannot_be_asked_is_named(tiny, tmp_path, capsys):
    (tmp_path / "gsm8k_test.jsonl").write_text(disk.json_line(dict(question="Janet", answer="#### 3")))
    with gzip.open(tmp_path / "gsm8k_test.jsonl.gz", "wt") as f:
        f.write((tmp_path / "gsm8k_test.jsonl").read_text())
    options = dict(model=tiny, tasks="gsm8k", data=tmp_path, out=tmp_path / "E", max_new_tokens=8, block_length=8)
    assert tabom.main(["evaluate", *flags(**options)]) == 1
    assert "question 0 of gsm8k" in error_line(capsys)
