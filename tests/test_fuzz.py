"""The readers of foreign files against broken ones.

python -m pytest tests/test_fuzz.py                             # 600 files
python -m pytest -m "not exhaustive" tests/test_fuzz.py         # more than 10,000

Whatever a file holds, a reader gives an answer or one of the errors that the command line prints as one line; anything
else, and a hang, is a failure. Half of the inputs are random, half are good files with a few things changed."""

import functools
import gzip
import json
import random
import shutil
import subprocess
import sys
from unittest import mock

import pytest
from helpers import FOLDER, ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

import data
import evaluate
import lora
import model
import tokenizer
from runs import disk, resume

ERRORS = (ValueError, OSError, ImportError, SafetensorError, RuntimeError)  # what tabom.main() turns into one line
SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]
TINY = FOLDER / "llada-tiny"


@pytest.fixture(params=["few", pytest.param("all", marks=pytest.mark.slow)])
def fuzz(request):
    """A decorator that calls the function below it with `count` examples of the strategies, or with a twentieth."""

    def decorate(count, *strategies):
        if request.param == "few":
            count //= 20
        some = settings(max_examples=count, deadline=None, database=None, suppress_health_check=SLOW, derandomize=True)
        return lambda check: given(*strategies)(some(check))()

    return decorate


def survives(read, *arguments, **options):
    try:
        read(*arguments, **options)
    except ERRORS as e:
        assert str(e) or type(e) is not ValueError


KEYS = "id prompt messages question answer role content prompt_ids response_ids order history choices system context"
KEYS = (*KEYS.split(), "text", "label", "solutions", "method", "response_token_ids", "decoding_order")
leaves = st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats() | st.text(max_size=6) | st.sampled_from(KEYS)
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=4), inner),
    max_leaves=12,
)


def mutated(content, seed):
    """The bytes with up to eight random changes."""
    chance, content = random.Random(seed), bytearray(content)
    for _ in range(chance.randint(1, 8)):
        i = chance.randrange(len(content))
        kind = chance.randrange(4)
        if kind == 0:
            content[i] ^= 1 << chance.randrange(8)
        elif kind == 1:
            content[i] = chance.randrange(256)
        elif kind == 2:
            del content[i : i + chance.randint(1, 9)]
        else:
            content[i:i] = chance.choice([b"9" * 30, b"{", b"]", b'"', b"-1", b"null", b"\x00", b"1e999", b"[[[[[[[["])
        if not content:
            break
    return bytes(content)


def changed(tree, seed):
    """The JSON value with one to three random places replaced."""
    chance, tree = random.Random(seed), json.loads(json.dumps(tree))
    odd = [None, True, -1, 0, 2**31, 10**30, 1e308, "", "x", "[MASK]", [], {}, [None], {"a": 1}, ["q_proj"], "(a+)+$"]
    for _ in range(chance.randint(1, 3)):
        node = tree
        while True:
            keys = list(node) if isinstance(node, dict) else range(len(node))
            if not keys:
                break
            key = chance.choice(list(keys))
            if isinstance(node[key], (dict, list)) and node[key] and chance.random() < 0.7:
                node = node[key]
                continue
            if chance.random() < 0.2:
                del node[key]
            else:
                node[key] = json.loads(json.dumps(chance.choice(odd)))
            break
    return tree


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def read_all(path):
    said = []
    survives(data.read_examples, path, warn=said.append)
    survives(data.read_examples, path, "question", "answer", warn=said.append)
    survives(data.read_trajectories, path, 64, warn=said.append)
    survives(data.holds_trajectories, path)


def test_random_bytes_as_a_dataset(fuzz, place):
    @fuzz(
        1500,
        st.binary(max_size=200),
        st.sampled_from([".jsonl", ".json", ".jsonl.gz", ".parquet", ".txt"]),
        st.booleans(),
    )
    def check(content, suffix, packed):
        path = place / f"a{suffix}"
        path.write_bytes(gzip.compress(content, 1) if packed else content)
        read_all(path)


def test_random_rows_as_a_dataset(fuzz, place):
    @fuzz(2000, st.lists(values, max_size=4), st.sampled_from([".jsonl", ".json"]))
    def check(rows, suffix):
        path = place / f"b{suffix}"
        text = "\n".join(map(json.dumps, rows)) if suffix == ".jsonl" else json.dumps(rows)
        path.write_text(text, encoding="utf-8")
        read_all(path)


RECORD = dict(id="a", prompt="x", answer="y", prompt_ids=[3, 4], response_ids=[5, 6, 1], order=[2, 0, 1], finished=True)


def test_a_damaged_trajectory(fuzz, place):
    @fuzz(1500, st.integers(0, 2**40))
    def check(seed):
        path = place / "c.jsonl"
        good = json.dumps(RECORD).encode()
        bad = json.dumps(changed(RECORD, seed)).encode() if seed % 2 else mutated(good, seed)
        path.write_bytes(good.replace(b'"a"', b'"b"') + b"\n" + bad + b"\n")
        try:
            records = data.read_trajectories(path, 64)
        except ERRORS:
            return
        for r in records:  # what was accepted can be trained on
            data.usable(r)
            data.collate([data.cut_at_eos(r, {1})], 0)


AUTHORS = dict(method="entropy", question="L12.", answer="1", gen_text="1", response_token_ids=[5, 6, 1])
AUTHORS.update(decoding_order=[1, 0, -1], non_ltr_positions=[0], data_source="x", messages=[])


def test_a_damaged_trajectory_of_the_authors(fuzz, place, tiny):
    @fuzz(800, st.integers(0, 2**40))
    def check(seed):
        tok, path, said = tokenizer_of(tiny), place / "d.jsonl", []
        path.write_text(json.dumps(AUTHORS) + "\n" + json.dumps(changed(AUTHORS, seed)) + "\n")
        try:
            records = data.read_trajectories(path, 64, tok, {"entropy"}, tok.mask_id, 8, said.append)
        except ERRORS:
            return
        assert len(records) >= 1
        data.collate([data.cut_at_eos(r, tok.stop_ids) for r in records], 0)


@functools.cache
def tokenizer_of(folder):
    return tokenizer.load(folder)


def test_a_damaged_config(fuzz):
    @fuzz(1500, st.integers(0, 2**40))
    def check(seed):
        raw = json.loads((FOLDER / ("llada-tiny", "dream-tiny")[seed % 2] / "config.json").read_text())
        survives(model.parse_config, changed(raw, seed))


def copied(place, source, name):
    folder = place / name
    if not folder.exists():
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns("expected*", "objective*", "adapter"))
    return folder


def test_a_damaged_model_folder(fuzz, place):
    """config.json, the header of model.safetensors, or an index that was written by somebody else."""

    @fuzz(1000, st.integers(0, 2**40))
    def check(seed):
        folder = copied(place, TINY, "model")
        file = folder / ("config.json", "model.safetensors", "model.safetensors.index.json")[seed % 3]
        good = file.read_bytes() if file.exists() else None
        if file.name == "config.json":
            file.write_text(json.dumps(changed(json.loads(good), seed)))
        elif good is not None:
            header = 8 + int.from_bytes(good[:8], "little")
            file.write_bytes(mutated(good[:header], seed) + good[header:])
        else:
            names = {f"model.transformer.{i}": "model.safetensors" for i in range(3)}
            file.write_text(json.dumps(changed(dict(metadata={}, weight_map=names), seed)))
        try:
            survives(model.load, folder)
        finally:
            file.unlink() if good is None else file.write_bytes(good)


def test_a_damaged_adapter(fuzz, place, golden_model):
    @fuzz(1000, st.integers(0, 2**40))
    def check(seed):
        folder = copied(place, TINY / "adapter", "adapter")
        file = folder / ("adapter_config.json", "adapter_model.safetensors")[seed % 2]
        good = file.read_bytes()
        if file.suffix == ".json":
            file.write_text(json.dumps(changed(json.loads(good), seed)))
        else:
            file.write_bytes(mutated(good[:600], seed) + good[600:])
        try:
            survives(lora.load, golden_model(), folder)
        finally:
            file.write_bytes(good)


@pytest.fixture(scope="module")
def golden_model():
    loaded = model.load(TINY)
    return lambda: loaded if not lora.layers(loaded) else model.load(TINY)


def test_a_damaged_tokenizer(fuzz, place, tiny):
    @fuzz(800, st.integers(0, 2**40))
    def check(seed):
        folder = copied(place, tiny, "tokenizer")
        file = folder / ("tokenizer_config.json", "tokenizer.json")[seed % 2]
        good = file.read_bytes()
        file.write_bytes(json.dumps(changed(json.loads(good), seed)).encode() if seed % 4 < 2 else mutated(good, seed))

        def use():
            tok = tokenizer.load(folder)
            ids = tokenizer.encode_prompt(tok, [dict(role="user", content="L12.")])
            tok.response_text(ids)
            tok.unused_ids(32)

        try:
            survives(use)
        finally:
            file.write_bytes(good)


PIECES = [
    "{{",
    "}}",
    "{%",
    "%}",
    " messages ",
    "[0]",
    ".content",
    "['role']",
    " for m in ",
    " if ",
    " endif ",
    " endfor ",
]
PIECES += [" raise_exception('x') ", " range(10**9) ", "|tojson", "|length", " % ", "__class__", ".__init__", " tools "]


def test_a_foreign_chat_template(fuzz, tiny):
    @fuzz(1000, st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=14))
    def check(pieces):
        tok = tokenizer.load(tiny)
        tok.template, tok.compiled = "".join(pieces), None
        survives(tok.chat, [dict(role="user", content="L12.")])


def test_a_damaged_checkpoint_is_none(fuzz, place):
    @fuzz(500, st.integers(0, 2**40))
    def check(seed):
        out = place / "run"
        folder = out / "epoch-1"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "trainer.json").write_text(json.dumps(dict(step=3)))
        (folder / "optimizer.safetensors").write_bytes(b"x" * 40)
        hashes = {name: disk.fingerprint(folder / name) for name in ("trainer.json", "optimizer.safetensors")}
        (folder / "manifest.json").write_text(json.dumps(hashes))
        assert resume.last_checkpoint(out) == folder
        file = folder / ("trainer.json", "optimizer.safetensors", "manifest.json")[seed % 3]
        good = file.read_bytes()
        file.write_bytes(mutated(good, seed))
        if file.read_bytes().strip() != good and file.name != "manifest.json":
            assert resume.last_checkpoint(out) is None
        else:
            survives(resume.last_checkpoint, out)


QUESTIONS = {
    "gsm8k": dict(question="2 + 2?", answer="It is #### 4"),
    "math500": dict(problem="$x$?", answer="4"),
    "humaneval": dict(prompt="def f(x):\n", entry_point="f", test="def check(f):\n    assert f(1) == 2\n"),
    "mbpp": dict(task_id=11, text="Add.", test_list=["assert f(1) == 2"], code="def f(x): return x", test_imports=[]),
    "ifeval": dict(key=1, prompt="No commas.", instruction_id_list=["punctuation:no_comma"], kwargs=[{}]),
}


def test_a_damaged_benchmark(fuzz, place):
    @fuzz(1000, st.integers(0, 2**40), st.sampled_from(sorted(QUESTIONS)), st.sampled_from(["dream", "llada"]))
    def check(seed, task, family):
        path = place / evaluate.TASKS[task].FILE
        path.write_bytes(gzip.compress(json.dumps(changed(QUESTIONS[task], seed)).encode(), 1))

        def use():
            rows = evaluate.read_questions(task, place)
            for row in rows:
                evaluate.TASKS[task].ask(row, family)
            if task in ("gsm8k", "ifeval"):
                evaluate.score(task, evaluate.verdicts(task, rows, ["4, or"] * len(rows), family))
            elif task != "math500":  # what would run the programs is replaced
                with mock.patch(
                    "benchmarks.execute.run_many", lambda jobs: [dict(passed=False, reason="")] * len(jobs)
                ):
                    evaluate.verdicts(task, rows, ["```python\ndef f(x): return x\n```"] * len(rows), family)

        survives(use)


@pytest.mark.skipif(sys.platform != "linux", reason="the unit of ru_maxrss")
def test_one_line_of_a_gigabyte_takes_no_memory(place):
    """The file is sparse; a reader that held the line would need a gigabyte."""
    path = place / "long.jsonl"
    with open(path, "wb") as f:
        f.truncate(2**30)
    program = (
        "import resource, sys, data\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n"
        "    data.read_examples(sys.argv[1])\n"
        "except ValueError as e:\n"
        "    print(e)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, cwd=ROOT)
    error, grown = done.stdout.splitlines()
    assert "long.jsonl:1: the line is longer than 67108864 bytes" in error and int(grown) < 300_000  # kilobytes
