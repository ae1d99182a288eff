"""The options that commands share, and the model, tokenizer and decoder that they name.

    loaded = loading.load_model(c, processes, c.adapter)    # c: ModelOptions; -> m, tok, folder
    settings = loading.decoder_settings(c, loaded)          # c: DecodeOptions; -> arguments of decode.generate

Each family has a decoder (DECODERS), whose settings a model's folder and flags change.
"""

import contextlib
import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

import data
import decode
import lora
import model
import tokenizer
from blocks import decoders
from runs import disk, torchrun
from runs.options import kind, opt

# ---------------------------------------------------------------------------------------------------------- options


DTYPES = ("auto", *model.DTYPES)


@dataclass
class ModelOptions:
    """the model and the machine"""

    model: str = opt(None, "model folder in Hugging Face layout, or Hub repo id", required=True)
    device: str = opt("auto", "cuda, mps or cpu; auto takes the first one available")
    dtype: str = opt("auto", "of the base model; auto: bfloat16 on cuda, else float32", choices=DTYPES)
    seed: int = opt(0, "seed of every random choice, for any number of processes")
    compile: bool = opt(False, "compile the transformer's blocks: faster after a minute, the same except for rounding")
    block_causal: int | None = opt(
        None, "attention is causal from block to block of this many tokens (A2D: 32 for bd3lm models)", low=1
    )


@dataclass
class GridOptions:
    """models whose attention goes from block to block"""

    grid: str | None = opt(
        None,
        "where blocks are counted from, the start of the row or the end of its prompt (as the model's decoder: SDAR "
        "start, A2D prompt)",
        choices=("start", "prompt"),
    )


@dataclass
class DecodeOptions:
    """the decoder (defaults in brackets)"""

    max_new_tokens: int | None = opt(None, "response length in tokens (256)")
    steps: int | None = opt(None, "decoding steps for the whole response (one per token)")
    block_length: int | None = opt(
        None,
        "decode in blocks of this many tokens, left to right; 0 = one (LLaDA 32, Dream 0, SDAR the model's)",
    )
    strategy: str | None = opt(
        None, "which masked positions to decode first (Dream: entropy, LLaDA: confidence)", choices=decode.STRATEGIES
    )
    schedule: str | None = opt(
        None,
        "how the tokens are divided among --steps (the family's); credit: LLaDA's, with the authors' credit fusion",
        choices=tuple(decode.SCHEDULES | decode.ELSEWHERE),
    )
    temperature: float | None = opt(None, "for drawing tokens; 0 takes the most probable one (Dream: 0.1, LLaDA: 0)")
    top_p: float | None = opt(None, "draw from the most probable tokens with this total probability (Dream: 0.9)")
    top_k: int | None = opt(None, "draw from this many of the most probable tokens")
    threshold: float | None = opt(
        None, "each step decodes every token of at least this probability, instead of following --schedule"
    )
    tokens_per_step: int | None = opt(None, "decode exactly this many tokens a step, instead of --steps", low=1)
    greedy: bool = opt(
        False,
        "take the most probable token; --temperature then only affects which position is next",
        idle=dict(sample=True, temperature=0),
    )
    sample: bool = opt(False, "draw tokens even where a benchmark's protocol takes the most probable one")
    suppress_eos: bool = opt(False, "never choose a token that ends a response: each has its full length")
    eos_last: bool = opt(
        False,
        "decode what ends a response last: positions that predict EOS or the like score lowest",
        idle=dict(suppress_eos=True),
    )


@dataclass
class DatasetOptions:
    """the dataset"""

    data: str = opt(
        None, "dataset: .jsonl, .jsonl.gz, .json, .parquet; several with commas, or a folder", required=True
    )
    prompt_field: str | None = opt(None, "name of the prompt's field, where it is not one of the usual names")
    answer_field: str | None = opt(None, "name of the answer's field, where it is not one of the usual names")
    limit: int | None = opt(None, "use only the first LIMIT rows; of trajectories, by id", low=1)
    raw: bool = opt(False, "use prompts as they are, without the chat template")


class Loaded(NamedTuple):
    """A model, its tokenizer, and the folder that both came from."""

    m: Any
    tok: Any
    folder: Path

    @property
    def never_chosen(self):
        """Ids that no response may hold: the mask token, and rows of the network that are no token."""
        return sorted({*self.tok.unused_ids(self.m.config.vocab_size), self.m.config.mask_id})


def disagreements(tok, config):
    """Lines about the ids on which a tokenizer and a model's config (anything with eos_id, pad_id and
    mask_id) disagree."""
    lines = []
    for name in ("eos", "pad", "mask"):
        token = tok.special.get(f"{name}_token")
        ours, theirs = getattr(config, f"{name}_id", None), tok.ids.get(token)
        if None not in (ours, theirs) and ours != theirs:
            lines.append(f"{name}_token_id is {ours} in config.json, the tokenizer has {theirs} ({token})")
    return lines


def load_model(c, processes, adapter=None, weights=None, dtype="auto", spread=None):
    """Loaded: the model of the options c on this process's device, its tokenizer and its folder.

    adapter: a folder to take an adapter from. weights: another folder with the same model's tensors, such as a
    checkpoint. spread: see model.load. Raises ValueError for a tokenizer that has more ids than the model has rows."""
    folder = model.resolve(c.model)
    dtype = model.DTYPES[resolve_dtype(c, processes, dtype)]
    fill = None
    if spread is not None:
        from runs import shard  # torch's FSDP2 takes two seconds to import

        fill = shard.fill
    m = model.load(weights or folder, dtype=dtype, device=processes.device, spread=spread, fill=fill)
    if c.block_causal is not None:
        if m.config.family not in ("sdar", "a2d"):
            raise ValueError(f"--block-causal {c.block_causal}: {m.config.family} models see everything; leave it out")
        m.config.block_length = c.block_causal
    one_thread_if_small(m)
    tok = tokenizer.load(folder, m.config.eos_id, m.config.mask_id)
    masks = tok.ids.get(tok.special.get("mask_token"))
    if masks is not None and "mask_token_id" not in m.config.raw:  # the family's is a guess
        m.config.mask_id = masks
        tok = tokenizer.load(folder, m.config.eos_id, masks)
    for line in disagreements(tok, m.config):
        torchrun.warner(processes)(f"{folder}: {line}")
    if tok.size > m.config.vocab_size:
        rows = m.config.vocab_size
        raise ValueError(f"{folder}: the tokenizer has ids up to {tok.size - 1}, the model only {rows} rows")
    if adapter is not None:
        warn_of_another_base(adapter, folder, torchrun.warner(processes))
        lora.load(m, adapter)
    if c.compile:
        compile_blocks(m)
    return Loaded(m, tok, folder)


def warn_of_another_base(adapter, folder, warn):
    """Warn where an adapter was trained on another model than the one in a folder, as the meta.json of its run says: in
    a model that it is merged into it would act twice."""
    meta, base = Path(adapter).parent / "meta.json", None
    with contextlib.suppress(ValueError):  # what is beside an adapter need not be of its run
        base = data.read_json(meta, missing={}).get("model_sha256")
    if base is not None and base != disk.fingerprint(folder):
        line = f"{adapter} was trained on another model than {folder}"
        warn(f"{line}, as the hash in {meta} says; where it is merged in already it acts twice")


def compile_blocks(m, **options):
    """Compile the transformer's blocks, with the options of torch.compile."""
    torch._dynamo.config.recompile_limit = 64  # of one code, shared by all blocks and models, adapted or not
    torch.fx.experimental._config.use_duck_shape = False  # sizes that are equal by chance may differ later
    for block in m.layers:
        block.compile(dynamic=True, **options)


SMALL = 50_000_000  # parameters


def one_thread_if_small(m):
    """Let torch use one thread for a small model, where OMP_NUM_THREADS does not say otherwise.

    Threads of a small model mostly wait for each other, and each wait is long where other programs use the cores."""
    if "OMP_NUM_THREADS" not in os.environ and sum(p.numel() for p in m.parameters()) < SMALL:
        torch.set_num_threads(1)


def load_checkpoint(c, processes, checkpoint):
    """Loaded for a checkpoint of a run: the base model with its adapter, or its weights where all were trained. None is
    the base model."""
    if checkpoint is None or (Path(checkpoint) / "adapter_config.json").is_file():
        return load_model(c, processes, adapter=checkpoint)
    return load_model(c, processes, weights=checkpoint)


def resolve_dtype(c, processes, dtype="auto"):
    """The dtype asked for; "auto" means `dtype`, and that again what the device is best at."""
    if c.dtype != "auto":
        return c.dtype
    if dtype != "auto":
        return dtype
    return "bfloat16" if processes.device.type == "cuda" else "float32"


def identity(c, processes, loaded):
    """What an answer depends on besides the prompt and the decoder's settings, for the meta.json of a run: the content
    of model and adapter, how they compute, and the seed."""
    return dict(
        block_causal=c.block_causal,
        **disk.content_hashes(loaded.folder, c.adapter),
        dtype=resolve_dtype(c, processes),
        seed=c.seed,
        versions=disk.versions(),
    )


def shape(config):
    """What tells the checkpoints of a family apart: a dict of family, layers, width and vocab_size."""
    return dict(family=config.family, layers=config.layers, width=config.width, vocab_size=config.vocab_size)


def set_grid(c, m):
    """Let the blocks of a model's attention be counted from where c (GridOptions) says.

    Raises ValueError for a model without blocks."""
    if c.grid is not None and m.config.block_length is None:
        raise ValueError(f"--grid {c.grid}: {c.model} sees everything, without blocks; leave it out")
    if c.grid is not None:
        m.config.grid = c.grid


def batch_of(records, loaded, processes):
    """Records -> the batch of objectives.py, on this process's device; with the origin of blocks that are counted from
    the end of the prompt, and whether anything is padded."""
    batch = data.collate(records, loaded.m.config.pad_id)
    if getattr(loaded.m.config, "grid", None) == "prompt":
        batch["origin"] = batch["prompt_mask"].sum(1)
    real = batch["prompt_mask"].all() and (batch["length"] == batch["order"].shape[1]).all()  # asked on the host
    return {name: tensor.to(processes.device) for name, tensor in batch.items()} | dict(padded=not real)


# How each family decodes by default: Table 8 of the paper, with 32-token blocks for LLaDA's distillation.
DECODERS = {
    "dream": dict(strategy="entropy", schedule="dream", temperature=0.1, top_p=0.9, max_new_tokens=256),
    "llada": dict(strategy="confidence", schedule="llada", temperature=0.0, block_length=32, max_new_tokens=256),
    **decoders.DECODERS,
}
EOS_RULES = ("suppress_eos", "eos_last")  # settings that with_eos_rules() turns into ids


def decoder_settings(c, loaded, preset=None):
    """The arguments of decode.generate: the family's, then a benchmark's preset, then the model folder's, then the
    flags of c (DecodeOptions). suppress_eos and eos_last are among them: with_eos_rules() puts in the ids. Where the
    model's attention is block-causal, a block length that is asked for is applied to it.

    Raises ValueError for settings that do not fit together, before anything is decoded or written."""
    family, blocks = loaded.m.config.family, getattr(loaded.m.config, "block_length", None)
    if family not in DECODERS:
        raise ValueError(f"{loaded.folder}: no decoder for {family!r} models; there is one for {', '.join(DECODERS)}")
    base = DECODERS[family]
    if blocks is not None:
        base = dict(base, block_length=blocks)
    settings = merge_layers(base, preset or {}, folder_decoder(loaded.folder), decoder_flags(c))
    settings["block_length"] = settings.get("block_length") or blocks
    if c.sample:
        settings["greedy"] = False
        if not settings.get("temperature"):
            raise ValueError("--sample draws nothing at temperature 0: give --temperature above 0")
    if "tokens_per_step" not in settings:
        steps, length = settings["max_new_tokens"], settings["block_length"]
        if decode.find_schedule(settings["schedule"]).finishes_blocks and length is not None:
            steps = length * -(-steps // length)  # a last block that is not whole has as many steps as the others
        settings.setdefault("steps", steps)
    check_decoder(settings)
    apply_block_length(loaded.m, settings["block_length"])
    return settings


PACE = {"steps", "tokens_per_step", "threshold"}  # how fast to decode: who says one of them says it anew


def merge_layers(*layers):
    """Decoder settings, of which a later layer's stand in place of an earlier one's -> dict.

    A layer that sets the pace drops that of the earlier ones; with another length only their steps, which were
    steps for theirs."""
    merged = {}
    for layer in layers:
        dropped = set()
        if "max_new_tokens" in layer:
            dropped = {"steps"}
        if PACE & layer.keys():
            dropped = PACE
        for name in dropped:
            merged.pop(name, None)
        merged.update(layer)
    return merged


def check_decoder(settings):
    """Raises ValueError for decoder settings that do not fit together, or that may leave masks in a response."""
    s = decode.Settings(**{name: value for name, value in settings.items() if name not in EOS_RULES})
    if s.threshold is None or s.threshold_adds or s.steps_per_block >= min(s.length, s.max_new_tokens):
        return
    why = f"a step may decode only one of the {s.max_new_tokens} tokens, and the rest would stay masked"
    raise ValueError(f"threshold {s.threshold} and steps {s.steps}: {why}; leave steps out")


def apply_block_length(m, length):
    """Give a model with block-causal attention the decoder's block length; any other sees everything and stays so."""
    if getattr(m.config, "block_length", None) is not None:
        m.config.block_length = length


def with_eos_rules(settings, loaded):
    """Arguments of decode.generate: the settings, with ids in place of suppress_eos and eos_last, and the ids that no
    response may hold.

    Where these are True they stand for every token that ends a response: EOS, the end of a turn, padding. Where they
    are "eos", as in a benchmark's protocol, they stand for the EOS of the model's config alone."""
    settings = dict(settings)
    rules = {name: settings.pop(name, False) for name in EOS_RULES}
    ids = {False: [], True: sorted(loaded.tok.stop_ids), "eos": [loaded.m.config.eos_id]}
    settings["suppress"] = [*loaded.never_chosen, *ids[rules["suppress_eos"]]]
    if rules["eos_last"]:
        settings["decode_last"] = ids[rules["eos_last"]]
    finishes_blocks = decode.find_schedule(settings.get("schedule", "dream")).finishes_blocks
    if finishes_blocks and loaded.m.config.block_length is not None:
        settings["stop"] = sorted(loaded.tok.stop_ids)  # what a finished block ends, later blocks cannot change
    return settings


DECODER_FIELDS = {f.name: f for f in dataclasses.fields(DecodeOptions) if f.name != "sample"}


def decoder_flags(c):
    """The decoder settings that flags give."""
    given = {name: getattr(c, name) for name in DECODER_FIELDS}
    # 0 is a value: --temperature 0, --block-length 0
    return {name: value for name, value in given.items() if value is not None and value is not False}


def folder_decoder(folder):
    """The decoder settings of a model folder: what its generation_config.json has under "tabom"."""
    file = Path(folder) / "generation_config.json"
    said = data.read_json(file).get("tabom", {}) if file.is_file() else {}
    if type(said) is not dict:
        raise ValueError(f'{file}: "tabom" must be an object of decoder settings, not {said}')
    for name, value in said.items():
        if name not in DECODER_FIELDS:
            raise ValueError(f'{file}: "tabom" has {name}; the decoder settings are {", ".join(DECODER_FIELDS)}')
        wanted = kind(DECODER_FIELDS[name])
        if type(value) is not wanted and not (wanted is float and type(value) is int):
            raise ValueError(f'{file}: "tabom" has {name} {value!r}, which must be {wanted.__name__}')
    return said
