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


def tunable(name, help, **more):
    """A parameter of some objectives: None = what each of them has as its own default, which the help shows."""
    parameters = {k: inspect.signature(f).parameters for k, f in objectives.OBJECTIVES.items()}
    defaults = ", ".join(f"{k} {p[name].default}" for k, p in parameters.items() if name in p)
    return opt(None, f"{help} (default: {defaults})", tunable=True, **more)


def window_size(text):
    return text if text == "global" else int(text)


DTYPES = ("auto", *model.DTYPES)


def name_list(text):
    return tuple(text.split(","))


def row_list(text):
    return tuple(name.strip() for name in text.split(";"))


def numbers(text):
    return tuple(int(number) for number in text.split(","))


# Each family's own decoder (Table 8 of the paper, and 32-token blocks for LLaDA's distillation).
DECODERS = {
    "dream": dict(strategy="entropy", schedule="dream", temperature=0.1, top_p=0.9, max_new_tokens=256),
    "llada": dict(strategy="confidence", schedule="llada", temperature=0.0, block_length=32, max_new_tokens=256),
}
TASKS = ("gsm8k", "math500", "humaneval", "mbpp", "ifeval")
SOURCES = ", ".join(f"{k} ({inspect.getdoc(f).split(':')[0]})" for k, f in objectives.OBJECTIVES.items())


@dataclass
class ModelOptions:
    model: str = opt(None, "model folder in Hugging Face layout, or Hub repo id", required=True)
    device: str = opt("auto", "cuda, mps or cpu; auto takes the first that is there")
    dtype: str = opt("auto", "of the base model; auto: bfloat16 on cuda, else float32", choices=DTYPES)
    seed: int = opt(0, "every random choice follows from this, whatever the number of processes")
    compile: bool = opt(False, "compile the blocks of the transformer: faster after a minute, equal but for rounding")


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
    tokens_per_step: int | None = opt(None, "decode so many tokens a step: fewer --steps (Table 4)", low=1)
    approximate_cache: str | None = opt(
        None, "reuse keys and values inside a block: faster, other results", choices=decode.CACHES
    )


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
    adapter: str | None = opt(None, "adapter folder to start from, instead of a new adapter")
    objective: str = opt("tabom", f"what to train: {SOURCES}", choices=tuple(objectives.OBJECTIVES))
    window: int | str | None = tunable("window", "W: consecutively decoded tokens, or global", parse=window_size)
    margin: float | None = tunable("margin", "gamma of the ranking loss, nats", low=0)
    weight: float | None = tunable("weight", "lambda: weight of the ranking loss, or of the certainty", low=0)
    ce_weight: float | None = tunable("ce_weight", "weight of the cross-entropy; 0 = ranking alone", low=0)
    entropy_context: str | None = tunable(
        "entropy_context", "entropies given the window's start, or own step", choices=("window", "step")
    )
    alpha: float | None = tunable("alpha", "weight of the reference's own tokens", low=0)
    beta: float | None = tunable("beta", "sharpness of the preference", low=0)
    path_weight: float | None = tunable("path_weight", "weight of the path consistency", low=0)
    random_tokens: float | None = tunable("random_tokens", "share of the masks that show a random token", low=0, high=1)
    reference_steps: int = opt(10, "t3d: the student becomes the reference every so many steps", low=1)
    block_length: int | None = tunable("block_length", "tokens of a block", low=1)
    temperature: float | None = tunable("temperature", "of the entropy that is the certainty", low=0.01)
    keep: str = opt(
        "correct", "trajectories to train on (correct: or not checkable)", choices=("correct", "finished", "all")
    )
    keep_eos: bool = opt(False, "keep the tokens after the first EOS")
    lora_rank: int = opt(16, "0 = train all weights", low=0)
    lora_alpha: int = opt(16, "the adapter counts alpha / rank times", low=0)
    lora_dropout: float = opt(0.0, "dropout before the adapter", low=0)
    lora_targets: tuple = opt(("q_proj", "v_proj"), "layers with an adapter, comma-separated", parse=name_list)
    epochs: int = opt(5, "passes over the data; a checkpoint after each", low=1)
    stop_after: int | None = opt(None, "stop after so many of the epochs; the learning rate falls over all", low=1)
    save_every: int = opt(0, "optimizer steps between further checkpoints; 0 = none", low=0)
    keep_last: int = opt(1, "keep so many of those; those of epochs are always kept", low=1)
    skip_nonfinite: bool = opt(False, "drop a step whose loss is not finite, instead of stopping")
    global_batch: int | None = opt(None, "examples per optimizer step, over all processes (4 per process)", low=1)
    batch_size: int = opt(4, "examples per forward pass on each process; the rest accumulates", low=1)
    lr: float = opt(2e-5, "peak learning rate", low=0)
    final_lr: float = opt(0.0, "learning rate at the end of the cosine", low=0)
    warmup: int = opt(50, "steps of linear warm-up", low=0)
    weight_decay: float = opt(0.0, "of AdamW", low=0)
    clip: float = opt(1.0, "largest gradient norm; 0 = no clipping", low=0)
    gradient_checkpointing: bool = opt(False, "recompute activations: less memory, more time")


@dataclass
class SweepOptions(TrainOptions):
    data: str = opt(None, "prompts with answers, which are distilled once; or trajectories", required=True)
    out: str = opt(None, "folder for the runs and the table; an unfinished sweep is continued", required=True)
    over: tuple = opt(
        (f"objective={','.join(objectives.OBJECTIVES)}", "seed=0,1,2"),
        "the grid: OPTION=VALUE,VALUE for options of train; objective=sft-gt is nelbo on the answers of --data",
        parse=str,
        nargs="+",
    )
    validation: str | None = opt(None, "dataset or benchmark that chooses the checkpoint of a run")
    test: tuple = opt((), "datasets or benchmarks that the chosen checkpoint answers, comma-separated", parse=name_list)
    tokens_per_step: tuple = opt((1,), "test with so many tokens a step, comma-separated", parse=numbers, low=1)
    ground_truth: str | None = opt(None, "dataset whose answers sft-gt trains on, instead of those of --data")
    metric: str = opt("accuracy", "of the validation; last = no choice", choices=("accuracy", "tds", "last"))
    rounds: int = opt(1, "distill again with the chosen checkpoint and train on, so many times in all (ReDi)", low=1)
    check: str = opt("number", "how a response is compared with the answer", choices=evaluate.CHECKS)
    decode_batch: int = opt(16, "prompts decoded together", low=1)
    test_limit: int | None = opt(None, "only the first so many questions of each validation and test set", low=1)
    benchmarks: str | None = opt(None, "folder with the benchmarks' files; without it they come from the Hub")


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
    out: str | None = opt(None, "folder for responses and results, continued if unfinished (out/evaluate-MODELHASH)")
    data: str | None = opt(None, "folder with the benchmarks' files; without it they come from the Hub")
    adapter: str | None = opt(None, "adapter folder")
    shots: str | None = opt(None, "JSON file of earlier turns: a list of chat messages, or one list for each task")
    limit: int | None = opt(None, "only the first so many questions of each task", low=1)
    batch_size: int = opt(16, "questions decoded together on each process", low=1)


@dataclass
class GradeOptions:
    task: str = opt(None, "gsm8k, math500, humaneval, mbpp or ifeval", required=True, choices=TASKS)
    responses: str = opt(None, "JSON Lines of the benchmark's fields and a response", required=True)
    out: str = opt(None, "file for the same lines with their verdicts", required=True)
    family: str = opt("dream", "whose prompt the code answers", choices=tuple(DECODERS))


@dataclass
class DiagnoseOptions(ModelOptions, DecodeOptions, DatasetOptions):
    model: str | None = opt(None, "base model; only the curves of --runs need none")
    checkpoints: tuple = opt((), "checkpoints of it, each one more curve, comma-separated", parse=name_list)
    data: str | None = opt(None, "trajectories to replay; or prompts, which each model decodes itself")
    fresh: bool = opt(False, "decode the prompts of stored trajectories anew with each model")
    ground_truth: str | None = opt(None, "dataset with answers, for the loss over the mask ratio")
    runs: tuple = opt((), "training runs whose metrics are drawn, comma-separated", parse=name_list)
    out: str = opt(None, "folder for the numbers and pictures, which must not be there yet", required=True)
    limit: int | None = opt(64, "only the first so many trajectories and answers", low=1)
    batch_size: int = opt(16, "trajectories replayed together on each process", low=1)
    window: int = opt(32, "W: compare entropies inside windows of so many tokens", low=2)


@dataclass
class MergeOptions:
    model: str = opt(None, "base model", required=True)
    adapter: str = opt(None, "adapter folder", required=True)
    out: str = opt(None, "folder for the merged model", required=True)


@dataclass
class DemoOptions:
    out: str | None = opt(None, "folder for datasets, trajectories and checkpoints (out/demo, --full: out/experiment)")
    quick: bool = opt(False, "few puzzles: shows that it runs, not what it does")
    data_only: str | None = opt(None, "only write the tasks' datasets into this folder")
    retrain: str | None = opt(None, "only train the tiny model again, into this folder")
    full: bool = opt(False, "the paper's claims with intervals: several base models, all objectives; takes hours")
    bases: int = opt(3, "--full: base models, trained from different seeds", low=1)
    seeds: int = opt(2, "--full: training runs of each row on each base model", low=1)
    rows: tuple | None = opt(None, "--full: only these rows of the tables, separated by ;", parse=row_list)
    compile: bool = opt(False, "--full: compile the blocks of the transformer; faster, equal but for rounding")
    seed: int = opt(0, "of the tasks and of the training")


def decoder(c, family, folder, preset=None):
    """The arguments of decode.generate: the family's, then a benchmark's preset, then the model's own, then those given
    on the command line.

    Raises ValueError for settings that do not fit together, before anything is decoded or written."""
    known = {f.name: f for f in dataclasses.fields(DecodeOptions)}
    given = {k: getattr(c, k) for k in known if getattr(c, k) is not None}
    settings = {}
    for layer in (DECODERS[family], preset or {}, own_decoder(folder, known), given):
        length, steps = "max_new_tokens" in layer, layer.keys() & {"steps", "tokens_per_step"}
        for k in ["steps"] * (length or bool(steps)) + ["tokens_per_step"] * bool(steps):
            settings.pop(k, None)  # it was said for another length, or is said anew
        settings.update(layer)
    at_once = settings.pop("tokens_per_step", None)
    if at_once and "steps" in settings:
        raise ValueError(f"--tokens-per-step {at_once} and --steps {settings['steps']}: give one of them")
    if at_once:
        settings["steps"] = math.ceil(settings["max_new_tokens"] / at_once)
    settings.setdefault("steps", settings["max_new_tokens"])
    settings["block_length"] = settings.get("block_length") or None
    decode.check(**settings)
    return settings


def own_decoder(folder, known):
    """The decoder settings of a model folder: what its generation_config.json has under "tabom"."""
    file = Path(folder) / "generation_config.json"
    own = data.read_json(file).get("tabom", {}) if file.is_file() else {}
    if type(own) is not dict:
        raise ValueError(f'{file}: "tabom" must be an object of decoder settings, not {own}')
    for k, v in own.items():
        if k not in known:
            raise ValueError(f'{file}: "tabom" has {k}, which is none of {", ".join(known)}')
        if type(v) is not kind(known[k]) and not (kind(known[k]) is float and type(v) is int):
            raise ValueError(f'{file}: "tabom" has {k} {v!r}, which must be {kind(known[k]).__name__}')
    return own


def flag(name):
    return "--" + name.replace("_", "-")


def check(c):
    """Raises ValueError for a number outside what its option takes, or one that is none."""
    for f in dataclasses.fields(c):
        given, low, high = getattr(c, f.name), f.metadata.get("low"), f.metadata.get("high", math.inf)
        for value in given if isinstance(given, tuple) else (given,):
            if low is not None and value is not None and type(value) is not str:
                if not low <= value < math.inf:
                    raise ValueError(f"{flag(f.name)} {value}: must be a number of at least {low}")
                if value > high:
                    raise ValueError(f"{flag(f.name)} {value}: must be at most {high}")


def of_objective(c):
    """The parameters of the objective that c names, those given and its own defaults; and the names of the options that
    are given and not used. c: TrainOptions. Raises ValueError for a window without pairs, or without an adapter where
    one is needed."""
    parameters = inspect.signature(objectives.OBJECTIVES[c.objective]).parameters
    tunables = [f.name for f in dataclasses.fields(TrainOptions) if "tunable" in f.metadata]
    unused = [k for k in tunables if k not in parameters and getattr(c, k) is not None]
    if c.objective != "t3d" and c.reference_steps != TrainOptions.reference_steps:
        unused.append("reference_steps")
    used = [k for k in tunables if k in parameters]
    found = {k: parameters[k].default if getattr(c, k) is None else getattr(c, k) for k in used}
    window = found.get("window", "global")
    if window != "global" and window < 2:
        raise ValueError(f"--window {window}: needs at least 2 tokens (one has no pair to rank), or global")
    if c.lora_rank == 0 and (c.objective == "t3d" or c.adapter):
        raise ValueError(f"--lora-rank 0 has no adapter, which {'--adapter' if c.adapter else 't3d'} needs")
    return found, unused


def kind(f):
    """The type of a field's value: bool, int, float, str or tuple."""
    return next(k for k in (*typing.get_args(f.type), f.type) if k is not type(None))


def parse(f, text, extra=()):
    """The value that a text gives a field, as on the command line. extra: values allowed besides its choices."""
    try:
        value = f.metadata.get("parse", kind(f))(text)
    except ValueError as e:
        raise ValueError(f"{flag(f.name)} {text!r}: must be {kind(f).__name__}") from e
    choices = f.metadata.get("choices")
    if choices and value not in (*choices, *extra):
        raise ValueError(f"{flag(f.name)} {text!r}: must be one of {', '.join((*choices, *extra))}")
    return value


def parser(commands, description):
    """The command line's parser. commands: {name: (function, options class)}; a function's docstring describes it."""
    top = argparse.ArgumentParser(prog="tabom.py", description=description, allow_abbrev=False)
    subs = top.add_subparsers(dest="command", required=True, metavar="|".join(commands))
    for name, (run, options) in commands.items():
        summary = inspect.getdoc(run).split("\n\n")[0]
        sub = subs.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        for f in dataclasses.fields(options):
            about = {k: v for k, v in f.metadata.items() if k not in ("low", "high", "tunable")}
            if kind(f) is bool:
                sub.add_argument(flag(f.name), action="store_true", help=about["help"])
            else:
                shown = f.default
                if isinstance(shown, tuple):
                    shown = (" " if "nargs" in about else ",").join(map(str, shown))
                about["help"] += f" (default {shown})" if shown not in (None, "") else ""
                sub.add_argument(flag(f.name), default=f.default, type=about.pop("parse", kind(f)), **about)
    return top
