"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685), written out by hand and stored as PEFT stores them.

    lora.inject(m, rank=16, alpha=16, targets=("q_proj", "v_proj"))   # freezes m; only lora_A and lora_B train
    lora.save(m, "out/adapter")                                      # adapter_config.json, adapter_model.safetensors
    lora.load(m, "out/adapter")                                      # ours or PEFT's
    with lora.disabled(m): ...                                       # the base model
    reference = lora.Reference(m); reference.update()                # the model as it was
    lora.merge(m); lora.unmerge(m)                                   # fold into the weights, and take out again

    y = W x + b + (alpha / rank) * B A dropout(x)         A [rank, in], B [out, rank], B = 0 at the start

A and B are float32 whatever the dtype of W, and the sum is formed in float32, as PEFT does. Works on any nn.Module; a
module with a method `checkpoint_name` is saved under the names that it gives (those of the official model class).
"""

import contextlib
import json
import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

PREFIX = "base_model.model."  # PEFT wraps the official model class twice


class LoRALinear(nn.Linear):
    """A frozen linear layer with an adapter. Shares its weight with the layer that it replaces."""

    def __init__(self, base, rank, alpha, dropout=0.0, generator=None):
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.rank, self.alpha, self.dropout, self.enabled = rank, alpha, dropout, True
        where = dict(device=base.weight.device, dtype=torch.float32)
        self.lora_A = nn.Linear(self.in_features, rank, bias=False, **where)
        self.lora_B = nn.Linear(rank, self.out_features, bias=False, **where)
        bound = 1 / math.sqrt(self.in_features)  # PEFT's start: kaiming_uniform_(a=sqrt(5))
        start = torch.empty(rank, self.in_features).uniform_(-bound, bound, generator=generator)
        self.lora_A.weight.data.copy_(start)
        nn.init.zeros_(self.lora_B.weight)
        self.train(base.training)  # dropout of a loaded adapter does not act in an eval model
        self.unmerged = None  # after merge(): (weight, lora_A, lora_B) as they were

    def forward(self, x):
        if self.unmerged is not None:
            return F.linear(x, self.weight if self.enabled else self.unmerged[0], self.bias)
        y = F.linear(x, self.weight, self.bias)
        if not self.enabled:
            return y
        z = F.dropout(x.float(), self.dropout, self.training)
        return (y + self.alpha / self.rank * self.lora_B(self.lora_A(z))).to(y.dtype)

    def merge(self):
        if self.unmerged is None:
            delta = self.alpha / self.rank * (self.lora_B.weight @ self.lora_A.weight)
            self.unmerged = (self.weight, self.lora_A, self.lora_B)
            merged = (self.weight.detach().float() + delta.detach()).to(self.weight.dtype)
            self.weight, self.lora_A, self.lora_B = nn.Parameter(merged, requires_grad=False), None, None

    def unmerge(self):
        if self.unmerged is not None:
            self.weight, self.lora_A, self.lora_B = self.unmerged
            self.unmerged = None


def official(m, name):
    return m.checkpoint_name(name) if hasattr(m, "checkpoint_name") else name


def layers(m):
    """Name -> LoRALinear, for every adapter of m."""
    return {name: module for name, module in m.named_modules() if isinstance(module, LoRALinear)}


def find(m, targets):
    """Name -> linear layer, for the layers whose official name is a target or ends in .target; a string is a pattern
    for the whole name, as in PEFT. Raises ValueError for a target that matches nothing."""
    linears = {name: module for name, module in m.named_modules() if isinstance(module, nn.Linear)}
    names = {name: official(m, name) for name in linears}
    if isinstance(targets, str):
        try:
            hits = {targets: [n for n, o in names.items() if re.fullmatch(targets, o)]}
        except re.error as e:
            raise ValueError(f"the pattern {targets!r} of layers is not one: {e}") from e
    else:
        hits = {t: [n for n, o in names.items() if o == t or o.endswith("." + t)] for t in targets}
    nothing = [t for t, found in hits.items() if not found]
    if nothing or not hits:
        known = sorted({o.rsplit(".", 1)[-1] for o in names.values()})
        raise ValueError(
            f"no linear layer is called {', '.join(nothing) or '(no target)'}; there are {', '.join(known)}"
        )
    wanted = {n for found in hits.values() for n in found}
    return {name: module for name, module in linears.items() if name in wanted}


def inject(m, rank=16, alpha=16, targets=("q_proj", "v_proj"), dropout=0.0, generator=None):
    """Freeze m and put an adapter on every target layer, in place. Returns m.

    generator (a CPU torch.Generator) draws lora_A. Raises ValueError for an unknown target, a rank below 1, a dropout
    outside [0, 1), or a model that has adapters already.
    """
    if layers(m):
        raise ValueError("the model has adapters already, or had some that were merged: load the base model again")
    if rank < 1 or not 0 <= dropout < 1:
        raise ValueError(f"LoRA rank {rank} must be at least 1, and dropout {dropout} in [0, 1)")
    found = find(m, targets)
    m.requires_grad_(False)
    for name, linear in found.items():
        parent, _, leaf = name.rpartition(".")
        setattr(m.get_submodule(parent), leaf, LoRALinear(linear, rank, alpha, dropout, generator))
    return m


@contextlib.contextmanager
def disabled(m):
    """Inside, m computes what its base model computes. Nests, and restores the state before it on any exit."""
    before = {layer: layer.enabled for layer in layers(m).values()}
    for layer in before:
        layer.enabled = False
    try:
        yield m
    finally:
        for layer, enabled in before.items():
            layer.enabled = enabled


class Reference:
    """The model as it was: called like m, it computes what m computed at the last `update`, and before the first one
    what the base model does. Without gradient and dropout. Holds one copy of the adapter, never one of the base."""

    def __init__(self, m):
        if not layers(m):
            raise ValueError("a reference needs an adapter on the model: the base weights are not copied")
        self.m, self.adapter = m, {}  # parameter's name -> tensor; empty = no adapter

    def update(self):
        for name, p in self.m.named_parameters():
            if ".lora_A." in name or ".lora_B." in name:
                self.adapter[name] = p.detach().clone()

    @torch.no_grad()
    def __call__(self, *inputs, **options):
        training = self.m.training
        self.m.eval()
        try:
            if self.adapter:
                return torch.func.functional_call(self.m, self.adapter, inputs, options)
            with disabled(self.m):
                return self.m(*inputs, **options)
        finally:
            self.m.train(training)


def merge(m):
    """W <- W + (alpha / rank) B A, in place; the sum in float32, rounded once to W's dtype. Twice is as good as once.
    Afterwards the model's parameters are those of the base class, and it can be saved. Returns m."""
    for layer in layers(m).values():
        layer.merge()
    return m


def unmerge(m):
    """Undo merge() exactly: the base weights are kept, not computed by a subtraction. Returns m."""
    for layer in layers(m).values():
        layer.unmerge()
    return m


def tensors(m):
    """PEFT's tensor name -> lora_A or lora_B weight (the parameter itself), merged or not."""
    found = {}
    for name, layer in layers(m).items():
        A, B = (layer.lora_A, layer.lora_B) if layer.unmerged is None else layer.unmerged[1:]
        found[f"{PREFIX}{official(m, name)}.lora_A.weight"] = A.weight
        found[f"{PREFIX}{official(m, name)}.lora_B.weight"] = B.weight
    return found


def save(m, folder, base=None):
    """Write the adapter as a PEFT folder. base: the name or path of the base model, for PEFT's AutoPeftModel.

    Raises ValueError for a model without adapters."""
    found = layers(m)
    if not found:
        raise ValueError("the model has no adapter to save: lora.inject(m) first")
    folder, layer = Path(folder), next(iter(found.values()))
    folder.mkdir(parents=True, exist_ok=True)
    config = dict(
        peft_type="LORA",
        base_model_name_or_path=None if base is None else str(base),
        r=layer.rank,
        lora_alpha=layer.alpha,
        lora_dropout=layer.dropout,
        target_modules=short_names(m, found),
        bias="none",
        fan_in_fan_out=False,
        inference_mode=True,
        task_type=None,
    )
    weights = {name: p.detach().contiguous() for name, p in tensors(m).items()}
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def short_names(m, found):
    """The last parts of the adapted layers' names, as PEFT writes them; the whole names where those fit others too."""
    short = sorted({official(m, name).rsplit(".", 1)[-1] for name in found})
    return short if find(m, short).keys() == found.keys() else sorted(official(m, name) for name in found)


# Of PEFT's settings: those that load() reads or that change nothing here, and the values of others that are computed
# here. Anything else that is set asks for a variant of LoRA that this module is not.
HARMLESS = set(
    """
    r lora_alpha lora_dropout target_modules base_model_name_or_path revision task_type auto_mapping inference_mode
    peft_version layers_pattern loftq_config megatron_config megatron_core qalora_group_size ensure_weight_tying
    """.split()
)
PLAIN = dict(peft_type=("LORA",), bias=("none", None), init_lora_weights=(True, False, None, "gaussian"))


def is_finite(x):
    return type(x) in (int, float) and math.isfinite(x)


def load(m, folder):
    """Inject and fill the adapter of a PEFT folder; into the adapter that m has already, if its shapes fit. Returns m.

    Raises FileNotFoundError, or ValueError with every unsupported setting or every missing, unexpected or misshapen
    tensor; m is unchanged then."""
    folder = Path(folder)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"no {file} in {folder}: not a PEFT adapter folder")
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        stored = load_file(folder / "adapter_model.safetensors")
        rank, alpha, targets = config["r"], config["lora_alpha"], config["target_modules"]
    except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError, KeyError, TypeError) as e:
        raise ValueError(f"{folder}: not a readable LoRA adapter ({type(e).__name__}: {e})") from e
    odd = [k for k, v in config.items() if k not in HARMLESS and (v not in PLAIN[k] if k in PLAIN else v)]
    if odd:
        raise ValueError(f"{folder}: unsupported adapter settings {', '.join(f'{k} = {config[k]!r}' for k in odd)}")

    dropout = config.get("lora_dropout") or 0.0
    if not (type(rank) is int and rank > 0 and is_finite(alpha) and is_finite(dropout)):
        raise ValueError(f"{folder}: r {rank!r}, lora_alpha {alpha!r} or lora_dropout {dropout!r} is no usable number")
    if not isinstance(targets, str) and not (isinstance(targets, list) and all(isinstance(t, str) for t in targets)):
        raise ValueError(f"{folder}: target_modules is {targets!r}, not a list of names or a pattern")
    targeted = layers(m) or find(m, targets)
    shapes = {}
    for name, linear in targeted.items():
        shapes[f"{PREFIX}{official(m, name)}.lora_A.weight"] = (rank, linear.in_features)
        shapes[f"{PREFIX}{official(m, name)}.lora_B.weight"] = (linear.out_features, rank)
    wrong = [f"missing {k}" for k in shapes if k not in stored] + [f"unexpected {k}" for k in stored if k not in shapes]
    both = shapes.keys() & stored.keys()
    wrong += [f"{k} is {[*stored[k].shape]}, not {[*shapes[k]]}" for k in both if tuple(stored[k].shape) != shapes[k]]
    if any(layer.rank != rank for layer in layers(m).values()):
        wrong.append(f"rank {rank}, but the model's adapter has rank {next(iter(layers(m).values())).rank}")
    if wrong:
        raise ValueError(f"{folder}: the adapter does not fit this model: {'; '.join(wrong[:8])}")

    if not layers(m):
        inject(m, rank, alpha, targets, dropout)
    unmerge(m)
    for layer in layers(m).values():
        layer.alpha = alpha
    with torch.no_grad():
        for name, p in tensors(m).items():
            p.copy_(stored[name])
    return m
