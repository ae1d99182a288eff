"""TABOM: post-training of masked diffusion language models along the trajectories that they decode themselves.

    python tabom.py demo                                                     # the whole method on a CPU, from nothing
    torchrun --nproc_per_node 8 tabom.py distill --model GSAI-ML/LLaDA-8B-Instruct --data prompts.jsonl --out out/T
    torchrun --nproc_per_node 8 tabom.py train --model GSAI-ML/LLaDA-8B-Instruct --data out/T --out out/R
    torchrun --nproc_per_node 8 tabom.py evaluate --model GSAI-ML/LLaDA-8B-Instruct --tasks gsm8k --out out/E
    python tabom.py sweep --model GSAI-ML/LLaDA-8B-Instruct --data prompts.jsonl --test gsm8k --metric last --out out/S
    python tabom.py grade --task gsm8k --responses R.jsonl --out V.jsonl
    python tabom.py diagnose --model GSAI-ML/LLaDA-8B-Instruct --checkpoints out/R/epoch-5 --data out/T --out out/D
    python tabom.py generate --model GSAI-ML/LLaDA-8B-Instruct --adapter out/R/epoch-5 --prompt "2 + 2 =" --watch
    python tabom.py merge --model GSAI-ML/LLaDA-8B-Instruct --adapter out/R/epoch-5 --out out/M

This file is the root: the commands, distillation and the data-parallel training loop. What a command takes is in
options, processes and run folders are in runs. The leaves (model, lora, decode, objectives, data, evaluate) know
nothing of each other. Results go to stdout, ending in one line of JSON; progress and errors go to stderr.
TABOM_DEBUG=1 shows the traceback of an error.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import shutil
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from tqdm import tqdm

import data
import decode
import evaluate
import lora
import model
import objectives
import options
import runs

# ---------------------------------------------------------------------------------------------------------- distill


def distill(c, ranks=None):
    """Decode every prompt of a dataset with the model's own decoder and log the order -> counts of what is in --out.

    Each finished batch is written at once; the same command continues where an earlier one was stopped."""
    ranks = ranks or runs.Ranks(c.device)
    examples = data.read_examples(c.data, c.prompt_field, c.answer_field, c.limit)
    m, tok, folder = runs.load_model(c, ranks, c.adapter)
    settings = options.decoder(c, m.config.family, folder)
    meta = dict(
        command="distill",
        **{k: getattr(c, k) for k in ("model", "adapter", "data", "prompt_field", "answer_field", "limit", "raw")},
        **runs.identity(c, folder, c.adapter),
        data_sha256=runs.fingerprint(c.data),
        dtype=runs.resolve_dtype(c, ranks),
        decoder=settings,
        check=c.check,
        seed=c.seed,
        vocab_size=m.config.vocab_size,
        versions=runs.versions(),
    )
    for e in examples:
        e["prompt_ids"] = data.encode_prompt(tok, e["messages"], c.raw)
    out = runs.open_run(c.out, meta, ranks, free=("limit", "model", "adapter", "data"))  # these by their content

    def judge(batch, texts):
        return [dict(correct=evaluate.check(c.check, text, e["answer"])) for e, text in zip(batch, texts)]

    new = decode_all(c, ranks, m, tok, examples, settings, out, judge)
    records = data.read_trajectories(out)
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
            runs.drop_torn_line(file)
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
        tqdm(total=sum(map(len, batches)), desc=out.name, unit="prompt", disable=not ranks.shows) as bar,
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


# ------------------------------------------------------------------------------------------------------------ train


def train(c, ranks=None):
    """Train an adapter (or, with --lora-rank 0, all weights) -> the last metrics and the last checkpoint.

    One optimizer step sees the same examples, windows and gradient whatever the number of processes: each takes every
    world-th example of the global batch, sums its share of the mean loss, and the gradients are added up. (Dropout is
    the exception: its noise differs with the split.)"""
    ranks = ranks or runs.Ranks(c.device)
    parameters, unused = options.of_objective(c)
    last = runs.last_checkpoint(Path(c.out))
    full = c.lora_rank == 0
    prefer = "float32" if full else "auto"  # bfloat16 is too coarse for AdamW's small steps
    m, tok, folder = runs.load_model(c, ranks, weights=last if full else None, dtype=prefer)
    records = training_records(c, m, tok)
    G = 4 * ranks.world if c.global_batch is None else c.global_batch
    steps_per_epoch = math.ceil(len(records) / G)
    total = c.epochs * steps_per_epoch
    end = min(total, (c.stop_after or c.epochs) * steps_per_epoch)
    meta = dict(training_identity(c, records), **parameters, **runs.identity(c, folder, c.adapter))
    meta.update(dtype=runs.resolve_dtype(c, ranks, prefer), global_batch=G)
    by_content = ("model", "data", "adapter")  # these may be elsewhere, if they are the same
    runs.same_run(c.out, meta, by_content)  # before a checkpoint is read that need not fit
    weights = trainable(c, m, last)
    objective = functools.partial(objectives.OBJECTIVES[c.objective], **parameters)
    reference = None
    if c.objective == "t3d":  # the student as it was: at first as it starts, then as of every reference_steps-th step
        reference = lora.Reference(m)
        objective = functools.partial(objective, reference=reference)
        if c.adapter:
            reference.update()
    fused = ranks.device.type == "cuda"
    optimizer = torch.optim.AdamW(weights.values(), lr=c.lr, weight_decay=c.weight_decay, fused=fused)

    out = runs.open_run(c.out, meta, ranks, by_content)
    if c.warmup >= total and ranks.first:
        tqdm.write(f"warning: {c.warmup} warm-up steps, but {total} in all: the peak --lr is never reached", sys.stderr)
    if unused and ranks.first:
        flags = ", ".join(map(options.flag, unused))
        tqdm.write(f"warning: {flags}: not used by --objective {c.objective}", sys.stderr)
    m.train()
    m.gradient_checkpointing = c.gradient_checkpointing
    done = 0 if last is None else runs.restore(last, weights, optimizer, reference)
    if ranks.first:
        runs.keep_lines(out / "metrics.jsonl", done)
    ranks.barrier()

    metrics = list(data.read_rows(out / "metrics.jsonl"))[-1][1] if done >= end else {}
    order = None
    with (
        open(out / "metrics.jsonl", "a", encoding="utf-8") if ranks.first else contextlib.nullcontext() as log,
        tqdm(total=end, initial=done, desc="train", unit="step", disable=not ranks.shows) as bar,
        runs.stop_signals() as signals,
    ):
        for step in range(done, end):
            epoch, i = divmod(step, steps_per_epoch)
            if order is None or i == 0:
                order = data.epoch_order(len(records), c.seed, epoch)
            chosen = [records[k] for k in order[i * G : (i + 1) * G]]
            metrics = train_step(c, m, objective, list(weights.values()), optimizer, chosen, step, epoch, total, ranks)
            if not math.isfinite(metrics["loss"] + metrics["grad_norm"]):
                metrics = dropped(c, metrics, chosen, last, ranks)
            if reference is not None and (step + 1) % c.reference_steps == 0:
                reference.update()
            if ranks.first:
                log.write(json.dumps(metrics) + "\n")
                log.flush()
                loss = "none" if metrics["loss"] is None else f"{metrics['loss']:.3f}"
                bar.set_postfix_str(f"loss {loss}, {metrics['tokens_per_second']:.0f} tokens/s")
                bar.update()
            stop = ranks.sum([len(signals)])[0] > 0  # one process was asked to stop: all do, after this step
            whole = i == steps_per_epoch - 1
            if whole or stop or (c.save_every and (step + 1) % c.save_every == 0):
                last = out / (f"epoch-{epoch + 1}" if whole else f"step-{step + 1}")
                if ranks.first:
                    shutil.rmtree(last, ignore_errors=True)  # it can only be a damaged one
                    with runs.atomic_folder(last) as beside:
                        runs.write_checkpoint(beside, m, folder, c.model, weights, optimizer, step + 1, reference)
                    runs.prune(out, c.keep_last)
                ranks.barrier()
            if stop and step + 1 < end:
                raise KeyboardInterrupt
    return dict(out=str(out), checkpoint=str(last), steps=max(done, end), examples=len(records), **metrics)


def trainable(c, m, last):
    """The weights to train, by name: all of them, or those of an adapter, new or as in a checkpoint."""
    if c.lora_rank == 0:
        m.requires_grad_(True)
    else:
        start = data.generator(c.seed, "lora")
        lora.inject(m, c.lora_rank, c.lora_alpha, c.lora_targets, c.lora_dropout, start)
        if last or c.adapter:
            lora.load(m, last or c.adapter)
        if any(layer.alpha != c.lora_alpha for layer in lora.layers(m).values()):
            raise ValueError(f"{c.adapter}: its lora_alpha differs from --lora-alpha {c.lora_alpha}")
    return {name: p for name, p in m.named_parameters() if p.requires_grad}


def training_identity(c, records):
    """What a training run is, for its meta.json: its options, but for those that change nothing in what is computed and
    those of its objective, and the data by their content."""
    machine = ("out", "device", "batch_size", "gradient_checkpointing", "compile", "save_every", "keep_last")
    fields = [f.name for f in dataclasses.fields(c) if "tunable" not in f.metadata]
    settings = {name: getattr(c, name) for name in fields if name not in (*machine, "stop_after")}
    sha256 = hashlib.sha256(json.dumps(records).encode()).hexdigest()
    return dict(command="train", **settings, examples=len(records), data_sha256=sha256, versions=runs.versions())


def dropped(c, metrics, chosen, last, ranks):
    """The metrics of a step that was not finite and is left out, with None for what is no number. Raises ValueError
    without --skip-nonfinite."""
    what = f"loss {metrics['loss']} and gradient norm {metrics['grad_norm']} at step {metrics['step']}"
    what = f"{what}, examples {[r['id'] for r in chosen]}"
    if not c.skip_nonfinite:
        raise ValueError(f"{what}; last good checkpoint: {last}")
    if ranks.first:
        tqdm.write(f"warning: {what}: the step is dropped", sys.stderr)
    return {k: v if math.isfinite(v) else None for k, v in metrics.items()}


def training_records(c, m, tok):
    """What to train on, sorted by id: the usable trajectories, cut at their first EOS, or a dataset's prompts with
    their answers, as dicts of id, prompt_ids, response_ids and order (None for an answer)."""
    path = Path(c.data)
    if not data.holds_trajectories(path):
        if c.objective != "nelbo":
            raise ValueError(f"{path} has no trajectories, and {c.objective} needs them: distill, or --objective nelbo")
        kept = reference_answers(c, path, tok)
    else:
        rows = m.config.vocab_size
        records = data.read_trajectories(path, rows)[: c.limit]
        meta = data.read_json(path / "meta.json") if (path / "meta.json").is_file() else {}
        if meta.get("vocab_size", rows) != rows:
            raise ValueError(f"{path}: made with a vocabulary of {meta['vocab_size']}; {c.model} has {rows}")
        kept = [r for r in records if data.usable(r, c.keep)]
        if not kept:
            finished = sum(bool(r.get("finished")) for r in records)
            wrong = sum(r.get("correct") is False for r in records)
            raise ValueError(
                f"{path}: --keep {c.keep} keeps none of {len(records)} ({finished} finished, {wrong} wrong)"
            )
        kept = kept if c.keep_eos else [data.cut_at_eos(r, m.config.eos_id) for r in kept]
    return [{k: r.get(k) for k in ("id", "prompt_ids", "response_ids", "order")} for r in kept]


def reference_answers(c, path, tok):
    """The prompts and answers of a dataset, the first where there are several, as records to train on without order."""
    examples = data.read_examples(path, c.prompt_field, c.answer_field, c.limit)
    bare = [e["id"] for e in examples if e["answer"] is None]
    if bare:
        raise ValueError(f"{path}: {len(bare)} rows have no answer to train on, the first is id {bare[0]}")
    for e in examples:
        e["prompt_ids"] = data.encode_prompt(tok, e["messages"], c.raw)
        answer = e["answer"][0] if isinstance(e["answer"], list) else e["answer"]
        e["response_ids"] = data.encode_answer(tok, e["messages"], answer, c.raw)
    return examples


def train_step(c, m, objective, weights, optimizer, chosen, step, epoch, total, ranks):
    """One optimizer step on the examples of a global batch -> its line of metrics.jsonl."""
    begun = time.time()
    torch.manual_seed(data.generator(c.seed, step, ranks.rank, "dropout").initial_seed())

    mine = sorted(chosen[ranks.rank :: ranks.world], key=lambda r: len(r["prompt_ids"]) + len(r["response_ids"]))
    sums, tokens = {}, 0
    for i in range(0, len(mine), c.batch_size):
        records = mine[i : i + c.batch_size]
        batch = {k: v.to(ranks.device) for k, v in data.collate(records, m.config.pad_id).items()}
        generators = [data.generator(c.seed, epoch, r["id"]) for r in records]
        losses = objective(m, batch, generator=generators)
        share = len(records) / len(chosen)  # of the global batch, whose loss is the mean over its examples
        (losses["loss"] * share).backward()
        for k in losses:
            sums[k] = sums.get(k, 0.0) + losses[k].item() * share
        tokens += sum(len(r["prompt_ids"]) + len(r["response_ids"]) for r in records)
    names = dict.fromkeys(ranks.gather(sums))  # a process without an example knows of none
    *means, tokens = ranks.sum([*(sums.get(k, 0.0) for k in names), tokens])
    values = dict(zip(names, means))
    ranks.sum_gradients(weights)

    lr = learning_rate(step, total, c)
    for group in optimizer.param_groups:
        group["lr"] = lr
    norm = torch.nn.utils.clip_grad_norm_(weights, c.clip or math.inf)
    if math.isfinite(values["loss"] + norm.item()):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
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


# ----------------------------------------------------------------------------------------------- generate and merge


def generate(c):
    """Answer one prompt, or chat -> the last answer and its speed."""
    if c.raw and (c.system or c.prompt is None):
        raise ValueError("--raw takes one --prompt as it is: no --system and no chat")
    ranks = runs.Ranks(c.device, alone=True)
    m, tok, folder = runs.load_model(c, ranks, c.adapter)
    settings = options.decoder(c, m.config.family, folder)
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
        cells, ids = [], response[0].tolist()
        for text, places in self.tok.pieces(ids, self.mask_id):
            h = float(entropy[0, places[0]])
            if text is None:
                cells.append("\x1b[2m·\x1b[0m")
            elif ids[places[0]] not in self.tok.stop_ids:
                cells.append(f"\x1b[38;5;{self.COLOURS[min(int(h / 3 * 10), 10)]}m{text}\x1b[0m")
        home = "\x1b[H\x1b[2J"  # the top left of an empty screen
        print(f"{home}step {step}\n{''.join(cells)}", file=sys.stderr, flush=True)


def merge(c):
    """Fold an adapter into its base model and write a model folder in the base's own layout and dtype."""
    runs.must_be_free(c.out)
    folder = model.resolve(c.model)
    m = lora.load(model.load(folder, dtype=None), c.adapter)
    changed = len(lora.layers(m))
    with runs.atomic_folder(c.out) as beside:
        model.save(lora.merge(m), beside)
        runs.copy_extras(folder, beside)
    return dict(out=c.out, merged_layers=changed)


def run_diagnose(c):
    """Measure how models decode (TDS, order of certainty, loss over mask ratio) and draw it -> TDS and inversions."""
    import diagnose

    return diagnose.run(c)


def run_sweep(c):
    """Train and evaluate a grid of settings -> a table with mean and spread over seeds."""
    import sweep

    return sweep.run(c)


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
    "demo": (demo, options.DemoOptions),
    "distill": (distill, options.DistillOptions),
    "train": (train, options.TrainOptions),
    "sweep": (run_sweep, options.SweepOptions),
    "evaluate": (run_evaluate, options.EvaluateOptions),
    "grade": (run_grade, options.GradeOptions),
    "diagnose": (run_diagnose, options.DiagnoseOptions),
    "generate": (generate, options.GenerateOptions),
    "merge": (merge, options.MergeOptions),
}


def parser():
    return options.parser(COMMANDS, __doc__.split("\n")[0])


ALONE = ("generate", "grade", "merge")  # nothing to share: under torchrun the first process does them


def main(argv=None):
    """Run a command -> exit status. An error is one line on stderr."""
    given = vars(parser().parse_args(argv))
    command = given.pop("command")
    run, kind = COMMANDS[command]
    first = int(os.environ.get("RANK", 0)) == 0
    if command in ALONE and not first:
        return 0
    try:
        c = kind(**given)
        options.check(c)
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
