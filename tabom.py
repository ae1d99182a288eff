"""TABOM: post-training of masked diffusion language models along the trajectories that they decode themselves.

    python tabom.py demo                                                     # the whole method on a CPU, from nothing
    torchrun --nproc_per_node 8 tabom.py distill --model GSAI-ML/LLaDA-8B-Instruct --data prompts.jsonl --out out/T
    torchrun --nproc_per_node 8 tabom.py train --model GSAI-ML/LLaDA-8B-Instruct --data out/T --out out/R
    torchrun --nproc_per_node 8 tabom.py evaluate --model GSAI-ML/LLaDA-8B-Instruct --tasks gsm8k --out out/E
    python tabom.py grade --task gsm8k --responses R.jsonl --out V.jsonl
    python tabom.py generate --model GSAI-ML/LLaDA-8B-Instruct --adapter out/R/epoch-5 --prompt "2 + 2 =" --watch
    python tabom.py merge --model GSAI-ML/LLaDA-8B-Instruct --adapter out/R/epoch-5 --out out/M

This file is the root: the command line, distillation and the data-parallel training loop. The leaves (model, lora,
decode, objectives, data, evaluate) know nothing of each other. Results go to stdout, ending in one line of JSON;
progress and errors go to stderr. TABOM_DEBUG=1 shows the traceback of an error.
"""

import argparse
import contextlib
import dataclasses
import datetime
import hashlib
import inspect
import json
import math
import os
import platform
import shutil
import sys
import time
import typing
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import data
import decode
import evaluate
import lora
import model
import objectives

# ---------------------------------------------------------------------------------------------------------- options


def opt(default, help, **more):
    """A field of an options dataclass; its help text is the command line's, and low the least value it takes."""
    return field(default=default, metadata=dict(help=help, **more))


def window_size(text):
    return text if text == "global" else int(text)


DTYPES = ("auto", *model.DTYPES)


def names(text):
    return tuple(text.split(","))


# Each family's own decoder (Table 8 of the paper, and 32-token blocks for LLaDA's distillation).
DECODERS = {
    "dream": dict(strategy="entropy", schedule="dream", temperature=0.1, top_p=0.9, max_new_tokens=256),
    "llada": dict(strategy="confidence", schedule="llada", temperature=0.0, block_length=32, max_new_tokens=256),
}
TASKS = ("gsm8k", "math500", "humaneval", "mbpp", "ifeval")


@dataclass
class ModelOptions:
    model: str = opt(None, "model folder in Hugging Face layout, or Hub repo id", required=True)
    device: str = opt("auto", "cuda, mps or cpu; auto takes the first that is there")
    dtype: str = opt("auto", "of the base model; auto: bfloat16 on cuda, else float32", choices=DTYPES)
    seed: int = opt(0, "every random choice follows from this, whatever the number of processes")


@dataclass
class DecodeOptions:
    """None = what the model's own decoder does: DECODERS above, then generation_config.json's "tabom" entry."""

    max_new_tokens: int | None = opt(None, "response length (256)")
    steps: int | None = opt(None, "decoding steps (as many as tokens)")
    block_length: int | None = opt(None, "decode blocks of so many tokens from left to right; 0 = one block")
    strategy: str | None = opt(None, "which tokens to decode next", choices=decode.STRATEGIES)
    schedule: str | None = opt(None, "how many tokens a step decodes", choices=decode.SCHEDULES)
    temperature: float | None = opt(None, "of the token choice; 0 = the most probable one")
    top_p: float | None = opt(None, "choose among the most probable tokens of this total probability")
    top_k: int | None = opt(None, "choose among so many tokens")
    threshold: float | None = opt(None, "decode every token more probable than this at once, instead of the schedule")


@dataclass
class DatasetOptions:
    data: str = opt(None, "dataset: .jsonl, .jsonl.gz, .json or .parquet", required=True)
    prompt_field: str | None = opt(None, "name of the prompt's field, if it is none of the usual ones")
    answer_field: str | None = opt(None, "name of the answer's field, likewise")
    limit: int | None = opt(None, "only the first so many rows", low=1)
    raw: bool = opt(False, "prompts as they are, without the chat template")


@dataclass
class DistillOptions(ModelOptions, DecodeOptions, DatasetOptions):
    out: str = opt(None, "folder for the trajectories; an unfinished one is continued", required=True)
    adapter: str | None = opt(None, "adapter folder: distill from the adapted model")
    batch_size: int = opt(16, "prompts decoded together on each process", low=1)
    check: str = opt("number", "how a response is compared with the answer", choices=evaluate.CHECKS)


@dataclass
class TrainOptions(ModelOptions, DatasetOptions):
    data: str = opt(None, "trajectories from distill; for nelbo also a dataset with answers (SFT-GT)", required=True)
    out: str = opt(None, "folder for checkpoints and metrics; an unfinished run is continued", required=True)
    objective: str = opt("tabom", "what to train", choices=tuple(objectives.OBJECTIVES))
    window: int | str = opt(32, "W: consecutively decoded tokens, or global", parse=window_size)
    margin: float = opt(0.2, "gamma of the ranking loss, nats", low=0)
    weight: float = opt(1.0, "lambda: weight of the ranking loss", low=0)
    entropy_context: str = opt("window", "entropies given the window's start, or own step", choices=("window", "step"))
    keep: str = opt(
        "correct", "trajectories to train on (correct: or not checkable)", choices=("correct", "finished", "all")
    )
    keep_eos: bool = opt(False, "keep the tokens after the first EOS")
    lora_rank: int = opt(16, "0 = train all weights", low=0)
    lora_alpha: int = opt(16, "the adapter counts alpha / rank times", low=0)
    lora_dropout: float = opt(0.0, "dropout before the adapter", low=0)
    lora_targets: tuple = opt(("q_proj", "v_proj"), "layers with an adapter, comma-separated", parse=names)
    epochs: int = opt(5, "passes over the data; a checkpoint after each", low=1)
    global_batch: int | None = opt(None, "examples per optimizer step, over all processes (4 per process)", low=1)
    batch_size: int = opt(4, "examples per forward pass on each process; the rest accumulates", low=1)
    lr: float = opt(2e-5, "peak learning rate", low=0)
    final_lr: float = opt(0.0, "learning rate at the end of the cosine", low=0)
    warmup: int = opt(50, "steps of linear warm-up", low=0)
    weight_decay: float = opt(0.0, "of AdamW", low=0)
    clip: float = opt(1.0, "largest gradient norm; 0 = no clipping", low=0)
    gradient_checkpointing: bool = opt(False, "recompute activations: less memory, more time")


@dataclass
class GenerateOptions(ModelOptions, DecodeOptions):
    adapter: str | None = opt(None, "adapter folder")
    prompt: str | None = opt(None, "the user's turn; without it a chat is read from stdin, one turn a line")
    system: str | None = opt(None, "a system turn before it")
    raw: bool = opt(False, "the prompt as it is, without the chat template")
    watch: bool = opt(False, "redraw the response on stderr while it unmasks, coloured by entropy")


@dataclass
class EvaluateOptions(ModelOptions, DecodeOptions):
    tasks: tuple = opt(("gsm8k",), "gsm8k, math500, humaneval, mbpp, ifeval, comma-separated", parse=names)
    out: str = opt(None, "folder for responses and results; an unfinished one is continued", required=True)
    data: str | None = opt(None, "folder with the benchmarks' files; without it they come from the Hub")
    adapter: str | None = opt(None, "adapter folder")
    shots: str | None = opt(None, "JSON file of earlier turns: a list of chat messages, or one list for each task")
    limit: int | None = opt(None, "only the first so many questions of each task", low=1)
    batch_size: int = opt(16, "questions decoded together on each process", low=1)
    tokens_per_step: int = opt(1, "decode so many tokens a step (Table 4)", low=1)


@dataclass
class GradeOptions:
    task: str = opt(None, "gsm8k, math500, humaneval, mbpp or ifeval", required=True, choices=TASKS)
    responses: str = opt(None, "JSON Lines of the benchmark's fields and a response", required=True)
    out: str = opt(None, "file for the same lines with their verdicts", required=True)
    family: str = opt("dream", "whose prompt the code answers", choices=tuple(DECODERS))


@dataclass
class MergeOptions:
    model: str = opt(None, "base model", required=True)
    adapter: str = opt(None, "adapter folder", required=True)
    out: str = opt(None, "folder for the merged model", required=True)


@dataclass
class DemoOptions:
    out: str = opt("out/demo", "folder for datasets, trajectories and checkpoints")
    quick: bool = opt(False, "few puzzles: shows that it runs, not what it does")
    data_only: str | None = opt(None, "only write the tasks' datasets into this folder")
    retrain: str | None = opt(None, "only train the tiny model again, into this folder")
    seed: int = opt(0, "of the tasks and of the training")


def decoder(options, family, folder, preset=None):
    """The arguments of decode.generate: the family's, then a benchmark's preset, then the model's own, then those given
    on the command line.

    Raises ValueError for settings that do not fit together, before anything is decoded or written."""
    known = {f.name: f for f in dataclasses.fields(DecodeOptions)}
    settings = {**DECODERS[family], **(preset or {})}
    file = Path(folder) / "generation_config.json"
    own = data.read_json(file).get("tabom", {}) if file.is_file() else {}
    if type(own) is not dict or any(k not in known or not isinstance(v, known[k].type) for k, v in own.items()):
        raise ValueError(f'{file}: "tabom" must hold decoder settings ({", ".join(known)}), not {own}')
    settings.update(own)
    settings.update({k: getattr(options, k) for k in known if getattr(options, k) is not None})
    settings.setdefault("steps", settings["max_new_tokens"])
    settings["block_length"] = settings.get("block_length") or None
    decode.check(**settings)
    return settings


def check_options(options):
    """Raises ValueError for a number below the least that its option takes, or one that is none."""
    for f in dataclasses.fields(options):
        value, low = getattr(options, f.name), f.metadata.get("low")
        if low is not None and value is not None and not low <= value < math.inf:
            raise ValueError(f"--{f.name.replace('_', '-')} {value}: must be a number of at least {low}")


# -------------------------------------------------------------------------------------------------------- processes


class Ranks:
    """This process among those that torchrun started: its rank, its device, and what they do together."""

    def __init__(self, device="auto"):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        if device == "cuda":
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        try:
            self.device = torch.device(device)
            torch.empty(1, device=self.device).item()
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
        except Exception as e:  # torch raises whatever its backends do
            raise ValueError(f"--device {device} cannot be used here: {str(e).strip().splitlines()[0]}") from e
        if self.world > 1 and not dist.is_initialized():
            patient = datetime.timedelta(hours=2)  # others wait while the first writes a checkpoint
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo", timeout=patient)

    @property
    def first(self):
        return self.rank == 0

    def barrier(self):
        if self.world > 1:
            dist.barrier()

    def sum(self, values):
        """The sum over all processes of a list of numbers."""
        total = torch.tensor(values, dtype=torch.float32 if self.device.type == "mps" else torch.float64)
        if self.world > 1:
            total = total.to(self.device)
            dist.all_reduce(total)
        return total.tolist()

    def sum_gradients(self, parameters):
        """Add up the gradients of all processes, in one message of float32 for each 64 MiB."""
        if self.world == 1:
            return
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad  # a process without an example has none
        bucket, size = [], 0
        for i, p in enumerate(parameters, 1):
            bucket, size = [*bucket, p.grad], size + p.numel()
            if size >= 2**24 or i == len(parameters):
                flat = torch.cat([g.float().flatten() for g in bucket])
                dist.all_reduce(flat)
                for g, total in zip(bucket, flat.split([g.numel() for g in bucket])):
                    g.copy_(total.view_as(g))
                bucket, size = [], 0


def load_model(options, ranks, adapter=None, weights=None, dtype="auto"):
    """The model on this process's device, its tokenizer, and the folder that both came from.

    weights: another folder with the same model's tensors, such as a checkpoint."""
    folder = model.resolve(options.model)
    m = model.load(weights or folder, dtype=model.DTYPES[resolve_dtype(options, ranks, dtype)], device=ranks.device)
    tok = data.load_tokenizer(folder)
    if tok.size > m.config.vocab_size:
        rows = m.config.vocab_size
        raise ValueError(f"{folder}: the tokenizer has ids up to {tok.size - 1}, the model only {rows} rows")
    if adapter is not None:
        lora.load(m, adapter)
    return m, tok, folder


def resolve_dtype(options, ranks, dtype="auto"):
    """The dtype asked for; "auto" means `dtype`, and that again what the device is best at."""
    dtype = options.dtype if options.dtype != "auto" else dtype
    return ("bfloat16" if ranks.device.type == "cuda" else "float32") if dtype == "auto" else dtype


# ------------------------------------------------------------------------------------------------------ run folders


def open_run(out, meta, ranks, free=()):
    """Make the folder of a run, or continue the same one. What the run is stands in its meta.json; `free` keys may
    change between two starts. Raises FileExistsError, on every process, for a folder that holds anything else."""
    out, meta = Path(out), json.loads(json.dumps(meta))
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file, not a folder")
    if (out / "meta.json").is_file():
        before = data.read_json(out / "meta.json")
        differ = [k for k in {**before, **meta} if k not in {*free, "versions"} and before.get(k) != meta.get(k)]
        if differ:
            changes = ", ".join(f"{k} was {before.get(k)!r} and is now {meta.get(k)!r}" for k in differ)
            raise FileExistsError(f"{out} holds another run: {changes}; choose another --out")
    elif out.is_dir() and any(file.suffix != ".tmp" for file in out.iterdir()):
        raise FileExistsError(f"{out} is not empty and holds no run of ours: choose another --out")
    ranks.barrier()  # all have looked before one writes
    if ranks.first:
        out.mkdir(parents=True, exist_ok=True)
        with atomic_file(out / "meta.json") as f:
            f.write(json.dumps(meta, indent=2) + "\n")
    ranks.barrier()
    return out


@contextlib.contextmanager
def atomic_file(path):
    """A text file that appears whole or not at all."""
    beside = path.with_name(path.name + ".tmp")
    try:
        with open(beside, "w", encoding="utf-8") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path):
    """A folder that appears whole or not at all: written beside its place, and renamed once."""
    path = Path(path)
    must_be_free(path)
    beside = path.with_name(path.name + ".tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
        os.replace(beside, path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def must_be_free(path):
    """Raises FileExistsError for a path that is there already, unless it is an empty folder."""
    if Path(path).exists() and (not Path(path).is_dir() or any(Path(path).iterdir())):
        raise FileExistsError(f"{path} is there already: choose another --out")


def versions():
    return dict(python=platform.python_version(), torch=torch.__version__)


def fingerprint(path):
    """SHA-256 of a file, or of the names, sizes and ends of the files in a model or adapter folder."""
    digest, path = hashlib.sha256(), Path(path)
    for file in [path] if path.is_file() else sorted(path.glob("*")):
        if file.suffix in (".safetensors", ".json", ".txt", ".jinja") or file == path:
            with open(file, "rb") as f:
                size = file.stat().st_size
                digest.update(f"{file.name} {size}".encode() if file != path else b"")
                whole = file == path or size < 2**24
                for start in range(0, size, 2**20) if whole else (0, size - 2**20):
                    f.seek(start)
                    digest.update(f.read(2**20))
    return digest.hexdigest()


def identity(c, folder, adapter=None):
    """What a run depends on besides its options: the bytes of the model and of the adapter."""
    return dict(model_sha256=fingerprint(folder), adapter_sha256=None if adapter is None else fingerprint(adapter))


# ---------------------------------------------------------------------------------------------------------- distill


def distill(c):
    """Decode every prompt of a dataset with the model's own decoder and log the order -> counts of what is in --out.

    Each finished batch is written at once; the same command continues where an earlier one was stopped."""
    ranks = Ranks(c.device)
    examples = data.read_examples(c.data, c.prompt_field, c.answer_field, c.limit)
    m, tok, folder = load_model(c, ranks, c.adapter)
    settings = decoder(c, m.config.family, folder)
    meta = dict(
        command="distill",
        **{k: getattr(c, k) for k in ("model", "adapter", "data", "prompt_field", "answer_field", "limit", "raw")},
        **identity(c, folder, c.adapter),
        data_sha256=fingerprint(c.data),
        dtype=resolve_dtype(c, ranks),
        decoder=settings,
        check=c.check,
        seed=c.seed,
        vocab_size=m.config.vocab_size,
        versions=versions(),
    )
    for e in examples:
        e["prompt_ids"] = data.encode_prompt(tok, e["messages"], c.raw)
    out = open_run(c.out, meta, ranks, free=("limit", "model", "adapter", "data"))  # these by their content

    def judge(batch, texts):
        return [dict(correct=evaluate.check(c.check, text, e["answer"])) for e, text in zip(batch, texts)]

    new = decode_all(c, ranks, m, tok, examples, settings, out, judge)
    records = data.read_trajectories(out) if ranks.first else []
    return dict(
        out=str(out),
        trajectories=len(records),
        new=new,
        finished=sum(r["finished"] for r in records),
        checked=sum(r["correct"] is not None for r in records),
        correct=sum(r["correct"] is True for r in records),
        kept=sum(map(data.usable, records)),
    )


def decode_all(c, ranks, m, tok, examples, settings, out, judge):
    """Decode the examples that the folder out does not hold yet, shared over the processes -> how many there were.

    examples: dicts of id, prompt, answer and prompt_ids. judge(examples, texts) gives each record its verdict: a dict
    with correct (True, False or None) and whatever else is worth keeping."""
    if ranks.first:
        for file in data.trajectory_files(out):
            drop_torn_line(file)
    ranks.barrier()
    done = {json.dumps(r["id"]) for r in data.read_trajectories(out)} if data.trajectory_files(out) else set()
    ranks.barrier()  # nobody writes before everybody has read

    todo = [e for e in examples if json.dumps(e["id"]) not in done]
    todo.sort(key=lambda e: -len(e["prompt_ids"]))  # little padding, and the batch that needs most memory first
    batches = [todo[i : i + c.batch_size] for i in range(0, len(todo), c.batch_size)][ranks.rank :: ranks.world]
    never = never_chosen(m, tok)
    seen = kept = tokens = 0
    start = time.time()
    with (
        open(out / f"trajectories-{ranks.rank:05d}.jsonl", "a", encoding="utf-8") as f,
        tqdm(total=sum(map(len, batches)), desc=out.name, unit="prompt", disable=not ranks.first) as bar,
    ):
        for batch in batches:
            records = decode_batch(m, tok, batch, settings, never, c.seed, ranks.device)
            for record, verdict in zip(records, judge(batch, [r["text"] for r in records])):
                record.update(verdict)
                f.write(json.dumps(record, ensure_ascii=False) + "\n")
                kept += data.usable(record)
                tokens += len(record["response_ids"])
            f.flush()
            seen += len(batch)
            bar.update(len(batch))
            bar.set_postfix_str(f"{tokens / (time.time() - start):.0f} tokens/s, kept {kept / seen:.0%}")
    ranks.barrier()
    return len(todo)


def decode_batch(m, tok, batch, settings, never, seed, device):
    """Trajectory records of a few examples: the lines of a trajectory file, but for the verdict."""
    ids, mask = (x.to(device) for x in data.pad_left([e["prompt_ids"] for e in batch], m.config.pad_id))
    generators = [data.generator(seed, "decode", e["id"], device=device) for e in batch]
    t = decode.generate(m, ids, mask, generator=generators, suppress=never, **settings)
    if not t.entropy.isfinite().all():
        raise ValueError("the model's predictions are not finite: NaN weights, or an overflow of its dtype")
    return [
        dict(
            id=e["id"],
            prompt=e["prompt"],
            answer=e["answer"],
            prompt_ids=e["prompt_ids"],
            response_ids=response,
            order=order,
            step=step,
            entropy=[round(x, 6) for x in entropy],
            confidence=[round(x, 6) for x in confidence],
            text=tok.response_text(response),
            finished=m.config.eos_id in response,
        )
        for e, response, step, order, entropy, confidence in zip(batch, *(x.tolist() for x in t))
    ]


def never_chosen(m, tok):
    """Ids that no response may hold: the mask token, and rows of the network that are no token."""
    return sorted({*tok.unused_ids(m.config.vocab_size), m.config.mask_id})


def drop_torn_line(file):
    """Cut off what a process left behind that was killed while it wrote a line."""
    content = file.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(file, whole)


# ------------------------------------------------------------------------------------------------------------ train


def train(c):
    """Train an adapter (or, with --lora-rank 0, all weights) -> the last metrics and the last checkpoint.

    One optimizer step sees the same examples, windows and gradient whatever the number of processes: each takes every
    world-th example of the global batch, sums its share of the mean loss, and the gradients are added up. (Dropout is
    the exception: its noise differs with the split.)"""
    objective_options(c)
    ranks = Ranks(c.device)
    full = c.lora_rank == 0
    last = last_checkpoint(Path(c.out))
    prefer = "float32" if full else "auto"  # bfloat16 is too coarse for AdamW's small steps
    m, tok, folder = load_model(c, ranks, weights=last if full else None, dtype=prefer)
    records = training_records(c, m, tok)
    G = 4 * ranks.world if c.global_batch is None else c.global_batch
    steps_per_epoch = math.ceil(len(records) / G)
    total = c.epochs * steps_per_epoch
    settings = {f.name: getattr(c, f.name) for f in dataclasses.fields(c)}
    machine = ("out", "device", "batch_size", "gradient_checkpointing")  # no part of what is computed
    meta = {"command": "train", **{k: v for k, v in settings.items() if k not in machine}, **identity(c, folder)}
    meta.update(dtype=resolve_dtype(c, ranks, prefer), global_batch=G, examples=len(records), versions=versions())
    meta["data_sha256"] = hashlib.sha256(json.dumps(records).encode()).hexdigest()
    if full:
        m.requires_grad_(True)
    else:
        start = data.generator(c.seed, "lora")
        lora.inject(m, c.lora_rank, c.lora_alpha, c.lora_targets, c.lora_dropout, start)
        m = m if last is None else lora.load(m, last)
    weights = {name: p for name, p in m.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(weights.values(), lr=c.lr, weight_decay=c.weight_decay)

    out = open_run(c.out, meta, ranks, free=("model", "data"))  # these by their content
    if c.warmup >= total and ranks.first:
        tqdm.write(f"warning: {c.warmup} warm-up steps, but {total} in all: the peak --lr is never reached", sys.stderr)
    m.train()
    m.gradient_checkpointing = c.gradient_checkpointing
    done = 0 if last is None else restore(last, weights, optimizer)
    if ranks.first:
        keep_lines(out / "metrics.jsonl", done)

    metrics, order = {}, None
    with (
        open(out / "metrics.jsonl", "a", encoding="utf-8") if ranks.first else contextlib.nullcontext() as log,
        tqdm(total=total, initial=done, desc="train", unit="step", disable=not ranks.first) as bar,
    ):
        for step in range(done, total):
            epoch, i = divmod(step, steps_per_epoch)
            if order is None or i == 0:
                order = data.epoch_order(len(records), c.seed, epoch)
            chosen = [records[k] for k in order[i * G : (i + 1) * G]]
            metrics = train_step(c, m, list(weights.values()), optimizer, chosen, step, epoch, total, ranks)
            if not math.isfinite(metrics["loss"] + metrics["grad_norm"]):
                what = f"loss {metrics['loss']} and gradient norm {metrics['grad_norm']} at step {step + 1}"
                raise ValueError(f"{what}, examples {[r['id'] for r in chosen]}; last good checkpoint: {last}")
            if ranks.first:
                log.write(json.dumps(metrics) + "\n")
                log.flush()
                bar.set_postfix_str(f"loss {metrics['loss']:.3f}, {metrics['tokens_per_second']:.0f} tokens/s")
                bar.update()
            if i == steps_per_epoch - 1:
                last = out / f"epoch-{epoch + 1}"
                if ranks.first:
                    with atomic_folder(last) as beside:
                        write_checkpoint(beside, m, folder, full, c.model, weights, optimizer, step + 1)
                ranks.barrier()
    return dict(out=str(out), checkpoint=str(last), steps=total, examples=len(records), **metrics)


TUNABLE = ("window", "margin", "weight", "entropy_context")  # options that some objectives take and others do not


def objective_options(c):
    """The options of c that its objective takes. Raises ValueError for one that is set and would not be used."""
    if c.window != "global" and c.window < 2:
        raise ValueError(f"--window {c.window}: needs at least 2 tokens (one has no pair to rank), or global")
    known = inspect.signature(objectives.OBJECTIVES[c.objective]).parameters
    unused = [k for k in TUNABLE if k not in known and getattr(c, k) != getattr(TrainOptions, k)]
    if unused:
        raise ValueError(f"--objective {c.objective} does not use --{', --'.join(unused).replace('_', '-')}")
    return {k: getattr(c, k) for k in TUNABLE if k in known}


def training_records(c, m, tok):
    """What to train on, sorted by id: the usable trajectories, cut at their first EOS, or a dataset's prompts with
    their answers, as dicts of id, prompt_ids, response_ids and order (None for an answer)."""
    path = Path(c.data)
    first = next(data.read_rows(path), (None, {}))[1] if path.is_file() else {}
    if path.is_file() and not (isinstance(first, dict) and "response_ids" in first):
        if c.objective != "nelbo":
            raise ValueError(f"{path} has no trajectories, and {c.objective} needs them: distill, or --objective nelbo")
        examples = data.read_examples(path, c.prompt_field, c.answer_field, c.limit)
        bare = [e["id"] for e in examples if e["answer"] is None]
        if bare:
            raise ValueError(f"{path}: {len(bare)} rows have no answer to train on, the first is id {bare[0]}")
        for e in examples:
            e["prompt_ids"] = data.encode_prompt(tok, e["messages"], c.raw)
            e["response_ids"] = data.encode_answer(tok, e["messages"], e["answer"], c.raw)
        kept = examples
    else:
        records = data.read_trajectories(path, m.config.vocab_size)
        meta = data.read_json(path / "meta.json") if (path / "meta.json").is_file() else {}
        rows = m.config.vocab_size
        if meta.get("vocab_size", rows) != rows:
            raise ValueError(f"{path}: made with a vocabulary of {meta['vocab_size']}; {c.model} has {rows}")
        records.sort(key=lambda r: (str(type(r["id"])), r["id"]))
        records = records[: c.limit]
        kept = [r for r in records if data.usable(r, c.keep)]
        if not kept:
            finished = sum(bool(r.get("finished")) for r in records)
            wrong = sum(r.get("correct") is False for r in records)
            raise ValueError(
                f"{path}: --keep {c.keep} keeps none of {len(records)} ({finished} finished, {wrong} wrong)"
            )
        kept = kept if c.keep_eos else [data.cut_at_eos(r, m.config.eos_id) for r in kept]
    return [{k: r.get(k) for k in ("id", "prompt_ids", "response_ids", "order")} for r in kept]


MEANS = ("loss", "ce", "rank", "in_order", "entropy", "masked")  # what objectives report, averaged over the batch


def train_step(c, m, weights, optimizer, chosen, step, epoch, total, ranks):
    """One optimizer step on the examples of a global batch -> its line of metrics.jsonl."""
    begun = time.time()
    objective, options = objectives.OBJECTIVES[c.objective], objective_options(c)
    torch.manual_seed(data.generator(c.seed, step, ranks.rank, "dropout").initial_seed())

    mine = chosen[ranks.rank :: ranks.world]
    sums, tokens, seen = dict.fromkeys(MEANS, 0.0), 0, set()
    for i in range(0, len(mine), c.batch_size):
        records = mine[i : i + c.batch_size]
        batch = {k: v.to(ranks.device) for k, v in data.collate(records, m.config.pad_id).items()}
        generators = [data.generator(c.seed, epoch, r["id"]) for r in records]
        losses = objective(m, batch, generator=generators, **options)
        share = len(records) / len(chosen)  # of the global batch, whose loss is the mean over its examples
        (losses["loss"] * share).backward()
        for k in losses:
            sums[k] += losses[k].item() * share
        seen |= losses.keys()
        tokens += sum(len(r["prompt_ids"]) + len(r["response_ids"]) for r in records)
    *means, tokens = ranks.sum([*sums.values(), tokens])
    ranks.sum_gradients(weights)

    lr = learning_rate(step, total, c)
    for group in optimizer.param_groups:
        group["lr"] = lr
    norm = torch.nn.utils.clip_grad_norm_(weights, c.clip or math.inf)
    if math.isfinite(means[0] + norm.item()):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    values = {k: v for k, v in zip(sums, means) if k in seen}
    speed = tokens / (time.time() - begun)
    return dict(
        step=step + 1, epoch=epoch + 1, **values, grad_norm=norm.item(), lr=lr, tokens_per_second=round(speed, 1)
    )


def learning_rate(step, total, c):
    """Linear warm-up to the peak, then a cosine to the final rate; step counts from 0."""
    if step < c.warmup:
        return c.lr * (step + 1) / c.warmup
    done = (step - c.warmup) / max(total - c.warmup, 1)
    return c.final_lr + (c.lr - c.final_lr) * (1 + math.cos(math.pi * done)) / 2


def write_checkpoint(folder, m, base_folder, full, base, weights, optimizer, step):
    """An adapter (or a model) that every command takes, and beside it what a continued run needs."""
    if full:
        model.save(m, folder)
        copy_extras(base_folder, folder)
    else:
        lora.save(m, folder, base)
    state = {f"{k}.{name}": v for name, p in weights.items() for k, v in optimizer.state[p].items()}
    save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, folder / "optimizer.safetensors")
    (folder / "trainer.json").write_text(json.dumps(dict(step=step)) + "\n")


def last_checkpoint(out):
    """The folder of the latest epoch in a run, or None."""
    found = {int(p.name[6:]): p for p in out.glob("epoch-*") if p.name[6:].isdigit()}
    return found[max(found)] if found else None


def restore(checkpoint, weights, optimizer):
    """Fill the optimizer's state from a checkpoint, whose weights are loaded already -> optimizer steps done."""
    state, step = (
        load_file(checkpoint / "optimizer.safetensors"),
        data.read_json(checkpoint / "trainer.json").get("step"),
    )
    wanted = {f"{k}.{name}" for name in weights for k in ("step", "exp_avg", "exp_avg_sq")}
    if type(step) is not int or state.keys() != wanted:
        raise ValueError(f"{checkpoint}: not a checkpoint of this run: remove it to continue from the one before")
    for name, p in weights.items():
        moments = {k: state[f"{k}.{name}"].to(p.device) for k in ("exp_avg", "exp_avg_sq")}
        optimizer.state[p] = {"step": state[f"step.{name}"], **moments}
    return step


def keep_lines(file, count):
    """Cut a log back to its first lines: those of the steps that the checkpoint knows."""
    if file.is_file():
        lines = file.read_text().splitlines(keepends=True)
        with atomic_file(file) as f:
            f.writelines(lines[:count])


def copy_extras(source, target):
    """The small files of a model folder that are no weights: tokenizer, chat template, generation settings, code."""
    for file in Path(source).iterdir():
        weights = file.suffix in (".safetensors", ".bin") or file.name.endswith(".index.json")
        if file.is_file() and not weights and not (Path(target) / file.name).exists() and file.stat().st_size < 2**26:
            shutil.copyfile(file, Path(target) / file.name)


# ----------------------------------------------------------------------------------------------- generate and merge


def generate(c):
    """Answer one prompt, or chat -> the last answer and its speed."""
    if c.raw and (c.system or c.prompt is None):
        raise ValueError("--raw takes one --prompt as it is: no --system and no chat")
    ranks = Ranks(c.device)
    m, tok, folder = load_model(c, ranks, c.adapter)
    settings = decoder(c, m.config.family, folder)
    messages = [{"role": "system", "content": c.system}] if c.system else []
    result = {}
    for turn, prompt in enumerate([c.prompt] if c.prompt is not None else chat_turns()):
        messages.append({"role": "user", "content": prompt})
        ids = torch.tensor([data.encode_prompt(tok, messages, c.raw)], device=ranks.device)
        generator = data.generator(c.seed, "generate", turn, device=ranks.device)
        watch = Watch(tok, m.config.mask_id) if c.watch else None
        start = time.time()
        t = decode.generate(m, ids, generator=generator, suppress=never_chosen(m, tok), on_step=watch, **settings)
        seconds = time.time() - start
        text = tok.response_text(t.response[0].tolist())
        messages.append({"role": "assistant", "content": text})
        print(text)
        speed = round(t.response.numel() / seconds, 1)
        result = dict(
            prompt=prompt, text=text, tokens=t.response.numel(), seconds=round(seconds, 2), tokens_per_second=speed
        )
    return dict(**result, decoder=settings)


def chat_turns():
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


class Watch:
    """Redraws a response while it unmasks: masks are dots, tokens green where certain, red from 3 nats."""

    COLOURS = (46, 82, 118, 154, 190, 226, 220, 214, 208, 202, 196)  # of the 256-colour terminal palette

    def __init__(self, tok, mask_id):
        self.tok, self.mask_id = tok, mask_id

    def __call__(self, step, response, entropy):
        cells, tokens = [], list(zip(response[0].tolist(), entropy[0].tolist()))
        while tokens:
            token, h = tokens.pop(0)
            if token == self.mask_id:
                cells.append("\x1b[2m·\x1b[0m")
            elif token not in self.tok.stop_ids:
                part = [token]  # a character may be spread over several tokens
                while (text := self.tok.decode(part)).endswith("\ufffd") and tokens and tokens[0][0] != self.mask_id:
                    part.append(tokens.pop(0)[0])
                cells.append(f"\x1b[38;5;{self.COLOURS[min(int(h / 3 * 10), 10)]}m{text}\x1b[0m")
        home = "\x1b[H\x1b[2J"  # the top left of an empty screen
        print(f"{home}step {step}\n{''.join(cells)}", file=sys.stderr, flush=True)


def merge(c):
    """Fold an adapter into its base model and write a model folder in the base's own layout and dtype."""
    must_be_free(c.out)
    folder = model.resolve(c.model)
    m = lora.load(model.load(folder, dtype=None), c.adapter)
    changed = len(lora.layers(m))
    with atomic_folder(c.out) as beside:
        model.save(lora.merge(m), beside)
        copy_extras(folder, beside)
    return dict(out=c.out, merged_layers=changed)


def run_evaluate(c):
    """Answer the questions of benchmarks and grade the answers -> a score with its interval for each."""
    import benchmarks

    return benchmarks.run(c)


def run_grade(c):
    """Grade responses that were made elsewhere -> the score; every line is written back with its verdict."""
    import benchmarks

    return benchmarks.grade(c)


def demo(c):
    """The whole method on a tiny model: distill, train, and an evaluation before and after."""
    import demo

    return demo.run(c)


# ----------------------------------------------------------------------------------------------------- command line

COMMANDS = {
    "demo": (demo, DemoOptions),
    "distill": (distill, DistillOptions),
    "train": (train, TrainOptions),
    "evaluate": (run_evaluate, EvaluateOptions),
    "grade": (run_grade, GradeOptions),
    "generate": (generate, GenerateOptions),
    "merge": (merge, MergeOptions),
}


def parser():
    top = argparse.ArgumentParser(prog="tabom.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    commands = top.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    for name, (run, options) in COMMANDS.items():
        summary = inspect.getdoc(run).split("\n\n")[0]
        sub = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        for f in dataclasses.fields(options):
            flag, about = "--" + f.name.replace("_", "-"), {k: v for k, v in f.metadata.items() if k != "low"}
            kind = next(k for k in (*typing.get_args(f.type), f.type) if k is not type(None))
            if kind is bool:
                sub.add_argument(flag, action="store_true", help=about["help"])
            else:
                shown = ",".join(f.default) if isinstance(f.default, tuple) else f.default
                about["help"] += "" if shown is None else f" (default {shown})"
                sub.add_argument(flag, default=f.default, type=about.pop("parse", kind), **about)
    return top


ALONE = ("generate", "grade", "merge")  # nothing to share: under torchrun the first process does them


def main(argv=None):
    """Run a command -> exit status. An error is one line on stderr."""
    given = vars(parser().parse_args(argv))
    command = given.pop("command")
    run, options = COMMANDS[command]
    first = int(os.environ.get("RANK", 0)) == 0
    if command in ALONE and not first:
        return 0
    try:
        c = options(**given)
        check_options(c)
        result = run(c)
        if first:
            print(json.dumps(result, ensure_ascii=False))
        return 0
    except KeyboardInterrupt:
        print("stopped" + ("" if command in ALONE else "; the same command continues"), file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError, SafetensorError, RuntimeError) as e:  # torch's are RuntimeErrors
        if os.environ.get("TABOM_DEBUG"):
            raise
        print(f"error: {' '.join(str(e).split()) or type(e).__name__}", file=sys.stderr)
        return 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
