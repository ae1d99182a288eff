"""distill.py: what is logged, what a second start does, batches and processes, answers that cannot be checked.

python -m pytest tests/test_distill.py"""

import json
import shutil

import pytest
import torch
from helpers import TRAIN, changed_model, decoded, edit_json, fails, flags, last_json, meta, run, shell, write_lines

import data
import decode
import distill as answering
import model
import tokenizer
from experiments import tiny as tiny_model
from runs import loading, queue, torchrun


def distill(capsys, **options):
    """Run distill -> its result."""
    return run(capsys, "distill", **options)[0]


# ---------------------------------------------------------------------------------------------------------- records


def test_it_logs_what_the_decoder_did(tiny, puzzles, trajectories):
    """The slow way is decode.generate with one prompt."""
    found = {r["id"]: r for r in data.read_trajectories(trajectories)}
    rows = [json.loads(line) for line in puzzles.read_text().splitlines()]
    assert set(found) == {row["id"] for row in rows}
    decoder = meta(trajectories)["decoder"]
    assert decoder["strategy"] == "entropy"  # the model's own generation_config.json
    assert decoder["max_new_tokens"] == tiny_model.WHOLE.answer
    m, tok = model.load(tiny), tokenizer.load(tiny)
    for row in rows[:3]:
        record = found[row["id"]]
        assert record["prompt_ids"] == tok.encode(row["prompt"])
        assert (record["prompt"], record["answer"]) == (row["prompt"], row["answer"])
        t = decode.generate(m, torch.tensor([record["prompt_ids"]]), suppress=[m.config.mask_id], **decoder)
        assert record["response_ids"] == t.response[0].tolist()
        assert record["order"] == t.order[0].tolist()
        assert record["step"] == t.step[0].tolist()
        assert record["entropy"] == pytest.approx(t.entropy[0].tolist(), abs=1e-4)
        assert record["confidence"] == pytest.approx(t.confidence[0].tolist(), abs=1e-4)
        assert record["finished"] == (tok.eos_id in record["response_ids"])
        assert record["text"] == tok.response_text(record["response_ids"])
        assert record["correct"] == (record["text"] == row["answer"])


def test_the_same_from_python(tiny, puzzles, trajectories):
    """answering.answer takes texts or token ids, and gives the records that distill writes."""
    m, tok, settings = model.load(tiny), tokenizer.load(tiny), meta(trajectories)["decoder"]
    rows = [json.loads(line) for line in puzzles.read_text().splitlines()][:3]
    prompts = [row["prompt"] for row in rows]
    texts, records = answering.answer(m, tok, prompts, settings)
    wanted = decoded(trajectories)
    for row, text, record in zip(rows, texts, records, strict=True):
        assert text == record["text"]
        ids, response, order, step, text, finished, _ = wanted[row["id"]]
        assert (record["prompt_ids"], record["response_ids"]) == (ids, response)
        assert (record["order"], record["step"]) == (order, step)
        assert (record["text"], record["finished"]) == (text, finished)
    again, _ = answering.answer(m, tok, [tok.encode(prompt) for prompt in prompts], settings)
    assert again == texts


def test_the_seed_decides_what_python_samples(tiny):
    m, tok = model.load(tiny), tokenizer.load(tiny)
    settings = dict(max_new_tokens=12, steps=12, temperature=1.0)
    answers = [answering.answer(m, tok, ["L1", "L2"], settings, seed)[0] for seed in (0, 0, 1)]
    assert answers[0] == answers[1]
    assert answers[0] != answers[2]


def test_predictions_that_are_not_finite_are_an_error(tiny):
    m, tok = model.load(tiny), tokenizer.load(tiny)
    with torch.no_grad():
        next(m.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match="predictions are not finite"):
        answering.answer(m, tok, ["L1"], dict(max_new_tokens=4, steps=4))


def test_a_prompt_with_predictions_that_are_not_finite_costs_no_other(tiny, puzzles, tmp_path, capsys, monkeypatch):
    options = dict(
        model=tiny, data=puzzles, limit=6, batch_size=2, max_new_tokens=8, block_length=8, out=tmp_path / "T"
    )
    stream = queue.stream

    def broken(m, prompts, *more, **how):
        bad = next(i for i, prompt in enumerate(prompts) if prompt.tolist() == asked["prompt_ids"])
        for numbers, t in stream(m, prompts, *more, **how):
            t.entropy[[number == bad for number in numbers]] = torch.nan
            yield numbers, t

    asked = distill_records(tiny, puzzles, tmp_path / "whole", capsys)[2]
    monkeypatch.setattr(queue, "stream", broken)
    message = f"predictions are not finite for 1 of 6 prompts, such as id {asked['id']}: "
    fails(capsys, message, "distill", **options)
    assert len(data.read_trajectories(tmp_path / "T")) == 5
    fails(capsys, "predictions are not finite for 1 of 1 prompts", "distill", **options)  # the others are there
    monkeypatch.setattr(queue, "stream", stream)
    assert run(capsys, "distill", **options)[0]["new"] == 1


def distill_records(tiny, puzzles, out, capsys):
    distill(capsys, model=tiny, data=puzzles, limit=6, max_new_tokens=8, block_length=8, out=out)
    return data.read_trajectories(out)


def test_a_smaller_limit_keeps_what_is_there(tiny, tmp_path, capsys):
    """Also where a prompt is there twice; and its number of prompts stays, for train to ask for them all."""
    rows = [dict(prompt=text, answer="1") for text in ("L1", "L2", "L1", "L3")]
    write_lines(tmp_path / "d.jsonl", rows)
    options = dict(model=tiny, data=tmp_path / "d.jsonl", max_new_tokens=4, block_length=4, out=tmp_path / "T")
    run(capsys, "distill", **options, format="release")
    result, _ = run(capsys, "distill", **options, limit=2)
    assert (result["new"], result["trajectories"]) == (0, 4) and meta(tmp_path / "T")["prompts"] == 4


def test_batch_size_changes_nothing(tiny, puzzles, tmp_path, capsys):
    options = dict(model=tiny, data=puzzles, temperature=0.7, top_p=0.9, limit=6, max_new_tokens=12, block_length=12)
    for size in (1, 5):
        distill(capsys, out=tmp_path / str(size), batch_size=size, **options)
    assert decoded(tmp_path / "1") == decoded(tmp_path / "5")
    distill(capsys, out=tmp_path / "greedy", batch_size=6, greedy=True, **options)
    assert decoded(tmp_path / "greedy") != decoded(tmp_path / "1")  # so tokens were drawn


@pytest.mark.slow
def test_two_processes_make_the_same_records(tiny, puzzles, trajectories, tmp_path):
    out = tmp_path / "T"
    done = shell("distill", *flags(model=tiny, data=puzzles, out=out, check="exact", batch_size=2), processes=2)
    assert done.returncode == 0, done.stderr
    assert last_json(done.stdout)["new"] == 12
    assert len(list(out.glob("trajectories-*.jsonl"))) == 2
    assert len(data.read_trajectories(out)) == 12
    assert decoded(out) == decoded(trajectories)


# ---------------------------------------------------------------------------------------------------- second starts


def test_a_second_start_does_nothing_and_a_longer_limit_only_the_rest(tiny, puzzles, tmp_path, capsys):
    options = dict(model=tiny, data=puzzles, out=tmp_path / "T")
    for limit, new in ((5, 5), (5, 0), (12, 7)):
        result = distill(capsys, **options, limit=limit)
        assert (result["new"], result["trajectories"]) == (new, limit)
        assert meta(tmp_path / "T")["prompts"] == limit


def test_the_prompts_of_several_files_and_of_a_folder(tiny, tmp_path, capsys):
    folder = tmp_path / "D"
    folder.mkdir()
    files = [write_lines(folder / f"{i}.jsonl", [dict(prompt=f"L{i}", answer="1")]) for i in (1, 2)]
    options = dict(model=tiny, check="none", tokens_per_step=8)
    distill(capsys, data=",".join(map(str, files)), out=tmp_path / "T", **options)
    assert [r["prompt"] for r in data.read_trajectories(tmp_path / "T")] == ["L1", "L2"]
    assert distill(capsys, data=folder, out=tmp_path / "T", **options)["new"] == 0  # the same by their content
    write_lines(files[1], [dict(prompt="L3", answer="1")])
    fails(capsys, "data_sha256", "distill", data=folder, out=tmp_path / "T", **options)


@pytest.mark.parametrize("ids", [(1, 2, 1), ("a", "b", "a")])
def test_a_longer_limit_that_changes_the_ids_is_refused(tiny, tmp_path, capsys, ids):
    """The first two rows have ids of their own, all three do not; a prompt must not be answered under two of them."""
    source, out = tmp_path / "D.jsonl", tmp_path / "T"
    write_lines(source, [dict(id=key, question=f"L{i + 1}", answer="1") for i, key in enumerate(ids)])
    options = dict(model=tiny, data=source, out=out, check="none", tokens_per_step=8)
    distill(capsys, **options, limit=2)
    fails(capsys, "2 of its answers are to other prompts.*--limit as before", "distill", **options)
    assert distill(capsys, **options, limit=1)["new"] == 0  # a shorter one changes nothing
    assert [r["id"] for r in data.read_trajectories(out)] == list(ids[:2])


def test_a_truth_value_is_no_id(tiny, tmp_path, capsys):
    source = write_lines(tmp_path / "D.jsonl", [dict(question="L1", id=True), dict(question="L2", id=1)])
    distill(capsys, model=tiny, data=source, out=tmp_path / "T", check="none", tokens_per_step=8)
    assert sorted(r["id"] for r in data.read_trajectories(tmp_path / "T")) == [0, 1]


def test_a_record_without_its_verdict_is_named(tiny, puzzles, trajectories, tmp_path, capsys):
    out = tmp_path / "T"
    shutil.copytree(trajectories, out)
    first, *rest = [r for _, r in data.read_rows(out / "trajectories-00000.jsonl")]
    del first["correct"]
    write_lines(out / "trajectories-00000.jsonl", [first, *rest])
    fails(
        capsys,
        f"the line of id {first['id']} has no correct",
        "distill",
        model=tiny,
        data=puzzles,
        out=out,
        check="exact",
    )


def test_a_torn_line_is_made_again(tiny, puzzles, trajectories, tmp_path, capsys):
    out = tmp_path / "T"
    shutil.copytree(trajectories, out)
    file = out / "trajectories-00000.jsonl"
    file.write_bytes(file.read_bytes()[:-50])
    assert distill(capsys, model=tiny, data=puzzles, out=out, check="exact")["new"] == 1
    assert decoded(out) == decoded(trajectories)


def test_a_folder_with_another_run_is_refused_and_kept(tiny, puzzles, trajectories, tmp_path, capsys):
    options = dict(model=tiny, data=puzzles)
    fails(capsys, "holds another run: check was 'exact'", "distill", out=trajectories, **options)
    (tmp_path / "note.txt").write_text("mine")
    fails(capsys, "is not empty and holds no run", "distill", out=tmp_path, **options)
    assert (tmp_path / "note.txt").read_text() == "mine"
    fails(capsys, "is a file", "distill", out=tmp_path / "note.txt", **options)


def test_a_changed_dataset_is_noticed(tiny, puzzles, trajectories, tmp_path, capsys):
    shutil.copytree(trajectories, tmp_path / "T")
    changed = tmp_path / "train.jsonl"
    changed.write_text(puzzles.read_text().replace("L", "S", 1))
    fails(capsys, "data_sha256 was", "distill", model=tiny, data=changed, out=tmp_path / "T", check="exact")


def test_another_model_under_the_same_name_is_noticed(tiny, puzzles, trajectories, tmp_path, capsys):
    shutil.copytree(trajectories, tmp_path / "T")
    other = changed_model(tmp_path, tiny)
    model.save(model.create(tiny_model.config(), torch.Generator().manual_seed(5)), other)
    fails(capsys, "model_sha256 was", "distill", model=other, data=puzzles, out=tmp_path / "T", check="exact")


# ------------------------------------------------------------------------------------------- checks, formats, warnings


def test_the_verdicts_are_counted(tiny, trajectories, puzzles, capsys):
    result = distill(capsys, model=tiny, data=puzzles, out=trajectories, check="exact")
    records = data.read_trajectories(trajectories)
    assert result["trajectories"] == result["checked"] == 12
    assert result["finished"] == sum(r["finished"] for r in records)
    assert result["correct"] == sum(r["correct"] is True for r in records)
    assert result["kept"] == len([r for r in records if data.usable(r)])
    assert result["unchecked"] == 0


@pytest.fixture
def prose(tmp_path):
    """Four prompts: two whose answer is a number, two whose answer is prose that nothing can check."""
    rows = []
    for i, answer in enumerate(("12", "a long walk", "7", "it depends")):
        rows.append(dict(id=i, prompt=f"L{i + 1}", answer=answer))
    return write_lines(tmp_path / "prose.jsonl", rows)


def all_end(monkeypatch):
    """Every response counts as finished."""
    monkeypatch.setattr(tokenizer, "is_finished", lambda response, order, stop_ids: True)


def test_answers_that_cannot_be_checked_are_counted_and_named(tiny, prose, tmp_path, capsys, monkeypatch):
    all_end(monkeypatch)
    options = dict(model=tiny, data=prose, max_new_tokens=4, block_length=4)
    result, err = run(capsys, "distill", out=tmp_path / "T", **options)
    assert (result["checked"], result["unchecked"]) == (2, 2)
    assert result["kept"] == 2 + result["correct"]
    assert "2 of 4 answers could not be checked and are kept: see --check and --keep" in err


def test_keep_says_what_counts_as_kept(tiny, prose, tmp_path, capsys, monkeypatch):
    all_end(monkeypatch)
    options = dict(model=tiny, data=prose, max_new_tokens=4, block_length=4, out=tmp_path / "T", format="release")
    result, _ = run(capsys, "distill", **options, keep="finished")
    assert (result["kept"], result["unchecked"], result["correct"]) == (4, 2, 0)
    assert len((tmp_path / "T" / "release.jsonl").read_text().splitlines()) == 4
    result, err = run(capsys, "distill", **{**options, "format": "ours"})  # nothing is decoded anew, the other kept up
    assert (result["kept"], result["unchecked"], result["new"]) == (2, 2, 0)
    assert len((tmp_path / "T" / "release.jsonl").read_text().splitlines()) == 2


def test_nobody_is_warned_where_no_check_was_asked_for(tiny, prose, tmp_path, capsys, monkeypatch):
    all_end(monkeypatch)
    options = dict(model=tiny, data=prose, max_new_tokens=4, block_length=4, check="none")
    result, err = run(capsys, "distill", out=tmp_path / "T", **options)
    assert (result["checked"], result["unchecked"], result["kept"]) == (0, 4, 4)
    assert "could not be checked" not in err


def test_prompts_beyond_the_context_are_named(tiny, puzzles, tmp_path, capsys):
    short = changed_model(tmp_path, tiny, lambda f: edit_json(f / "config.json", max_sequence_length=40))
    options = dict(model=short, data=puzzles, limit=1, block_length=2)
    longest = 1 + 36  # a tag and the cells
    err = run(capsys, "distill", out=tmp_path / "T", max_new_tokens=4, **options)[1]
    assert f"prompt and response have up to {longest + 4} tokens; the model was trained with 40" in err
    err = run(capsys, "distill", out=tmp_path / "S", max_new_tokens=2, **options)[1]
    assert "context" not in err


def test_a_config_and_a_tokenizer_that_disagree_are_named(tiny, puzzles, tmp_path, capsys):
    other = changed_model(tmp_path, tiny, lambda f: edit_json(f / "config.json", pad_token_id=5))
    err = run(capsys, "distill", model=other, data=puzzles, out=tmp_path / "T", limit=1, max_new_tokens=37)[1]
    assert f"{other}: pad_token_id is 5 in config.json, the tokenizer has 2 (<|pad|>)" in err


def test_a_mask_token_that_no_config_names_is_the_tokenizers(tiny, monkeypatch, capsys):
    """A family's own is a guess."""
    load, c = model.load, answering.DistillOptions(model=str(tiny), device="cpu")
    named = load(tiny).config.mask_id

    def without(*args, **more):
        m = load(*args, **more)
        del m.config.raw["mask_token_id"]
        m.config.mask_id = 7
        return m

    monkeypatch.setattr(model, "load", without)
    loaded = loading.load_model(c, torchrun.Processes("cpu"))
    assert loaded.m.config.mask_id == named != 7 and named in loaded.never_chosen and 7 not in loaded.never_chosen
    assert "mask_token_id" not in capsys.readouterr().err


def test_the_authors_format_holds_the_kept_trajectories(tiny, prose, tmp_path, capsys, monkeypatch):
    all_end(monkeypatch)
    options = dict(model=tiny, data=prose, max_new_tokens=4, block_length=4, format="release", out=tmp_path / "T")
    result = distill(capsys, **options)
    kept = [r for r in data.read_trajectories(tmp_path / "T") if data.usable(r)]
    rows = [row for _, row in data.read_rows(tmp_path / "T" / "release.jsonl")]
    assert len(rows) == len(kept) == result["kept"] >= 2
    for row, record in zip(rows, kept):
        assert row["response_token_ids"] == record["response_ids"] + [2] * 252  # padded to 256
        assert row["decoding_order"] == record["step"] + [-1] * 252
        assert (row["prompt"], row["method"]) == (record["prompt"], "entropy")
    assert distill(capsys, **options)["new"] == 0  # the file is no trajectory file of ours


@pytest.mark.parametrize(
    "strategy, method", [("entropy", "entropy"), ("confidence", "default"), ("margin", "topk_margin")]
)
def test_the_authors_format_has_their_names_of_decoders(tiny, prose, tmp_path, capsys, monkeypatch, strategy, method):
    all_end(monkeypatch)
    options = dict(model=tiny, data=prose, max_new_tokens=2, block_length=2, check="none", format="release")
    distill(capsys, strategy=strategy, out=tmp_path / "T", **options)
    rows = [row for _, row in data.read_rows(tmp_path / "T" / "release.jsonl")]
    assert {row["method"] for row in rows} == {method}


def test_what_was_never_decoded_has_no_order_and_is_trained_around(tiny, prose, tmp_path, capsys, monkeypatch):
    """A threshold that nothing reaches decodes a token a step, and two steps leave six masks; commands refuse it."""
    monkeypatch.setattr(loading, "check_decoder", lambda settings: None)
    options = dict(model=tiny, data=prose, max_new_tokens=8, block_length=8, check="none")
    distill(capsys, threshold=1.0, steps=2, out=tmp_path / "T", **options)
    for record in data.read_trajectories(tmp_path / "T", mask_id=0):
        masked = [token == 0 for token in record["response_ids"]]
        assert sum(masked) == 6 and not record["finished"]
        for hidden, order, h, p in zip(masked, record["order"], record["entropy"], record["confidence"]):
            assert hidden == (order == -1)
            assert not hidden or (h, p) == (0, 0)
    train = dict(TRAIN, epochs=1, data=tmp_path / "T", out=tmp_path / "R")
    assert run(capsys, "train", model=tiny, **train)[0]["examples"] == 4


# -------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "lines, message",
    [
        ("", "the dataset is empty"),
        ('{"prompt": "L1"}\n{"prompt": \n', r"d\.jsonl:2: not valid JSON"),
        ('{"wrong": "L1"}\n', r"d\.jsonl:1: no known prompt field"),
        ('{"prompt": "hello"}\n', "cannot encode 'hello'"),
        ('{"prompt": "L1"}\n{"prompt": ""}\n', "an empty prompt"),
    ],
)
def test_bad_datasets(tiny, tmp_path, capsys, lines, message):
    (tmp_path / "d.jsonl").write_text(lines)
    fails(capsys, message, "distill", model=tiny, data=tmp_path / "d.jsonl", out=tmp_path / "T")
    assert not (tmp_path / "T").exists()


@pytest.mark.parametrize(
    "option, value, message",
    [
        ("batch_size", 0, "--batch-size 0: must be a number of at least 1"),
        ("limit", -1, "--limit -1: must be"),
        ("temperature", "nan", "temperature nan must be"),
        ("device", "warp9", "--device warp9 cannot be used here"),
    ],
)
def test_values_out_of_range_are_refused_and_leave_no_trace(tiny, puzzles, tmp_path, capsys, option, value, message):
    fails(capsys, message, "distill", model=tiny, data=puzzles, out=tmp_path / "T", **{option: value})
    assert not (tmp_path / "T").exists()
