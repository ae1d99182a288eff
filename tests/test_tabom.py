"""The command line end to end, on a tiny random model: python -m pytest tests/test_tabom.py

distill, train, generate and merge as a user calls them: killed and started again, on one process and on two, and with
every kind of bad input."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import ROOT, flags, last_json, shell
from safetensors.torch import load_file, save_file

import data
import decode
import lora
import model
import objectives
import runs
import tabom
import train
from experiments import tiny as tiny_model

GOLDEN = ROOT / "tests" / "golden"
LEAVES = ("model", "lora", "decode", "objectives", "data", "evaluate", "ifeval", "execute")


def records(folder):
    return {r["id"]: r for r in data.read_trajectories(folder)}


def decoded(folder):
    """What was decoded and when; entropies differ in the last digit with the shape of a batch."""
    same = ("prompt_ids", "response_ids", "order", "step", "text", "finished", "correct")
    return {k: [r[s] for s in same] for k, r in records(folder).items()}


TRAIN = dict(keep="all", window=8, epochs=2, global_batch=5, batch_size=2, lr=1e-2, warmup=2)

# ---------------------------------------------------------------------------------------------------------- distill


def test_distill_logs_what_the_decoder_did(tiny, puzzles, trajectories, capsys):
    found = records(trajectories)
    rows = [json.loads(line) for line in puzzles.read_text().splitlines()]
    assert set(found) == {row["id"] for row in rows}
    meta = json.loads((trajectories / "meta.json").read_text())
    assert meta["decoder"]["strategy"] == "entropy"  # the model's own generation_config.json
    assert meta["decoder"]["max_new_tokens"] == tiny_model.ANSWER
    m, tok = model.load(tiny), data.load_tokenizer(tiny)
    for row in rows[:3]:
        record = found[row["id"]]
        assert record["prompt_ids"] == tok.encode(row["prompt"])
        assert (record["prompt"], record["answer"]) == (row["prompt"], row["answer"])
        t = decode.generate(m, torch.tensor([record["prompt_ids"]]), suppress=[m.config.mask_id], **meta["decoder"])
        assert record["response_ids"] == t.response[0].tolist()
        assert record["order"] == t.order[0].tolist()
        assert record["step"] == t.step[0].tolist()
        assert record["entropy"] == pytest.approx(t.entropy[0].tolist(), abs=1e-4)
        assert record["confidence"] == pytest.approx(t.confidence[0].tolist(), abs=1e-4)
        assert record["finished"] == (tok.eos_id in record["response_ids"])
        assert record["text"] == tok.response_text(record["response_ids"])
        assert record["correct"] == (record["text"] == row["answer"])


def test_distill_again_does_nothing_and_a_longer_limit_only_the_rest(tiny, puzzles, tmp_path, capsys):
    options = dict(model=tiny, data=puzzles, out=tmp_path / "T")
    for limit, new in ((5, 5), (5, 0), (12, 7)):
        assert tabom.main(["distill", *flags(**options, limit=limit)]) == 0
        result = last_json(capsys.readouterr().out)
        assert (result["new"], result["trajectories"]) == (new, limit)


def test_batch_size_changes_nothing(tiny, puzzles, trajectories, tmp_path):
    out = tmp_path / "T"
    options = dict(temperature=0.7, top_p=0.9)
    for size in (1, 5):
        assert (
            tabom.main(["distill", *flags(model=tiny, data=puzzles, out=out / str(size), batch_size=size, **options)])
            == 0
        )
    assert decoded(out / "1") == decoded(out / "5") != decoded(trajectories)


def test_a_torn_line_is_made_again(tiny, puzzles, trajectories, tmp_path, capsys):
    out = tmp_path / "T"
    shutil.copytree(trajectories, out)
    file = out / "trajectories-00000.jsonl"
    file.write_bytes(file.read_bytes()[:-50])
    assert tabom.main(["distill", *flags(model=tiny, data=puzzles, out=out, check="exact")]) == 0
    assert last_json(capsys.readouterr().out)["new"] == 1
    assert decoded(out) == decoded(trajectories)


def test_distill_killed_and_started_again_loses_and_repeats_nothing(tiny, puzzles, trajectories, tmp_path):
    out = tmp_path / "T"
    words = ["distill", *flags(model=tiny, data=puzzles, out=out, check="exact", batch_size=1)]
    process = subprocess.Popen([sys.executable, str(ROOT / "tabom.py"), *words], stderr=subprocess.DEVNULL)
    file = out / "trajectories-00000.jsonl"
    while process.poll() is None and not (file.is_file() and file.read_bytes().count(b"\n") >= 3):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = file.read_bytes().count(b"\n")
    again = shell(*words)
    assert again.returncode == 0, again.stderr
    result = last_json(again.stdout)
    assert 3 <= before < 12 and result["new"] == 12 - before
    assert len(data.read_trajectories(out)) == 12
    assert decoded(out) == decoded(trajectories)


def test_distill_on_two_processes_makes_the_same_records(tiny, puzzles, trajectories, tmp_path):
    out = tmp_path / "T"
    done = shell("distill", *flags(model=tiny, data=puzzles, out=out, check="exact", batch_size=2), processes=2)
    assert done.returncode == 0, done.stderr
    assert last_json(done.stdout)["new"] == 12
    assert len(list(out.glob("trajectories-*.jsonl"))) == 2
    assert len(data.read_trajectories(out)) == 12
    assert decoded(out) == decoded(trajectories)


# ------------------------------------------------------------------------------------------------------------ train


def run_train(capsys, **options):
    assert tabom.main(["train", *flags(**{**TRAIN, **options})]) == 0
    return last_json(capsys.readouterr().out)


def weights(folder):
    return load_file(Path(folder) / "adapter_model.safetensors")


def metrics(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tiny, trajectories, tmp_path_factory):
    out = tmp_path_factory.mktemp("R") / "R"
    assert tabom.main(["train", *flags(model=tiny, data=trajectories, out=out, **TRAIN)]) == 0
    return out


def test_train_writes_adapters_and_metrics(tiny, trained):
    log = metrics(trained)
    assert [line["step"] for line in log] == [1, 2, 3, 4, 5, 6]  # 12 examples in batches of 5, twice
    wanted = {"loss", "ce", "ranking", "in_order", "entropy", "grad_norm", "lr", "tokens_per_second", "step", "epoch"}
    assert set(log[0]) == wanted
    assert all(line["loss"] == pytest.approx(line["ce"] + line["ranking"], abs=1e-5) for line in log)
    assert [line["lr"] for line in log][:2] == pytest.approx([0, 5e-3])
    assert log[-1]["lr"] < 2e-3
    m = lora.load(model.load(tiny), trained / "epoch-2")
    assert all(p.dtype == torch.float32 for p in lora.tensors(m).values())
    assert any(p.abs().max() > 0 for name, p in lora.tensors(m).items() if "lora_B" in name)


def test_training_is_the_mean_gradient_of_the_global_batch_by_hand(tiny, trajectories, trained):
    """The first optimizer step, written out without accumulation."""
    m = lora.inject(model.load(tiny), generator=data.generator(0, "lora"))
    rows = data.read_trajectories(trajectories)
    rows.sort(key=lambda r: r["id"])
    rows = [rows[k] for k in data.epoch_order(12, 0, 0)[:5]]
    generators = [data.generator(0, 0, r["id"]) for r in rows]
    out = objectives.tabom(m, data.collate(rows, m.config.pad_id), window=8, generator=generators)
    out["loss"].backward()
    norm = torch.stack([p.grad.norm() for p in lora.tensors(m).values()]).norm()
    first = metrics(trained)[0]
    assert first["loss"] == pytest.approx(out["loss"].item(), abs=1e-5)
    assert first["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


def test_batch_size_only_splits_the_global_batch(tiny, trajectories, trained, tmp_path, capsys):
    run_train(capsys, model=tiny, data=trajectories, out=tmp_path / "R", batch_size=5)
    for name, w in weights(tmp_path / "R" / "epoch-2").items():
        torch.testing.assert_close(w, weights(trained / "epoch-2")[name], rtol=1e-3, atol=1e-5)


def test_two_processes_train_the_same_adapter(tiny, trajectories, trained, tmp_path):
    out = tmp_path / "R"
    done = shell("train", *flags(model=tiny, data=trajectories, out=out, **TRAIN), processes=2)
    assert done.returncode == 0, done.stderr
    for a, b in zip(metrics(out), metrics(trained)):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)
    for name, w in weights(out / "epoch-2").items():
        torch.testing.assert_close(w, weights(trained / "epoch-2")[name], rtol=1e-3, atol=1e-5)


def test_a_run_killed_after_an_epoch_continues_bit_for_bit(tiny, trajectories, trained, tmp_path, capsys):
    """The folder as a kill inside epoch 2 leaves it: one checkpoint, half of another, and too many lines of metrics."""
    out = tmp_path / "R"
    shutil.copytree(trained, out)
    shutil.move(out / "epoch-2", out / "epoch-2.tmp")
    (out / "epoch-2.tmp" / "adapter_model.safetensors").write_bytes(b"torn")
    result = run_train(capsys, model=tiny, data=trajectories, out=out)
    assert result["step"] == 6 and result["checkpoint"].endswith("epoch-2")
    for file in ("adapter_model.safetensors", "optimizer.safetensors"):
        assert (out / "epoch-2" / file).read_bytes() == (trained / "epoch-2" / file).read_bytes()
    untimed = [
        [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in metrics(f)] for f in (out, trained)
    ]
    assert untimed[0] == untimed[1]


def test_a_run_that_stops_early_is_the_beginning_of_the_whole_run(tiny, trajectories, trained, tmp_path, capsys):
    options = dict(model=tiny, data=trajectories, out=tmp_path / "R")
    for _ in range(2):  # the second start has nothing to do
        result = run_train(capsys, **options, stop_after=1)
        assert result["step"] == result["steps"] == 3 and result["checkpoint"].endswith("epoch-1")
        assert not (tmp_path / "R" / "epoch-2").exists()
    assert metrics(tmp_path / "R")[-1]["lr"] == metrics(trained)[2]["lr"]
    assert run_train(capsys, **options)["step"] == 6
    for epoch in ("epoch-1", "epoch-2"):
        name = f"{epoch}/adapter_model.safetensors"
        assert (tmp_path / "R" / name).read_bytes() == (trained / name).read_bytes()


def test_an_objective_of_ones_own_reports_terms_of_its_own(tiny, trajectories, tmp_path, capsys, monkeypatch):
    def shortest(m, batch, generator=None, mask_id=None):
        found = objectives.nelbo(m, batch, generator=generator, mask_id=mask_id)
        return dict(found, shortest=batch["length"].min().float())

    monkeypatch.setitem(objectives.OBJECTIVES, "traj", shortest)
    run_train(capsys, model=tiny, data=trajectories, out=tmp_path / "R", objective="traj", epochs=1)
    assert all(line["shortest"] > 0 for line in metrics(tmp_path / "R"))


def test_a_finished_run_is_left_alone(tiny, trajectories, trained, capsys):
    before = {file: file.stat().st_mtime_ns for file in trained.rglob("*.safetensors")}
    result = run_train(capsys, model=tiny, data=trajectories, out=trained)
    assert result["loss"] == metrics(trained)[-1]["loss"]  # the last metrics are known
    assert before == {file: file.stat().st_mtime_ns for file in trained.rglob("*.safetensors")}


@pytest.mark.parametrize(
    "options",
    [
        *(dict(objective=name) for name in objectives.OBJECTIVES),
        dict(objective="t3d", reference_steps=1, random_tokens=0.5, alpha=1, beta=1, path_weight=0),
        dict(objective="dparallel", block_length=4, weight=1, temperature=0.1),
        dict(window="global"),
        dict(ce_weight=0),
        dict(entropy_context="step", window=4),
        dict(weight=0.0),
        dict(cut_eos=True),
        dict(starts="non-ltr", window=4),
        dict(ranking="listwise", beta=2.0),
        dict(ranking="kl", window=4),
        dict(lora_dropout=0.1, lora_rank=2, lora_alpha=4, lora_targets="q_proj,ff_proj", gradient_checkpointing=True),
    ],
)
def test_every_objective_and_switch_trains(tiny, trajectories, tmp_path, capsys, options):
    out = tmp_path / "R"
    result = run_train(capsys, model=tiny, data=trajectories, out=out, **{"epochs": 1, **options})
    assert result["loss"] > 0 and weights(out / "epoch-1")
    meta = json.loads((out / "meta.json").read_text())
    for name, value in options.items():
        assert name in ("lora_targets", "gradient_checkpointing") or meta[name] == value
    assert ("window" in meta) == (meta["objective"] == "tabom")  # only what had an effect


def test_t3d_continues_with_the_reference_that_it_had(tiny, trajectories, tmp_path, capsys):
    setting = dict(model=tiny, data=trajectories, objective="t3d", beta=5, reference_steps=2)
    once, again, base = (tmp_path / name for name in ("once", "again", "base"))
    result = run_train(capsys, out=once, **setting)
    shutil.copytree(once, again)
    shutil.rmtree(again / "epoch-2")
    assert run_train(capsys, out=again, **setting)["loss"] == result["loss"]
    for file in ("adapter_model.safetensors", "optimizer.safetensors", "reference.safetensors"):
        assert (again / "epoch-2" / file).read_bytes() == (once / "epoch-2" / file).read_bytes()
    # after 3 steps the reference is the student of step 2, and it makes a difference
    student, reference = (load_file(once / "epoch-1" / f"{f}.safetensors") for f in ("adapter_model", "reference"))
    assert len(student) == len(reference)
    assert not any(torch.equal(a, b) for a, b in zip(student.values(), reference.values()))
    assert run_train(capsys, out=base, **{**setting, "reference_steps": 100})["loss"] != result["loss"]
    assert not (base / "epoch-2" / "reference.safetensors").exists()


def test_training_starts_from_an_adapter(tiny, trajectories, trained, tmp_path, capsys):
    start = dict(model=tiny, data=trajectories, keep="all", adapter=trained / "epoch-2")
    run_train(capsys, out=tmp_path / "R", **{**start, "lr": 0})
    assert all(torch.equal(w, weights(trained / "epoch-2")[k]) for k, w in weights(tmp_path / "R" / "epoch-2").items())
    fails(capsys, "--lora-rank 4: .* has 16; leave the flag out", "train", out=tmp_path / "S", lora_rank=4, **start)
    fails(capsys, "--lora-alpha 8.*: .* has 16; leave the flag out", "train", out=tmp_path / "S", lora_alpha=8, **start)
    fails(
        capsys,
        "--lora-rank 0 trains no adapter, and --adapter needs one",
        "train",
        out=tmp_path / "S",
        lora_rank=0,
        **start,
    )
    t3d = dict(objective="t3d", lora_rank=0)
    fails(capsys, "and t3d needs one", "train", model=tiny, data=trajectories, keep="all", out=tmp_path / "S", **t3d)
    assert not (tmp_path / "S").exists()


def test_training_lowers_the_loss(tiny, trajectories, tmp_path, capsys):
    out = tmp_path / "R"
    run_train(capsys, model=tiny, data=trajectories, out=out, epochs=12, global_batch=12, batch_size=12, lr=3e-2)
    losses = [line["loss"] for line in metrics(out)]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_blocks_train_the_same(tiny, trajectories, trained, tmp_path):
    out = tmp_path / "R"
    done = shell("train", *flags(model=tiny, data=trajectories, out=out, compile=True, **{**TRAIN, "epochs": 1}))
    assert done.returncode == 0, done.stderr
    assert metrics(out)[0]["loss"] == pytest.approx(metrics(trained)[0]["loss"], abs=1e-4)
    assert metrics(out)[0]["grad_norm"] == pytest.approx(metrics(trained)[0]["grad_norm"], rel=1e-3)


def test_full_fine_tuning_on_reference_answers(tiny, puzzles, tmp_path, capsys):
    out = tmp_path / "R"
    run_train(capsys, model=tiny, data=puzzles, out=out, objective="nelbo", window=32, lora_rank=0, lr=3e-3)
    before, after = load_file(tiny / "model.safetensors"), load_file(out / "epoch-2" / "model.safetensors")
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[k], after[k]) for k in before)
    data.load_tokenizer(out / "epoch-2")  # the checkpoint is a model folder of its own
    shutil.rmtree(out / "epoch-2")
    run_train(capsys, model=tiny, data=puzzles, out=out, objective="nelbo", window=32, lora_rank=0, lr=3e-3)
    again = load_file(out / "epoch-2" / "model.safetensors")
    assert all(torch.equal(after[k], again[k]) for k in after)


def test_learning_rate_warms_up_and_falls_to_the_final_one():
    c = train.TrainOptions(lr=1.0, final_lr=0.1, warmup=4)
    rates = [train.learning_rate(step, 12, c) for step in range(13)]
    assert rates[:5] == pytest.approx([0, 0.25, 0.5, 0.75, 1.0])
    assert rates[8] == pytest.approx(0.55)
    assert rates[12] == pytest.approx(0.1)
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_a_full_disk_at_a_checkpoint_leaves_the_last_good_one(tiny, trajectories, trained, tmp_path):
    """The kernel refuses files above 20 kB from the second checkpoint on, as a full disk would."""
    out = tmp_path / "R"
    script = f"""
import resource, sys
sys.path.insert(0, {str(ROOT)!r})
import runs, tabom
write, calls = runs.write_checkpoint, []
def limited(*arguments):
    calls.append(1)
    if len(calls) == 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    write(*arguments)
runs.write_checkpoint = limited
sys.exit(tabom.main({["train", *flags(model=tiny, data=trajectories, out=out, **TRAIN)]!r}))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1
    assert re.fullmatch(r"error: .*(too large|No space).*", done.stderr.strip().splitlines()[-1])
    assert "Traceback" not in done.stderr
    assert sorted(p.name for p in out.iterdir()) == ["epoch-1", "lock", "meta.json", "metrics.jsonl"]
    good = (trained / "epoch-1" / "adapter_model.safetensors").read_bytes()
    assert (out / "epoch-1" / "adapter_model.safetensors").read_bytes() == good


def test_an_infinite_loss_stops_the_run(tiny, trajectories, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(tiny, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.transformer.ln_f.weight"].fill_(3e38)
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    assert tabom.main(["train", *flags(model=broken, data=trajectories, out=tmp_path / "R", **TRAIN)]) == 1
    assert re.search(r"error: loss nan .* at step 1, examples \[.*train-.*\]; last", capsys.readouterr().err)


# ----------------------------------------------------------------------------------------------- generate and merge

PROMPT = "L12345623456134561245612356123461....."


def test_generate_prints_the_answer_and_watches(tiny, trained, capsys):
    options = dict(model=tiny, adapter=trained / "epoch-2", prompt=PROMPT[:37])
    assert tabom.main(["generate", *flags(**options, watch=True)]) == 0
    out, err = capsys.readouterr()
    result = last_json(out)
    assert out.splitlines()[0] == result["text"] and result["tokens"] == tiny_model.ANSWER
    frames = err.split("\x1b[H\x1b[2J")[1:]
    assert len(frames) == tiny_model.ANSWER
    assert [frame.count("·") for frame in frames] == list(range(tiny_model.ANSWER - 1, -1, -1))
    assert tabom.main(["generate", *flags(**options)]) == 0
    assert last_json(capsys.readouterr().out)["text"] == result["text"]


def test_generate_under_torchrun_answers_once(tiny, trained, capsys):
    words = ["generate", *flags(model=tiny, adapter=trained / "epoch-2", prompt="L1")]
    assert tabom.main(words) == 0
    alone, done = last_json(capsys.readouterr().out), shell(*words, processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("tokens_per_second") == 1 and last_json(done.stdout)["text"] == alone["text"]


def test_generate_chats_from_stdin(tiny):
    done = subprocess.run(
        [sys.executable, str(ROOT / "tabom.py"), "generate", "--model", str(tiny)],
        input="L12\n\nL34\n",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 3  # two answers and the JSON


@pytest.mark.parametrize("family", ["llada-tiny", "dream-tiny"])
def test_merge_gives_the_adapters_logits_in_the_bases_layout(family, tmp_path, capsys):
    base, out = GOLDEN / family, tmp_path / "M"
    assert tabom.main(["merge", *flags(model=base, adapter=base / "adapter", out=out)]) == 0
    assert last_json(capsys.readouterr().out)["merged_layers"] == 4
    expected = load_file(base / "expected.safetensors")
    logits = model.load(out)(expected["logits.ids"])
    assert (logits - expected["adapter.aligned"]).abs().max() < 1e-3
    assert {f.name for f in base.glob("model*")} == {f.name for f in out.glob("model*")}
    assert tabom.main(["merge", *flags(model=base, adapter=base / "adapter", out=out)]) == 1
    assert "there already" in capsys.readouterr().err


def test_merge_keeps_the_dtype_and_the_tokenizer(tiny, trained, tmp_path):
    base = tmp_path / "bf16"
    model.save(model.load(tiny, dtype=torch.bfloat16), base)
    runs.copy_extras(tiny, base)
    assert tabom.main(["merge", *flags(model=base, adapter=trained / "epoch-2", out=tmp_path / "M")]) == 0
    assert {t.dtype for t in load_file(tmp_path / "M" / "model.safetensors").values()} == {torch.bfloat16}
    assert data.load_tokenizer(tmp_path / "M").size == len(tiny_model.vocabulary())


# -------------------------------------------------------------------------------------------------------- bad input


def broken_model(tmp_path, tiny, change):
    folder = tmp_path / "broken"
    shutil.copytree(tiny, folder)
    change(folder)
    return folder


def edit_json(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


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


BROKEN_MODELS = [
    (lambda f: (f / "config.json").unlink(), r"no config\.json in .*broken"),
    (
        lambda f: edit_json(f / "config.json", model_type="gpt5"),
        "model_type is 'gpt5'; this code knows 'llada', 'Dream', 'sdar' and 'a2d-qwen3'",
    ),
    (lambda f: edit_json(f / "config.json", alibi=True), "alibi is True, supported is False"),
    (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
    (lambda f: truncate(f / "model.safetensors"), "truncated or not a safetensors file"),
    (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors"),
    (index_of_a_missing_shard, "missing model-00001-of-00002.safetensors"),
    (misshape, r"model\.transformer\.wte\.weight is \[3, 4\], the config wants \[18, 96\]"),
    (lambda f: edit_json(f / "config.json", vocab_size=9, embedding_size=9), r"wte\.weight is \[18, 96\]"),
    (lambda f: (f / "tokenizer.json").unlink(), r"no tokenizer\.json"),
]


def fails(capsys, message, command, **options):
    """The command ends with status 1 and one line on stderr that says what is wrong."""
    assert tabom.main([command, *flags(**options)]) == 1
    captured = capsys.readouterr()
    (line,) = [x for x in captured.err.splitlines() if x.startswith("error")]
    assert re.search(message, line), line
    assert captured.out == ""


@pytest.mark.parametrize("change, message", BROKEN_MODELS)
def test_bad_model_folders(tiny, puzzles, tmp_path, capsys, change, message):
    folder = broken_model(tmp_path, tiny, change)
    fails(capsys, message, "distill", model=folder, data=puzzles, out=tmp_path / "T")
    assert not (tmp_path / "T").exists()


def test_no_such_model(puzzles, tmp_path, capsys):
    for name in (tmp_path / "nowhere", "./nowhere", "nowhere"):
        fails(capsys, "no model folder .*nowhere", "distill", model=name, data=puzzles, out=tmp_path / "T")


def test_a_tokenizer_with_more_ids_than_the_model_has_rows(tiny, puzzles, tmp_path, capsys):
    folder = broken_model(tmp_path, tiny, lambda f: None)
    small = {**tiny_model.config(), "vocab_size": 12, "embedding_size": 12}
    model.save(model.create(small), folder)
    fails(
        capsys,
        "tokenizer has ids up to 17, the model only 12",
        "distill",
        model=folder,
        data=puzzles,
        out=tmp_path / "T",
    )


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


def test_settings_of_the_decoder_that_do_not_fit(tiny, puzzles, tmp_path, capsys):
    options = dict(model=tiny, data=puzzles, schedule="llada")
    blocks = dict(max_new_tokens=32, block_length=8)
    fails(
        capsys, "steps 30 do not divide by the 4 blocks", "distill", **options, **blocks, steps=30, out=tmp_path / "a"
    )
    fails(capsys, "block_length 5 does not divide", "distill", **options, block_length=5, out=tmp_path / "b")


@pytest.mark.parametrize("window", [0, 1, -3])
def test_a_window_without_pairs(tiny, trajectories, tmp_path, capsys, window):
    options = {**TRAIN, "window": window}
    fails(
        capsys,
        f"--window {window}: needs at least 2",
        "train",
        model=tiny,
        data=trajectories,
        out=tmp_path / "R",
        **options,
    )


def test_trajectories_of_another_model(tiny, trajectories, tmp_path, capsys):
    other = broken_model(tmp_path, tiny, lambda f: None)
    model.save(model.create({**tiny_model.config(), "vocab_size": 20, "embedding_size": 20}), other)
    message = "made with a vocabulary of 18; .* has 20"
    fails(capsys, message, "train", model=other, data=trajectories, out=tmp_path / "R", **TRAIN)
    high = tmp_path / "high.jsonl"
    high.write_text(json.dumps(dict(id=0, prompt_ids=[3], response_ids=[500, 4], order=[1, 0])) + "\n")
    fails(capsys, "token id 500, but the model has 18", "train", model=tiny, data=high, out=tmp_path / "R", **TRAIN)


def test_nothing_usable_to_train_on(tiny, trajectories, puzzles, tmp_path, capsys):
    options = dict(model=tiny, out=tmp_path / "R", **{k: v for k, v in TRAIN.items() if k != "keep"})
    fails(capsys, "--keep correct keeps none of 12", "train", data=trajectories, **options)
    fails(capsys, "no trajectories, and tabom needs them", "train", data=puzzles, **options)
    fails(capsys, "no dataset at", "train", data=tmp_path / "none", **options)
    (tmp_path / "bare.jsonl").write_text('{"prompt": "L1"}\n')
    fails(
        capsys,
        "bare.jsonl:1: the row has no answer to train on",
        "train",
        data=tmp_path / "bare.jsonl",
        objective="nelbo",
        **{**options, "window": 32},
    )


def test_a_folder_with_another_run_is_refused_and_kept(tiny, puzzles, trajectories, trained, tmp_path, capsys):
    fails(capsys, "holds another run: check was 'exact'", "distill", model=tiny, data=puzzles, out=trajectories)
    options = {**TRAIN, "lr": 1.0}
    fails(
        capsys,
        "holds another run: lr was 0.01 and is now 1.0",
        "train",
        model=tiny,
        data=trajectories,
        out=trained,
        **options,
    )
    for changed, what in ((dict(lora_rank=8), "lora_rank was 16 and is now 8"), (dict(lora_alpha=2), "lora_alpha was")):
        fails(capsys, what, "train", model=tiny, data=trajectories, out=trained, **TRAIN, **changed)
    (tmp_path / "note.txt").write_text("mine")
    fails(capsys, "is not empty and holds no run", "distill", model=tiny, data=puzzles, out=tmp_path)
    assert (tmp_path / "note.txt").read_text() == "mine"
    fails(capsys, "is a file", "distill", model=tiny, data=puzzles, out=tmp_path / "note.txt")


def test_a_changed_dataset_is_noticed(tiny, puzzles, trajectories, tmp_path, capsys):
    shutil.copytree(trajectories, tmp_path / "T")
    changed = tmp_path / "train.jsonl"
    changed.write_text(puzzles.read_text().replace("L", "S", 1))
    edit_json(tmp_path / "T" / "meta.json", data=str(changed))
    fails(capsys, "data_sha256 was", "distill", model=tiny, data=changed, out=tmp_path / "T", check="exact")


@pytest.mark.parametrize(
    "command, option, value, message",
    [
        ("distill", "batch_size", 0, "--batch-size 0: must be a number of at least 1"),
        ("distill", "limit", -1, "--limit -1: must be"),
        ("distill", "temperature", "nan", "temperature nan must be"),
        ("distill", "device", "warp9", "--device warp9 cannot be used here"),
        ("train", "limit", -5, "--limit -5: must be"),
        ("train", "lr", "nan", "--lr nan: must be a number"),
        ("train", "clip", -1, "--clip -1.0: must be"),
        ("train", "global_batch", 0, "--global-batch 0: must be"),
        ("train", "lora_targets", "foo", "no linear layer is called foo"),
    ],
)
def test_values_out_of_range_are_refused_and_leave_no_trace(
    tiny, puzzles, trajectories, tmp_path, capsys, command, option, value, message
):
    source = puzzles if command == "distill" else trajectories
    options = {**(TRAIN if command == "train" else {}), option: value}
    fails(capsys, message, command, model=tiny, data=source, out=tmp_path / "R", **options)
    assert not (tmp_path / "R").exists()


def test_options_without_effect_are_named(tiny, trajectories, tmp_path, capsys):
    unused = dict(objective="nelbo", window=8, weight=2, reference_steps=3, epochs=1)
    assert tabom.main(["train", *flags(model=tiny, data=trajectories, out=tmp_path / "R", keep="all", **unused)]) == 0
    expected = "warning: --window, --weight, --reference-steps: not used by --objective nelbo"
    assert expected in capsys.readouterr().err
    assert not {"window", "weight"} & json.loads((tmp_path / "R" / "meta.json").read_text()).keys()
    fails(capsys, "--raw takes one --prompt", "generate", model=tiny, prompt="L", raw=True, system="S")


def test_another_model_under_the_same_name_is_noticed(tiny, puzzles, tmp_path, capsys):
    other = broken_model(tmp_path, tiny, lambda f: None)
    options = dict(model=other, data=puzzles, out=tmp_path / "T", check="exact")
    assert tabom.main(["distill", *flags(**options, limit=2)]) == 0
    capsys.readouterr()
    model.save(model.create(tiny_model.config(), torch.Generator().manual_seed(5)), other)
    fails(capsys, "model_sha256 was", "distill", **options)


def test_the_order_of_trajectory_lines_does_not_matter(tiny, trajectories, trained, tmp_path, capsys):
    lines = (trajectories / "trajectories-00000.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "T").mkdir()
    (tmp_path / "T" / "trajectories-00000.jsonl").write_text("".join(lines[::-2]))
    (tmp_path / "T" / "trajectories-00001.jsonl").write_text("".join(lines[-2::-2]))
    run_train(capsys, model=tiny, data=tmp_path / "T", out=tmp_path / "R")
    assert [line["loss"] for line in metrics(tmp_path / "R")] == [line["loss"] for line in metrics(trained)]


@pytest.mark.parametrize(
    "own, message",
    [
        (dict(steps=8, foo=1), "has foo; the decoder settings are max_new_tokens"),
        ([1], "must be an object of decoder settings"),
        (None, "must be an object of decoder settings"),
        (dict(max_new_tokens="x"), "has max_new_tokens 'x', which must be int"),
        (dict(max_new_tokens=True), "has max_new_tokens True, which must be int"),
        (dict(max_new_tokens=0), "max_new_tokens 0"),
    ],
)
def test_a_models_own_decoder_settings_are_checked(tiny, puzzles, tmp_path, capsys, own, message):
    folder = broken_model(tmp_path, tiny, lambda f: edit_json(f / "generation_config.json", tabom=own))
    fails(capsys, message, "distill", model=folder, data=puzzles, out=tmp_path / "T")


def test_bad_adapters(tiny, tmp_path, capsys):
    options = dict(model=tiny, prompt="L1")
    fails(capsys, "no adapter_config.json", "generate", adapter=tmp_path, **options)
    fails(capsys, "does not fit this model", "generate", adapter=GOLDEN / "llada-tiny" / "adapter", **options)


@pytest.mark.parametrize("words", [["train", "--windw", "8"], ["train", "--keep", "some"], ["fly"], [], ["merge"]])
def test_misspelt_options_are_refused(words, capsys):
    with pytest.raises(SystemExit) as stop:
        tabom.main(words)
    assert stop.value.code == 2
    assert "error" in capsys.readouterr().err


def test_an_error_in_a_real_process_is_one_line():
    done = shell("generate", "--model", "./nowhere", "--prompt", "x")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: no model folder ./nowhere") and done.stderr.count("\n") == 1


# ----------------------------------------------------------------------------------------------------------- layout
