"""One bidirectional transformer for both families of masked diffusion language models: LLaDA-8B and Dream-7B.

    m = model.load("GSAI-ML/LLaDA-8B-Instruct", dtype=torch.bfloat16, device="cuda")  # a folder or a Hub repo id
    logits = m(ids, attention_mask=None, positions=None)                               # [B, L] -> [B, L or P, V]
    model.save(m, "out/model")                                                         # the layout it was loaded from

logits[b, i] always predicts token i. Checkpoints are Hugging Face folders (config.json, *.safetensors) and are read
without the transformers library; nothing in a checkpoint is executed.

Sources: ML-GSAI/LLaDA (modeling_llada.py: an OLMo / Llama block without a causal mask) and DreamLM/Dream
(modeling_dream.py: Qwen2 without a causal mask). What differs between the two is in `Config`, in `NAMES`, and where a
line of code says so:

                      LLaDA-8B                        Dream-7B
    biases            none                            on q, k and v
    key-value heads   as many as query heads          4 for 28 query heads
    RoPE              rotates in float32              rotates in the model's dtype
    padding           positions not shifted           positions count real tokens only
    output            logits[i] predicts token i      logits[i] predicts token i + 1 (shifted here)

Dimensions: B batch, L length, P positions asked for, V vocabulary, D width, H query heads, K key-value heads,
E width of a head.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# ----------------------------------------------------------------------------------------------------------- config


@dataclass
class Config:
    family: str  # "llada" or "dream"
    vocab_size: int  # rows of the embedding and of the output head; may exceed the tokenizer's ids
    mask_id: int  # the mask token
    eos_id: int  # ends a response
    pad_id: int  # fills up a batch
    width: int
    layers: int
    heads: int  # query heads
    kv_heads: int  # key-value heads, a divisor of heads
    mlp_width: int
    rope_theta: float
    norm_eps: float
    qkv_bias: bool
    tied: bool  # the output head is the embedding
    rope_float32: bool  # rotate q and k in float32, then cast back; otherwise in the model's dtype
    shifted: bool  # position i of the network predicts token i + 1
    raw: dict = field(default_factory=dict, repr=False)  # config.json as read, and as save() writes it


# What a config.json may say, per family. READ: our field -> their key. REQUIRED: the values that this code computes;
# anything else is a different network. IGNORED: keys that do not change what the network computes.
READ = {
    "llada": dict(
        mask_id="mask_token_id",
        eos_id="eos_token_id",
        pad_id="pad_token_id",
        width="d_model",
        layers="n_layers",
        heads="n_heads",
        rope_theta="rope_theta",
        norm_eps="rms_norm_eps",
        tied="weight_tying",
        rope_float32="rope_full_precision",
    ),
    "dream": dict(
        mask_id="mask_token_id",
        eos_id="eos_token_id",
        pad_id="pad_token_id",
        width="hidden_size",
        layers="num_hidden_layers",
        heads="num_attention_heads",
        kv_heads="num_key_value_heads",
        mlp_width="intermediate_size",
        vocab_size="vocab_size",
        rope_theta="rope_theta",
        norm_eps="rms_norm_eps",
        tied="tie_word_embeddings",
    ),
}
REQUIRED = {
    "llada": dict(
        activation_type=("silu",),
        alibi=(False,),
        attention_dropout=(0, None),
        attention_layer_norm=(False,),
        bias_for_layer_norm=(False, None),
        block_group_size=(1,),
        block_type=("llama",),
        embedding_dropout=(0, None),
        include_bias=(False,),
        input_emb_norm=(False,),
        layer_norm_type=("rms",),
        layer_norm_with_affine=(True,),
        multi_query_attention=(None, False),
        residual_dropout=(0, None),
        rope=(True,),
        scale_logits=(False,),
    ),
    "dream": dict(
        attention_dropout=(0, None),
        hidden_act=("silu",),
        rope_scaling=(None,),
        use_mrope=(False, None),
        use_sliding_window=(False, None),
    ),
}
LAYERS = 1024  # a config that asks for more is an accident or an attack
DERIVED = {"llada": {"vocab_size", "embedding_size", "n_kv_heads", "mlp_hidden_size", "mlp_ratio", "include_qkv_bias"}}
IGNORED = set(
    """
    _name_or_path architectures auto_map bos_token_id dtype model_type return_dict tie_word_embeddings torch_dtype
    transformers_version use_cache alibi_bias_max attention_layer_norm_with_affine flash_attention init_cutoff_factor
    init_device init_fn init_std initializer_range max_position_embeddings max_sequence_length max_window_layers
    precision sliding_window tokenizer_class
    """.split()
)


def parse_config(raw, where="config.json"):
    """Config from the content of a config.json. Raises ValueError with every missing, unsupported and unknown key."""
    family = str(raw.get("model_type")).lower()
    if family not in READ:
        raise ValueError(f"{where}: model_type is {raw.get('model_type')!r}; this code knows 'llada' and 'Dream'")
    values = {ours: raw[key] for ours, key in READ[family].items() if key in raw}
    if family == "llada":
        values.setdefault("rope_float32", True)
        values["vocab_size"] = raw.get("embedding_size") or raw.get("vocab_size")
        values["kv_heads"] = raw.get("n_kv_heads") or values.get("heads")
        width, ratio = values.get("width"), raw.get("mlp_ratio", 4)
        values["mlp_width"] = raw.get("mlp_hidden_size") or (
            width * ratio if type(width) is type(ratio) is int else None
        )
        values["qkv_bias"], values["shifted"] = bool(raw.get("include_qkv_bias")), False
    else:
        values.update(qkv_bias=True, shifted=True, rope_float32=False)

    wrong = [f"{key} is missing" for ours, key in READ[family].items() if values.get(ours) is None]
    wrong += [f"{k} is missing" for k in ("vocab_size", "mlp_width") if values.get(k) is None]
    for ours, kind in Config.__annotations__.items():
        value = values.get(ours)
        if kind is int and value is not None and (type(value) is not int or value < 0):
            wrong.append(f"{READ[family].get(ours, ours)} is {value!r}, not a whole number")
        elif kind is int and value is not None and value > (LAYERS if ours == "layers" else 2**31):
            wrong.append(f"{READ[family].get(ours, ours)} is {value!r}, more than any model has")
        if kind is float and value is not None and not (isinstance(value, (int, float)) and value > 0):
            wrong.append(f"{READ[family].get(ours, ours)} is {value!r}, not a positive number")
    for key, allowed in REQUIRED[family].items():
        if key in raw and raw[key] not in allowed:
            wrong.append(f"{key} is {raw[key]!r}, supported is {allowed[0]!r}")
    known = set(READ[family].values()) | set(REQUIRED[family]) | DERIVED.get(family, set()) | IGNORED
    wrong += [f"unknown key {k} = {v!r}" for k, v in raw.items() if k not in known and v not in (None, False)]
    if not wrong:
        width, heads, kv_heads, vocab = (values[k] for k in ("width", "heads", "kv_heads", "vocab_size"))
        if not heads or width % heads or (width // heads) % 2:
            wrong.append(f"width {width} is not an even multiple of {heads} heads")
        if not kv_heads or heads % kv_heads:
            wrong.append(f"{heads} heads are not a multiple of {kv_heads} key-value heads")
        for key in ("mask_id", "eos_id", "pad_id"):
            if values[key] >= vocab:
                wrong.append(f"{READ[family][key]} {values[key]} is outside the vocabulary of {vocab}")
    if wrong:
        raise ValueError(f"{where}: {'; '.join(wrong)}. Correct the file, or remove a key that changes no computation")
    return Config(family=family, raw=dict(raw), **values)


# ------------------------------------------------------------------------------------------------------ transformer


class RMSNorm(nn.Module):
    """Normalised in float32, cast back, then scaled: the rounding of both official implementations."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


def rotate(x, cos, sin):
    """Rotary position embedding of x [B, H, L, E], halves (not pairs) rotated, in the dtype of cos and sin."""
    dtype, x = x.dtype, x.to(cos.dtype)
    a, b = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-b, a), dim=-1) * sin).to(dtype)


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.head_width = c.width // c.heads
        kv_width = c.kv_heads * self.head_width
        self.attn_norm = RMSNorm(c.width, c.norm_eps)
        self.q_proj = nn.Linear(c.width, c.width, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.width, kv_width, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.width, kv_width, bias=c.qkv_bias)
        self.o_proj = nn.Linear(c.width, c.width, bias=False)
        self.mlp_norm = RMSNorm(c.width, c.norm_eps)
        self.gate_proj = nn.Linear(c.width, c.mlp_width, bias=False)
        self.up_proj = nn.Linear(c.width, c.mlp_width, bias=False)
        self.down_proj = nn.Linear(c.mlp_width, c.width, bias=False)

    def forward(self, x, cos, sin, mask, cache=None, start=0, at=None):
        """x [B, L, D] -> [B, L, D], or [B, P, D] at the places at [B, P]: all that the last block has to compute."""
        B, L, D = x.shape
        y = self.attn_norm(x)
        E = self.head_width
        k = self.k_proj(y).view(B, L, -1, E).transpose(1, 2)  # [B, K, L, E]
        v = self.v_proj(y).view(B, L, -1, E).transpose(1, 2)  # [B, K, L, E]
        k = rotate(k, cos, sin)
        if at is not None:
            x, y = (z.gather(1, at[..., None].expand(-1, -1, D)) for z in (x, y))  # [B, P, D]
            cos, sin = (
                z[:, 0].expand(B, -1, -1).gather(1, at[..., None].expand(-1, -1, z.shape[-1])) for z in (cos, sin)
            )
            cos, sin = cos[:, None], sin[:, None]  # [B, 1, P, E]
        P = x.shape[1]
        q = rotate(self.q_proj(y).view(B, P, D // E, E).transpose(1, 2), cos, sin)  # [B, H, P, E]
        if cache is not None:
            k, v = cache.put(self, k, v, start)
        groups = q.shape[1] // k.shape[1]
        if groups > 1 and mask is not None:  # no fused CUDA kernel takes both a mask and fewer keys than queries
            k, v, groups = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), 1
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=groups > 1)
        x = x + self.o_proj(y.transpose(1, 2).reshape(B, P, D))
        y = self.mlp_norm(x)
        return x + self.down_proj(F.silu(self.gate_proj(y)) * self.up_proj(y))


class Cache:
    """Keys and values of every block for the tokens of one batch, [B, K, L, E] each, as they were when computed."""

    def __init__(self):
        self.kept = {}  # block -> (keys, values)

    @torch.compiler.disable  # it would be compiled anew for every block
    def put(self, block, k, v, start):
        """Store what was computed anew for the tokens from `start` on -> keys and values of all tokens."""
        if block in self.kept:
            for old, new in zip(self.kept[block], (k, v)):
                old[:, :, start : start + new.shape[2]] = new
        else:
            self.kept[block] = (k.contiguous(), v.contiguous())
        return self.kept[block]

    def keep(self, rows):
        """Forget the rows of the batch that are not among these."""
        self.kept = {block: (k[rows], v[rows]) for block, (k, v) in self.kept.items()}


class Transformer(nn.Module):
    """The network. Set `gradient_checkpointing = True` to recompute each block in the backward pass instead of
    keeping its activations."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        if not config.tied:
            self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.gradient_checkpointing = False
        self.files = {}  # official tensor name -> the file of the checkpoint that holds it

    def forward(self, ids, attention_mask=None, positions=None, cache=None, span=None):
        """ids [B, L] -> logits [B, L, V]; logits[:, i] predicts token i, for every family.

        attention_mask [B, L]: 1 = real token, 0 = padding, on either side. Rows of padding have no meaning, nor has
        Dream's first real token after left padding (its logits come from the padding before it).
        positions [B, P]: the output head runs only there, and the result is [B, P, V].
        cache, span: approximate inference (see decode.py). A first call with an empty Cache() fills it; a call with
            span = (start, end) computes only those tokens anew, and takes the keys and values of the others from there.
            positions are needed then, and count from the start of ids as ever.
        """
        c, first, length = self.config, 0, ids.shape[1]
        cos, sin = self.rope(ids, attention_mask, self.embed.weight.dtype)
        if span is not None:
            first, end = span[0] - (c.shifted and span[0] > 0), span[1]  # Dream predicts a token one place before it
            ids, cos, sin = ids[:, first:end], cos[:, :, first:end], sin[:, :, first:end]
        x = self.embed(ids)  # [B, L, D]
        mask = None if attention_mask is None else attention_mask.bool()[:, None, None, :]  # keys only: no empty rows
        if c.shifted:  # Dream was adapted from an autoregressive model: token i is predicted at position i - 1
            positions = torch.arange(length, device=ids.device).expand(len(ids), -1) if positions is None else positions
            positions = (positions - 1).clamp(min=0)
        at = None if positions is None else positions - first
        for block in self.layers:
            last = at if block is self.layers[-1] else None  # the last block only where the head runs
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, mask, cache, first, last, use_reentrant=False)
            else:
                x = block(x, cos, sin, mask, cache, first, last)
        x = self.norm(x)
        return F.linear(x, self.embed.weight) if c.tied else self.head(x)

    def new_cache(self):
        return Cache()

    def rope(self, ids, attention_mask, dtype):
        """cos and sin, [1 or B, 1, L, E], in the dtype that the family rotates in."""
        c, L = self.config, ids.shape[1]
        if c.family == "dream" and attention_mask is not None:  # Dream counts real tokens only
            index = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)  # [B, L]
        else:
            index = torch.arange(L, device=ids.device)[None]  # [1, L]
        E = c.width // c.heads
        frequency = 1.0 / c.rope_theta ** (torch.arange(0, E, 2, device=ids.device, dtype=torch.float32) / E)
        angle = index[..., None].float() * frequency  # [1 or B, L, E / 2]
        angle = torch.cat((angle, angle), dim=-1)[:, None]  # [1 or B, 1, L, E]
        dtype = torch.float32 if c.rope_float32 else dtype
        return angle.cos().to(dtype), angle.sin().to(dtype)

    def checkpoint_name(self, name):
        """The official name of a parameter or module of ours: layers.0.o_proj -> model.transformer.blocks.0.attn_out"""
        names = NAMES[self.config.family]
        if not name.startswith("layers."):
            part, _, rest = name.partition(".")
            return names[part] + ("." + rest if rest else "")
        _, i, part, *rest = name.split(".")
        return ".".join([names["layers"], i, names.get(part, part), *rest])


NAMES = {
    "llada": dict(
        embed="model.transformer.wte",
        norm="model.transformer.ln_f",
        head="model.transformer.ff_out",
        layers="model.transformer.blocks",
        o_proj="attn_out",
        mlp_norm="ff_norm",
        gate_proj="ff_proj",
        down_proj="ff_out",  # the same last name as the output head
    ),
    "dream": dict(
        embed="model.embed_tokens",
        norm="model.norm",
        head="lm_head",
        layers="model.layers",
        attn_norm="input_layernorm",
        q_proj="self_attn.q_proj",
        k_proj="self_attn.k_proj",
        v_proj="self_attn.v_proj",
        o_proj="self_attn.o_proj",
        mlp_norm="post_attention_layernorm",
        gate_proj="mlp.gate_proj",
        up_proj="mlp.up_proj",
        down_proj="mlp.down_proj",
    ),
}

# --------------------------------------------------------------------------------------------------- load and save


def create(raw, generator=None, dtype=torch.float32, device="cpu"):
    """A model with random weights from the content of a config.json: normal, with the config's own standard deviation
    (init_std or initializer_range, else 0.02), and smaller by sqrt(2 layers) where a block adds to its input."""
    m = empty(parse_config(raw)).to_empty(device=device).to(dtype)
    std = raw.get("init_std") or raw.get("initializer_range") or 0.02
    for name, p in m.named_parameters():
        if p.ndim == 1:
            nn.init.constant_(p, 0.0 if name.endswith("bias") else 1.0)
        else:
            adds = name.split(".")[-2] in ("o_proj", "down_proj")
            nn.init.normal_(p, std=std / (2 * m.config.layers) ** 0.5 if adds else std, generator=generator)
    return m.eval()


def empty(config):
    """The modules without storage: no time and no memory is spent on weights that are about to be replaced."""
    with torch.device("meta"):
        return Transformer(config)


def resolve(path):
    """A local folder for a folder or a Hub repo id ("GSAI-ML/LLaDA-8B-Instruct", downloaded if need be).

    Raises FileNotFoundError when it is neither, or a folder without a config.json."""
    folder = Path(path)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"no config.json in {folder}: not a Hugging Face model folder")
        return folder
    if folder.exists() or not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", str(path)):
        raise FileNotFoundError(
            f"no model folder {path}: give a folder with config.json, or a Hub repo id (owner/name)"
        )
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.txt", "*.jinja"]  # no pickles and no code
    try:
        return Path(snapshot_download(str(path), allow_patterns=wanted))
    except Exception as e:  # the hub library raises its own, requests' and httpx's errors
        reason = str(e).strip().split("\n")[0]
        raise FileNotFoundError(f"no folder {path}, and no download from the Hub: {type(e).__name__}: {reason}") from e


def load(path, dtype=torch.float32, device="cpu"):
    """Transformer in eval mode from a Hugging Face folder or Hub repo id, one tensor at a time;
    dtype None keeps the dtype of each stored tensor.

    Memory peaks at the model's own size plus one tensor: modules are made on the meta device, and each tensor is read
    through a mapping of its own that is given back at once. Nothing refers to the files afterwards.
    Raises FileNotFoundError or ValueError; one error lists every missing, unexpected or misshapen tensor.
    """
    folder = resolve(path)
    config_file = folder / "config.json"
    m = empty(parse_config(read_json(config_file), config_file))
    m.files = find_tensors(folder)
    wanted = {m.checkpoint_name(name): name for name, _ in m.named_parameters()}
    shapes = {name: p.shape for name, p in m.named_parameters()}
    wrong = [f"missing {name}" for name in wanted if name not in m.files]
    wrong += [f"unexpected {name}" for name in m.files if name not in wanted]
    for name, file in m.files.items():
        if name not in wanted:
            continue
        try:
            with safe_open(folder / file, framework="pt") as f:
                shape = tuple(f.get_slice(name).get_shape())
                if shape != tuple(shapes[wanted[name]]):
                    wrong.append(f"{name} is {list(shape)}, the config wants {list(shapes[wanted[name]])}")
                elif not wrong:
                    parent, _, leaf = wanted[name].rpartition(".")
                    tensor = f.get_tensor(name).to(device=device, dtype=dtype, copy=True)
                    setattr(m.get_submodule(parent), leaf, nn.Parameter(tensor))
        except SafetensorError as e:
            wrong.append(f"{name} cannot be read from {file} ({e})")
    if wrong:
        more = f"; and {len(wrong) - 20} more" if len(wrong) > 20 else ""
        raise ValueError(f"{folder}: {'; '.join(wrong[:20])}{more}")
    return m.eval()


def find_tensors(folder):
    """Official tensor name -> file name, from the headers of model.safetensors or of the shards in the index."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        listed = read_json(index).get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(v, str) and Path(v).name == v for v in listed.values()):
            raise ValueError(f"{index}: weight_map must map tensor names to file names in this folder")
        files = sorted(set(listed.values()))
        missing = [f for f in files if not (folder / f).is_file()]
        if missing:
            raise FileNotFoundError(f"{folder}: missing {', '.join(missing)}, named in {index.name}; download again")
    elif single.is_file():
        files, listed = [single.name], None
    else:
        raise FileNotFoundError(f"no model.safetensors and no model.safetensors.index.json in {folder}")
    found = {}
    for file in files:
        try:
            with safe_open(folder / file, framework="pt") as f:
                stored = f.keys()
            found.update({name: file for name in stored if listed is None or listed.get(name, file) == file})
        except SafetensorError as e:
            raise ValueError(f"{folder / file}: truncated or not a safetensors file ({e}); download it again") from e
    return found


def read_json(file):
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as e:
        raise ValueError(f"{file}: not valid JSON ({e})") from e
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a JSON object, found {type(content).__name__}")
    return content


def save(m, path):
    """Write config.json and the safetensors files in the layout, names and shards that m was loaded from.

    Raises ValueError while an adapter is attached: lora.merge(m) first, or save the adapter alone with lora.save."""
    known = {name for name, _ in empty(m.config).named_parameters()}
    extra = [name for name, _ in m.named_parameters() if name not in known]
    if extra:
        raise ValueError(
            f"not part of a {m.config.family} checkpoint: {', '.join(extra[:4])}, ...; merge the adapter first"
        )
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    files = {}  # file name -> {official name: tensor}
    for name, p in m.named_parameters():
        official = m.checkpoint_name(name)
        files.setdefault(m.files.get(official, "model.safetensors"), {})[official] = p.detach().contiguous()
    for file, tensors in files.items():
        save_file(tensors, path / file, metadata={"format": "pt"})
    if set(files) != {"model.safetensors"}:
        size = sum(p.numel() * p.element_size() for p in m.parameters())
        where = {name: file for file, tensors in files.items() for name in tensors}
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))}
        (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    (path / "config.json").write_text(json.dumps(m.config.raw, indent=2) + "\n")
