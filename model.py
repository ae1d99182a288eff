"""The bidirectional transformer of masked diffusion language models: LLaDA and Dream.

    # a folder or a Hub repo id
    m = model.load("GSAI-ML/LLaDA-8B-Instruct", dtype=torch.bfloat16, device="cuda")
    logits = m(ids, attention_mask=None, positions=None)         # [B, L] -> [B, L or P, V]
    model.save(m, "out/model")                                   # the layout it was loaded from

logits[b, i] always predicts token i. Checkpoints are Hugging Face folders (config.json, *.safetensors)
and are read without the transformers library; nothing in a checkpoint is executed.

Sources: ML-GSAI/LLaDA (modeling_llada.py: an OLMo / Llama block without a causal mask) and DreamLM/Dream
(modeling_dream.py: Qwen2 without one). The families differ in these points, each a field of `Config`:

                      LLaDA-8B       Dream-7B
    biases            none           on q, k and v
    key-value heads   all            4 for 28 of q
    RoPE rotates in   float32        the model's dtype
    padding           is counted     positions skip it
    output at i       token i        token i + 1

A further family is an entry of `FAMILIES`, in another file where its network differs (`ELSEWHERE`).

Dimensions: B batch, L length, P positions asked for, V vocabulary, D width, H query heads,
K key-value heads, E width of a head.
"""

import hashlib
import importlib
import json
import mmap
import re
import tempfile
from collections import namedtuple
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def key(*keys, least=1, most=2**31, **more):
    """A field of Config that a config.json has under the first of these keys that is there; the bounds of a number
    are what keeps accidents and attacks out."""
    return field(metadata=dict(keys=keys, least=least, most=most), **more)


@dataclass
class Config:
    """What the network computes. `parse_config` reads it from a config.json; of two keys the first is LLaDA's."""

    family: str  # a name in FAMILIES
    # rows of the embedding and of the output head; may exceed the tokenizer's ids
    vocab_size: int = key("embedding_size", "vocab_size")
    mask_id: int = key("mask_token_id", least=0)  # the mask token
    eos_id: int = key("eos_token_id", least=0)  # ends a response
    width: int = key("d_model", "hidden_size")
    layers: int = key("n_layers", "num_hidden_layers", most=1024)
    heads: int = key("n_heads", "num_attention_heads")  # query heads
    kv_heads: int = key("n_kv_heads", "num_key_value_heads", "n_heads")  # key-value heads, a divisor of heads
    mlp_width: int = key("mlp_hidden_size", "intermediate_size")
    norm_eps: int | float = key("rms_norm_eps", least=0)
    rope_theta: int | float = key("rope_theta", least=1e-6)
    tied: bool = key("weight_tying", "tie_word_embeddings", least=0)  # the output head is the embedding
    pad_id: int | None = key("pad_token_id", default=None, least=0)  # fills up a batch; where it is not given, eos_id
    # an even number; where it is not given, width / heads
    head_width: int | None = key("head_dim", default=None)
    qkv_bias: bool = key("include_qkv_bias", default=False, least=0)
    # rotate q and k in float32, then cast back; otherwise in the model's dtype
    rope_float32: bool = key("rope_full_precision", default=False, least=0)
    # the longest context in tokens; callers warn beyond it
    max_length: int | None = key("max_sequence_length", "max_position_embeddings", default=None)
    # a token sees its block of so many tokens and earlier ones; None = everything
    block_length: int | None = key("block_size", "block_length", default=None)
    grid: str | None = None  # where such blocks are counted from: the "start" of a row, or the end of its "prompt"
    qk_norm: bool = False  # normalise each head of q and k before it is rotated
    weight_first: bool = False  # RMSNorm multiplies by its weight before the cast to the model's dtype
    skip_padding: bool = False  # positions count real tokens only
    shifted: bool = False  # position i of the network predicts token i + 1
    raw: dict = field(default_factory=dict, repr=False)  # config.json as read, and as save() writes it


# ------------------------------------------------------------------------------------- transformer


class RMSNorm(nn.Module):
    """Normalised in float32, then scaled by the weight and cast, in the family's order: the wrong
    one costs as much as bfloat16's rounding."""

    def __init__(self, width, c):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps, self.weight_first = c.norm_eps, c.weight_first

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return (self.weight * y).to(x.dtype) if self.weight_first else self.weight * y.to(x.dtype)


def rotate(x, cos, sin):
    """Rotary position embedding of x [B, H, L, E], halves (not pairs) rotated, in the dtype of cos
    and sin [1 or B, L, E]."""
    dtype, x = x.dtype, x.to(cos.dtype)
    a, b = x.chunk(2, dim=-1)
    return (x * cos[:, None] + torch.cat((-b, a), dim=-1) * sin[:, None]).to(dtype)


def pick(x, at):
    """x [1 or B, L, D] at the places at [B, P] -> [B, P, D]."""
    return x.expand(len(at), -1, -1).gather(1, at[..., None].expand(-1, -1, x.shape[-1]))


def attend(q, k, v, mask):
    """Attention of q [B, H, P, E] over k and v [B, K, L, E] where mask is True (None = everywhere)
    -> [B, H, P, E]."""
    groups = q.shape[1] // k.shape[1]
    # No fused CUDA kernel takes both a mask and fewer keys than queries
    if groups > 1 and mask is not None:
        k, v, groups = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), 1
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=groups > 1)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.head_width = c.head_width
        self.q_proj = nn.Linear(c.width, c.heads * c.head_width, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.width, c.kv_heads * c.head_width, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.width, c.kv_heads * c.head_width, bias=c.qkv_bias)
        self.o_proj = nn.Linear(c.heads * c.head_width, c.width, bias=False)
        self.q_norm = RMSNorm(c.head_width, c) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(c.head_width, c) if c.qk_norm else nn.Identity()
        # What measures or replaces the kernel sets another function here, on one instance
        self.attend = attend

    def forward(self, x, cos, sin, mask, at=None, cache=None):
        """x [B, L, D] -> [B, L, D], or [B, P, D] where `at` [B, P] names the places whose queries
        are wanted. mask: None, [B, 1, 1, L], or [1 or B, 1, L, L]: a row for each query.
        cache: anything whose put(k, v) gives the keys and values to attend to."""
        k, v = self.split(self.k_proj(x)), self.split(self.v_proj(x))  # [B, K, L, E]
        k = rotate(self.k_norm(k), cos, sin)
        if cache is not None:
            k, v = cache.put(k, v)
        if at is not None:
            x, cos, sin = pick(x, at), pick(cos, at), pick(sin, at)
            if mask is not None and mask.shape[2] > 1:
                mask = pick(mask[:, 0], at)[:, None]
        q = rotate(self.q_norm(self.split(self.q_proj(x))), cos, sin)  # [B, H, P, E]
        return self.o_proj(self.attend(q, k, v, mask).transpose(1, 2).flatten(2))

    def split(self, x):
        """[B, L, heads * E] -> [B, heads, L, E]"""
        return x.view(*x.shape[:2], x.shape[2] // self.head_width, self.head_width).transpose(1, 2)


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c.width, c.mlp_width, bias=False)
        self.up_proj = nn.Linear(c.width, c.mlp_width, bias=False)
        self.down_proj = nn.Linear(c.mlp_width, c.width, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.attn_norm = RMSNorm(c.width, c)
        self.attn = Attention(c)
        self.mlp_norm = RMSNorm(c.width, c)
        self.mlp = MLP(c)

    def forward(self, x, cos, sin, mask, at=None, cache=None):
        """x [B, L, D] -> [B, L, D], or [B, P, D] at the places at [B, P]: all that the last block
        has to compute."""
        y = self.attn(self.attn_norm(x), cos, sin, mask, at, cache)
        x = y + (x if at is None else pick(x, at))
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """The network. Set `gradient_checkpointing = True` to recompute each block in the backward
    pass instead of keeping its activations."""

    # Whoever decodes may ask for head=False, and for the logits of a few rows at a time by unembed(x).
    splits_head = True

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config)
        self.head = None if config.tied else nn.Linear(config.width, config.vocab_size, bias=False)
        self.gradient_checkpointing = False
        self.files = {}  # official tensor name -> the file of the checkpoint that holds it

    def forward(self, ids, attention_mask=None, positions=None, head=True):
        """ids [B, L] -> logits [B, L, V]; logits[:, i] predicts token i, for every family.

        attention_mask [B, L]: 1 = real token, 0 = padding, on either side. Rows of padding have no
        meaning, nor has Dream's first real token after left padding (its logits come from the
        padding before it).
        positions [B, P]: places (columns of ids), where alone the output head runs; the result is [B, P, V].
        head: False = what the output head gets, [B, L or P, D], for unembed() of some at a time.
        """
        if self.config.shifted:
            # Dream was adapted from an autoregressive model: token i is predicted at i - 1.
            if positions is None:
                positions = torch.arange(ids.shape[1], device=ids.device).expand(len(ids), -1)
            positions = (positions - 1).clamp(min=0)
        pos, mask = self.pos_of(ids, attention_mask), self.visible(attention_mask)
        x = self.hidden(ids, pos, mask, positions)  # [B, L or P, D]
        return self.unembed(x) if head else x

    def pos_of(self, ids, attention_mask):
        """The position of each token in its row, for RoPE: among the real ones, or its place, [1 or B, L]."""
        if attention_mask is None or not self.config.skip_padding:
            return torch.arange(ids.shape[1], device=ids.device)[None]
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)

    def visible(self, attention_mask):
        """Which keys the queries see: None for all, or [B, 1, 1, L], the real ones."""
        # Padding is hidden as a key only. As a query it sees real tokens too: softmax over an
        # empty row is NaN.
        return None if attention_mask is None else attention_mask.bool()[:, None, None, :]

    def hidden(self, ids, pos, mask, at=None, caches=None):
        """What the output head gets: of ids [B, n] at pos [1 or B, n], [B, n, D], or [B, P, D] of the places
        at [B, P]. caches: one for each block, see Attention."""
        x = self.embed(ids)  # [B, n, D]
        cos, sin = self.rope(pos, x.dtype)  # [1 or B, n, E]
        for i, block in enumerate(self.layers):
            # The last block computes only the places where the head runs.
            last = at if i == len(self.layers) - 1 else None
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, mask, last, caches and caches[i], use_reentrant=False)
            else:
                x = block(x, cos, sin, mask, last, caches and caches[i])
        return self.norm(x)

    def unembed(self, x):
        """The output head: [..., D] -> logits [..., V]."""
        return self.head(x) if self.head is not None else F.linear(x, self.embed.weight)

    def rope(self, pos, dtype):
        """cos and sin [1 or B, L, E] of pos [1 or B, L], in the dtype that the family rotates in."""
        c, E = self.config, self.config.head_width
        frequency = 1.0 / c.rope_theta ** (torch.arange(0, E, 2, device=pos.device, dtype=torch.float32) / E)
        # Angles are float32 even for a bfloat16 model: bfloat16 cannot tell 257 from 256.
        angle = pos[..., None].float() * frequency  # [1 or B, L, E / 2]
        angle = torch.cat((angle, angle), dim=-1)  # [1 or B, L, E]
        dtype = torch.float32 if c.rope_float32 else dtype
        return angle.cos().to(dtype), angle.sin().to(dtype)

    def checkpoint_name(self, name):
        """The official name of a parameter or module of ours: layers.0.attn.o_proj of a LLaDA ->
        model.transformer.blocks.0.attn_out."""
        known = FAMILIES[self.config.family].names
        return ".".join(filter(None, [known.get(part, part) for part in name.split(".")]))


# ------------------------------------------------------------------------------------------ config


# What the checkpoints of a family of models mean:
#   model_type: what config.json calls the family, in lower case
#   defaults: field of Config -> what all its models do, and what holds where a file leaves a key out
#   names: our name of a part -> that of the official class, where they differ; "" = it has none
#   required: key -> the value that is computed here: with another one it is a different network
#   network: the class of the model
Family = namedtuple("Family", "model_type defaults names required network", defaults=[Transformer])
# Keys that ask for what no family here has (mixtures of experts, quantized weights), and for blocks of tokens.
NOT_HERE = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "quantization_config")
NO_BLOCKS = dict(block_size=None, block_length=None)
# fmt: off
LLADA = Family(
    "llada", defaults=dict(rope_float32=True),
    names=dict(embed="model.transformer.wte", norm="model.transformer.ln_f", head="model.transformer.ff_out",
        layers="model.transformer.blocks", attn="", mlp="", o_proj="attn_out", mlp_norm="ff_norm", gate_proj="ff_proj",
        down_proj="ff_out"),  # the same last name as the output head
    required=NO_BLOCKS | dict(
        activation_type="silu", block_type="llama", block_group_size=1, layer_norm_type="rms", rope=True, alibi=False,
        attention_dropout=0, embedding_dropout=0, residual_dropout=0, input_emb_norm=False, scale_logits=False))
DREAM = Family(
    # Whether there are biases is not read from attention_bias by the official code either.
    "dream", defaults=dict(qkv_bias=True, shifted=True, skip_padding=True),
    names=dict(embed="model.embed_tokens", norm="model.norm", head="lm_head", layers="model.layers", attn="self_attn",
        attn_norm="input_layernorm", mlp_norm="post_attention_layernorm"),
    required=dict(hidden_act="silu", attention_dropout=0, use_mrope=False, use_sliding_window=False) | NO_BLOCKS)
# fmt: on
FAMILIES = {"llada": LLADA, "dream": DREAM}  # Config.family -> Family
ELSEWHERE = {"sdar": "blocks", "a2d-qwen3": "blocks", "a2d-qwen2": "blocks"}  # model_type -> the folder that adds it


def parse_config(raw, where="config.json"):
    """Config from the content of a config.json. Keys that are not known are kept in `raw`, and not looked at.

    Raises ValueError: one line with every missing and unsupported key, that begins with `where`."""
    kind = str(raw.get("model_type")).lower()
    if kind in ELSEWHERE and Path(__file__).with_name(ELSEWHERE[kind]).is_dir():
        importlib.import_module(ELSEWHERE[kind])
    known = {family.model_type: name for name, family in FAMILIES.items()}
    if kind not in known:
        more = "".join(f", {other} (with {folder}/)" for other, folder in ELSEWHERE.items() if other not in known)
        raise ValueError(f"{where}: model_type is {raw.get('model_type')!r}; this code knows {', '.join(known)}{more}")
    if strange := [key for key in NOT_HERE if raw.get(key)]:
        raise ValueError(f"{where}: {', '.join(strange)}: no mixture of experts and no quantized weights are supported")
    family = FAMILIES[known[kind]]
    values, wrong = read_values(raw, family)
    for key, wanted in family.required.items():
        given = raw.get(key)
        if given is not None and given != wanted and (given or wanted):  # false, 0, "" and [] ask for nothing
            wrong.append(f"{key} is {given!r}, supported is {wanted!r}")
    if not wrong:
        values = dict(pad_id=values["eos_id"], head_width=values["width"] // values["heads"]) | values
        c = Config(**{"family": known[kind], **values}, raw=dict(raw))
        if c.head_width % 2:
            wrong.append(f"head_dim is {c.head_width} ({c.heads} heads), which is not even and cannot be rotated")
        if max(c.mask_id, c.eos_id, c.pad_id) >= c.vocab_size:
            wrong.append(f"ids {c.mask_id}, {c.eos_id} and {c.pad_id} are not all in a vocabulary of {c.vocab_size}")
        kinds = raw.get("layer_types") or []
        if not isinstance(kinds, list) or kinds.count("full_attention") < len(kinds):
            wrong.append(f"layer_types is {kinds!r}, supported is 'full_attention' for every layer")
    if wrong:
        raise ValueError(f"{where}: {'; '.join(wrong)}")
    return c


def read_values(raw, family):
    """(the fields of Config that a config.json gives; what is wrong with them)"""
    theta, wrong = read_rope(raw)
    values, raw = dict(family.defaults), raw | dict(rope_theta=theta)
    for f in fields(Config):
        there = [key for key in f.metadata.get("keys", ()) if raw.get(key) is not None]
        value = raw[there[0]] if there else values.get(f.name)
        # Of several ends the first counts; Config.raw keeps the others.
        value = value[0] if f.name == "eos_id" and isinstance(value, list) and value else value
        if f.metadata and (value is not None or f.default is MISSING):
            values[f.name], name = value, " or ".join(there or f.metadata["keys"])
            if not isinstance(value, f.type) or not f.metadata["least"] <= value <= f.metadata["most"]:
                wrong.append(f"{name} is {value!r}: missing, or of another type or size than a model has")
    return values, wrong


def read_rope(raw):
    """(theta, what is wrong) of the rotary embeddings. Since transformers 5 it stands in rope_parameters, perhaps
    for each type of layer, beside a type of which only the plain one is computed here; rope_scaling is the older
    name of the same."""
    theta, wrong = raw.get("rope_theta"), []
    for key in ("rope_parameters", "rope_scaling"):
        found = raw.get(key) or {}
        found = found.get("full_attention", found) if isinstance(found, dict) else found
        settings = found if isinstance(found, dict) else {key: found}
        theta = theta or settings.get("rope_theta")
        if any(value not in (None, "default", 1, theta) for value in settings.values()):
            wrong.append(f"{key} is {raw[key]!r}: only plain rotary embeddings, of one theta, are computed")
    return theta, wrong


# ----------------------------------------------------------------------------------- load and save


def create(raw, generator=None, dtype=torch.float32, device="cpu"):
    """A model with random weights from the content of a config.json: normal, with the
    standard deviation of the config (init_std or initializer_range, else 0.02), and smaller by sqrt(2 layers)
    where a block adds to its input."""
    m = empty(parse_config(raw)).to_empty(device=device).to(dtype)
    std = raw.get("init_std") or raw.get("initializer_range") or 0.02
    for name, p in m.named_parameters():
        if p.ndim == 1:
            nn.init.constant_(p, float(not name.endswith("bias")))
        else:
            adds = name.endswith(("o_proj.weight", "down_proj.weight"))
            nn.init.normal_(p, std=std / (2 * m.config.layers) ** (adds / 2), generator=generator)
    return m.eval()


def empty(config):
    """The modules without storage: no time and no memory is spent on weights that are about to be
    replaced."""
    with torch.device("meta"):
        return FAMILIES[config.family].network(config)


def resolve(path):
    """A local folder for a folder or a Hub repo id ("GSAI-ML/LLaDA-8B-Instruct", downloaded if
    need be).

    Raises FileNotFoundError when it is neither, or a folder without a config.json."""
    folder = Path(path)
    if (folder / "config.json").is_file():
        return folder
    if (folder / "adapter_config.json").is_file():
        raise FileNotFoundError(f"{folder} is an adapter, not a model: load the model that it was made for, then it")
    if folder.exists() or not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", str(path)):
        raise FileNotFoundError(f"no model folder {path}: no config.json in {folder}, nor a Hub id (owner/name)")
    # Imported for a Hub id only: everything else works without the package.
    from huggingface_hub import snapshot_download

    # No pickles. Code is never run here; a merged model is written with it, for those who load it
    # with transformers.
    try:
        return Path(snapshot_download(str(path), allow_patterns="*.json *.safetensors *.txt *.jinja *.py".split()))
    except Exception as e:  # the hub library raises errors of its classes, requests' and httpx's
        reason = str(e).strip().split("\n")[0]
        raise FileNotFoundError(f"no folder {path}, and no download from the Hub: {type(e).__name__}: {reason}") from e


def load(path, dtype=torch.float32, device="cpu", spread=None, fill=None):
    """Transformer in eval mode from a Hugging Face folder or Hub repo id, one tensor at a time;
    dtype None keeps the dtype of each stored tensor.

    spread: a function that spreads the model, still without storage, over several processes. fill(target,
    file, name) then copies a tensor of an open safetensors file into a parameter -> the part of it that
    this process holds.

    Memory peaks at the size of the model plus one tensor: modules are made on the meta device, and
    each tensor is read through a mapping that is given back at once. Nothing refers to
    the files afterwards. Raises FileNotFoundError or ValueError; one error lists every missing,
    unexpected or misshapen tensor. Values that are not finite, and files that a manifest.json
    knows with another hash, are errors too.
    """
    folder = resolve(path)
    m = empty(parse_config(read_json(folder / "config.json"), folder / "config.json"))
    m = m if spread is None else spread(m.to(dtype)).to_empty(device=device)
    stored = find_tensors(folder)
    m.files = {official: file for official, (file, _) in stored.items()}
    check_manifest(folder, {"config.json", *m.files.values()})
    names = {m.checkpoint_name(name): name for name, _ in m.named_parameters()}
    if m.config.tied and m.checkpoint_name("head.weight") in stored:
        names[m.checkpoint_name("head.weight")] = "embed.weight"  # some tools write a tied head as well
    wrong = [f"missing {official}" for official in names if official not in stored]
    for official, (_, shape) in stored.items():
        if official not in names:
            wrong.append(f"unexpected {official}")
        elif shape != list(m.get_parameter(names[official]).shape):
            wrong.append(f"{official} is {shape}, the config wants {list(m.get_parameter(names[official]).shape)}")
    wrong = wrong or fill_all(m, folder, names, dtype, device, fill if spread else None)
    if wrong:
        more = f"; and {len(wrong) - 20} more" if len(wrong) > 20 else ""
        raise ValueError(f"{folder}: {'; '.join(wrong[:20])}{more}")
    return m.eval()


def fill_all(m, folder, names, dtype, device, fill):
    """Fill the parameters of m, names: official name -> ours -> a list of errors. A name of ours that comes
    twice has to have the same values again: the embedding, and a stored copy of a tied head."""
    wrong, parts = [], {}  # our name -> what this process holds of it
    for official, name in names.items():
        target = m.get_parameter(name)
        with safe_open(folder / m.files[official], framework="pt") as f:
            if fill is None:
                part = f.get_tensor(official).to(device=device, dtype=dtype, copy=True)
            else:
                part = fill(torch.empty_like(target) if name in parts else target, f, official)
        # The extremes are NaN or infinite if any value is, and take no memory: isfinite() would double
        # the largest tensor.
        if part.numel() and not torch.stack(torch.aminmax(part)).isfinite().all():
            wrong.append(f"{official} in {m.files[official]} has values that are not finite: the file is damaged")
        elif name in parts and not torch.equal(part.to(parts[name].dtype), parts[name]):
            wrong.append(f"{official} differs from the embedding, but the config says that they are tied")
        elif target.is_meta:
            parent, _, leaf = name.rpartition(".")
            setattr(m.get_submodule(parent), leaf, nn.Parameter(part))
        parts.setdefault(name, part)
    return wrong


def find_tensors(folder):
    """Official tensor name -> (file name, shape), from the headers of model.safetensors or of the shards in
    the index. Instead of a shape: what else but floating-point numbers is there."""
    index = folder / "model.safetensors.index.json"
    listed = read_json(index).get("weight_map") if index.is_file() else {}
    if not isinstance(listed, dict) or any(Path(str(file)).name != file for file in listed.values()):
        raise ValueError(f"{index}: weight_map must map tensor names to file names in this folder")
    files, found = sorted(set(listed.values())) or ["model.safetensors"], {}
    if missing := [file for file in files if not (folder / file).is_file()]:
        raise FileNotFoundError(f"{folder}: missing {', '.join(missing)} (the weights, or shards in {index.name})")
    for file in files:
        try:
            with safe_open(folder / file, framework="pt") as f:
                for name in f.keys():  # noqa: SIM118 - not a dict
                    shape, kind = f.get_slice(name).get_shape(), f.get_slice(name).get_dtype()
                    if listed.get(name, file) == file:
                        plain = kind in ("F64", "F32", "F16", "BF16")
                        found[name] = (file, shape if plain else f"of {kind} in {file}, quantized")
        except SafetensorError as e:
            raise ValueError(f"{folder / file}: truncated or not a safetensors file ({e}); download it again") from e
    return found


def check_manifest(folder, files):
    """Raises ValueError for a file whose SHA-256 is not the one in manifest.json, where there is
    one that has it: a checkpoint of training has."""
    manifest = folder / "manifest.json"
    hashes = read_json(manifest) if manifest.is_file() else {}
    for file in sorted(hashes.keys() & files):
        with open(folder / file, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if hashlib.sha256(content).hexdigest() != hashes[file]:
                raise ValueError(f"{folder / file} was damaged or changed: not the SHA-256 of {manifest.name}")


def read_json(file):
    try:
        return {} | json.loads(file.read_text(encoding="utf-8-sig"))  # of two objects only
    except (ValueError, TypeError, RecursionError) as e:
        raise ValueError(f"{file}: not valid JSON, or no object ({e})") from e


def save(m, path, whole=torch.detach, write=True):
    """Write config.json and the safetensors files in the layout, names and shards that m was
    loaded from. Weights and an index that were in the folder before are removed.

    whole: a function that makes a parameter the tensor to write: gathered, where it is spread over
    processes. All of them then call this together, and one of them with write; it holds the
    tensors of one file at a time.

    Raises ValueError while an adapter is attached: lora.merge(m) first, or save the adapter alone
    with lora.save."""
    parameters = {m.checkpoint_name(name): p for name, p in m.named_parameters()}
    if extra := parameters.keys() - {m.checkpoint_name(name) for name, _ in empty(m.config).named_parameters()}:
        raise ValueError(f"not part of a {m.config.family} checkpoint: {min(extra)}, ...; merge the adapter first")
    path, index, texts = Path(path), "model.safetensors.index.json", {"config.json": m.config.raw}
    path.mkdir(parents=True, exist_ok=True)
    where = {official: m.files.get(official, "model.safetensors") for official in parameters}
    files = sorted(set(where.values()))
    if files != ["model.safetensors"]:
        size = sum(p.numel() * p.element_size() for p in parameters.values())
        texts = {index: {"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))}, **texts}

    # All is written beside its place, in a folder that nobody has and that is gone whatever happens, before anything
    # old goes. Killed in between, the folder is without a config.json: it cannot be loaded, and never are old and new
    # weights mixed. A link goes, and not what it points to: that may be a cache of the Hub, which others read.
    with tempfile.TemporaryDirectory(dir=path if write else None) as new:
        for file in files:
            tensors = {}
            for official in [name for name in where if where[name] == file]:
                tensor = whole(parameters[official])
                if write:
                    tensors[official] = tensor.contiguous()
            if write:
                save_file(tensors, Path(new, file), metadata={"format": "pt"})
        if not write:
            return
        for file, content in texts.items():
            Path(new, file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        mode = Path(new, "config.json").stat().st_mode  # the library makes its files private, whatever the umask
        for old in (path / "config.json", path / index, *path.glob("model*.safetensors")):
            old.unlink(missing_ok=True)
        for file in (*files, *texts):
            Path(new, file).chmod(mode)
            Path(new, file).replace(path / file)
