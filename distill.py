"""Step 1: prompts to trajectories. The model answers each prompt, and the decode order is logged.

    torchrun --nproc_per_node 8 tabom.py distill --model GSAI-ML/LLaDA-8B-Instruct --data prompts.jsonl --out out/T

    texts, records = distill.answer(m, tok, prompts, settings, seed=0)    # settings: arguments of decode.generate

Section 4 of the paper: one token a step (Dream: nearly, docs/choices.md), at most 256 new tokens. The folder out/T
holds a JSON line per trajectory (docs/formats.md lists its fields) and meta.json. Each finished batch is written at
once; the same command continues where an earlier one was stopped. Which trajectories are trained on is decided in
train.py. Other commands answer prompts with the functions of this file, too.
"""

import importlib
import itertools
import json
import time
from dataclasses import dataclass

import torch
from tqdm import tqdm

import data
import tokenizer
from benchmarks.answers import CHECKS, check
from runs import disk, loading, queue, torchrun
from runs.options import opt
from runs.records import prompts_of

FORMATS = {"ours": None, "release": "release.files"}  # --format -> the room that writes another one


@dataclass
class DistillOptions(loading.ModelOptions, loading.DecodeOptions, loading.DatasetOptions):
    """distillation"""

    out: str = opt(None, "folder for the trajectories; an unfinished one is continued", required=True)
    adapter: str | None = opt(None, "adapter folder: distill from the adapted model")
    batch_size: int = opt(16, "prompts decoded together on each process", low=1)
    format: str = opt(
        "ours",
        "also write the kept trajectories to out/FORMAT.jsonl, as the trainer of the authors' code reads them",
        choices=tuple(FORMATS),
    )
    check: str = opt(
        "auto",
        "how a response is compared with the answer: by final number, math-verify, exact text or not at all; "
        "auto: number, letter or math as the answer is, no verdict on other text that is not the same",
        choices=CHECKS,
    )
    keep: str = opt(
        "correct",
        "which trajectories count as kept, as train's --keep, and go into the file of another --format; out has all",
        choices=("correct", "finished", "all"),
    )


def distill(c, processes=None, loaded=None):
    """Decode every prompt of a dataset as the model's family does and log the order -> counts of what is in --out.

    c: DistillOptions. loaded: a loading.Loaded that decodes, instead of loading c.model and c.adapter; it must be what
    they name. Raises ValueError or FileNotFoundError before anything is decoded."""
    processes = processes or torchrun.Processes(c.device)
    say = torchrun.warner(processes)
    examples = data.read_examples(c.data, c.prompt_field, c.answer_field, c.limit, say)
    loaded = loaded or loading.load_model(c, processes, c.adapter)
    settings = loading.decoder_settings(c, loaded)
    tokenizer.encode_examples(loaded.tok, examples, c.raw)
    check_context(examples, settings["max_new_tokens"], loaded.m.config, say)
    meta = dict(
        command="distill",
        model=c.model,
        adapter=c.adapter,
        data=c.data,
        prompt_field=c.prompt_field,
        answer_field=c.answer_field,
        limit=c.limit,
        raw=c.raw,
        data_sha256=disk.data_fingerprint(c.data),
        decoder=settings,
        check=c.check,
        vocab_size=loaded.m.config.vocab_size,
        prompts=max(len(examples), prompts_of(c.out, 0)),  # a smaller --limit makes no answer go
        **loading.identity(c, processes, loaded),
    )
    by_content = ("model", "adapter", "data")  # these may be elsewhere, if they are the same
    out = disk.open_run(c.out, meta, processes, may_change=("limit", "prompts", *by_content))

    def judge(batch, records):
        return [dict(correct=check(c.check, r["text"], e["answer"])) for e, r in zip(batch, records)]

    new = answer_all(c, processes, loaded, examples, settings, out, judge)
    found = read_verdicts(out)
    kept = [r for r in found if data.usable(r, c.keep)]
    unchecked = sum(r["correct"] is None for r in kept)
    if unchecked and c.check != "none":
        say(f"{unchecked} of {len(found)} answers could not be checked and are kept: see --check and --keep")
    for name, module in FORMATS.items():
        if module and processes.first and (name == c.format or (out / f"{name}.jsonl").is_file()):
            importlib.import_module(module).write(out, kept, settings, loaded)  # again, where it was asked for before
    return dict(
        out=str(out),
        trajectories=len(found),
        new=new,
        finished=sum(r["finished"] for r in found),
        checked=sum(r["correct"] is not None for r in found),
        correct=sum(r["correct"] is True for r in found),
        kept=len(kept),
        unchecked=sum(r["correct"] is None for r in found),
    )


# ------------------------------------------------------------------------------------------------ answers to prompts


def answer(m, tok, prompts, settings, seed=0):
    """Answer prompts in one batch -> (texts, records), one of each per prompt.

    prompts: texts as the model reads them (tok.chat renders one), or lists of token ids. settings: arguments of
    decode.generate. seed: with the number of the prompt it decides every random choice. A record is a line of a
    trajectory file (docs/formats.md). Raises ValueError for predictions that are not finite."""
    examples = []
    for i, prompt in enumerate(prompts):
        ids = tok.encode(prompt) if isinstance(prompt, str) else list(prompt)
        examples.append(dict(id=i, prompt=prompt, answer=None, prompt_ids=ids))
    records = answer_batch(loading.Loaded(m, tok, None), examples, settings, seed, next(m.parameters()).device)
    return [r["text"] for r in records], records


def answer_batch(loaded, examples, settings, seed, device):
    """Decode a few examples (dicts of id and prompt_ids, perhaps prompt and answer) together -> their trajectory
    records."""
    records = {}
    for numbers, found in answers(loaded, examples, settings, seed, device):
        records.update(zip(numbers, found))
    return [records[i] for i in range(len(examples))]


def answers(loaded, examples, settings, seed, device, batch_size=None, on_step=None):
    """Decode examples, batch_size at a time -> yields (their numbers, their trajectory records) as they finish.

    on_step: called after each decoding step, see queue.stream. Raises ValueError for predictions that are not finite:
    when the other prompts are answered, or at once where none has any."""
    m, prompts = loaded.m, [torch.tensor(e["prompt_ids"], device=device) for e in examples]

    def generator(i):
        return data.generator(seed, "decode", examples[i]["id"], device=device)

    how = dict(generator=generator, on_step=on_step, **loading.with_eos_rules(settings, loaded))
    good, bad = 0, []  # numbers of prompts
    for numbers, t in queue.stream(m, prompts, batch_size, **how):
        decoded = t.response != m.config.mask_id  # [R, N]; behind a token that ends it, a response may be masked
        finite = (t.entropy.isfinite() | ~decoded).all(1)  # [R]
        bad += itertools.compress(numbers, (~finite).tolist())
        good += int(finite.sum())
        if not good:  # else the others are answered first
            break
        t = t._replace(order=t.order.masked_fill(~decoded, -1))
        t = t._replace(entropy=t.entropy.where(decoded, 0.0), confidence=t.confidence.where(decoded, 0.0))
        rows, fine = zip(*(field[finite].tolist() for field in t)), list(itertools.compress(numbers, finite.tolist()))
        yield fine, [record_of(examples[i], loaded.tok, *row) for i, row in zip(fine, rows)]
    if bad:
        what = f"the model's predictions are not finite for {len(bad)} of {good + len(bad)} prompts"
        raise ValueError(f"{what}, such as id {examples[bad[0]]['id']}: NaN weights, or an overflow of its dtype")


def record_of(e, tok, response, step, order, entropy, confidence):
    """The trajectory record of an example and of a row of decode.Trajectory, as lists."""
    record = dict(id=e["id"], prompt=e.get("prompt"), answer=e.get("answer"), prompt_ids=e["prompt_ids"])
    record.update(response_ids=response, order=order, step=step)
    record.update(entropy=[round(h, 6) for h in entropy], confidence=[round(p, 6) for p in confidence])
    record["text"] = tok.response_text(response)
    record["finished"] = tokenizer.is_finished(response, order, tok.stop_ids)
    return record


def check_context(examples, new, config, warn):
    """Warn of prompts that, with a response of `new` tokens (None: their own), are longer than the model's context."""
    longest = max(len(e["prompt_ids"]) + (new or len(e["response_ids"])) for e in examples)
    if config.max_length is not None and longest > config.max_length:
        warn(f"prompt and response have up to {longest} tokens; the model was trained with {config.max_length}")


def cut_prompts(examples, most, warn, where):
    """Cut the prompt_ids of examples on the left to at most so many tokens (None: not at all). warn(line) is called
    once, with how many are cut and how long the longest is. where: what the examples are of."""
    long = [e for e in examples if most is not None and len(e["prompt_ids"]) > most]
    if long:
        longest = max(len(e["prompt_ids"]) for e in long)
        cut = f"{len(long)} of {len(examples)} prompts have up to {longest} tokens, and lose all but the last {most}"
        warn(f"{where}: {cut}: their beginning is not read; --prompt-tokens {longest} keeps it")
    for e in long:
        e["prompt_ids"] = e["prompt_ids"][-most:]


def answer_all(c, processes, loaded, examples, settings, out, judge):
    """Answer the examples whose answers the folder out lacks, split over the processes -> their number.

    c: options with seed and batch_size. examples: dicts of id, prompt, answer and prompt_ids. judge(examples, records)
    gives each record its verdict: a dict of correct (True, False or None) and whatever else is worth keeping."""
    if processes.first:
        for file in data.trajectory_files(out):
            disk.drop_torn_line(file)
    processes.barrier()
    done = {}
    if data.trajectory_files(out):
        done = {json.dumps(r["id"]): r["prompt_ids"] for r in read_verdicts(out)}
        check_answered(out, examples, done)
    processes.barrier()  # nobody writes before everybody has read

    todo = [e for e in examples if json.dumps(e["id"]) not in done]
    todo.sort(key=lambda e: -len(e["prompt_ids"]))  # little padding, and the batch that needs most memory first
    mine = todo[processes.index :: processes.count]
    with (
        open(out / f"trajectories-{processes.index:05d}.jsonl", "a", encoding="utf-8") as f,
        tqdm(total=len(mine), desc=out.name, unit="prompt", disable=not processes.shows) as bar,
    ):
        progress = Progress(bar, settings)
        for numbers, records in answers(
            loaded, mine, settings, c.seed, processes.device, c.batch_size, progress.decoded
        ):
            for record, verdict in zip(records, judge([mine[i] for i in numbers], records)):
                record.update(verdict)
                f.write(disk.json_line(record))
                progress.kept += data.usable(record)
                progress.masks += record["order"].count(-1)
            f.flush()
            progress.seen += len(records)
    processes.barrier()
    return len(todo)


def check_answered(out, examples, known):
    """Raises ValueError where the answers of a folder, id -> tokens of its prompt, are not to these prompts: with
    another --limit, rows may have the ids of the file or be numbered."""
    asked, prompts, others = {}, set(), []
    for e in examples:
        key = json.dumps(e["id"])
        asked[key] = e["prompt_ids"]
        if key not in known:
            prompts.add(tuple(e["prompt_ids"]))
    for key, prompt in known.items():
        under_another = key not in asked and tuple(prompt) in prompts
        if asked.get(key, prompt) != prompt or under_another:
            others.append(key)
    if others:
        what = f"{len(others)} of its answers are to other prompts, or under other ids, such as {others[0]}"
        raise ValueError(f"{out}: {what}; give the same --limit as before, or another --out")


def read_verdicts(out, more=()):
    """The records of a run folder with their verdicts. Raises ValueError for one that lacks any."""
    records = data.read_trajectories(out)
    for r in records:
        for name in ("finished", "correct", "step", "text", *more):
            if name not in r:
                raise ValueError(f"{out}: the line of id {r['id']} has no {name}: remove it, and it is made again")
    return records


class Progress:
    """Moves a bar of prompts, also while they are being answered, and says the speed and how long all will take."""

    def __init__(self, bar, settings):
        self.bar, self.seen, self.kept, self.begun = bar, 0, 0, time.perf_counter()
        self.tokens, self.masks = settings["max_new_tokens"], 0  # of a prompt; of all, those never decoded
        self.steps = settings.get("steps") or -(-self.tokens // settings["tokens_per_step"])

    def decoded(self, now, *_):
        """After a step: the number of the step, in each row that took one."""
        done = self.seen + float(((now + 1) / self.steps).clamp(max=1).sum())  # prompts, and shares of some
        speed = torchrun.per_second(done, self.begun)  # prompts
        tokens = torchrun.per_second(done * self.tokens - self.masks, self.begun)
        shown = f"{tokens:.0f} tokens/s, {tqdm.format_interval(round(self.bar.total / speed))} in all"
        if self.seen:
            shown += f", kept {self.kept / self.seen:.0%}"
        self.bar.set_postfix_str(shown, refresh=False)
        self.bar.update(int(done) - self.bar.n)
