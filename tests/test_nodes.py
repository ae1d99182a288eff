"""Several nodes, and how a run with several processes ends: python -m pytest tests/test_nodes.py

Each node is a torchrun of its own on this machine. Its working directory stands for the disk that only it has."""

import json
import re
import shutil
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from helpers import HUNG, ROOT, TRAIN, decoded, edit_json, flags, interpreter, last_json, metrics, run, shell, start

from runs import disk, torchrun

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="torchrun")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def nodes(folders, *words, program=ROOT / "tabom.py"):
    """A command on one node for each folder, which it runs in -> [(status, stdout, stderr)]."""
    port, running = free_port(), []
    for rank, folder in enumerate(folders):
        folder.mkdir(exist_ok=True)
        place = ["--nnodes", str(len(folders)), "--node_rank", str(rank), "--nproc_per_node", "1"]
        place += ["--master_addr", "127.0.0.1", "--master_port", str(port)]
        command = [sys.executable, "-m", "torch.distributed.run", *place, str(program), *map(str, words)]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        running.append(subprocess.Popen(command, cwd=folder, env=interpreter(program)[1], **pipes))
    ended = []
    for process in running:
        out, err = process.communicate(timeout=HUNG)
        ended.append((process.returncode, out, err))
    return ended


def errors(*texts):
    """What we say of why a run ended; another process's bar may stand before it in the line."""
    return re.findall(r"\b(?:error: |stopped).*", "\n".join(texts))


@pytest.mark.slow
def test_two_nodes_distill_and_train_as_one_process_does(tiny, puzzles, tmp_path, capsys):
    shared, places = tmp_path / "shared", [tmp_path / "node-0", tmp_path / "node-1"]
    distill = flags(model=tiny, data=puzzles, check="exact", batch_size=2)
    train = flags(model=tiny, data=shared / "T", **TRAIN)
    for words in (["distill", *distill, "--out", shared / "T"], ["train", *train, "--out", shared / "R"]):
        first, second = nodes(places, *words)
        assert (first[0], second[0]) == (0, 0), (first, second)
        assert last_json(first[1])["out"] == str(words[-1])
        assert second[1] == ""  # the first process alone has a result to show
    assert len(list((shared / "T").glob("trajectories-*.jsonl"))) == 2  # both have worked
    assert not list(shared.glob("*/*.tmp"))

    run(capsys, "distill", model=tiny, data=puzzles, check="exact", batch_size=2, out=tmp_path / "T")
    run(capsys, "train", model=tiny, data=shared / "T", **TRAIN, out=tmp_path / "R")
    assert decoded(shared / "T") == decoded(tmp_path / "T")
    for ours, alone in zip(metrics(shared / "R"), metrics(tmp_path / "R"), strict=True):
        assert ours["loss"] == pytest.approx(alone["loss"], abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["distill", "train"])
def test_a_folder_that_nodes_do_not_share_is_found_before_the_work(tiny, puzzles, trajectories, tmp_path, command):
    """Two working directories, and one relative --out."""
    own = dict(distill=dict(data=puzzles), train=dict(data=trajectories, keep="all"))[command]
    ended = nodes([tmp_path / "a", tmp_path / "b"], command, *flags(model=tiny, out="R", **own))
    assert all(status != 0 for status, _, _ in ended)
    (line,) = errors(*(err for _, _, err in ended))
    place = re.escape(str(tmp_path / "b" / "R"))
    assert re.fullmatch(f"error: {place} of process 1 on .* is not the folder of process 0: give an --out .*", line)
    assert sorted(file.name for file in (tmp_path / "a" / "R").iterdir()) == ["lock", "meta.json"]


@pytest.mark.slow
def test_nodes_with_other_files_are_refused(tiny, puzzles, tmp_path):
    """A relative --model names another model on each node."""
    places = [tmp_path / "a", tmp_path / "b"]
    for place in places:
        shutil.copytree(tiny, place / "M")
    config = json.loads((tiny / "config.json").read_text())
    edit_json(places[1] / "M" / "config.json", rope_theta=config["rope_theta"] * 2)
    ended = nodes(places, "distill", *flags(model="M", data=puzzles, out=tmp_path / "T"))
    assert all(status != 0 for status, _, _ in ended)
    (line,) = errors(*(err for _, _, err in ended))
    assert re.search(
        "process 1 on .* and process 0 on .* differ in model_sha256: [0-9a-f]{24} and [0-9a-f]{24}; ", line
    )
    assert not (tmp_path / "T").exists()


# ------------------------------------------------------------------------------------- what differs, without processes


def metas(*others):
    """Processes of which the first has the meta that it is asked about, and the others these."""

    def gather(items):
        return [*items, *(dict(meta, node="there") for meta in others)]

    return SimpleNamespace(gather=gather)


def test_what_may_differ_between_nodes():
    first = dict(model="/a/M", data="/a/d", adapter="x", model_sha256="1", lr=1.0, versions=dict(torch="2"))
    other = dict(first, model="/b/M", data="/b/d", adapter="y", versions=dict(torch="3"))
    disk.same_everywhere(first, metas(first, other))
    for key, value in dict(model_sha256="2", data_sha256="3", lr=2.0).items():
        with pytest.raises(ValueError, match=f"process 2 on there and process 0 on .* differ in {key}: {value} and"):
            disk.same_everywhere(first, metas(first, dict(other, **{key: value})))


# ---------------------------------------------------------------------------------------------------------- last words


def test_the_last_words_are_said_once(monkeypatch, capsys):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for name, value in dict(RANK=1, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=store.port).items():
        monkeypatch.setenv(name, str(value))
    assert [torchrun.tell(ValueError("a\nb")), torchrun.tell(RuntimeError("connection closed"))] == [1, 1]
    torchrun.last_words("stopped")
    assert capsys.readouterr().err == "error: a b\n"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # torchrun has started the processes again
    torchrun.last_words("stopped")
    assert capsys.readouterr().err == "stopped\n"
    monkeypatch.setenv("MASTER_PORT", "no port")
    torchrun.last_words("stopped")
    assert capsys.readouterr().err == "stopped\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(model="nowhere"), "nowhere"),
        (dict(batch_size=0), "--batch-size 0"),  # before there is a process group
        (dict(limit=0), "--limit 0"),
    ],
    ids=str,
)
def test_the_same_error_of_all_processes_is_one_line(tiny, puzzles, tmp_path, wrong, message):
    options = dict(model=tiny, data=puzzles, out=tmp_path / "T") | wrong
    done = shell("distill", *flags(**options), processes=2)
    assert done.returncode != 0
    (line,) = errors(done.stderr)
    assert message in line


BROKEN = """
import os, signal, sys, tabom, train
step = train.train_step
def broken(*arguments):
    if os.environ["RANK"] == sys.argv[1] and arguments[1] == 2:
        raise ValueError("a bad thing")
    return step(*arguments)
train.train_step = broken
sys.exit(tabom.main(sys.argv[2:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("process", ["0", "1"])
def test_the_error_of_one_process_is_the_only_line(tiny, trajectories, tmp_path, process):
    """The other one waits for it in a collective, and ends."""
    program = tmp_path / "program.py"
    program.write_text(BROKEN)
    words = ["train", *flags(model=tiny, data=trajectories, out=tmp_path / "R", **TRAIN)]
    running = start(process, *words, program=program, processes=2)
    _, err = running.communicate(timeout=HUNG)
    assert running.returncode != 0
    assert errors(err) == ["error: a bad thing"]
