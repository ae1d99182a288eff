"""The evaluate command: python -m pytest tests/test_evaluate.py

The benchmarks and the graded real outputs are read from the folder that TABOM_DATA names, and skipped without it."""

import gzip
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import fails, last_json, run
from test_lora import AUTHORS

import data
import decode
import distill
import evaluate
import lora
import model
import tabom
import tokenizer
from benchmarks import gsm8k
from runs import loading

REAL = Path(os.environ.get("TABOM_DATA", "no-such-folder"))
needs_data = pytest.mark.skipif(not REAL.is_dir(), reason="TABOM_DATA names no folder")


LLADA = dict(max_new_tokens=8, block_length=8, strategy="confidence", schedule="llada")


def write(path, rows):
    with gzip.open(path, "wt", encoding="utf-8") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def read(path):
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as f:
        return [json.loads(line) for line in f]


# --------------------------------------------------------------------------------------------- prompts and settings


def of_family(family, folder):
    """A Loaded that only knows its family and folder."""
    return loading.Loaded(SimpleNamespace(config=SimpleNamespace(family=family, raw={})), None, folder)


def settings_of(task, family, folder, **flags):
    return evaluate.task_settings(evaluate.EvaluateOptions(**flags), task, of_family(family, folder))


def test_settings_are_those_of_table_8(tmp_path):
    dream = settings_of("humaneval", "dream", tmp_path)
    wanted = dict(max_new_tokens=768, steps=768, temperature=0.1, top_p=0.9, strategy="entropy", block_length=None)
    assert {**dream, **wanted} == dream and dream["greedy"]
    llada = settings_of("math500", "llada", tmp_path)
    wanted = dict(max_new_tokens=512, steps=512, temperature=0.0, strategy="confidence", block_length=64)
    assert {**llada, **wanted} == llada
    assert settings_of("humaneval", "llada", tmp_path)["suppress_eos"]
    assert settings_of("mbpp", "llada", tmp_path)["eos_last"]
    assert not settings_of("gsm8k", "dream", tmp_path, sample=True)["greedy"]
    assert settings_of("gsm8k", "llada", tmp_path, protocol="release")["max_new_tokens"] == 256
    faster = settings_of("gsm8k", "dream", tmp_path, tokens_per_step=3)
    assert faster["tokens_per_step"] == 3 and "steps" not in faster
    with pytest.raises(ValueError, match="tokens_per_step 2 and steps 8: give one"):
        settings_of("gsm8k", "dream", tmp_path, tokens_per_step=2, steps=8)


@pytest.mark.parametrize(
    "own, given, wanted",
    [
        (dict(max_new_tokens=36), {}, (36, 36, None)),  # not the preset's steps for another length
        (dict(tokens_per_step=2), {}, (256, None, 2)),
        (dict(tokens_per_step=2), dict(steps=64), (256, 64, None)),
        (dict(tokens_per_step=2), dict(max_new_tokens=64), (64, None, 2)),
        (dict(max_new_tokens=64, steps=16), dict(tokens_per_step=2), (64, None, 2)),
        (dict(temperature=0, top_p=1), {}, (256, 256, None)),  # JSON's numbers
    ],
)
def test_the_number_of_steps_is_that_of_the_last_who_speaks_of_it(tmp_path, own, given, wanted):
    (tmp_path / "generation_config.json").write_text(json.dumps(dict(tabom=own)))
    found = settings_of("gsm8k", "dream", tmp_path, **given)
    assert (found["max_new_tokens"], found.get("steps"), found.get("tokens_per_step")) == wanted


def test_a_score_is_over_all_questions():
    found = [dict(correct=True), dict(correct=None, reason="not graded (x)"), dict(correct=False), dict(correct=True)]
    score = evaluate.score("math500", found)
    assert (score["n"], score["correct"], score["score"], score["not_graded"]) == (4, 2, 50.0, 1)
    score = evaluate.score("math500", found, ["a", "b", "c", "c"])  # c was answered twice
    assert (score["n"], score["correct"], score["score"]) == (3, 1.5, 50.0)
    assert evaluate.score("gsm8k", [dict(correct=True)] * 3, [0] * 3)["correct"] == 1


def test_the_table_says_how_many_answers_could_not_be_graded():
    score = evaluate.score("math500", [dict(correct=True), dict(correct=None, reason="not graded (x)")])
    decoder = dict(max_new_tokens=8, steps=8, block_length=None)
    table = evaluate.score_table([dict(score, decoder=decoder, finished=100.0, protocol="paper", shots=0, seed=0)])
    assert "math500: 1 of 2 answers could not be graded and count as wrong" in table


def test_the_table_says_how_fast_was_decoded_and_that_tokens_were_drawn():
    score = dict(evaluate.score("gsm8k", [dict(correct=True)]), finished=100.0, protocol="paper", shots=0, seed=0)
    decoder = dict(max_new_tokens=8, steps=8, block_length=None, threshold=0.5, temperature=0.2)
    assert "| 8, threshold 0.5, -, sampled |" in evaluate.score_table([dict(score, decoder=decoder)])
    decoder.update(threshold=None, greedy=True)
    assert "| 8, 8, - |" in evaluate.score_table([dict(score, decoder=decoder)])


def test_wilson_interval():
    low, high = evaluate.wilson(50, 100)
    assert (low, high) == (pytest.approx(0.4038, abs=1e-4), pytest.approx(0.5962, abs=1e-4))
    assert evaluate.wilson(0, 10)[0] == 0 and evaluate.wilson(10, 10)[1] == pytest.approx(1)


@pytest.mark.parametrize(
    "layers, n, options, shown",
    [
        (32, 1319, {}, "76.1 / 78.6 / 77.3"),
        (32, 1319, dict(protocol="release"), "76.1 / 78.6 / 77.3"),
        (32, 1319, dict(steps=512, seed=3), "76.1 / 78.6 / 77.3"),  # what the benchmark has anyway
        (32, 1319, dict(model="here/LLaDA-8B-Instruct/"), "76.1 / 78.6 / 77.3"),
        (32, 1319, dict(protocol="official"), "-"),
        (32, 1319, dict(tokens_per_step=2), "-"),
        (32, 1319, dict(shots="shots.json"), "-"),
        (32, 5, dict(limit=5), "-"),
        (32, 2, {}, "-"),  # a file of two questions
        (2, 1319, {}, "-"),  # a name is not enough
        (32, 1319, dict(model="GSAI-ML/LLaDA-1.5"), "-"),
        (32, 1319, dict(model="GSAI-ML/LLaDA-8B-Base"), "-"),
        (32, 1319, dict(raw=True), "-"),
        (32, 1319, dict(prompt_tokens=16), "-"),
    ],
)
def test_the_papers_score_stands_beside_the_same_checkpoint_and_questions(layers, n, options, shown, tmp_path):
    loaded = of_family("llada", tmp_path)
    loaded.m.config.vocab_size, loaded.m.config.width, loaded.m.config.layers = 126464, 4096, layers
    c = evaluate.EvaluateOptions(**{"model": "GSAI-ML/LLaDA-8B-Instruct", **options})
    about = dict(decoder=evaluate.task_settings(c, "gsm8k", loaded), finished=100.0)
    about.update(protocol=c.protocol, shots=0, seed=0)
    paper = evaluate.paper_scores(c, loaded, "gsm8k", about["decoder"], n)
    score = dict(evaluate.score("gsm8k", [dict(correct=True)]), **about, **paper)
    head, _, row, *legend = evaluate.score_table([score]).splitlines()
    assert row.split(" | ")[head.split(" | ").index("paper %")] == shown
    assert bool(legend) == (shown != "-")


# --------------------------------------------------------------------------------------------------------- evaluate


def test_a_prompt_that_is_cut_is_said_and_shots_are_counted_as_examples(bytes_model, tmp_path, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "gsm8k_test.jsonl.gz", [dict(question=f"What is {i}?", answer=f"#### {i}") for i in range(2)])
    turns = [dict(role="user", content="x" * 900), dict(role="assistant", content="#### 1")] * 2
    (tmp_path / "shots.json").write_text(json.dumps(turns))
    options = dict(model=bytes_model, data=folder, shots=tmp_path / "shots.json", max_new_tokens=8, block_length=8)
    result, err = run(capsys, "evaluate", **options, out=tmp_path / "E")
    assert re.search(r"gsm8k: 2 of 2 prompts have up to \d{4} tokens, and lose all but the last 1024", err)
    assert result["scores"][0]["shots"] == 2
    assert {len(r["prompt_ids"]) for r in data.read_trajectories(tmp_path / "E" / "gsm8k")} == {1024}
    result, err = run(capsys, "evaluate", **options, prompt_tokens=4096, out=tmp_path / "whole")
    assert "prompts have up to" not in err
    assert min(len(r["prompt_ids"]) for r in data.read_trajectories(tmp_path / "whole" / "gsm8k")) > 1800


def test_raw_asks_without_the_template(bytes_model, tmp_path, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "gsm8k_test.jsonl.gz", [dict(question="What is 1?", answer="#### 1")])
    options = dict(model=bytes_model, data=folder, max_new_tokens=8, block_length=8, raw=True)
    run(capsys, "evaluate", **options, out=tmp_path / "E")
    (record,) = data.read_trajectories(tmp_path / "E" / "gsm8k")
    tok = tokenizer.load(bytes_model)
    assert tok.decode(record["prompt_ids"]) == record["prompt"]  # no "user: " before it
    fails(
        capsys, "--raw asks each question alone: no --shots", "evaluate", **options, shots="s.json", out=tmp_path / "F"
    )


def test_the_settings_of_another_checkpoint_are_named(bytes_model, tmp_path, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "gsm8k_test.jsonl.gz", [dict(question="What is 1?", answer="#### 1")])
    options = dict(model=bytes_model, data=folder, max_new_tokens=8, block_length=8, out=tmp_path / "E")
    _, err = run(capsys, "evaluate", **options)
    assert f"--protocol paper has the lengths and steps of LLaDA-8B-Instruct; {bytes_model} is another model" in err


def test_evaluate_answers_grades_and_continues(bytes_model, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "gsm8k_test.jsonl.gz", [dict(question=f"What is {i}?", answer=f"#### {i}") for i in range(5)])
    kinds = dict(instruction_id_list=["punctuation:no_comma"], kwargs=[{}])
    write(folder / "ifeval.jsonl.gz", [dict(key=i, prompt="No commas.", **kinds) for i in range(3)])
    words = ["evaluate", "--model", str(bytes_model), "--data", str(folder), "--out", str(tmp_path / "E")]
    words += ["--tasks", "gsm8k, ifeval, gsm8k", "--max-new-tokens", "8", "--block-length", "8"]
    words += ["--tokens-per-step", "2"]
    assert tabom.main([*words, "--limit", "2"]) == 0
    assert tabom.main(words) == 0
    out = capsys.readouterr().out
    result = last_json(out)
    assert [s["n"] for s in result["scores"]] == [5, 3] and "| gsm8k | 5 |" in out
    records = data.read_trajectories(tmp_path / "E" / "gsm8k")
    assert sorted(r["id"] for r in records) == [0, 1, 2, 3, 4]
    for r in records:
        assert r["correct"] == gsm8k.grade(dict(answer=r["answer"]), r["response"])["correct"]
        assert max(r["step"]) == 3  # 8 tokens, 2 a step
    monkeypatch.chdir(tmp_path)  # without --out, a folder named by the model
    assert tabom.main([*words[:5], *words[7:], "--limit", "1"]) == 0
    out = last_json(capsys.readouterr().out)["out"]
    assert out.startswith("out/evaluate-") and len(data.read_trajectories(tmp_path / out / "ifeval")) == 1
    saved = json.loads((tmp_path / "E" / "results.json").read_text())
    assert saved["scores"] == result["scores"] and saved["command"]["tokens_per_step"] == 2
    for name, message in (("fly", "--tasks fly: unknown; choose among"), ("math500", "no dataset file")):
        assert tabom.main([*words[:7], "--tasks", name]) == 1
        assert message in capsys.readouterr().err
    write(folder / "gsm8k_test.jsonl.gz", [dict(question=f"What is {i}?", answer=f"#### {i + 1}") for i in range(5)])
    assert tabom.main(words) == 1
    assert "holds another run: questions_sha256 was" in capsys.readouterr().err
    write(folder / "gsm8k_test.jsonl.gz", [dict(question="What?", answer="#### 1"), dict(answer=7)])
    assert tabom.main(words) == 1
    assert "gsm8k_test.jsonl.gz:2: answer, question missing or of another type" in capsys.readouterr().err


def test_verdicts_of_an_earlier_call_keep_its_versions(tmp_path, monkeypatch):
    (tmp_path / "results.json").write_text(json.dumps(dict(versions={"math-verify": "0.9.0", "torch": "1"})))
    monkeypatch.setattr(evaluate, "grader_versions", lambda: {"math-verify": "99.0", "torch": "1"})
    for timed, told in ((3, "99.0"), (2, "0.9.0; 99.0"), (0, "0.9.0; 99.0")):
        found = evaluate.versions_of(tmp_path, [dict(n=3, timed=timed)])
        assert found == {"math-verify": told, "torch": "1"}


def test_an_adapter_with_the_authors_config_answers(bytes_model, tmp_path, capsys):
    m = lora.inject(model.load(bytes_model), generator=torch.Generator().manual_seed(0))
    for layer in lora.layers(m).values():
        layer.lora_B.weight.data.normal_(generator=torch.Generator().manual_seed(1))
    lora.save(m, tmp_path / "A")
    (tmp_path / "A" / "adapter_config.json").write_text(AUTHORS)
    write(tmp_path / "gsm8k_test.jsonl.gz", [dict(question="What is 1?", answer="#### 1")])
    options = dict(model=bytes_model, data=tmp_path, max_new_tokens=8, block_length=8)
    found = {}
    for name, more in dict(base={}, adapted=dict(adapter=tmp_path / "A")).items():
        run(capsys, "evaluate", **options, **more, out=tmp_path / name)
        (record,) = data.read_trajectories(tmp_path / name / "gsm8k")
        found[name] = record
    t = decode.generate(m, torch.tensor([found["adapted"]["prompt_ids"]]), suppress=[257, 258, 259], **LLADA)
    assert found["adapted"]["response_ids"] == t.response[0].tolist() != found["base"]["response_ids"]


def test_a_folder_of_another_command_is_refused(bytes_model, tmp_path, capsys):
    write(tmp_path / "gsm8k_test.jsonl.gz", [dict(question="What?", answer="#### 1")])
    (tmp_path / "meta.json").write_text('{"command": "distill"}')
    words = [
        "evaluate",
        "--model",
        str(bytes_model),
        "--data",
        str(tmp_path),
        "--tasks",
        "gsm8k",
        "--out",
        str(tmp_path),
    ]
    assert tabom.main([*words, "--steps", "8", "--max-new-tokens", "8"]) == 1
    assert "holds a run of distill: choose another --out" in capsys.readouterr().err
    assert not (tmp_path / "gsm8k").exists()


@pytest.mark.parametrize(
    "turn", [dict(role="user", content=1), dict(role="user", content=None), dict(role=5, content="x")]
)
def test_shots_are_texts(turn, tmp_path):
    (tmp_path / "shots.json").write_text(json.dumps([turn]))
    with pytest.raises(ValueError, match="shots.json: an earlier turn must have a role and a text content, found"):
        evaluate.read_shots(tmp_path / "shots.json", "gsm8k")


def test_shots_come_before_the_question(bytes_model, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "gsm8k_test.jsonl.gz", [dict(question="What?", answer="#### 1")])
    turns = [dict(role="user", content="one"), dict(role="assistant", content="two")]
    (tmp_path / "shots.json").write_text(json.dumps(dict(gsm8k=turns)))
    words = [
        "evaluate",
        "--model",
        str(bytes_model),
        "--data",
        str(folder),
        "--out",
        str(tmp_path / "E"),
        "--steps",
        "8",
    ]
    words += ["--max-new-tokens", "8", "--shots", str(tmp_path / "shots.json")]
    assert tabom.main(words) == 0
    (record,) = data.read_trajectories(tmp_path / "E" / "gsm8k")
    text = tokenizer.load(bytes_model).decode(record["prompt_ids"])
    assert text.startswith("user: one\nassistant: two\nuser: Q: What?")


def test_what_was_never_decoded_has_the_order_minus_one(bytes_model):
    m, tok = model.load(bytes_model), tokenizer.load(bytes_model)
    settings = dict(max_new_tokens=8, steps=2, threshold=1.0)
    texts, (record,) = distill.answer(m, tok, ["one"], settings)
    masks = [r for r, token in enumerate(record["response_ids"]) if token == m.config.mask_id]
    assert len(masks) == 6
    for r in range(8):
        assert (record["order"][r] == -1) == (r in masks)
    assert sorted(record["order"])[6:] == [0, 1]
    data.check_record(record, m.config.vocab_size, m.config.mask_id)
    assert texts == [record["text"]]
