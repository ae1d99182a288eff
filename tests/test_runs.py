"""runs/: processes and locks, run folders, files that appear whole, checkpoints, models with their decoders.

python -m pytest tests/test_runs.py"""

import gzip
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from helpers import FOLDER, changed_model, edit_json, fails, locked_by_another
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import data
import lora
import model
import train
from experiments import tiny as tiny_model
from runs import disk, loading, resume, torchrun

ALONE = torchrun.Processes("cpu")
NO_LOCKS = pytest.mark.skipif(sys.platform == "win32", reason="there are no locks")

# -------------------------------------------------------------------------------------------------------- processes


def test_one_process_shares_nothing():
    assert (ALONE.index, ALONE.count, ALONE.first, ALONE.shows) == (0, 1, True, True)
    assert ALONE.sum([1, 2.5]) == [1, 2.5]
    assert ALONE.gather([3, 4]) == [3, 4]
    p = torch.zeros(2, requires_grad=True)
    train.sum_gradients([p], ALONE)
    assert p.grad is None


def test_the_place_among_others_is_torchruns(monkeypatch):
    monkeypatch.setenv("RANK", "2")  # a job scheduler may set this alone
    assert torchrun.place_among_processes() == (0, 1)
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    assert torchrun.place_among_processes() == (2, 3)
    alone = torchrun.Processes("cpu", alone=True)  # works for itself, and does not draw a bar
    assert (alone.index, alone.count, alone.first, alone.shows) == (0, 1, True, False)
    monkeypatch.setattr(torchrun.dist, "init_process_group", lambda *a, **k: None)
    third = torchrun.Processes("cpu")
    assert (third.index, third.count, third.first, third.shows) == (2, 3, False, False)


@pytest.fixture
def three(monkeypatch):
    """One of three processes that all hold the same: a sum over them is three times its own."""
    messages = []

    def all_reduce(tensor):
        messages.append(tensor.numel())
        tensor.mul_(3)

    processes = torchrun.Processes("cpu")
    processes.count = 3
    monkeypatch.setattr(torchrun.dist, "all_reduce", all_reduce)
    return processes, messages


def test_gradients_of_all_processes_are_added_up(three):
    processes, messages = three
    a, b, c = (torch.zeros(n, requires_grad=True) for n in (4, 2, 3))
    a.grad, c.grad = torch.arange(4.0), torch.ones(3)
    train.sum_gradients([a, b, c], processes)
    assert a.grad.tolist() == [0, 3, 6, 9]
    assert b.grad.tolist() == [0, 0]  # this process had no example for it
    assert c.grad.tolist() == [3, 3, 3]
    assert messages == [9]  # one message
    assert processes.sum([1.0, 2.0]) == [3.0, 6.0]


def test_a_message_holds_at_most_the_parameter_that_fills_it(three):
    processes, messages = three
    parameters = []
    for n in (5, 2**24, 7):
        p = torch.zeros(n, requires_grad=True)
        p.grad = torch.zeros(1).expand(n).clone() if n > 10 else torch.ones(n)
        parameters.append(p)
    train.sum_gradients(parameters, processes)
    assert messages == [5 + 2**24, 7]
    assert parameters[2].grad.tolist() == [3] * 7


@pytest.mark.parametrize("device", ["warp9", "cuda:99", "meta"])
def test_a_device_that_is_not_there_is_an_error(device):
    with pytest.raises(ValueError, match=f"--device {device} cannot be used here: "):
        torchrun.Processes(device)


def test_only_the_first_process_warns(capsys):
    torchrun.warner(ALONE)("careful")
    assert capsys.readouterr().err == "warning: careful\n"
    other = torchrun.Processes("cpu")
    other.index = 1
    torchrun.warner(other)("careful")
    assert capsys.readouterr().err == ""


# ------------------------------------------------------------------------------------------------------------ locks


@NO_LOCKS
def test_a_folder_that_another_process_writes_into_is_locked(tmp_path):
    processes = torchrun.Processes("cpu")
    with locked_by_another(tmp_path), pytest.raises(FileExistsError, match="another process is writing into"):
        processes.lock(tmp_path)
    assert processes.lock(tmp_path)  # now it is free
    assert processes.lock(tmp_path)  # and ours, as often as we ask
    assert list(processes.locks) == [tmp_path.resolve()]
    processes.unlock()
    assert processes.locks == {}
    with locked_by_another(tmp_path):  # our lock is given back
        pass


@NO_LOCKS
def test_a_file_system_without_locks_is_no_error(tmp_path, monkeypatch):
    import fcntl  # not on Windows

    def refuse(*arguments):
        raise OSError("no locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    processes = torchrun.Processes("cpu")
    assert processes.lock(tmp_path) is False
    assert processes.locks == {}


# ------------------------------------------------------------------------------------------------------ run folders


def opened(out, may_change=(), **meta):
    processes = torchrun.Processes("cpu")
    try:
        return disk.open_run(out, meta, processes, may_change)
    finally:
        processes.unlock()


def test_a_run_is_opened_again_by_the_same_run_alone(tmp_path):
    out = tmp_path / "a" / "R"
    assert opened(out, lr=1.0, tags=("x", "y"), limit=5) == out
    assert json.loads((out / "meta.json").read_text()) == dict(lr=1.0, tags=["x", "y"], limit=5)
    opened(out, lr=1.0, tags=("x", "y"), limit=5)
    with pytest.raises(
        FileExistsError, match="holds another run: lr was 1.0 and is now 2.0; use its options, or choose another"
    ):
        opened(out, lr=2.0, tags=("x", "y"), limit=5)
    with pytest.raises(FileExistsError, match="warmup was None and is now 3"):
        opened(out, lr=1.0, tags=("x", "y"), limit=5, warmup=3)
    assert json.loads((out / "meta.json").read_text())["lr"] == 1.0


def test_the_folder_of_another_command_or_of_many_differences_is_named_shortly(tmp_path):
    opened(tmp_path / "R", command="train", **dict.fromkeys("abcdefgh", 1))
    with pytest.raises(FileExistsError, match="R holds a run of train: choose another --out$"):
        opened(tmp_path / "R", command="distill", lr=1.0)
    with pytest.raises(FileExistsError, match="e was 1 and is now 2, and 3 more; use its options"):
        opened(tmp_path / "R", command="train", **dict.fromkeys("abcdefgh", 2))
    opened(tmp_path / "R", may_change=("command",), command="claims", **dict.fromkeys("abcdefgh", 1))


def test_free_keys_and_versions_may_change(tmp_path):
    opened(tmp_path / "R", lr=1.0, limit=5, versions=dict(torch="2"))
    opened(tmp_path / "R", may_change=("limit",), lr=1.0, limit=9, versions=dict(torch="3"))
    assert json.loads((tmp_path / "R" / "meta.json").read_text())["limit"] == 9


def test_a_foreign_folder_and_a_file_are_refused(tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty and holds no run that could continue"):
        opened(tmp_path)
    with pytest.raises(FileExistsError, match="is a file, not a folder"):
        opened(tmp_path / "note.txt")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["note.txt"]


def test_what_a_kill_leaves_of_a_first_start_is_no_hindrance(tmp_path):
    for name in ("lock", "meta.json.tmp"):
        (tmp_path / name).touch()
    assert opened(tmp_path, lr=1.0) == tmp_path


def test_a_meta_file_that_is_no_json_is_one_line(tmp_path):
    (tmp_path / "meta.json").write_text("{")
    with pytest.raises(ValueError, match="meta.json: not valid JSON"):
        opened(tmp_path)


# ------------------------------------------------------------------------------------------- files that appear whole


@pytest.mark.parametrize("name, opener", [("a.txt", open), ("a.txt.gz", gzip.open)])
def test_a_file_appears_whole_or_not_at_all(tmp_path, name, opener):
    file = tmp_path / name
    with disk.atomic_file(file) as f:
        f.write("é 1\n")
        assert not file.exists()
    with opener(file, "rt", encoding="utf-8") as f:
        assert f.read() == "é 1\n"
    before = file.read_bytes()
    with pytest.raises(ZeroDivisionError), disk.atomic_file(file) as f:
        f.write("half")
        raise ZeroDivisionError
    assert file.read_bytes() == before
    assert os.listdir(tmp_path) == [name]


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "new"
    with pytest.raises(ZeroDivisionError), disk.atomic_folder(folder) as beside:
        (beside / "half").touch()
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == []
    with disk.atomic_folder(folder) as beside:
        (beside / "whole").touch()
        assert not folder.exists()
    assert os.listdir(tmp_path) == ["new"]
    assert os.listdir(folder) == ["whole"]


def test_what_others_have_beside_an_output_is_left_alone(tmp_path):
    """NAME.tmp may be anybody's: a base model, notes."""
    (tmp_path / "new.tmp").mkdir()
    (tmp_path / "new.tmp" / "notes").touch()
    (tmp_path / "a.txt.tmp").write_text("mine")
    with disk.atomic_folder(tmp_path / "new") as beside, disk.atomic_file(tmp_path / "a.txt") as f:
        (beside / "whole").touch()
        f.write("1")
    assert (tmp_path / "new.tmp" / "notes").exists() and (tmp_path / "a.txt.tmp").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "a.txt.tmp", "new", "new.tmp"]


def test_of_two_that_write_one_folder_the_second_fails_and_the_first_stays_whole(tmp_path):
    slow = disk.atomic_folder(tmp_path / "M")
    beside = slow.__enter__()
    (beside / "slow").touch()
    with disk.atomic_folder(tmp_path / "M") as other:
        (other / "fast").touch()
    with pytest.raises(FileExistsError, match="M is there already"):
        slow.__exit__(None, None, None)
    assert os.listdir(tmp_path) == ["M"] and os.listdir(tmp_path / "M") == ["fast"]


def test_a_link_is_followed_and_a_pipe_is_written_into(tmp_path):
    target, link, pipe = tmp_path / "target", tmp_path / "link", tmp_path / "pipe"
    target.write_text("old")
    link.symlink_to(target)
    with disk.atomic_file(link) as f:
        f.write("new")
    assert link.is_symlink() and target.read_text() == "new"
    os.mkfifo(pipe)
    reader = subprocess.Popen(["cat", str(pipe)], stdout=subprocess.PIPE, text=True)
    with disk.atomic_file(pipe) as f:
        f.write("through")
    assert reader.communicate()[0] == "through"
    assert pipe.is_fifo()


def test_what_a_kill_has_left_in_a_run_folder_goes_when_the_run_continues(tmp_path):
    out = opened(tmp_path / "R", lr=1.0)
    (disk.beside(out / "epoch-1")).mkdir()
    (disk.beside(out / "meta.json")).touch()
    (out / "mine.tmp").touch()
    assert opened(tmp_path / "R", lr=1.0) == out
    assert sorted(os.listdir(out)) == ["lock", "meta.json", "mine.tmp"]


def test_a_place_that_is_taken_is_refused(tmp_path):
    disk.must_be_free(tmp_path / "nothing")
    disk.must_be_free(tmp_path)  # an empty folder is free
    (tmp_path / "file").touch()
    for place in (tmp_path, tmp_path / "file"):
        with pytest.raises(FileExistsError, match="is there already: choose another --out"):
            disk.must_be_free(place)
    with pytest.raises(FileExistsError), disk.atomic_folder(tmp_path):
        pass
    assert os.listdir(tmp_path) == ["file"]


@given(st.dictionaries(st.text(max_size=4), st.text(st.characters(), max_size=8) | st.integers(), max_size=4))
def test_any_row_is_one_line_that_is_read_back(row):
    line = disk.json_line(row)
    assert line.endswith("\n")
    assert json.loads(line) == row
    assert line.encode().count(b"\n") == 1


def test_text_is_written_as_it_is_but_for_lone_surrogates():
    assert disk.json_line(dict(text="für ∀")) == '{"text": "für ∀"}\n'
    assert disk.json_line(dict(text="ü\ud800")) == '{"text": "\\u00fc\\ud800"}\n'


def test_a_torn_line_is_cut_off(tmp_path):
    file = tmp_path / "a.jsonl"
    for content, kept in ((b"1\n2\n3", b"1\n2\n"), (b"1\n2\n", b"1\n2\n"), (b"1", b""), (b"", b"")):
        file.write_bytes(content)
        disk.drop_torn_line(file)
        assert file.read_bytes() == kept


def test_a_log_is_cut_back_to_what_a_checkpoint_knows(tmp_path):
    file = tmp_path / "metrics.jsonl"
    disk.keep_lines(file, 3)  # no log yet
    assert not file.exists()
    file.write_text("1\n2\n3\n4")
    for count, kept in ((9, "1\n2\n3\n"), (3, "1\n2\n3\n"), (0, "")):  # a kill has torn the fourth
        disk.keep_lines(file, count)
        assert file.read_text() == kept


# ------------------------------------------------------------------------------------------------------ fingerprints


def test_a_fingerprint_is_of_names_and_contents(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    for folder in (a, b):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "x.safetensors").write_bytes(b"123")
    assert disk.fingerprint(a) == disk.fingerprint(b)
    (b / "notes.md").write_text("read by nobody")
    assert disk.fingerprint(a) == disk.fingerprint(b)
    (b / "x.safetensors").rename(b / "y.safetensors")
    assert disk.fingerprint(a) != disk.fingerprint(b)
    (b / "y.safetensors").rename(b / "x.safetensors")
    (b / "config.json").write_text("{ }")
    assert disk.fingerprint(a) != disk.fingerprint(b)


def test_a_file_has_the_fingerprint_of_its_content(tmp_path):
    (tmp_path / "a.jsonl").write_text("1\n")
    (tmp_path / "b.jsonl").write_text("1\n")
    assert disk.fingerprint(tmp_path / "a.jsonl") == disk.fingerprint(tmp_path / "b.jsonl")
    (tmp_path / "b.jsonl").write_text("2\n")
    assert disk.fingerprint(tmp_path / "a.jsonl") != disk.fingerprint(tmp_path / "b.jsonl")


def test_large_models_that_differ_in_a_tensor_are_told_apart(tmp_path):
    """A large file is sampled: what fine-tuning changes is far more than one sample."""
    file = tmp_path / "model.safetensors"
    content = bytearray(random.Random(0).randbytes(20 * 2**20))
    file.write_bytes(content)
    before = disk.fingerprint(tmp_path)
    content[9 * 2**20 : 11 * 2**20] = bytes(2**21)
    file.write_bytes(content)
    assert disk.fingerprint(tmp_path) != before


def test_what_a_run_depends_on(tiny, trained):
    without = disk.content_hashes(tiny)
    assert without == dict(model_sha256=disk.fingerprint(tiny), adapter_sha256=None)
    adapter = disk.content_hashes(tiny, trained / "epoch-1")["adapter_sha256"]
    assert adapter == disk.fingerprint(trained / "epoch-1")
    assert adapter != disk.fingerprint(trained / "epoch-2")


# ------------------------------------------------------------------------------------------------------ checkpoints


def adapted(tiny, folder):
    """(model with the adapter of a checkpoint, its weights, an optimizer without state)"""
    m = lora.load(model.load(tiny), folder)
    found = {name: p for name, p in m.named_parameters() if p.requires_grad}
    return m, found, torch.optim.AdamW(found.values(), lr=1.0)


def test_a_checkpoint_is_written_and_restored(tiny, trained, tmp_path):
    m, found, optimizer = adapted(tiny, trained / "epoch-1")
    assert resume.restore(trained / "epoch-1", found, optimizer) == 3
    loaded = loading.Loaded(m, None, tiny)
    (tmp_path / "epoch-9").mkdir()
    shutil.copyfile(trained / "meta.json", tmp_path / "meta.json")
    resume.write_checkpoint(tmp_path / "epoch-9", loaded, train.TrainOptions(model="base"), found, optimizer, 3)
    for name in ("adapter_model.safetensors", "optimizer.safetensors", "trainer.json"):
        assert (tmp_path / "epoch-9" / name).read_bytes() == (trained / "epoch-1" / name).read_bytes(), name
    assert resume.intact(tmp_path / "epoch-9")
    assert resume.checkpoints(tmp_path) == [(3, tmp_path / "epoch-9")]


def test_an_optimizer_of_other_weights_is_refused(tiny, trained, tmp_path):
    _, found, optimizer = adapted(tiny, trained / "epoch-1")
    folder = tmp_path / "epoch-1"
    shutil.copytree(trained / "epoch-1", folder)
    state = load_file(folder / "optimizer.safetensors")
    some = next(iter(state))
    save_file({("other" if name == some else name): tensor for name, tensor in state.items()},
              folder / "optimizer.safetensors")  # fmt: skip
    with pytest.raises(ValueError, match="not a checkpoint of this run: optimizer.safetensors has other"):
        resume.restore(folder, found, optimizer)
    del state[some]
    save_file(state, folder / "optimizer.safetensors")
    with pytest.raises(ValueError, match="not a checkpoint of this run: remove it"):
        resume.restore(folder, found, optimizer)


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest", "no manifest"])
def test_a_damaged_checkpoint_is_passed_over(trained, tmp_path, capsys, damage):
    out = tmp_path / "R"
    shutil.copytree(trained, out)
    file = out / "epoch-2" / ("manifest.json" if "manifest" in damage else "optimizer.safetensors")
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage in ("truncate", "manifest"):
        file.write_bytes(content[: len(content) // 2])
    else:
        file.unlink()
    assert not resume.intact(out / "epoch-2")
    assert resume.last_checkpoint(out) == out / "epoch-1"
    assert f"{out / 'epoch-2'} is damaged: the checkpoint before it is used" in capsys.readouterr().err


def fake_checkpoint(folder, step):
    folder.mkdir()
    (folder / "trainer.json").write_text(json.dumps(dict(step=step)))


def test_checkpoints_are_sorted_by_step_and_pruned_between_epochs(tmp_path):
    for name, step in (("step-10", 10), ("epoch-1", 4), ("step-9", 9), ("step-2", 2), ("epoch-2", 8)):
        fake_checkpoint(tmp_path / name, step)
    fake_checkpoint(tmp_path / "epoch-3.tmp", 12)  # half written
    fake_checkpoint(tmp_path / "epoch-4", "x")  # not ours
    (tmp_path / "epoch-5").mkdir()
    names = [folder.name for _, folder in resume.checkpoints(tmp_path)]
    assert names == ["step-2", "epoch-1", "epoch-2", "step-9", "step-10"]
    resume.prune(tmp_path, 1, 10)
    names = [folder.name for _, folder in resume.checkpoints(tmp_path)]
    assert names == ["epoch-1", "epoch-2", "step-10"]
    resume.prune(tmp_path, 5, 10)
    assert len(resume.checkpoints(tmp_path)) == 3
    fake_checkpoint(tmp_path / "step-6", 6)  # a run that continued from epoch-1: step-10 is damaged
    fake_checkpoint(tmp_path / "step-7", 7)
    resume.prune(tmp_path, 1, 7)
    names = [folder.name for _, folder in resume.checkpoints(tmp_path)]
    assert names == ["epoch-1", "step-7", "epoch-2", "step-10"]


def test_where_all_checkpoints_are_damaged_nothing_is_begun_anew(tmp_path):
    for name, step in (("step-9", 9), ("epoch-1", 4)):
        fake_checkpoint(tmp_path / name, step)  # without hashes
    assert resume.last_checkpoint(tmp_path) is None
    alone = torchrun.Processes("cpu", alone=True)
    with pytest.raises(ValueError, match="all its checkpoints are damaged: remove them"):
        resume.where_to_continue(tmp_path, alone)
    assert resume.where_to_continue(tmp_path / "nothing", alone) is None
    (tmp_path / "epoch-1" / resume.MANIFEST).mkdir()  # a file that cannot be read may be whole
    with pytest.raises(IsADirectoryError):
        resume.last_checkpoint(tmp_path)


def test_no_run_has_no_checkpoint(tmp_path):
    assert resume.checkpoints(tmp_path / "nothing") == []
    assert resume.last_checkpoint(tmp_path / "nothing") is None


def test_signals_are_collected_inside_and_as_before_outside():
    stops = [signal.SIGTERM, signal.SIGINT]
    if hasattr(signal, "SIGHUP"):
        stops.append(signal.SIGHUP)  # a closed terminal
    inherited = {number: signal.signal(number, signal.default_int_handler) for number in stops}  # none is ignored
    try:
        with resume.stop_signals() as seen:
            for number in stops:
                signal.raise_signal(number)
            assert seen == stops
        assert set(map(signal.getsignal, stops)) == {signal.default_int_handler}
    finally:
        for number, handler in inherited.items():
            signal.signal(number, handler)


def test_another_thread_leaves_signals_alone():
    found = []

    def enter():
        with resume.stop_signals() as seen:
            found.append((seen, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=enter)
    before = signal.getsignal(signal.SIGTERM)
    thread.start()
    thread.join()
    assert found == [([], before)]


# ------------------------------------------------------------------------------------------------- the decoder's layers


def settings(tmp_path, family="llada", preset=None, own=None, config=None, **options):
    """decoder_settings for a model of a family, whose folder says `own` about its decoder."""
    if own is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(dict(tabom=own)))
    config = config or SimpleNamespace(family=family, block_length=None)
    loaded = SimpleNamespace(m=SimpleNamespace(config=config), folder=tmp_path)
    return loading.decoder_settings(loading.DecodeOptions(**options), loaded, preset)


def test_each_family_has_its_decoder(tmp_path):
    """Table 8 of the paper; distillation has 256 new tokens in 256 steps."""
    dream, llada = settings(tmp_path, "dream"), settings(tmp_path, "llada")
    assert (dream["strategy"], dream["schedule"], dream["block_length"]) == ("entropy", "dream", None)
    assert (dream["temperature"], dream["top_p"]) == (0.1, 0.9)
    assert (llada["strategy"], llada["schedule"], llada["block_length"]) == ("confidence", "llada", 32)
    assert llada["temperature"] == 0
    for found in (dream, llada):
        assert (found["max_new_tokens"], found["steps"]) == (256, 256)


def test_a_family_without_a_decoder_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no decoder for 'bert' models; there is one for dream, llada, sdar, a2d"):
        settings(tmp_path, "bert")


def test_a_block_causal_model_and_its_decoder_have_the_same_blocks(tmp_path):
    for family, blocks in (("sdar", 4), ("a2d", 32)):
        config = SimpleNamespace(family=family, block_length=blocks)
        found = settings(tmp_path, config=config)
        assert (found["schedule"], found["strategy"], found["block_length"]) == (family, "confidence", blocks)
        assert config.block_length == blocks
        assert settings(tmp_path, config=config, preset=dict(block_length=None))["block_length"] == blocks
        assert settings(tmp_path, config=config, block_length=8)["block_length"] == 8
        assert config.block_length == 8
        assert settings(tmp_path, config=config, block_length=0)["block_length"] == 8
        assert settings(tmp_path, config=config, max_new_tokens=20)["steps"] == 24  # one token each, in whole blocks


def test_blocks_of_the_decoder_do_not_make_a_model_block_causal(tmp_path):
    config = SimpleNamespace(family="a2d", block_length=None)
    assert settings(tmp_path, config=config)["block_length"] == 32
    assert settings(tmp_path, config=config, block_length=16)["block_length"] == 16
    assert config.block_length is None


def test_sdar_needs_blocks(tmp_path):
    with pytest.raises(ValueError, match="'sdar' needs a block_length"):
        settings(tmp_path, "sdar")


def test_flags_win_over_the_model_and_that_over_the_benchmark(tmp_path):
    preset, own = dict(temperature=0.3, top_k=9, strategy="margin"), dict(temperature=0.5, top_k=5)
    found = settings(tmp_path, preset=preset, own=own, temperature=0.7)
    assert (found["temperature"], found["top_k"], found["strategy"]) == (0.7, 5, "margin")


def test_steps_follow_the_length_that_is_nearest_to_them(tmp_path):
    preset = dict(max_new_tokens=512, steps=128, block_length=64)
    assert settings(tmp_path, preset=preset)["steps"] == 128
    assert settings(tmp_path, preset=preset, max_new_tokens=64)["steps"] == 64  # the preset's were for another length
    assert settings(tmp_path, preset=preset, steps=256)["steps"] == 256
    paced = settings(tmp_path, preset=preset, tokens_per_step=2)
    assert paced["tokens_per_step"] == 2
    assert "steps" not in paced
    assert "tokens_per_step" not in settings(tmp_path, own=dict(tokens_per_step=2), steps=64)


def test_a_pace_is_said_anew_as_a_whole(tmp_path):
    """steps, tokens_per_step and threshold: a layer that says one of them drops those of the layers below it."""
    preset = dict(max_new_tokens=512, steps=128, block_length=64)
    found = settings(tmp_path, preset=preset, threshold=0.9)
    assert (found["threshold"], found["steps"]) == (0.9, 512)  # the steps that nobody asked for leave no masks
    assert "steps" not in settings(tmp_path, own=dict(threshold=0.9), tokens_per_step=2)
    found = settings(tmp_path, own=dict(threshold=0.9), steps=64)
    assert "threshold" not in found and found["steps"] == 64
    found = settings(tmp_path, own=dict(tokens_per_step=2), threshold=0.9)
    assert "tokens_per_step" not in found and found["steps"] == 256


@pytest.mark.parametrize("family, blocks", [("llada", None), ("dream", None), ("a2d", None), ("a2d", 8)])
def test_a_threshold_with_steps_that_may_leave_masks_is_refused(tmp_path, family, blocks):
    options = dict(family=family, config=SimpleNamespace(family=family, block_length=blocks), threshold=0.9)
    options |= dict(max_new_tokens=32, block_length=8)
    with pytest.raises(ValueError, match="^threshold 0.9 and steps 4: .* one of the 32 tokens.* leave steps out$"):
        settings(tmp_path, steps=4, **options)
    assert settings(tmp_path, steps=32, **options)["steps"] == 32
    with pytest.raises(ValueError, match="threshold 0.9 and steps 4"):
        settings(tmp_path, own=dict(max_new_tokens=32, steps=4, threshold=0.9), family=family, block_length=8)


def test_a_threshold_of_sdar_adds_to_its_steps(tmp_path):
    config = SimpleNamespace(family="sdar", block_length=4)
    for strategy in ("confidence", "entropy"):  # every block is decoded whole, whatever the steps are
        found = settings(tmp_path, config=config, max_new_tokens=32, steps=16, threshold=0.9, strategy=strategy)
        assert (found["threshold"], found["steps"]) == (0.9, 16)


def test_layers_are_merged_and_no_layer_is_changed():
    below, above = dict(max_new_tokens=8, steps=4, top_k=2), dict(max_new_tokens=16)
    assert loading.merge_layers(below, above) == dict(max_new_tokens=16, top_k=2)
    assert loading.merge_layers(below, dict(steps=2)) == dict(max_new_tokens=8, steps=2, top_k=2)
    assert below == dict(max_new_tokens=8, steps=4, top_k=2)


def test_ends_are_all_tokens_that_end_a_response_and_eos_is_one(tmp_path):
    """A flag means every end of a response, a benchmark's protocol exactly the EOS."""
    tok = SimpleNamespace(stop_ids={7, 5, 6}, unused_ids=lambda rows: [8, 9])
    config = SimpleNamespace(family="llada", block_length=None, eos_id=5, mask_id=4, vocab_size=10)
    loaded = loading.Loaded(SimpleNamespace(config=config), tok, tmp_path)
    assert loading.with_eos_rules(dict(steps=2), loaded) == dict(steps=2, suppress=[4, 8, 9])
    found = loading.with_eos_rules(dict(suppress_eos=True, eos_last=True), loaded)
    assert found == dict(suppress=[4, 8, 9, 5, 6, 7], decode_last=[5, 6, 7])
    found = loading.with_eos_rules(dict(suppress_eos="eos", eos_last="eos"), loaded)
    assert found == dict(suppress=[4, 8, 9, 5], decode_last=[5])
    config.block_length = 4
    assert loading.with_eos_rules(dict(schedule="a2d"), loaded)["stop"] == [5, 6, 7]
    assert "stop" not in loading.with_eos_rules(dict(schedule="llada"), loaded)


def test_block_length_0_is_one_block_and_sample_is_not_greedy(tmp_path):
    assert settings(tmp_path, block_length=0)["block_length"] is None
    assert settings(tmp_path, preset=dict(greedy=True))["greedy"] is True
    assert settings(tmp_path, preset=dict(greedy=True), sample=True, temperature=0.5)["greedy"] is False
    with pytest.raises(ValueError, match="--sample draws nothing at temperature 0"):
        settings(tmp_path, sample=True)
    assert settings(tmp_path, suppress_eos=True)["suppress_eos"] is True


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(max_new_tokens=32, block_length=8, steps=30), "steps 30 do not divide by the 4 blocks"),
        (dict(block_length=5), "block_length 5 does not divide"),
        (dict(max_new_tokens=0), "max_new_tokens 0"),
        (dict(temperature=float("nan")), "temperature nan must be"),
        (dict(top_p=1.5), "top_p 1.5"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        settings(tmp_path, **options)


@pytest.mark.parametrize(
    "own, message",
    [
        (dict(steps=8, foo=1), "has foo; the decoder settings are max_new_tokens"),
        ([1], "must be an object of decoder settings"),
        ("x", "must be an object of decoder settings"),
        (dict(max_new_tokens="x"), "has max_new_tokens 'x', which must be int"),
        (dict(max_new_tokens=True), "has max_new_tokens True, which must be int"),
        (dict(top_p="1"), "has top_p '1', which must be float"),
    ],
)
def test_a_models_own_decoder_settings_are_checked(tmp_path, own, message):
    with pytest.raises(ValueError, match=message):
        settings(tmp_path, own=own)


def test_a_whole_number_is_a_float_too(tmp_path):
    assert settings(tmp_path, own=dict(temperature=0))["temperature"] == 0


def test_own_settings_of_null_are_refused(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"tabom": null}')
    with pytest.raises(ValueError, match="must be an object of decoder settings"):
        settings(tmp_path)


# ------------------------------------------------------------------------------------------------------------ models


def load(folder, **options):
    return loading.load_model(loading.ModelOptions(model=str(folder), **options), ALONE)


def test_a_model_comes_with_its_tokenizer_and_its_folder(tiny, capsys):
    loaded = load(tiny)
    assert loaded.folder == tiny
    assert loaded.tok.size == loaded.m.config.vocab_size == len(tiny_model.vocabulary())
    assert loaded.never_chosen == [0]  # the mask token
    assert capsys.readouterr().err == ""


def test_block_causal_is_said_for_models_whose_files_do_not_say_it(tiny, tmp_path):
    with pytest.raises(ValueError, match="--block-causal 4: llada models see everything"):
        load(tiny, block_causal=4)
    raw = json.loads((FOLDER / "a2d-tiny" / "config.json").read_text())
    rows = len(tiny_model.vocabulary())
    raw |= dict(vocab_size=rows, mask_token_id=0, eos_token_id=1, pad_token_id=2, bos_token_id=2)
    folder = changed_model(tmp_path, tiny)
    model.save(model.create(raw), folder)
    assert load(folder).m.config.block_length is None
    assert load(folder, block_causal=4).m.config.block_length == 4


def test_rows_of_the_network_that_are_no_token_are_never_chosen(tiny, tmp_path):
    wide = changed_model(tmp_path, tiny)
    model.save(model.create({**tiny_model.config(), "vocab_size": 20, "embedding_size": 20}), wide)
    assert load(wide).never_chosen == [0, 18, 19]


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(eos_token_id=3), "eos_token_id is 3 in config.json, the tokenizer has 1 (<|endoftext|>)"),
        (dict(pad_token_id=4), "pad_token_id is 4 in config.json, the tokenizer has 2 (<|pad|>)"),
        (dict(mask_token_id=5), "mask_token_id is 5 in config.json, the tokenizer has 0 (<|mask|>)"),
    ],
)
def test_a_config_and_a_tokenizer_that_disagree_are_named(tiny, tmp_path, capsys, changes, message):
    folder = changed_model(tmp_path, tiny, lambda f: edit_json(f / "config.json", **changes))
    load(folder)
    assert capsys.readouterr().err == f"warning: {folder}: {message}\n"


def test_the_dtype_is_the_one_asked_for_or_the_best_of_the_device(tiny):
    auto, asked = loading.ModelOptions(), loading.ModelOptions(dtype="float16")
    cuda = SimpleNamespace(device=torch.device("cuda"))
    assert loading.resolve_dtype(auto, ALONE) == "float32"
    assert loading.resolve_dtype(auto, cuda) == "bfloat16"
    assert loading.resolve_dtype(auto, cuda, "float32") == "float32"
    assert loading.resolve_dtype(asked, cuda, "float32") == "float16"
    assert {p.dtype for p in load(tiny, dtype="bfloat16").m.parameters()} == {torch.bfloat16}


def test_a_checkpoint_of_either_kind_is_loaded(tiny, trained, tmp_path):
    c = loading.ModelOptions(model=str(tiny))
    assert lora.layers(loading.load_checkpoint(c, ALONE, None).m) == {}
    assert len(lora.layers(loading.load_checkpoint(c, ALONE, trained / "epoch-1").m)) == 8
    other = model.create(tiny_model.config(), torch.Generator().manual_seed(5))
    model.save(other, tmp_path / "full")
    loaded = loading.load_checkpoint(c, ALONE, tmp_path / "full")
    assert loaded.folder == tiny  # the tokenizer's
    for ours, theirs in zip(loaded.m.parameters(), other.parameters()):
        assert torch.equal(ours, theirs)


def test_small_models_use_one_thread_unless_told_otherwise(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    small, large = torch.nn.Linear(3, 4), torch.nn.Linear(loading.SMALL, 1, device="meta")
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    loading.one_thread_if_small(small)
    assert asked == []
    monkeypatch.delenv("OMP_NUM_THREADS")
    loading.one_thread_if_small(large)
    assert asked == []
    loading.one_thread_if_small(small)
    assert asked == [1]


def test_a_batch_is_on_the_device_of_its_process(tiny, trajectories):
    records = data.read_trajectories(trajectories)[:3]
    batch = loading.batch_of(records, load(tiny), ALONE)
    assert batch["response_ids"].shape == (3, tiny_model.WHOLE.answer)
    assert batch["order"][1].tolist() == records[1]["order"]


# ----------------------------------------------------------------------------------------------------- broken models


def truncate(file):
    file.write_bytes(file.read_bytes()[:-1000])


def misshape(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.transformer.wte.weight"] = torch.zeros(3, 4)
    save_file(tensors, folder / "model.safetensors")


def index_of_a_missing_shard(folder):
    names = load_file(folder / "model.safetensors")
    index = dict(weight_map=dict.fromkeys(names, "model-00001-of-00002.safetensors"))
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def fewer_rows(folder):
    model.save(model.create({**tiny_model.config(), "vocab_size": 12, "embedding_size": 12}), folder)


BROKEN = {
    "no config": (lambda f: (f / "config.json").unlink(), r"no config\.json in .*changed"),
    "family": (lambda f: edit_json(f / "config.json", model_type="gpt5"), "model_type is 'gpt5'; this code knows"),
    "setting": (lambda f: edit_json(f / "config.json", alibi=True), "alibi is True, supported is False"),
    "not JSON": (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
    "truncated": (lambda f: truncate(f / "model.safetensors"), "truncated or not a safetensors file"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "missing model.safetensors"),
    "no shard": (index_of_a_missing_shard, "missing model-00001-of-00002.safetensors"),
    "shape": (misshape, r"model\.transformer\.wte\.weight is \[3, 4\], the config wants \[18, 96\]"),
    "vocabulary": (
        lambda f: edit_json(f / "config.json", vocab_size=9, embedding_size=9),
        r"wte\.weight is \[18, 96\]",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), r"no tokenizer\.json"),
    "rows": (fewer_rows, "tokenizer has ids up to 17, the model only 12"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_bad_model_folders_are_one_line(tiny, tmp_path, name):
    change, message = BROKEN[name]
    with pytest.raises((ValueError, OSError)) as error:
        load(changed_model(tmp_path, tiny, change))
    assert re.search(message, " ".join(str(error.value).split()))


def test_nothing_is_written_for_a_bad_model(tiny, puzzles, tmp_path, capsys):
    broken = changed_model(tmp_path, tiny, misshape)
    fails(capsys, r"wte\.weight is \[3, 4\]", "distill", model=broken, data=puzzles, out=tmp_path / "T")
    assert not (tmp_path / "T").exists()


@pytest.mark.parametrize("name", ["/no/where", "./nowhere", "nowhere"])
def test_no_such_model(name):
    with pytest.raises(OSError, match="no model folder .*where"):
        load(name)


def test_disagreements_of_config_and_tokenizer_are_told():
    special = dict(eos_token="<|endoftext|>", pad_token="<|endoftext|>", mask_token="<|mask|>")
    letters = SimpleNamespace(special=special, ids={"<|endoftext|>": 256, "<|mask|>": 259})
    config = SimpleNamespace(eos_id=258, pad_id=256, mask_id=7)
    eos, mask = loading.disagreements(letters, config)
    assert "eos_token_id is 258 in config.json, the tokenizer has 256 (<|endoftext|>)" in eos
    assert "mask_token_id is 7 in config.json, the tokenizer has 259 (<|mask|>)" in mask
    assert loading.disagreements(letters, SimpleNamespace(eos_id=256, pad_id=None, mask_id=259)) == []
