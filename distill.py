"""Step 1: prompts to trajectories. The model answers each prompt with its own decoder, and the order is logged.

    torchrun --nproc_per_node 8 tabom.py distill --model GSAI-ML/LLaDA-8B-Instruct --data prompts.jsonl --out out/T

Section 4 of the paper: one token a step, at most 256 new tokens. The folder out/T holds a JSON line per trajectory
(docs/formats.md lists its fields) and meta.json. Each finished batch is written at once; the same command continues
where an earlier one was stopped. Which trajectories are trained on is decided in train.py.
"""

from dataclasses import dataclass

import data
import evaluate
from benchmarks import answers
from runs import disk, loading, torchrun
from runs.options import opt

RELEASE_METHODS = {"confidence": "default", "margin": "topk_margin"}  # what the authors' files call our strategies


@dataclass
class DistillOptions(loading.ModelOptions, loading.DecodeOptions, loading.DatasetOptions):
    """distillation"""

    out: str = opt(None, "folder for the trajectories; an unfinished one is continued", required=True)
    adapter: str | None = opt(None, "adapter folder: distill from the adapted model")
    batch_size: int = opt(16, "prompts decoded together on each process", low=1)
    format: str = opt(
        "ours",
        "release: also write out/release.jsonl, the kept trajectories as the authors' trainer reads them",
        choices=("ours", "release"),
    )
    check: str = opt(
        "auto",
        "how a response is compared with the answer: by final number, math-verify, exact text or not at all; "
        "auto: number, letter or math as the answer is, no verdict on other text that is not the same",
        choices=answers.CHECKS,
    )
    keep: str = opt(
        "correct",
        "which trajectories count as kept and go into release.jsonl, as train's --keep; out has all of them",
        choices=("correct", "finished", "all"),
    )


def distill(c, processes=None, loaded=None):
    """Decode every prompt of a dataset with the model's own decoder and log the order -> counts of what is in --out.

    Each finished batch is written at once; the same command continues where an earlier one was stopped. c:
    DistillOptions. loaded: a loading.Loaded that decodes, instead of loading c.model and c.adapter; it must be what
    they name. Raises ValueError or FileNotFoundError before anything is decoded."""
    processes = processes or torchrun.Processes(c.device)
    say = torchrun.warner(processes)
    examples = data.read_examples(c.data, c.prompt_field, c.answer_field, c.limit, say)
    if loaded is None:
        loaded = loading.load_model(c, processes, c.adapter)
    settings = loading.decoder_settings(c, loaded)
    data.encode_examples(loaded.tok, examples, c.raw)
    evaluate.check_context(examples, settings, loaded.m.config, say)
    by_content = ("model", "adapter", "data")  # these may be elsewhere, if they are the same
    meta = dict(identity(c, processes, loaded, settings), prompts=len(examples))
    out = disk.open_run(c.out, meta, processes, free=("limit", "prompts", *by_content))

    def judge(batch, records):
        return [dict(correct=answers.check(c.check, r["text"], e["answer"])) for e, r in zip(batch, records)]

    new = evaluate.answer_all(c, processes, loaded, examples, settings, out, judge)
    records = evaluate.read_verdicts(out)
    kept = [r for r in records if data.usable(r, c.keep)]
    unchecked = sum(r["correct"] is None for r in kept)
    if unchecked and c.check != "none":
        say(f"{unchecked} of {len(records)} answers could not be checked and are kept: see --check and --keep")
    if c.format == "release" and processes.first:
        with disk.atomic_file(out / "release.jsonl") as f:
            method = RELEASE_METHODS.get(settings["strategy"], settings["strategy"])
            for record in kept:
                f.write(disk.json_line(data.to_release_format(record, loaded.m.config.pad_id, method)))
    return dict(
        out=str(out),
        trajectories=len(records),
        new=new,
        finished=sum(r["finished"] for r in records),
        checked=sum(r["correct"] is not None for r in records),
        correct=sum(r["correct"] is True for r in records),
        kept=len(kept),
        unchecked=sum(r["correct"] is None for r in records),
    )


def identity(c, processes, loaded, settings):
    """What a distillation is, for its meta.json: another start into the same folder must agree."""
    return dict(
        command="distill",
        model=c.model,
        adapter=c.adapter,
        data=c.data,
        prompt_field=c.prompt_field,
        answer_field=c.answer_field,
        limit=c.limit,
        raw=c.raw,
        block_causal=c.block_causal,
        **disk.content_hashes(loaded.folder, c.adapter),
        data_sha256=disk.fingerprint(c.data),
        dtype=loading.resolve_dtype(c, processes),
        decoder=settings,
        check=c.check,
        seed=c.seed,
        vocab_size=loaded.m.config.vocab_size,
        versions=disk.versions(),
    )
