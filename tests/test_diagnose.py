"""tabom.py diagnose: its numbers against evaluate.py, its pictures, several processes.

python -m pytest tests/test_diagnose.py"""

import json
import re
import struct

import pytest
from helpers import flags, shell

import baselines
import data
import lora
import model
import objectives
import tabom
import tokenizer
from experiments import diagnose, pictures, plots
from runs import loading, torchrun

LIMIT = 6  # trajectories that are looked at, of 12


@pytest.fixture(scope="module")
def run_folder(tiny, trajectories, tmp_path_factory):
    out = tmp_path_factory.mktemp("R") / "R"
    training = dict(model=tiny, data=trajectories, out=out, keep="all", window=8, epochs=1, global_batch=5, lr=0.1)
    assert tabom.main(["train", *flags(**training)]) == 0
    return out


@pytest.fixture(scope="module")
def found(tiny, trajectories, puzzles, run_folder, tmp_path_factory):
    """What diagnose wrote about the base and one checkpoint: its folder, and what it returned."""
    out = tmp_path_factory.mktemp("D") / "D"
    checkpoint = run_folder / "epoch-1"
    options = dict(model=str(tiny), checkpoints=(str(checkpoint),), data=str(trajectories), device="cpu", window=5)
    more = dict(ground_truth=str(puzzles), runs=(str(run_folder),), batch_size=4, limit=LIMIT, out=str(out))
    return out, diagnose.diagnose(diagnose.DiagnoseOptions(**options, **more)), [None, checkpoint]


def rows(folder, name):
    return [row for _, row in data.read_rows(folder / f"{name}.jsonl")]


def size(png):
    """Width and height that a PNG file says it has."""
    head = png.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:24])


def test_tds_and_inversions_are_those_of_evaluate(tiny, trajectories, found):
    out, result, checkpoints = found
    records = data.read_trajectories(trajectories)[:LIMIT]
    for summary, checkpoint in zip(result["models"], checkpoints):
        m = model.load(tiny) if checkpoint is None else lora.load(model.load(tiny), checkpoint)
        batch = data.collate(records, m.config.pad_id)
        tds = objectives.tds(m, batch, m.config.eos_id)
        assert summary["tds"] == pytest.approx(tds["tds"], rel=1e-4)
        name = "base" if checkpoint is None else str(checkpoint)
        of_model = [r for r in rows(out, "trajectories") if r["model"] == name]
        assert [r["tds"] for r in of_model] == pytest.approx(tds["rows"], rel=1e-4)
        assert [r["id"] for r in of_model] == [r["id"] for r in records]
        by_step = [r["tds"] for r in rows(out, "tds") if r["model"] == name]
        assert by_step == pytest.approx(tds["per_step"], rel=1e-4, abs=1e-6)

        h = objectives.replay(m, batch, objectives.counted_until(batch, m.config.eos_id, "final"))
        own = baselines.inversions(baselines.entropies_when_decoded(h, batch))
        windows = baselines.inversions(baselines.windows_of_replay(h, batch, 5))
        for context, count in (("step", own), ("window", windows)):
            table = [r for r in rows(out, "inversions") if (r["model"], r["context"]) == (name, context)]
            assert [r["pairs"] for r in table] == [x for x in count["pairs"].tolist() if x]
            assert [r["distance"] for r in table] == list(range(1, len(table) + 1))
            assert len(table) == (4 if context == "window" else max(len(r["entropy"]) for r in of_model) - 1)
            assert sum(r["inverted"] for r in table) == pytest.approx(int(count["inverted"].sum()), abs=3)  # near ties
            rate = sum(r["inverted"] for r in table) / sum(r["pairs"] for r in table)
            assert summary[f"inversions_{context}"] == pytest.approx(rate)


def test_loss_over_the_mask_ratio(tiny, trajectories, puzzles, found):
    out, _, _ = found
    table = [r for r in rows(out, "loss") if r["model"] == "base"]
    assert {r["data"] for r in table} == {f"{trajectories} (decoded)", str(puzzles)}
    assert [r["mask_ratio"] for r in table] == [*diagnose.RATIOS, *diagnose.RATIOS]
    m = model.load(tiny)
    records = [data.cut_at_eos(r, {m.config.eos_id}) for r in data.read_trajectories(trajectories)[:LIMIT]]
    batch = data.collate(records, m.config.pad_id)
    losses = baselines.masked_loss(m, batch, 1.0, [data.generator(0, "mask", 1.0, r["id"]) for r in records])
    assert table[9]["responses"] == len(records) == LIMIT
    assert table[9]["loss"] == pytest.approx(losses.mean().item(), rel=1e-4)
    assert table[9]["loss_se"] == pytest.approx(losses.std().item() / LIMIT**0.5, rel=1e-3)


def test_pictures_are_drawn(found):
    out, _, _ = found
    for name in ("tds", "inversions", "loss", "training", "trajectory"):
        width, height = size(out / f"{name}.png")
        assert width > 300 and height > 100
    curves = plots.draw_tds(rows(out, "tds")).axes[0].get_lines()
    assert [len(line.get_xdata()) for line in curves] == [len(rows(out, "tds")) // 2] * 2
    assert len(plots.draw_loss(rows(out, "loss")).axes[0].get_lines()) == 4


def test_a_trajectory_is_drawn_token_by_token(tiny, trajectories):
    tok = tokenizer.load(tiny)
    ids = tok.encode("123") + [tok.eos_id] + tok.encode("456")
    drawing = pictures.draw_trajectory(tok, dict(response_ids=ids, order=[6, 1, 4, 0, 2, 3, 5]))
    axes = drawing.axes[0]
    assert [t.get_text() for t in axes.texts] == ["1", "2", "3", "<|endoftext|>"]  # and nothing after the first EOS
    colours = [patch.get_facecolor()[:3] for patch in axes.patches]
    assert sorted(range(4), key=lambda i: sum(colours[i])) == [3, 1, 2, 0]  # darker = decoded earlier
    assert [patch.get_x() for patch in axes.patches] == [0, 1, 2, 3]


@pytest.mark.slow
def test_two_processes_write_the_same(tiny, trajectories, puzzles, run_folder, found, tmp_path):
    options = dict(model=tiny, checkpoints=run_folder / "epoch-1", data=trajectories, ground_truth=puzzles)
    more = dict(window=5, batch_size=4, limit=LIMIT, out=tmp_path / "D")
    done = shell("diagnose", *flags(**options, **more), processes=2)
    assert done.returncode == 0, done.stderr
    for name in ("tds", "loss", "trajectories"):
        value = "loss" if name == "loss" else "tds"
        one, two = rows(found[0], name), rows(tmp_path / "D", name)
        assert [r[value] for r in two] == pytest.approx([r[value] for r in one], rel=1e-4, abs=1e-6)
        assert [r.get("id", r.get("step")) for r in two] == [r.get("id", r.get("step")) for r in one]


def test_own_order_has_the_window_and_margin_it_is_given(tiny, trajectories):
    """The slow way: every window of every trajectory that holds no EOS, one after the other."""
    processes, limit = torchrun.Processes("cpu"), 2
    options = loading.ModelOptions(model=str(tiny), device="cpu")
    loaded = loading.load_model(options, processes)
    records = data.read_trajectories(trajectories)[:limit]
    m = model.load(tiny)
    for window, margin in ((3, 0.1), (6, 0.4)):
        found = diagnose.own_order(loaded, processes, trajectories, limit, window, margin)
        losses, least, pairs, inverted = [], [], 0, 0
        for record in records:
            batch = data.collate([record], m.config.pad_id)
            h = objectives.replay(m, batch, objectives.counted_until(batch, m.config.eos_id, "final"))[0]
            of_row, least_of_row = [], []
            for t in range(len(h) - window + 1):
                inside = h[t, t : t + window]
                known = inside[~inside.isnan()]
                for i in range(len(known)):
                    inverted += int((known[i] > known[i + 1 :]).sum())
                    pairs += len(known) - i - 1
                if len(known) == window:
                    of_row.append(objectives.ranking_loss(inside, margin).item())
                    least_of_row.append(objectives.ranking_loss(inside.sort().values, margin).item())
            if of_row:
                losses.append(sum(of_row) / len(of_row))
                least.append(sum(least_of_row) / len(least_of_row))
        assert found["ranking"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
        assert found["ranking_least"] == pytest.approx(sum(least) / len(least), rel=1e-4)
        assert found["ranking_least"] < found["ranking"]
        assert found["inversions_window"] == pytest.approx(inverted / pairs, abs=3 / pairs)  # near ties
        assert set(found) == {
            "tds", "tds_final", "ranking", "ranking_least", "inversions_step", "inversions_window", "per_step",
        }  # fmt: skip


def test_responses_of_eos_alone_have_no_order(tiny, trajectories, tmp_path):
    eos_id = tokenizer.load(tiny).eos_id
    with open(tmp_path / "T.jsonl", "w") as f:
        for record in data.read_trajectories(trajectories)[:3]:
            record["response_ids"][0] = eos_id
            f.write(json.dumps(record) + "\n")
    options = loading.ModelOptions(model=str(tiny), device="cpu")
    processes = torchrun.Processes("cpu")
    loaded = loading.load_model(options, processes)
    found = diagnose.own_order(loaded, processes, tmp_path / "T.jsonl", 3, 8, 0.2)
    for name in ("ranking", "ranking_least", "inversions_step", "inversions_window"):
        assert found[name] is None


def test_prompts_are_decoded_by_each_model(tiny, puzzles, trajectories, run_folder, tmp_path, capsys):
    base = dict(model=tiny, limit=2)
    assert tabom.main(["diagnose", *flags(data=trajectories, out=tmp_path / "stored", **base)]) == 0
    assert tabom.main(["diagnose", *flags(data=puzzles, out=tmp_path / "prompts", **base)]) == 0
    checkpoint = run_folder / "epoch-1"
    again = dict(data=trajectories, fresh=True, checkpoints=checkpoint, out=tmp_path / "fresh", **base)
    assert tabom.main(["diagnose", *flags(**again)]) == 0
    entropies = {}
    for name in ("stored", "prompts", "fresh"):
        for row in rows(tmp_path / name, "trajectories"):
            entropies.setdefault((name, row["model"]), {})[row["id"]] = row["entropy"]
    for row_id, expected in entropies["stored", "base"].items():  # the base decodes what it decoded before
        assert entropies["fresh", "base"][row_id] == pytest.approx(expected, abs=1e-4)
    assert len(entropies["prompts", "base"]) == len(entropies["fresh", str(checkpoint)]) == 2
    stored = data.read_trajectories(trajectories)[:2]
    m = lora.load(model.load(tiny), checkpoint)
    batch = data.collate(stored, m.config.pad_id)
    replayed = objectives.tds(m, batch, m.config.eos_id)["rows"]
    own = [r["tds"] for r in rows(tmp_path / "fresh", "trajectories") if r["model"] != "base"]
    assert own != pytest.approx(replayed, rel=1e-3)  # its own trajectories are others


def test_the_same_file_as_prompts_and_as_ground_truth_has_two_curves(tiny, puzzles, tmp_path, capsys):
    options = dict(model=tiny, data=puzzles, ground_truth=puzzles, limit=2)
    assert tabom.main(["diagnose", *flags(out=tmp_path / "D", **options)]) == 0
    assert len(rows(tmp_path / "D", "loss")) == 2 * len(diagnose.RATIOS)


def test_curves_are_named_by_where_their_paths_differ():
    names = ["base", "out/S/runs/objective=tabom+seed=0/R-1/epoch-2", "out/S/runs/objective=nelbo+seed=0/R-1/epoch-2"]
    found = plots.labels(names)
    assert list(found.values()) == ["base", "objective=tabom+seed=0/R-1/epoch-2", "objective=nelbo+seed=0/R-1/epoch-2"]
    assert list(plots.labels(["a/b/c"]).values()) == ["a/b/c"]


def test_the_table_has_the_tds_of_each_model():
    one = dict(model="base", trajectories=1, tds=0.5, tds_se=None, inversions_step=0.25, inversions_window=None)
    one["tds_of"] = 1
    none = dict(one, model="out/R/epoch-1", trajectories=64, tds=None)
    part = dict(one, trajectories=4, tds_se=0.01, tds_of=3)  # one of them begins with EOS
    *_, first, second, third = diagnose.summary_table([one, none, part], 32).splitlines()
    assert third == "| base | 4 | 0.5000 ± 0.0100 (of 3) | 25.0 | - |"
    assert first == "| base | 1 | 0.5000 | 25.0 | - |"
    assert second == "| out/R/epoch-1 | 64 | - | 25.0 | - |"


def test_a_comma_after_the_last_checkpoint_is_an_error(tmp_path, capsys):
    options = dict(model="tiny", data="T", checkpoints="out/R/epoch-1,", out=tmp_path / "D")
    with pytest.raises(SystemExit):
        tabom.main(["diagnose", *flags(**options)])
    assert "--checkpoints" in capsys.readouterr().err
    assert not (tmp_path / "D").exists()


def test_training_curves_need_no_model(run_folder, tmp_path, capsys):
    assert tabom.main(["diagnose", *flags(runs=run_folder, out=tmp_path / "D")]) == 0
    assert sorted(file.name for file in (tmp_path / "D").iterdir()) == ["training.pdf", "training.png"]
    lines = (run_folder / "metrics.jsonl").read_text().splitlines()
    drawing = plots.draw_training({"R": [json.loads(line) for line in lines]})
    titles = [axes.get_title() for axes in drawing.axes if axes.get_lines()]
    assert titles == ["loss", "ce", "ranking", "in_order", "entropy", "grad_norm"]


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(), "--model is missing"),
        (dict(data="T"), "--model is missing"),
        (dict(model="TINY"), "--data is missing"),
        (dict(model="TINY", data="nowhere.jsonl"), "no dataset file nowhere.jsonl"),
        (dict(model="TINY", data="T", checkpoints="nowhere"), "--checkpoints nowhere: no adapter_config.json"),
        (dict(model="TINY", data="T", ground_truth="nowhere.jsonl"), "no dataset file nowhere.jsonl"),
        (dict(model="TINY", data="T", out="TINY/config.json/D"), "--out .*config.json is a file"),
        (dict(model="TINY", data="T", window=1), "--window 1: must be a number of at least 2"),
        (dict(runs="nowhere"), "--runs nowhere: there is no such run"),
        (dict(runs="TINY/config.json"), "config.json"),
        (dict(model="TINY", data="T", out="T"), "is there already"),
        (dict(model="TINY", data="T", temperature=1), "--temperature .* --fresh"),
    ],
    ids=str,
)
def test_bad_input_is_one_line(tiny, trajectories, tmp_path, capsys, options, message):
    named = {"TINY": str(tiny), "T": str(trajectories)}
    options = {k: named.get(v, str(v).replace("TINY", str(tiny))) for k, v in options.items()}
    assert tabom.main(["diagnose", *flags(**{"out": tmp_path / "D", **options})]) == 1
    captured = capsys.readouterr()
    (line,) = [x for x in captured.err.splitlines() if x.startswith("error")]
    assert re.search(message, line), line
    assert not (tmp_path / "D").exists()


def test_what_is_read_late_is_looked_at_before_a_model_is_loaded(tiny, trajectories, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "load_checkpoint", lambda *_: pytest.fail("a model is loaded"))
    options = dict(model=str(tiny), data=str(trajectories), out=str(tmp_path / "D"), device="cpu")
    for late in (dict(checkpoints=("nowhere",)), dict(ground_truth="nowhere.jsonl")):
        with pytest.raises(FileNotFoundError, match="nowhere"):
            diagnose.diagnose(diagnose.DiagnoseOptions(**options, **late))


def test_a_mask_that_counts_as_decoded_is_refused(tiny, trajectories, tmp_path):
    record, mask_id = data.read_trajectories(trajectories)[0], model.load(tiny).config.mask_id
    record["response_ids"][0] = mask_id
    (tmp_path / "T.jsonl").write_text(json.dumps(record) + "\n")
    options = dict(model=str(tiny), data=str(tmp_path / "T.jsonl"), out=str(tmp_path / "D"), device="cpu")
    with pytest.raises(ValueError, match=f"mask token {mask_id}"):
        diagnose.diagnose(diagnose.DiagnoseOptions(**options))


@pytest.mark.parametrize("line", [dict(step=True, loss=1.0), dict(step=1, loss="x"), dict(step=1.5, loss=1.0)], ids=str)
def test_what_is_no_metric_is_refused(line, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(ValueError, match="metrics.jsonl:1: not the metrics"):
        diagnose.read_metrics(tmp_path)
