"""What several test files share: golden checkpoints, a model that is a table, the command line as a user runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file

import model

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "tests" / "golden"


class Golden:
    """A tiny checkpoint in the official layout, and what the official implementation computed with it."""

    def __init__(self, family):
        self.family = family
        self.folder = FOLDER / f"{family}-tiny"
        self.expected = load_file(self.folder / "expected.safetensors")
        self.objective = load_file(self.folder / "objective.safetensors")
        self.decode_cases = json.loads((self.folder / "expected.json").read_text())["cases"]
        self.objective_cases = json.loads((self.folder / "objective.json").read_text())

    def load(self, **options):
        return model.load(self.folder, **options)


class Toy:
    """Logits from a table by place (counted over real tokens) and from what is visible. Records what it was asked."""

    def __init__(self, vocab=13, seed=0, mask_logit=-30.0, scale=2.0):
        g = torch.Generator().manual_seed(seed)
        self.by_place = torch.randn(2048, vocab, generator=g)
        self.by_token = torch.randn(vocab, vocab, generator=g)
        self.mask_logit, self.scale = mask_logit, scale
        self.config = SimpleNamespace(mask_id=vocab - 1)
        self.calls = []  # (ids, attention_mask, positions) of every call

    def __call__(self, ids, attention_mask=None, positions=None):
        self.calls.append((ids.clone(), attention_mask, positions))
        seen = torch.ones_like(ids) if attention_mask is None else attention_mask.long()
        place = (seen.cumsum(1) - 1).clamp(min=0)
        weight = seen / (1 + place)  # near the start counts more: the order of the tokens matters
        context = (self.by_token[ids] * weight[..., None]).sum(1, keepdim=True)
        logits = self.scale * (self.by_place[place] + context)  # [B, L, V]
        logits[..., self.config.mask_id] = self.mask_logit
        return logits if positions is None else logits.gather(1, positions[..., None].expand(-1, -1, logits.shape[-1]))


BYTES_CONFIG = dict(
    model_type="llada", d_model=32, n_layers=1, n_heads=2, mlp_hidden_size=32, vocab_size=260, rms_norm_eps=1e-5,
    rope_theta=1e4, weight_tying=True, mask_token_id=257, eos_token_id=256, pad_token_id=256, init_std=0.5,
)  # fmt: skip


def flags(**options):
    """{'lora_rank': 4, 'watch': True} -> ['--lora-rank', '4', '--watch']"""
    named = [["--" + k.replace("_", "-")] + ([] if v is True else [str(v)]) for k, v in options.items()]
    return [word for words in named for word in words]


def shell(*words, processes=1, **environment):
    """Run tabom.py as a user does -> the finished process."""
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [*start, str(ROOT / "tabom.py"), *words], capture_output=True, text=True, env=env, timeout=300
    )


def last_json(text):
    return json.loads(text.strip().splitlines()[-1])
