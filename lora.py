"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685), written out by hand and stored as PEFT stores them.

    lora.inject(m, rank=16, alpha=16, targets=("q_proj", "v_proj"))  # only lora_A and lora_B train
    lora.save(m, "out/adapter")                         # a PEFT folder: config and safetensors
    lora.load(m, "out/adapter")                         # ours or PEFT's, a folder or a Hub repo id
    lora.settings("out/adapter")                        # its rank, alpha, dropout, targets, ...
    with lora.disabled(m): ...                          # the base model
    lora.merge(m); lora.unmerge(m)                      # fold into the weights, and take out again

    y = W x + b + scaling * B A dropout(x)         A [rank, in], B [out, rank], B = 0 at the start
    scaling = alpha / rank, or alpha / sqrt(rank) with rslora (Kalajdzievski 2023, arXiv 2312.03732)

A and B are float32 whatever the dtype of W, and the sum is formed in float32, as PEFT does. Each layer
may have another rank and alpha, as PEFT's rank_pattern and alpha_pattern give them. Works on any nn.Module; a
module with a method `checkpoint_name` is saved under the names that it gives (those of the official
model class).
"""

import contextlib
import hashlib
import json
import math
import re
import uuid
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as as_bytes
from torch import nn

PREFIX = "base_model.model."  # PEFT wraps the official model class twice


@dataclass
class Settings:
    """What an adapter is, in PEFT's terms. A pattern maps a layer's name, or a regular expression
    for the end of one, to the number that this layer has instead."""

    rank: int = 16
    alpha: float = 16
    # The last parts of names, or whole ones; a string is a regular expression.
    targets: tuple | list | str = ("q_proj", "v_proj")
    dropout: float = 0.0
    rslora: bool = False  # scale by alpha / sqrt(rank)
    rank_pattern: dict = field(default_factory=dict)
    alpha_pattern: dict = field(default_factory=dict)

    def of(self, name):
        """(rank, alpha) of the layer with this official name."""
        return by_pattern(self.rank_pattern, name, self.rank), by_pattern(self.alpha_pattern, name, self.alpha)


def by_pattern(pattern, name, default):
    """The number of the first key that is the layer's name or the end of it, as in PEFT's
    get_pattern_key."""
    return next((number for key, number in pattern.items() if re.match(rf"(.*\.)?({key})$", name)), default)


class LoRALinear(nn.Linear):
    """A frozen linear layer with an adapter. Shares its weight with the layer that it replaces."""

    def __init__(self, base, rank, alpha, dropout=0.0, generator=None, rslora=False):
        nn.Module.__init__(self)
        # Kept out of the module tree, for the weight has one name only. Sharding (FSDP2) puts the whole
        # weight into the layer that it knows, and only for the time of a forward pass.
        self.base = (base,)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.rank, self.alpha, self.dropout, self.rslora = rank, alpha, dropout, rslora
        self.enabled = True
        where = dict(device=base.weight.device, dtype=torch.float32)
        self.lora_A = nn.Linear(self.in_features, rank, bias=False, **where)
        self.lora_B = nn.Linear(rank, self.out_features, bias=False, **where)
        bound = 1 / math.sqrt(self.in_features)  # PEFT's start: kaiming_uniform_(a=sqrt(5))
        start = torch.empty(rank, self.in_features).uniform_(-bound, bound, generator=generator)
        self.lora_A.weight.data.copy_(start)
        nn.init.zeros_(self.lora_B.weight)
        self.train(base.training)  # dropout of a loaded adapter does not act in an eval model
        self.unmerged = None  # after merge(): (weight, lora_A, lora_B) as they were

    @property
    def scaling(self):
        if self.rslora:
            return self.alpha / math.sqrt(self.rank)
        return self.alpha / self.rank

    def forward(self, x):
        if self.unmerged is not None:
            return F.linear(x, self.weight if self.enabled else self.unmerged[0], self.bias)
        y = self.base[0](x)
        if not self.enabled:
            return y
        z = F.dropout(x.float(), self.dropout, self.training)
        return (y + self.scaling * self.lora_B(self.lora_A(z))).to(y.dtype)

    def merge(self):
        if self.unmerged is None:
            delta = self.scaling * (self.lora_B.weight @ self.lora_A.weight)
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


def find(m, targets, every=True):
    """Name -> linear layer, for the layers whose official name is a target or ends in .target; a
    string is a pattern for the whole name, as in PEFT. Raises ValueError for targets that match
    nothing: any of them, or without `every` all together."""
    whole, found, used = isinstance(targets, str), {}, set()
    inside = (".lora_A", ".lora_B")  # of an adapter that is there: a pattern may fit them
    known = {name: x for name, x in m.named_modules() if isinstance(x, nn.Linear) and not name.endswith(inside)}
    targets = [targets] if whole else targets
    try:
        patterns = {target: re.compile(target if whole else rf"(.*\.)?{re.escape(target)}") for target in targets}
    except re.error as e:
        raise ValueError(f"the pattern {targets[0]!r} of layers is not one: {e}") from e
    for name, layer in known.items():
        fits = [target for target, pattern in patterns.items() if pattern.fullmatch(official(m, name))]
        if fits:
            found[name] = layer
            used.update(fits)
    nothing = [target for target in targets if target not in used]
    if not found or (every and nothing):
        there_are = sorted({official(m, name).rsplit(".", 1)[-1] for name in known})
        missing = ", ".join(nothing) or "(no target)"
        raise ValueError(f"no linear layer is called {missing}; there are {', '.join(there_are)}")
    return found


def inject(m, rank=16, alpha=16, targets=("q_proj", "v_proj"), dropout=0.0, generator=None, **more):
    """Freeze m and put an adapter on every target layer, in place. Returns m.

    generator (a CPU torch.Generator) draws lora_A. more: rslora, rank_pattern and alpha_pattern of
    `Settings`. Raises ValueError for an unknown target, a rank below 1, an alpha that is not above
    0, a dropout outside [0, 1), or a model that has adapters already.
    """
    if layers(m):
        raise ValueError("the model has adapters already, or had some that were merged: load the base model again")
    s = Settings(rank, alpha, targets, dropout, **more)
    check_settings(s)
    wrap(m, find(m, targets), s, generator)
    return m


def check_settings(s, where=""):
    """Raises ValueError for numbers that make no adapter; `where` begins the message."""
    for rank in (s.rank, *s.rank_pattern.values()):
        if type(rank) is not int or rank < 1:
            raise ValueError(f"{where}LoRA rank {rank!r} must be a whole number of at least 1")
    for alpha in (s.alpha, *s.alpha_pattern.values()):
        if type(alpha) not in (int, float) or not 0 < alpha < math.inf:
            raise ValueError(f"{where}LoRA alpha {alpha!r} must be a number above 0")
    if type(s.dropout) not in (int, float) or not 0 <= s.dropout < 1:
        raise ValueError(f"{where}LoRA dropout {s.dropout!r} must be a number in [0, 1)")


def wrap(m, found, s, generator=None):
    """Freeze m and put adapters with the settings s on the layers found (name -> linear layer)."""
    m.requires_grad_(False)
    for name, linear in found.items():
        parent, _, leaf = name.rpartition(".")
        rank, alpha = s.of(official(m, name))
        adapted = LoRALinear(linear, rank, alpha, s.dropout, generator, s.rslora)
        setattr(m.get_submodule(parent), leaf, adapted)


@contextlib.contextmanager
def disabled(m):
    """Inside, m computes what its base model computes. Nests, and restores the state before it on
    any exit."""
    before = {layer: layer.enabled for layer in layers(m).values()}
    for layer in before:
        layer.enabled = False
    try:
        yield m
    finally:
        for layer, enabled in before.items():
            layer.enabled = enabled


def merge(m):
    """W <- W + scaling * B A, in place; the sum in float32, rounded once to W's dtype. Twice is as
    good as once. Afterwards the model's parameters are those of the base class, and it can be
    saved. Returns m."""
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


# ----------------------------------------------------------------------------------- save and load


def save(m, folder, base=None):
    """Write the adapter as a PEFT folder. base: the name or path of the base model, for PEFT's
    AutoPeftModel.

    Raises ValueError for a model without adapters."""
    found = layers(m)
    if not found:
        raise ValueError("the model has no adapter to save: lora.inject(m) first")
    ranks, alphas = {}, {}  # official name -> number
    for name, layer in found.items():
        ranks[official(m, name)], alphas[official(m, name)] = layer.rank, layer.alpha
    rank, rank_pattern = common(ranks)
    alpha, alpha_pattern = common(alphas)
    layer = next(iter(found.values()))
    config = dict(peft_type="LORA", base_model_name_or_path=base and str(base), r=rank)
    config.update(lora_alpha=alpha, alpha_pattern=alpha_pattern, rank_pattern=rank_pattern, lora_dropout=layer.dropout)
    config.update(target_modules=short_names(m, found), use_rslora=layer.rslora, bias="none", fan_in_fan_out=False)
    config.update(inference_mode=True, task_type=None)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: p.detach().contiguous() for name, p in tensors(m).items()}
    # Both are whole, under names that nobody has, before either takes its place: a folder never holds half a file.
    new = f".{uuid.uuid4().hex[:8]}.tmp"
    files = ("adapter_model.safetensors", "adapter_config.json")
    try:
        (folder / f"{files[0]}{new}").write_bytes(as_bytes(weights, metadata={"format": "pt"}))
        (folder / f"{files[1]}{new}").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for file in files:
            (folder / f"{file}{new}").replace((folder / file).resolve())  # of a link the target is written
    finally:
        for file in files:
            (folder / f"{file}{new}").unlink(missing_ok=True)


def common(numbers):
    """(the most frequent number, PEFT's pattern for the layers that have another), from official
    name -> number"""
    usual, pattern = Counter(numbers.values()).most_common(1)[0][0], {}
    for name, number in numbers.items():
        if number != usual:
            # A key fits every name that ends in it: one that is the end of another's name is tied
            # to the beginning.
            ends_another = any(other.endswith("." + name) for other in numbers)
            pattern["^" * ends_another + name] = number
    return usual, pattern


def short_names(m, found):
    """The last parts of the adapted layers' names, as PEFT writes them; the whole names where
    those fit others too."""
    whole = sorted(official(m, name) for name in found)
    short = sorted({name.rsplit(".", 1)[-1] for name in whole})
    if find(m, short).keys() == found.keys():
        return short
    return whole


# Of PEFT's settings: those that change nothing here or that settings() reads, and the values of
# others that are computed here. Anything else that is set asks for a variant of LoRA that this
# module is not.
HARMLESS = set(
    """r lora_alpha lora_dropout target_modules rank_pattern alpha_pattern revision peft_type
    base_model_name_or_path task_type auto_mapping inference_mode peft_version layers_pattern
    loftq_config megatron_config megatron_core qalora_group_size ensure_weight_tying""".split()
)
PLAIN = dict(bias=("none", None), init_lora_weights=(True, False, None, "gaussian"), use_rslora=(True, False, None))


def adapter_folder(path):
    """A local folder for an adapter's folder or Hub repo id (owner/name, downloaded if need be).

    Raises FileNotFoundError where it is neither, naming the newest checkpoint of a folder that
    holds a run's."""
    folder = Path(path)
    if (folder / "adapter_config.json").is_file():
        return folder
    if (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is a model, not an adapter (no adapter_config.json)")
    if newest := max(folder.glob("*/adapter_config.json"), key=training_step, default=None):
        raise FileNotFoundError(f"{folder} is a run: take one of its checkpoints, such as {newest.parent}")
    if folder.is_dir():
        raise FileNotFoundError(f"no adapter_config.json in {folder}: not a PEFT adapter folder")
    if folder.exists() or not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", str(path)):
        raise FileNotFoundError(f"no adapter {path}: give a PEFT folder, or a Hub repo id (owner/name)")
    # Imported for a Hub id only: everything else works without the package.
    from huggingface_hub import snapshot_download

    wanted = ["adapter_config.json", "adapter_model.safetensors"]  # no pickles
    try:
        found = Path(snapshot_download(str(path), allow_patterns=wanted))
    except Exception as e:  # the hub library raises errors of its classes, requests' and httpx's
        reason = str(e).strip().split("\n")[0]
        raise FileNotFoundError(f"no folder {path}, and no download from the Hub: {type(e).__name__}: {reason}") from e
    if not (found / "adapter_config.json").is_file():
        raise FileNotFoundError(f"no adapter_config.json in the Hub's {path}: not a PEFT adapter")
    return found


def training_step(file):
    """(optimizer steps done before a checkpoint that holds this file, when the file was written)"""
    try:
        step = int(read_json(file.with_name("trainer.json"))["step"])
    except (OSError, ValueError, KeyError, TypeError):
        step = -1
    return step, file.stat().st_mtime


def read_json(file):
    try:
        return {} | json.loads(file.read_text(encoding="utf-8-sig"))  # an error where it is no object
    except (ValueError, TypeError, RecursionError) as e:
        raise ValueError(f"{file}: not valid JSON, or no object ({e})") from e


def settings(path):
    """The Settings of a PEFT adapter: a folder, or a Hub repo id.

    Raises FileNotFoundError, or ValueError for another method than LoRA and for each setting that
    is not computed here.
    """
    file = adapter_folder(path) / "adapter_config.json"
    config = read_json(file)
    if config.get("peft_type", "LORA") != "LORA":
        raise ValueError(f"{file}: peft_type is {config['peft_type']!r}, and only LoRA adapters are supported")
    odd = []
    for key, value in config.items():
        if key not in HARMLESS and (value not in PLAIN[key] if key in PLAIN else value):
            odd.append(f"{key} = {value!r}")
    if odd:
        raise ValueError(f"{file}: unsupported adapter settings {', '.join(odd)}")
    if missing := [key for key in ("r", "lora_alpha", "target_modules") if config.get(key) is None]:
        raise ValueError(f"{file}: {', '.join(missing)} missing: not a readable LoRA adapter")
    targets = config["target_modules"]
    if not isinstance(targets, (list, str)) or any(not isinstance(target, str) for target in targets):
        raise ValueError(f"{file}: target_modules is {targets!r}, not a list of names or a pattern")
    patterns = [config.get(key) or {} for key in ("rank_pattern", "alpha_pattern")]
    for pattern in patterns:
        try:
            by_pattern(pattern, "", None)
        except (re.error, AttributeError) as e:
            raise ValueError(f"{file}: {pattern!r} does not map names of layers to numbers ({e})") from e
    dropout, rslora = config.get("lora_dropout") or 0.0, bool(config.get("use_rslora"))
    s = Settings(config["r"], config["lora_alpha"], targets, dropout, rslora, *patterns)
    check_settings(s, f"{file}: ")
    return s


def load(m, path):
    """Inject and fill the adapter of a PEFT folder or Hub repo id; into the adapter that m has
    already, if its shapes fit. The layers are those that have tensors: some tools name targets
    that a model does not have. Returns m.

    Raises FileNotFoundError, or ValueError with every unsupported setting or every missing,
    unexpected or misshapen tensor, for values that are not finite, and for files with another hash
    than a manifest.json says; m is unchanged then."""
    folder = adapter_folder(path)
    check_manifest(folder, ["adapter_config.json", "adapter_model.safetensors"])
    s = settings(folder)
    stored = read_tensors(folder)
    mine = layers(m)
    targeted = mine or find(m, s.targets, every=False)
    wrong, shapes = [], {}
    for name, linear in targeted.items():
        whole = official(m, name)
        rank, _ = s.of(whole)
        shapes[f"{PREFIX}{whole}.lora_A.weight"] = [rank, linear.in_features]
        shapes[f"{PREFIX}{whole}.lora_B.weight"] = [linear.out_features, rank]
        if mine and linear.rank != rank:
            wrong.append(f"rank {rank} of {whole}, but the model's adapter has rank {linear.rank}")
    wrong += [f"missing {name}" for name in shapes if name not in stored]
    for name, tensor in stored.items():
        if name not in shapes:
            wrong.append(f"unexpected {name}")
        elif list(tensor.shape) != shapes[name]:
            wrong.append(f"{name} is {list(tensor.shape)}, not {shapes[name]}")
    if wrong:
        more = f"; and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise ValueError(f"{folder}: the adapter does not fit this model: {'; '.join(wrong[:8])}{more}")

    if not mine:
        wrap(m, targeted, s)
    unmerge(m)
    for name, layer in layers(m).items():
        layer.alpha, layer.rslora, layer.dropout = s.of(official(m, name))[1], s.rslora, s.dropout
    with torch.no_grad():
        for name, p in tensors(m).items():
            p.copy_(stored[name])
    return m


def read_tensors(folder):
    """PEFT's tensor name -> tensor. Raises FileNotFoundError or ValueError."""
    file, pickle = folder / "adapter_model.safetensors", folder / "adapter_model.bin"
    if not file.is_file() and pickle.is_file():
        way_out = "save the adapter with PEFT's safe_serialization=True"
        raise FileNotFoundError(f"{folder}: {pickle.name} is a pickle and may run code, so it is never read: {way_out}")
    if not file.is_file():
        raise FileNotFoundError(f"no {file.name} in {folder}")
    try:
        stored = load_file(file)
    except SafetensorError as e:
        raise ValueError(f"{file}: truncated or not a safetensors file ({e})") from e
    for name, tensor in stored.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{file}: {name} has values that are not finite: the adapter is damaged")
    return stored


def check_manifest(folder, files):
    """Raises ValueError for a file whose SHA-256 is not the one in manifest.json, where there is
    one that has it: a checkpoint of training has."""
    manifest = folder / "manifest.json"
    hashes = read_json(manifest) if manifest.is_file() else {}
    for file in [file for file in files if file in hashes and (folder / file).is_file()]:
        if hashlib.sha256((folder / file).read_bytes()).hexdigest() != hashes[file]:
            raise ValueError(f"{folder / file} was damaged or changed: not the SHA-256 of {manifest.name}")
