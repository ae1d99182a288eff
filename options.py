"""What every command takes: its options with their defaults, and the parser that reads them from a command line.

    c = options.DistillOptions(model="tiny", data="train.jsonl", out="out/T")       # as a command's function takes them
    options.check(c)                                                                # a ValueError for a number too low
    settings = options.decoder(c, m.config.family, folder)                          # the arguments of decode.generate
    top = options.parser({"distill": (distill, options.DistillOptions)}, "about")   # an argparse parser

A field of a dataclass is a flag of its command: max_new_tokens is --max-new-tokens.
"""

import argparse
import dataclasses
import inspect
import math
import typing
from dataclasses import dataclass, field
from pathlib import Path

import data
import decode
import evaluate
import model
import objectives


def opt(default, help, **more):
    """A field of an options dataclass; its help text is the command line's, and low the least value it takes."""
    return field(default=default, metadata=dict(help=help, **more))


def window_size(text):
    return text if text == "global" else int(text)


DTYPES = ("auto", *model.DTYPES)


def name_list(text):
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
    lora_targets: tuple = opt(("q_proj", "v_proj"), "layers with an adapter, comma-separated", parse=name_list)
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
    tasks: tuple = opt(("gsm8k",), "gsm8k, math500, humaneval, mbpp, ifeval, comma-separated", parse=name_list)
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


def decoder(c, family, folder, preset=None):
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
    settings.update({k: getattr(c, k) for k in known if getattr(c, k) is not None})
    settings.setdefault("steps", settings["max_new_tokens"])
    settings["block_length"] = settings.get("block_length") or None
    decode.check(**settings)
    return settings


def check(c):
    """Raises ValueError for a number below the least that its option takes, or one that is none."""
    for f in dataclasses.fields(c):
        value, low = getattr(c, f.name), f.metadata.get("low")
        if low is not None and value is not None and not low <= value < math.inf:
            raise ValueError(f"--{f.name.replace('_', '-')} {value}: must be a number of at least {low}")


def parser(commands, description):
    """The command line's parser. commands: {name: (function, options class)}; a function's docstring describes it."""
    top = argparse.ArgumentParser(prog="tabom.py", description=description, allow_abbrev=False)
    subs = top.add_subparsers(dest="command", required=True, metavar="|".join(commands))
    for name, (run, options) in commands.items():
        summary = inspect.getdoc(run).split("\n\n")[0]
        sub = subs.add_parser(name, help=summary, description=summary, allow_abbrev=False)
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
