"""The tables command: python -m pytest tests/test_tables.py

Folders of the real commands on a tiny model, and folders as these commands write them for the papers' checkpoints."""

import csv
import gzip
import io
import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import changed_model, edit_json, last_json, run, shell, write_lines

import evaluate
import tabom
from release import commands, found, published, tables
from runs import disk, loading
from runs.options import parse

PAPER = json.loads((Path(published.__file__).parent / "paper.json").read_text())
TABLES = [(paper, number) for paper, numbered in PAPER["tables"].items() for number in numbered]


def show(capsys, *words):
    """Run tables -> (what it prints before its JSON, the JSON)."""
    assert tabom.main(["tables", *map(str, words)]) == 0
    out = capsys.readouterr().out
    return out.rpartition("\n{")[0], last_json(out)


def rows_of(capsys, *words):
    """Run tables as CSV -> {(table, section, row, column): line}, and the JSON."""
    text, result = show(capsys, *words, "--format", "csv")
    lines = list(csv.DictReader(io.StringIO(text)))
    return {tuple(line[name] for name in ("table", "section", "row", "column")): line for line in lines}, result


def reasons(result):
    """What is said of the folders that are left out."""
    return "\n".join(f"{one['folder']}: {one['reason']}" for one in result["left_out"])


# ------------------------------------------------------------------------------------------- the paper's numbers


@pytest.mark.parametrize(("paper", "number"), TABLES)
def test_every_number_of_the_paper_is_printed(paper, number, tmp_path, capsys):
    rows, result = rows_of(capsys, tmp_path, "--paper", paper, "--table", number)
    table = PAPER["tables"][paper][number]
    for section, about in table["sections"].items():
        for label, numbers in about["rows"].items():
            for column, value in zip(table["columns"], numbers, strict=True):
                shown = rows[number, section, label, column]
                assert shown["paper"] == ("" if value is None else str(value))
                assert shown["ours"] == shown["folder"] == ""
    assert result["filled"] == 0 and result["left_out"] == []
    text, _ = show(capsys, tmp_path, "--paper", paper, "--table", number)
    for section in table["sections"].values():
        for value in (x for numbers in section["rows"].values() for x in numbers if x is not None):
            assert re.search(rf"\| {value:.2f}0? [|(]|\| {value:.3f} [|(]", text), value


def test_a_process_of_its_own_prints_them(tmp_path):
    done = shell("tables", tmp_path, "--paper", "t3d")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert last_json(done.stdout)["tables"] == list("1234567")


def test_averages_and_gains_of_the_paper(tmp_path, capsys):
    rows, _ = rows_of(capsys, tmp_path, "--table", "3")
    assert float(rows["3", "Dream", "TABOM", "in-domain"]["paper"]) == pytest.approx((84.31 + 41.1) / 2)
    assert float(rows["3", "Dream", "TABOM", "GSM8K"]["paper_gain"]) == pytest.approx(2.9)
    assert rows["3", "Dream", "No-SFT", "GSM8K"]["paper_gain"] == ""
    ood = float(rows["3", "LLaDA", "SFT-GT", "OOD"]["paper_gain"])
    assert ood == pytest.approx((31.09 + 40.6 + 26.98 - 36.01 - 39.2 - 33.08) / 3, abs=1e-4)


@pytest.mark.parametrize(("paper", "number"), TABLES)
def test_the_commands_for_empty_cells_parse(paper, number, tmp_path, capsys):
    text, result = show(capsys, tmp_path, "--paper", paper, "--table", number)
    listed = re.search(r"```bash\n(.*?)\n```", text, re.DOTALL)[1].splitlines()
    assert len(listed) == result["commands"] == len(set(listed))
    for line in listed:
        start, words = line.split("tabom.py ")
        assert start == "torchrun --nproc_per_node 8 "
        _, _, options, given = parse(tabom.COMMANDS, "", argv=shlex.split(words))
        options(**given)


def test_no_two_commands_write_into_one_folder(tmp_path, capsys):
    for paper in PAPER["tables"]:
        text, _ = show(capsys, tmp_path, "--paper", paper)
        folders = re.findall(r"tabom\.py .* --out (\S+)$", text, re.MULTILINE)
        assert len(folders) == len(set(folders)) > 50


@pytest.mark.parametrize(("paper", "number"), TABLES)
def test_a_run_of_the_commands_is_what_the_cell_asks_for(paper, number, tmp_path):
    """The options of a row's train command, read as the meta.json of its run, name the row's method and settings."""
    from runs import objective_options

    table = PAPER["tables"][paper][number]
    sections, seen = tables.fill(table, [], tables.TablesOptions(paper=paper), []), set()
    for entry in tables.entries_of(sections):
        if entry.where["data"] is None or entry.where["measure"] == "tds":
            continue
        hub = PAPER["checkpoints"][entry.where["base"]]["hub"]
        lines, _ = commands.training(paper, hub, entry.where)
        if lines[-1] in seen:
            continue
        seen.add(lines[-1])
        words = shlex.split(lines[-1].split("tabom.py ")[1])
        _, _, options, given = parse(tabom.COMMANDS, "", argv=words)
        c = options(**given)
        answers = entry.where["method"] == "SFT-GT"
        meta = dict(vars(c), **objective_options.chosen(c)[0], trained_on="answers" if answers else "trajectories")
        meta.update(model_sha256="x", data=meta["data"] if answers else lines[0].split("--data ")[1].split()[0])
        where = found.trained(tables.TablesOptions(paper=paper), meta)
        asked = {name: entry.where[name] for name in entry.where if name in where}
        assert asked.items() <= where.items()


# ------------------------------------------------------------------------------- folders of the papers' checkpoints


def adapter_run(out, base, **changes):
    """A training run as train leaves it, with two epochs -> its folder."""
    from runs import objective_options
    from train import TrainOptions

    hub = PAPER["checkpoints"][base]["hub"]
    given = dict(model=hub, data="out/prm12k/T", out=str(out), lora_rank=16)
    own = {name: changes.pop(name) for name in ("trained_on",) if name in changes}
    c = TrainOptions(**{**given, **changes})
    meta = dict(command="train", **vars(c), **own, examples=10, model_sha256=base, adapter_sha256=None)
    meta.update(objective_options.chosen(c)[0])
    out.mkdir(parents=True)
    (out / "meta.json").write_text(json.dumps(dict(meta, global_batch=32)))
    for number in (1, 2):
        (out / f"epoch-{number}").mkdir()
        (out / f"epoch-{number}" / "adapter_config.json").write_text(json.dumps(dict(run=str(out), number=number)))
    return out


def evaluation(out, base, checkpoint=None, scores=(("gsm8k", 1000),), n=None, paper="tabom", **options):
    """A folder as evaluate leaves it for a checkpoint of the papers. scores: (task, right answers); n: questions."""
    known = PAPER["checkpoints"][base]
    shape = dict(zip(("layers", "width", "vocab_size"), known["shape"]), family=known["family"])
    adapter = checkpoint and str(checkpoint)
    c = evaluate.EvaluateOptions(
        **{"model": known["hub"], "adapter": adapter, "tasks": [t for t, _ in scores], **options}
    )
    blocks = c.block_causal or (4 if known["family"] == "sdar" else None)
    config = SimpleNamespace(family=known["family"], block_length=blocks)
    loaded = loading.Loaded(SimpleNamespace(config=config), None, Path("no folder"))
    written = []
    for task, right in scores:
        settings, questions = evaluate.task_settings(c, task, loaded), n or published.QUESTIONS[task]
        meta = dict(command="evaluate", task=task, protocol=c.protocol, decoder=settings, raw=c.raw, limit=c.limit)
        meta["prompt_tokens"] = c.prompt_tokens
        sha256 = disk.fingerprint(checkpoint) if adapter else None
        meta.update(model_sha256=base, adapter_sha256=sha256, questions_sha256=task)
        (out / task).mkdir(parents=True)
        (out / task / "meta.json").write_text(json.dumps(meta))
        found = [dict(correct=i < right) for i in range(questions)]
        if task == "ifeval":
            found = [dict(one, strict=[one["correct"]], loose=[one["correct"]]) for one in found]
        about = dict(finished=100.0, shots=0, protocol=c.protocol, decoder=settings, seed=c.seed)
        written.append(dict(evaluate.score(task, found), **about))
    (out / "results.json").write_text(json.dumps(dict(command=vars(c), shape=shape, scores=written)))
    return out


def test_a_number_stands_beside_the_papers(tmp_path, capsys):
    run_of = adapter_run(tmp_path / "R", "Dream", recipe="dream-prm12k")
    both = (("gsm8k", 1050), ("math500", 200))
    evaluation(tmp_path / "E", "Dream", scores=both)
    evaluation(tmp_path / "E-tabom", "Dream", run_of / "epoch-2", scores=(("gsm8k", 1100), ("math500", 210)))
    text, result = show(capsys, tmp_path, "--table", "3")
    assert (result["read"], result["used"], result["left_out"], result["filled"]) == (3, 3, [], 4)
    (line,) = [line for line in text.splitlines() if line.startswith("| TABOM | 84.31")]
    low, high = (100 * x for x in evaluate.wilson(1100, 1319))
    assert f"| 84.31 (+2.90) | 83.40 [{low:.1f}, {high:.1f}] (+3.79 [" in line
    assert (
        "epoch 2 of 5" in text
        and f"{tmp_path / 'E-tabom'} (objective tabom, window 32, margin 0.1, weight 1.0, " in text
    )
    rows, _ = rows_of(capsys, tmp_path, "--table", "3")
    mean = rows["3", "Dream", "TABOM", "in-domain"]
    assert float(mean["ours"]) == pytest.approx((100 * 1100 / 1319 + 42) / 2, abs=0.01)
    assert float(mean["gain"]) == pytest.approx((100 * 50 / 1319 + 2) / 2, abs=0.01)
    assert rows["3", "Dream", "TABOM", "OOD"]["ours"] == ""
    command = "--model Dream-org/Dream-v0-Instruct-7B --tasks gsm8k,math500,humaneval,mbpp,ifeval --out out/dream/E"
    assert f"evaluate {command}\n" in text  # with the scores that are there: results.json has those of the last call


def test_an_average_is_of_one_model(tmp_path, capsys):
    checkpoint = adapter_run(tmp_path / "R", "Dream", recipe="dream-prm12k") / "epoch-1"
    evaluation(tmp_path / "E1", "Dream", checkpoint, scores=(("gsm8k", 1000), ("math500", 200)))
    rows, _ = rows_of(capsys, tmp_path, "--table", "3")
    assert rows["3", "Dream", "TABOM", "in-domain"]["ours"] != ""
    evaluation(tmp_path / "E2", "Dream", checkpoint.with_name("epoch-2"), scores=(("gsm8k", 1000),))
    rows, result = rows_of(capsys, tmp_path, "--table", "3")
    shown = [rows["3", "Dream", "TABOM", column] for column in ("GSM8K", "MATH500", "in-domain")]
    assert [(line["epoch"], bool(line["ours"])) for line in shown] == [("2", True), ("1", True), ("", False)]
    assert "Dream, TABOM, in-domain: empty, its cells are of other runs or epochs of a run" in reasons(result)


def test_what_else_a_run_changed_is_said(tmp_path, capsys):
    checkpoint = adapter_run(tmp_path / "R", "Dream", raw=True, weight_decay=9.0, lora_targets=("o_proj",)) / "epoch-2"
    evaluation(tmp_path / "E", "Dream", checkpoint)
    cut = adapter_run(tmp_path / "R2", "Dream", objective="nelbo", trained_on="trajectories", cut_eos=True) / "epoch-2"
    evaluation(tmp_path / "E2", "Dream", cut)
    text, result = show(capsys, tmp_path, "--table", "3")
    (line,) = [line for line in text.splitlines() if line.startswith(f"- Dream, TABOM: {tmp_path / 'E'} (")]
    assert "weight decay 9.0" in line and "lora targets o_proj" in line and "raw True" in line
    assert "keep correct" in line and "lora alpha" not in line and "cut eos" not in line
    assert f"{tmp_path / 'E2'}: gsm8k: it was trained with --cut-eos" in reasons(result)


def test_commands_have_the_protocol_and_epoch_that_are_asked_for(tmp_path, capsys):
    text, _ = show(capsys, tmp_path, "--table", "3", "--protocol", "release", "--epoch", "2")
    listed = [line for line in text.splitlines() if " evaluate " in line]
    assert all("--protocol release " in line for line in listed)
    (line,) = [line for line in listed if line.endswith("--out out/dream-prm12k/E-release-epoch2")]
    assert "--adapter out/dream-prm12k/R/epoch-2 " in line
    assert len({line.split("--out ")[1] for line in listed}) == len(listed)


def test_a_folder_whose_name_begins_like_a_checkpoints_is_read(tmp_path, capsys):
    evaluation(tmp_path / "epoch-5-gsm8k", "Dream")
    rows, _ = rows_of(capsys, tmp_path, "--table", "3")
    assert rows["3", "Dream", "No-SFT", "GSM8K"]["folder"] == str(tmp_path / "epoch-5-gsm8k")


def test_the_interval_of_a_gain_is_newcombes():
    """Example (a) of Newcombe (1998), method 10: 56/70 and 48/80, 0.0524 to 0.3339."""
    first, second = evaluate.wilson(56, 70, 1.959964), evaluate.wilson(48, 80, 1.959964)
    gain, low, high = tables.combined([(1.0, 0.8, *first), (-1.0, 0.6, *second)])
    assert (gain, low, high) == (pytest.approx(0.2), pytest.approx(0.0524, abs=1e-4), pytest.approx(0.3339, abs=1e-4))
    assert tables.combined([(0.5, 1.0, None, None), (0.5, 2.0, None, None)]) == (1.5, None, None)


METHODS = {
    "SFT-GT": dict(objective="nelbo", trained_on="answers"),
    "SFT-SD": dict(objective="nelbo", trained_on="trajectories"),
    "dInfer": dict(objective="transition"),
    "T3D": dict(objective="t3d"),
    "TABOM": dict(),
    "global window, no ranking": dict(window="global", weight=0.0),
    "global window": dict(window="global"),
    "no ranking": dict(weight=0.0),
}


def test_each_method_has_its_row(tmp_path, capsys):
    for i, options in enumerate(METHODS.values()):
        checkpoint = adapter_run(tmp_path / f"R{i}", "Dream", **options) / "epoch-2"
        evaluation(tmp_path / f"E{i}", "Dream", checkpoint, scores=(("gsm8k", 1000 + i),))
    rows, result = rows_of(capsys, tmp_path, "--table", "3,5")
    assert result["left_out"] == []
    for i, label in enumerate(METHODS):
        number = "3" if label in PAPER["tables"]["tabom"]["3"]["sections"]["Dream"]["rows"] else "5"
        assert rows[number, "Dream", label, "GSM8K"]["folder"] == str(tmp_path / f"E{i}")


def test_the_data_is_known_by_the_recipe_or_its_name(tmp_path, capsys):
    recipe = adapter_run(tmp_path / "A", "LLaDA", recipe="llada-ling-coder", data="elsewhere/T")
    evaluation(tmp_path / "E-A", "LLaDA", recipe / "epoch-2", scores=(("mbpp", 200),))
    (tmp_path / "T").mkdir()
    (tmp_path / "T" / "meta.json").write_text(json.dumps(dict(data="my/prm12k.parquet", model_sha256="LLaDA")))
    named = adapter_run(tmp_path / "B", "LLaDA", data=str(tmp_path / "T"))
    evaluation(tmp_path / "E-B", "LLaDA", named / "epoch-2", scores=(("mbpp", 201),))
    unknown = adapter_run(tmp_path / "C", "LLaDA", data="puzzles.jsonl")
    evaluation(tmp_path / "E-C", "LLaDA", unknown / "epoch-2", scores=(("mbpp", 202),))
    rows, result = rows_of(capsys, tmp_path, "--table", "2,3")
    assert rows["2", "LLaDA", "TABOM", "MBPP"]["folder"] == str(tmp_path / "E-A")
    assert rows["3", "LLaDA", "TABOM", "MBPP"]["folder"] == str(tmp_path / "E-B")
    assert "trained on puzzles.jsonl, which names neither of the paper's data sets" in reasons(result)
    rows, _ = rows_of(capsys, tmp_path / "E-C", "--table", "2", "--code", "puzzles", "--math", "prm12k")
    assert rows["2", "LLaDA", "TABOM", "MBPP"]["folder"] == str(tmp_path / "E-C")
    edit_json(tmp_path / "T" / "meta.json", model_sha256="another")
    assert "are of another model: no self-distillation" in reasons(rows_of(capsys, tmp_path)[1])
    edit_json(tmp_path / "T" / "meta.json", model_sha256="LLaDA", adapter_sha256="x")
    assert "are of a model with an adapter: no row of the paper" in reasons(rows_of(capsys, tmp_path)[1])


def test_the_epoch_decides_and_is_said(tmp_path, capsys):
    run_of = adapter_run(tmp_path / "R", "Dream")
    for number in (1, 2):
        evaluation(tmp_path / f"E{number}", "Dream", run_of / f"epoch-{number}", scores=(("gsm8k", 1000 + number),))
    for words, wanted in (((), "2"), (("--epoch", "1"), "1"), (("--epoch", "3"), "")):
        rows, _ = rows_of(capsys, tmp_path, "--table", "3", *words)
        assert rows["3", "Dream", "TABOM", "GSM8K"]["epoch"] == wanted
    with pytest.raises(SystemExit):
        tabom.main(["tables", "--epoch", "best"])
    assert "must be last, or the number of an epoch" in capsys.readouterr().err
    inside = run_of / "step-7"
    inside.mkdir()
    (inside / "adapter_config.json").write_text("{}")
    evaluation(tmp_path / "E7", "Dream", inside)
    assert "is no checkpoint of a whole epoch" in reasons(rows_of(capsys, tmp_path)[1])


def test_two_runs_for_one_cell_are_reported_and_none_is_shown(tmp_path, capsys):
    for i, name in enumerate(("A", "B")):
        evaluation(tmp_path / name, "Dream", scores=(("gsm8k", 1000 + i),), seed=i)
    rows, result = rows_of(capsys, tmp_path, "--table", "3")
    assert rows["3", "Dream", "No-SFT", "GSM8K"]["ours"] == ""
    assert f"Dream, No-SFT, GSM8K: {tmp_path / 'B'} has it too, so it is empty" in reasons(result)
    rows, result = rows_of(capsys, tmp_path / "A", "--table", "3")
    assert rows["3", "Dream", "No-SFT", "GSM8K"]["ours"] and result["left_out"] == []
    evaluation(tmp_path / "C", "Dream", scores=(("gsm8k", 1000),))
    rows, result = rows_of(capsys, tmp_path / "A", tmp_path / "C", "--table", "3")  # measured twice, and equal
    assert rows["3", "Dream", "No-SFT", "GSM8K"]["folder"] == str(tmp_path / "A")
    about = "base Dream, method No-SFT, task gsm8k, decoding full, measure score"
    assert reasons(result) == f"{tmp_path / 'C'}: {about}: no cell of these tables is left for it"


def test_of_a_grid_tables_2_to_5_have_the_recipes_margin_and_weight(tmp_path, capsys):
    for i, (margin, weight) in enumerate([(0.1, 1.0), (0.2, 1.0), (0.3, 2.0)]):
        checkpoint = adapter_run(tmp_path / f"R{i}", "LLaDA", margin=margin, weight=weight) / "epoch-2"
        evaluation(tmp_path / f"E{i}", "LLaDA", checkpoint, scores=(("gsm8k", 1000 + i),))
    rows, result = rows_of(capsys, tmp_path, "--table", "3,7")
    assert rows["3", "LLaDA", "TABOM", "GSM8K"]["folder"] == str(tmp_path / "E1")
    assert rows["7", "LLaDA", "lambda 1", "gamma 0.1"]["folder"] == str(tmp_path / "E0")
    assert rows["7", "LLaDA", "lambda 2", "gamma 0.3"]["folder"] == str(tmp_path / "E2")
    assert result["left_out"] == []


def test_windows_and_decoding_have_their_tables(tmp_path, capsys):
    checkpoint = adapter_run(tmp_path / "R", "Dream", window=64) / "epoch-2"
    evaluation(tmp_path / "E", "Dream", checkpoint)
    evaluation(tmp_path / "E2", "Dream", tokens_per_step=2)
    rows, result = rows_of(capsys, tmp_path)
    assert rows["9", "Dream", "W 64", "GSM8K"]["folder"] == str(tmp_path / "E")
    assert rows["4", "Dream", "No-SFT", "GSM8K"]["folder"] == str(tmp_path / "E2")
    assert rows["3", "Dream", "No-SFT", "GSM8K"]["ours"] == rows["3", "Dream", "TABOM", "GSM8K"]["ours"] == ""
    assert result["tables"] == ["2", "3", "4", "5", "6", "7", "9"]


def test_the_authors_adapters_have_a_row_of_their_own(tmp_path, capsys):
    folder = tmp_path / "checkpoints" / "llada_prm12k"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    evaluation(tmp_path / "E", "LLaDA", folder)
    rows, result = rows_of(capsys, tmp_path, "--table", "3")
    shown = rows["3", "LLaDA", "TABOM, the authors' adapter", "GSM8K"]
    assert (shown["paper"], shown["folder"]) == ("78.62", str(tmp_path / "E")) and result["left_out"] == []
    assert ("3", "Dream", "TABOM, the authors' adapter", "GSM8K") not in rows
    text, _ = show(capsys, tmp_path, "--table", "3")
    assert "--adapter TABOM/checkpoints/llada_prm12k --tasks gsm8k,math500,humaneval,mbpp,ifeval --out" in text


def test_t3ds_tables_are_of_models_trained_as_a_whole(tmp_path, capsys):
    hub = "JetLM/SDAR-1.7B-Chat"
    given = dict(objective="t3d", lora_rank=0, data="math_train.jsonl")
    model = adapter_run(tmp_path / "R", "SDAR-1.7B", **given) / "epoch-2"
    how = dict(protocol="official", temperature=0.1, max_new_tokens=2000, scores=(("math500", 300),))
    trained = evaluation(tmp_path / "E", "SDAR-1.7B", **how, model=str(model), tokens_per_step=2, block_causal=8)
    edit_json(trained / "math500" / "meta.json", model_sha256=disk.fingerprint(model))
    evaluation(tmp_path / "E0", "SDAR-1.7B", **how, model=hub, tokens_per_step=2, block_causal=8)
    evaluation(tmp_path / "E1", "SDAR-1.7B", **how, model=hub)
    evaluation(tmp_path / "E2", "SDAR-1.7B", protocol="official", scores=(("math500", 300),))
    answers = dict(objective="nelbo", lora_rank=0, data="stratos.jsonl", trained_on="answers")
    sft = adapter_run(tmp_path / "R-sft", "SDAR-1.7B", **answers) / "epoch-2"
    scored = evaluation(tmp_path / "E-sft", "SDAR-1.7B", **how, model=str(sft), tokens_per_step=2, block_causal=8)
    edit_json(scored / "math500" / "meta.json", model_sha256=disk.fingerprint(sft))
    rows, result = rows_of(capsys, tmp_path, "--paper", "t3d")
    shown = rows["1", "SDAR-1.7B, TokPS 2", "T3D", "MATH500, b 8"]
    assert (shown["paper"], shown["folder"], shown["gain"]) == ("47.8", str(tmp_path / "E"), "0.0")
    assert rows["2", "SDAR-1.7B", "original", "MATH500"]["folder"] == str(tmp_path / "E1")
    assert rows["1", "SDAR-1.7B, TokPS 2", "SFT", "MATH500, b 8"]["folder"] == str(tmp_path / "E-sft")
    assert "decoded with max_new_tokens 4096 for 2000, steps 4096 for 2000, temperature 0.0 for 0.1" in reasons(result)


# ---------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (dict(n=20, limit=20), "gsm8k: 20 questions, and the benchmark has 1319"),
        (dict(protocol="release"), "gsm8k: protocol release, and these tables are of paper: see --protocol"),
        (dict(steps=64), "decoded with steps 64 for 256: a decoder of no table"),
        (dict(raw=True), "asked with --shots or raw (True); the paper has no examples and the chat template"),
        (dict(prompt_tokens=16), "asked with --prompt-tokens 16; the paper's prompts are the protocol's"),
        (
            dict(model="out/M"),
            "out/M (layers 28, width 3584, vocab_size 152064, family dream) is no checkpoint of the",
        ),
        (dict(model="Dream-org/Dream-v0-Base-7B"), "--base Dream-v0-Base-7B shows it under its own name"),
    ],
)
def test_what_does_not_compare_is_left_out_with_the_reason(options, reason, tmp_path, capsys):
    evaluation(tmp_path / "E", "Dream", **options)
    rows, result = rows_of(capsys, tmp_path)
    assert (result["read"], result["used"], result["filled"]) == (1, 0, 0)
    ((folder, said),) = [(one["folder"], one["reason"]) for one in result["left_out"]]
    assert folder == str(tmp_path / "E") and reason in said
    assert "| Left out" not in rows and reason in show(capsys, tmp_path)[0]


def test_another_shape_is_no_checkpoint_of_the_paper(tmp_path, capsys):
    edit_json(evaluation(tmp_path / "E", "Dream") / "results.json", shape=dict(family="dream", layers=2, width=64,
              vocab_size=99))  # fmt: skip
    assert "layers 2, width 64, vocab_size 99) is no checkpoint of the paper" in reasons(rows_of(capsys, tmp_path)[1])


def test_a_checkpoint_that_is_gone_changed_or_of_another_model_is_refused(tmp_path, capsys):
    run_of = adapter_run(tmp_path / "R", "Dream")
    evaluation(tmp_path / "E", "Dream", run_of / "epoch-1")
    (tmp_path / "moved").mkdir()
    run_of.rename(tmp_path / "moved" / "R")
    rows, result = rows_of(capsys, tmp_path / "E", "--table", "3")
    assert "name the folder of its training run, too" in reasons(result)
    rows, result = rows_of(capsys, tmp_path / "E", tmp_path / "moved", "--table", "3")
    assert rows["3", "Dream", "TABOM", "GSM8K"]["ours"] and result["used"] == 2
    edit_json(tmp_path / "moved" / "R" / "meta.json", model_sha256="another")
    assert "was trained on another model than" in reasons(rows_of(capsys, tmp_path)[1])
    edit_json(tmp_path / "moved" / "R" / "epoch-1" / "adapter_config.json", number=7)
    assert "is not what was evaluated: it has changed since" in reasons(rows_of(capsys, tmp_path)[1])


def test_rows_of_another_base_or_other_questions_do_not_compare(tmp_path, capsys):
    run_of = adapter_run(tmp_path / "R", "Dream")
    evaluation(tmp_path / "E", "Dream")
    other = evaluation(tmp_path / "E-tabom", "Dream", run_of / "epoch-2")
    edit_json(other / "gsm8k" / "meta.json", questions_sha256="others")
    rows, result = rows_of(capsys, tmp_path, "--table", "3")
    assert rows["3", "Dream", "TABOM", "GSM8K"]["ours"] == "" and rows["3", "Dream", "No-SFT", "GSM8K"]["ours"]
    assert f"TABOM, GSM8K: does not compare with {tmp_path / 'E'}, other questions" in reasons(result)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "results.json"),
        ("[]", "expected a JSON object"),
        ("{}", "no scores of evaluate"),
        ('{"scores": []}', "does not say which checkpoint it is of"),
        (
            '{"scores": [{"n": 3}], "shape": {}, "command": {}}',
            "not as evaluate and diagnose write it (KeyError: 'task')",
        ),
        ('{"scores": [3], "shape": {}, "command": {}}', "not as evaluate and diagnose write it (TypeError"),
    ],
)
def test_a_malformed_file_is_one_line(text, reason, tmp_path, capsys):
    (tmp_path / "results.json").write_text(text)
    _, result = rows_of(capsys, tmp_path)
    (line,) = reasons(result).splitlines()
    assert reason in line


def test_bad_options_are_one_line(tmp_path, capsys):
    for words, message in (
        (["--table", "8"], "--table 8: there are numbers of 2, 3, 4, 5, 6, 7, 9 in --paper tabom"),
        ([str(tmp_path / "none")], "none: no such folder; give folders of evaluate, diagnose and train"),
    ):
        assert tabom.main(["tables", *words]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line


def test_a_run_without_an_evaluation_and_answers_without_a_score_are_said(tmp_path, capsys):
    run_of = adapter_run(tmp_path / "R", "Dream")
    evaluation(tmp_path / "E", "Dream", scores=(("gsm8k", 1000), ("mbpp", 300)))
    results = json.loads((tmp_path / "E" / "results.json").read_text())
    edit_json(tmp_path / "E" / "results.json", scores=results["scores"][:1])
    _, result = rows_of(capsys, tmp_path)
    assert f"{run_of}: trained, and no evaluation of it fits" in reasons(result)
    assert "mbpp: no score in results.json, which is of the last call" in reasons(result)


def test_latex_escapes_and_csv_and_out(tmp_path, capsys):
    evaluation(tmp_path / "E_1", "Dream")
    text, _ = show(capsys, tmp_path, "--table", "3", "--format", "latex")
    assert "\\begin{tabular}{l" in text and "95 \\%" not in text
    for line in text.splitlines():
        assert line.startswith(("%", "\\")) or line == "" or line.endswith("\\\\")
    shown, result = show(capsys, tmp_path, "--table", "3", "--out", tmp_path / "t.md")
    assert shown == "" and result["out"] == str(tmp_path / "t.md")
    assert (tmp_path / "t.md").read_text().startswith("arXiv 2605.11854v1")


# ------------------------------------------------------------------------------------------------- real folders


def test_folders_of_the_real_commands(bytes_model, tmp_path, capsys):
    def short(folder):
        decoder = dict(max_new_tokens=8, block_length=8)
        (folder / "generation_config.json").write_text(json.dumps(dict(tabom=decoder)))

    base = changed_model(tmp_path, bytes_model, short)
    questions = [dict(question=f"What is {i}?", answer=f"#### {i}") for i in range(4)]
    benchmarks = tmp_path / "data"
    benchmarks.mkdir()
    with gzip.open(benchmarks / "gsm8k_test.jsonl.gz", "wt") as f:
        f.writelines(json.dumps(row) + "\n" for row in questions)
    prompts = write_lines(tmp_path / "math_train.jsonl", questions)
    out = tmp_path / "out"
    run(capsys, "distill", model=base, data=prompts, check="none", out=out / "T")
    common = dict(model=base, keep="all", window=4, epochs=1, warmup=0, lr=1e-2)
    trained = {"TABOM": ("tabom", out / "T"), "SFT-SD": ("nelbo", out / "T"), "SFT-GT": ("nelbo", prompts)}
    asked = dict(model=base, data=benchmarks)
    run(capsys, "evaluate", **asked, out=out / "E")
    for name, (objective, source) in trained.items():
        options = dict(common, objective=objective, data=source)
        if objective == "nelbo":
            options.pop("window")
        run(capsys, "train", **options, out=out / f"R-{name}")
        run(capsys, "evaluate", **asked, adapter=out / f"R-{name}" / "epoch-1", out=out / f"E-{name}")
    run(capsys, "diagnose", model=base, data=out / "E" / "gsm8k", window=4, out=out / "D")
    own = dict(checkpoints=out / "R-SFT-SD" / "epoch-1", data=out / "E-SFT-SD" / "gsm8k")
    run(capsys, "diagnose", model=base, **own, window=4, out=out / "D-SFT-SD")

    _, result = rows_of(capsys, out)
    assert result["filled"] == 0 and "--base changed shows it under its own name" in reasons(result)
    rows, result = rows_of(capsys, out, "--base", "changed")
    assert {key[2] for key, row in rows.items() if key[:2] == ("3", "changed") and row["folder"]} == {
        "No-SFT", "SFT-SD", "SFT-GT",
    }  # fmt: skip
    shown = rows["3", "changed", "SFT-SD", "GSM8K"]
    assert (shown["n"], shown["epoch"], shown["paper"]) == ("4", "1", "")
    saved = json.loads((out / "E-SFT-SD" / "results.json").read_text())["scores"][0]
    assert [float(shown["ours"]), float(shown["low"]), float(shown["high"])] == [saved["score"], *saved["interval"]]
    for label, folder, place in (("No-SFT", "D", 0), ("SFT-SD", "D-SFT-SD", 1)):
        measured = json.loads((out / folder / "meta.json").read_text())["models"][place]["tds"]
        if measured is not None:  # the answer may end with its first token
            assert float(rows["6", "changed", label, "GSM8K"]["ours"]) == pytest.approx(measured, abs=1e-4)
    assert rows["9", "changed", "W 16", "GSM8K"]["ours"] == ""  # its window is 4

    grid = dict(rows="TABOM", over="seed=0", test="gsm8k", benchmarks=benchmarks, epoch="last", epochs=1)
    run(capsys, "sweep", model=base, data=out / "T", keep="all", warmup=0, lr=1e-2, **grid, out=out / "S")
    rows, result = rows_of(capsys, out, "--base", "changed", "--table", "3")
    shown = rows["3", "changed", "TABOM", "GSM8K"]
    assert shown["folder"].startswith(str(out / "S" / "runs")) and shown["epoch"] == "1"


def diagnosis(
    out, base, checkpoint=None, tds=1.0, answers_of=None, fresh=False, tds_se=0.1, tds_of=64, answers=None, **changes
):
    """A folder as diagnose leaves it. answers_of: the checkpoint whose answers to GSM8K are replayed, else its own;
    answers: what the meta.json of these has other than the paper's."""
    from experiments.diagnose import DiagnoseOptions

    known = PAPER["checkpoints"][base]
    shape = dict(zip(("layers", "width", "vocab_size"), known["shape"]), family=known["family"])
    hashes = [disk.fingerprint(one) if one else None for one in (checkpoint, answers_of or checkpoint)]
    models = []
    for name in ["base", *([str(checkpoint)] if checkpoint else [])]:
        models.append(dict(model=name, trajectories=64, tds=tds, tds_se=tds_se, tds_of=tds_of))
    made_by = dict(task="gsm8k", model_sha256=base, adapter_sha256=hashes[1], questions_sha256="q", raw=False)
    made_by.update(protocol="paper", prompt_tokens=None, shots_sha256=evaluate.digest([]))
    loaded = loading.Loaded(
        SimpleNamespace(config=SimpleNamespace(family=known["family"], block_length=None)), None, Path("no folder")
    )
    made_by.update(decoder=evaluate.task_settings(evaluate.EvaluateOptions(), "gsm8k", loaded))
    made_by.update(answers or {})
    options = dict(vars(DiagnoseOptions(model=known["hub"], out=str(out), fresh=fresh)), **changes)
    about = dict(command="diagnose", options=options, shape=shape, model_sha256=base, made_by=made_by, models=models)
    out.mkdir()
    about.update(checkpoint_sha256=[one for one in hashes[:1] if one], data_sha256="d")
    (out / "meta.json").write_text(json.dumps(about))


def test_the_tds_is_of_a_models_own_answers(tmp_path, capsys):
    checkpoint = adapter_run(tmp_path / "R", "Dream") / "epoch-2"
    other = adapter_run(tmp_path / "R2", "Dream", objective="nelbo", trained_on="trajectories") / "epoch-2"
    diagnosis(tmp_path / "D", "Dream", tds=1.2)
    diagnosis(tmp_path / "D-tabom", "Dream", checkpoint, tds=1.5)
    diagnosis(tmp_path / "D-other", "Dream", other, tds=1.4, answers_of=checkpoint)
    rows, result = rows_of(capsys, tmp_path, "--table", "6")
    shown = rows["6", "Dream", "TABOM", "GSM8K"]
    assert (shown["paper"], shown["ours"], shown["n"]) == ("1.469", "1.5", "64")
    assert (float(shown["low"]), float(shown["high"])) == (pytest.approx(1.304), pytest.approx(1.696))
    assert float(shown["gain"]) == pytest.approx(0.3) and rows["6", "Dream", "No-SFT", "GSM8K"]["ours"] == "1.2"
    assert rows["6", "Dream", "SFT-SD", "GSM8K"]["ours"] == ""
    assert "D-other: none of its models replays its own answers" in reasons(result)
    diagnosis(tmp_path / "D-sd", "Dream", other, limit=3)
    _, result = rows_of(capsys, tmp_path, "--table", "6")
    assert f"does not compare with {tmp_path / 'D'}, other limit" in reasons(result)
    text, _ = show(capsys, tmp_path, "--table", "6")
    assert "| TABOM | 1.469 (+0.302) | 1.500 [1.30, 1.70] (+0.300 [" in text


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (dict(protocol="official"), "protocol official, and these tables are of paper"),
        (dict(raw=True), "asked with --shots or raw (True)"),
        (dict(shots_sha256="x"), "asked with --shots or raw (False)"),
        (dict(prompt_tokens=9), "asked with --prompt-tokens 9"),
        (dict(tokens_per_step=8), "its trajectories have 8 a step"),
        (dict(temperature=1.0), "decoded with temperature 1.0 for"),
    ],
)
def test_the_tds_is_of_answers_to_the_papers_questions(tmp_path, capsys, changed, reason):
    decoder = {name: changed.pop(name) for name in ("tokens_per_step", "temperature") if name in changed}
    if decoder:
        loaded = loading.Loaded(
            SimpleNamespace(config=SimpleNamespace(family="dream", block_length=None)), None, Path("no folder")
        )
        changed["decoder"] = evaluate.task_settings(evaluate.EvaluateOptions(**decoder), "gsm8k", loaded)
    diagnosis(tmp_path / "D", "Dream", answers=changed)
    rows, result = rows_of(capsys, tmp_path, "--table", "6")
    assert rows["6", "Dream", "No-SFT", "GSM8K"]["ours"] == "" and reason in reasons(result)


def test_a_tds_of_fresh_answers_says_how_they_were_decoded(tmp_path, capsys):
    diagnosis(tmp_path / "D", "Dream", fresh=True, tokens_per_step=2)
    text, _ = show(capsys, tmp_path, "--table", "6")
    assert f"{tmp_path / 'D'} (as published, decoded anew with tokens_per_step 2), in Table 6" in text


def test_the_tds_of_one_trajectory_has_no_interval_and_its_own_number(tmp_path, capsys):
    diagnosis(tmp_path / "D", "Dream", tds=1.2, tds_se=None, tds_of=1)
    rows, _ = rows_of(capsys, tmp_path, "--table", "6")
    shown = rows["6", "Dream", "No-SFT", "GSM8K"]
    assert (shown["ours"], shown["low"], shown["high"], shown["n"]) == ("1.2", "", "", "1")


def test_one_token_a_step_is_full_decoding_and_is_said(tmp_path, capsys):
    evaluation(tmp_path / "E", "Dream", tokens_per_step=1)
    text, _ = show(capsys, tmp_path, "--table", "3")
    assert f"Dream, No-SFT: {tmp_path / 'E'} (as published, exactly one token a step), in Table 3" in text
