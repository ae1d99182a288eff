"""What the tests of benchmarks/ share: the benchmarks' rows, the harness's prompts, programs right
or wrong by making."""

import ast
import gzip
import json
import os
from pathlib import Path

import pytest

from benchmarks import execute

REAL = Path(os.environ.get("TABOM_DATA", "no-such-folder"))
GOLDEN = Path(__file__).parent / "golden" / "harness"
needs_data = pytest.mark.skipif(not REAL.is_dir(), reason="TABOM_DATA names no folder")


def rows(name):
    with gzip.open(REAL / f"{name}.jsonl.gz", "rt", encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def golden(name):
    return [json.loads(line) for line in (GOLDEN / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def dream_chat(text, start):
    """A prompt as Dream's chat template renders it."""
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    return f"{system}<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n{start}"


def llada_chat(text, start):
    """A prompt as LLaDA's chat template renders it: it trims every message, the assistant's start
    too."""
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    user, assistant = header.format("user"), header.format("assistant")
    return f"<|startoftext|>{user}{text.strip()}<|eot_id|>{assistant}{start.strip()}"


def check_prompts(benchmark):
    """The prompts of both families are those of the harness, character for character."""
    data = rows(benchmark.FILE.removesuffix(".jsonl.gz"))
    data = benchmark.rows(data) if hasattr(benchmark, "rows") else data
    (row,) = [row for row in golden("prompts_dream") if row["task"] == benchmark.NAME]
    assert dream_chat(*benchmark.ask(data[0], "dream")) == row["fork_transformers_4_47_or_newer"]
    for row in golden(f"prompts_llada_{benchmark.NAME}"):
        record = data[row["row"]]
        assert llada_chat(*benchmark.ask(record, "llada")) == row["prompt"]
        for protocol in ("paper", "release"):
            for family in ("dream", "llada"):
                assert benchmark.ask(record, family, protocol) == benchmark.ask(record, "dream", "official")


def check_lengths(benchmark, **wanted):
    """wanted: family_protocol -> (new tokens, block length); an unknown protocol is an error."""
    for name, (tokens, block) in wanted.items():
        family, protocol = name.split("_")
        found = benchmark.settings(family, protocol)
        assert (found["max_new_tokens"], found["steps"], found["block_length"]) == (tokens, tokens, block)
        if family == "dream":
            assert (found["temperature"], found["top_p"], found["greedy"]) == (0.1, 0.9, protocol != "official")
        else:
            assert found["temperature"] == 0 and "greedy" not in found
    assert set(benchmark.settings("sdar")) == {"max_new_tokens", "steps"}
    with pytest.raises(ValueError, match="protocol 'papr': known are paper, release, official"):
        benchmark.settings("dream", "papr")


class OffByOne(ast.NodeTransformer):
    def visit_Return(self, node):
        return ast.Return(ast.BinOp(node.value or ast.Constant(None), ast.Add(), ast.Constant(1)))


def off_by_one(code):
    return ast.unparse(ast.fix_missing_locations(OffByOne().visit(ast.parse(code))))


def emptied(code, body):
    tree = ast.parse(code)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            node.body = ast.parse(body).body
    return ast.unparse(tree)


def fenced(code):
    return f"Here is the completed function:\n```python\n{code}\n```\nIt works."


def judge(cases):
    """Runs the cases, (right or not, name, job); each distinct program once."""
    hashable = []
    for right, name, (program, tests, names) in cases:
        hashable.append((right, name, (program, tests, tuple(names))))
    jobs = list(dict.fromkeys(job for _, _, job in hashable))
    results = dict(zip(jobs, execute.run_many(jobs, workers=2)))
    wrong = []
    for right, name, job in hashable:
        if results[job]["passed"] != right:
            wrong.append((name, right, results[job]))
    assert not wrong, wrong
