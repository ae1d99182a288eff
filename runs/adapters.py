"""The weights that a training run trains: an adapter, new or of a folder, or all of them.

c = adapters.with_adapter(c, processes)     # TrainOptions, with the rank, alpha and layers of --adapter
weights = adapters.trainable(c, m, last)    # {name: parameter}
"""

import dataclasses

import data
import lora
import model
from release import recipes
from runs import loading, torchrun
from runs.options import flag


def with_adapter(c, processes):
    """c with the rank, alpha, targets and dropout of its adapter: of --adapter where no flag says otherwise, else 16,
    16, q_proj and v_proj, 0. Raises ValueError for a flag that contradicts the adapter; the dropout may be another."""
    recipe, say = recipes.settings(c.recipe), torchrun.warner(processes)
    for name in ("lora_alpha", "lora_dropout", "lora_targets") if c.lora_rank == 0 else ():
        if getattr(c, name) not in (None, recipe.get(name)):
            say(f"{flag(name)} has no effect with --lora-rank 0")
    known, dropout = dict(lora_rank=16, lora_alpha=16, lora_targets=("q_proj", "v_proj")), 0.0
    if c.adapter is not None and c.lora_rank != 0:
        loading.warn_of_another_base(c.adapter, model.resolve(c.model), say)
        stored = lora.settings(c.adapter)
        known = dict(lora_rank=stored.rank, lora_alpha=stored.alpha, lora_targets=stored.targets)
        dropout = stored.dropout
        for name, value in known.items():
            given = getattr(c, name)
            if given in (None, value) or (name == "lora_targets" and isinstance(value, str)):
                continue  # of a pattern trainable() compares the layers
            if name == "lora_targets" and set(given) == set(value):
                continue
            way_out = "leave the flag out"
            if recipe.get(name) == given:  # nobody gave the flag
                way_out = (
                    f"--recipe {c.recipe} asks for it: add {flag(name)} {as_flag(value)}, or start from another adapter"
                )
            raise ValueError(f"{flag(name)} {given}: {c.adapter} has {value}; {way_out}")
    changes = {}
    for name, value in dict(known, lora_dropout=dropout).items():
        if getattr(c, name) is None:
            changes[name] = value
    return dataclasses.replace(c, **changes)


def as_flag(value):
    return ",".join(value) if isinstance(value, (list, tuple)) else value


def trainable(c, m, last):
    """The weights to train, by name: all of them, or those of an adapter, new or as in a checkpoint."""
    if c.lora_rank == 0:
        m.requires_grad_(True)
    elif last or c.adapter:  # the checkpoint before the adapter: a continued run is past its start
        lora.load(m, last or c.adapter)
        if lora.find(m, c.lora_targets).keys() != lora.layers(m).keys():
            asked = f"--recipe {c.recipe}" if recipes.settings(c.recipe).get("lora_targets") else "the flag"
            raise ValueError(
                f"--lora-targets {as_flag(c.lora_targets)}: {last or c.adapter} has other layers; leave {asked} out"
            )
        for layer in lora.layers(m).values():
            layer.dropout = c.lora_dropout
    else:
        start = data.generator(c.seed, "lora")
        lora.inject(m, c.lora_rank, c.lora_alpha, c.lora_targets, c.lora_dropout, start)
    return {name: p for name, p in m.named_parameters() if p.requires_grad}
