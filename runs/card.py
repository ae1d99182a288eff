"""The model card of a checkpoint: the README.md that the Hugging Face Hub shows of a folder.

    text = card.text(c, out, left_out)    # c: TrainOptions; out: the run's folder

All of it comes from the run's options, meta.json and metrics.jsonl, so that a run that was killed and continued writes
the same card. It holds no path but those that the user gave. Its header is YAML, as the Hub reads it
(https://huggingface.co/docs/hub/model-cards); PEFT and our commands ignore the file.
"""

import dataclasses
import json
import math
import shlex
from pathlib import Path

import data
from release import recipes
from runs.options import flag

FILE = "README.md"
# The lines of meta.json that a reader looks for first.
SHOWN = ("objective", "window", "margin", "weight", "recipe", "changed_from_recipe", "data", "keep", "examples")
SHOWN += ("held_out", "adapter", "lora_rank", "lora_alpha", "lora_targets", "lr", "global_batch", "dtype", "seed")
OF_A_STEP = ("step", "epoch", "lr", "grad_norm", "tokens_per_second", "sample")  # what is no measure of an epoch


CARD = """\
---
base_model: {quoted}
{library}tags:
- tabom
- masked-diffusion
---

# {kind} trained from {base} with {objective}

Made by the reference implementation of TABOM ([arXiv 2605.11854](https://arxiv.org/abs/2605.11854)).
{note}
{settings}

Means over the steps of the epoch up to this checkpoint; the held-out loss is that after the epoch:

{metrics}

The command, without options that change nothing but rounding:

```bash
{command}
```
"""


def text(c, out, left_out):
    """The card of the checkpoint that a run in the folder `out` writes now. left_out: options that change
    nothing but rounding, which the command leaves out."""
    meta, base, note = data.read_json(out / "meta.json"), plain(c.model), ""
    if Path(c.model).is_dir():
        base = plain(Path(c.model).resolve().name)  # the Hub refuses a path
        note = "\n`base_model` is the name of a folder: before you upload, put the Hub's name of the model there.\n"
    kind, library = ("A LoRA adapter", "library_name: peft\n") if c.lora_rank else ("A model", "")
    settings = []
    for name in SHOWN:
        if meta.get(name) is not None:
            value = meta[name]
            if isinstance(value, dict):
                value = [f"{option} {given}" for option, given in value.items()]
            settings.append((name, value))
    return CARD.format(
        quoted=json.dumps(base, ensure_ascii=False),  # a JSON string is one of YAML, too
        **dict(base=base, note=note, kind=kind, library=library, objective=meta["objective"]),
        settings=table("setting", "value", settings),
        metrics=table("metric", "value", means_of_epoch(read_metrics(out / "metrics.jsonl"))),
        command=command(c, meta, left_out),
    )


def read_metrics(log):
    """The lines of a metrics.jsonl, or none where it cannot be read: a card is no reason to lose a checkpoint."""
    try:
        return [row for _, row in data.read_rows(log) if isinstance(row, dict) and {"step", "epoch"} <= row.keys()]
    except (OSError, ValueError):
        return []


def means_of_epoch(metrics):
    """[(name, value)] of the last line's step and epoch, and of what was measured in that epoch, its mean."""
    if not metrics:
        return []
    last, values = metrics[-1], {}
    for row in metrics:
        for name, value in row.items():
            measured = name not in OF_A_STEP and isinstance(value, (int, float))  # of a dropped step some are None
            if measured and row["epoch"] == last["epoch"]:
                values.setdefault(name, []).append(value)
    means = [(name, f"{math.fsum(found) / len(found):.6g}") for name, found in values.items()]
    return [("step", last["step"]), ("epoch", last["epoch"]), *means]


def command(c, meta, left_out):
    """The command line that makes the run again: the options that are neither the recipe's nor the default."""
    words, recipe = ["python", "tabom.py", "train"], recipes.of(c)
    for f in dataclasses.fields(c):
        value, default = getattr(c, f.name), recipe.get(f.name, f.metadata.get("otherwise", f.default))
        if f.name == "global_batch":
            value = meta["global_batch"]  # without the flag it depends on the number of processes
        if f.name in left_out or value is None or value is False or value == default:
            continue
        words.append(flag(f.name))
        if isinstance(value, (tuple, list)):
            value = ",".join(map(str, value))
        if value is not True:
            words.append(plain(value))
    return shlex.join([*words, "--out", "RUN"])


def table(name, value, lines):
    """A table of Markdown with two titles, and (name, value) of each line."""
    return "\n".join(f"| {plain(left)} | {plain(right)} |" for left, right in ((name, value), ("---", "---"), *lines))


def plain(value):
    """A value as text of one line, without characters that would end a cell of a table or a block of code."""
    if isinstance(value, (list, tuple)):
        value = ", ".join(map(str, value))
    return "".join(c if c.isprintable() and c not in "`|" else "?" for c in str(value))
