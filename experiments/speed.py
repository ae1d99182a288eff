"""Speed and memory, ours against the plain way, in one run.

    python -m experiments.speed                              # decoding and a training step; a last line of JSON
    python -m experiments.speed --device cuda --dtype bfloat16

The plain way is what a straightforward script does: the logits of every position at every step, softmax in float64
(LLaDA's decoder), a sort of the vocabulary at every masked position (Dream's), and training losses from the logits of
the whole sequence. Both ways decode with the same model, the same prompts and the same number of steps.

    a   a small model whose output head costs the share of a forward pass that it costs in LLaDA-8B (7 %)
    b   the same body with the real vocabularies: 126,464 (LLaDA) and 152,064 (Dream)

Each measurement runs in a process of its own; its memory is the peak above what it held with the weights loaded.
"""

import argparse
import functools
import json
import math
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

import decode
import lora
import model
import objectives
from experiments import cost

# --------------------------------------------------------------------------------------------------------- the models

ROOT = Path(__file__).parent.parent
WIDTH, LAYERS, HEADS, MLP = 512, 8, 8, 1536
SIZES = {"a": dict(llada=3968, dream=3968), "b": dict(llada=126464, dream=152064)}  # ids of the vocabulary
PROMPT, NEW = 64, 128
HEAD_STD = 0.2  # random weights with entropies like a trained model's (about 2 nats), not a flat distribution


def small(family, size, device, dtype):
    """A random model with the body of both sizes and the vocabulary of one."""
    V = SIZES[size][family]
    special = dict(mask_token_id=V - 1, eos_token_id=V - 2, pad_token_id=V - 2)
    if family == "llada":
        shape = dict(d_model=WIDTH, n_layers=LAYERS, n_heads=HEADS, n_kv_heads=HEADS, mlp_hidden_size=MLP)
        raw = cost.LLADA | shape | special | dict(vocab_size=V, embedding_size=V)
    else:
        shape = dict(hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=2)
        raw = cost.DREAM | shape | special | dict(intermediate_size=MLP, vocab_size=V)
    m = model.create(raw, torch.Generator().manual_seed(0), dtype=dtype)
    torch.nn.init.normal_(m.head.weight, std=HEAD_STD, generator=torch.Generator().manual_seed(1))
    return m.to(device)


# ------------------------------------------------------------------------------------------------------ the plain way


@torch.no_grad()
def plain_llada(m, prompt, new, steps, block_length):
    """LLaDA's decoder at temperature 0, straightforwardly."""
    ids = torch.cat((prompt, prompt.new_full((len(prompt), new), m.config.mask_id)), dim=1)
    P, mask_id = prompt.shape[1], m.config.mask_id
    each = steps // (new // block_length)
    for end in range(P + block_length, P + new + 1, block_length):
        for i in range(each):
            masked = ids == mask_id
            logits = m(ids)  # [B, L, V]
            token = logits.argmax(-1)
            confidence = logits.double().softmax(-1).gather(-1, token[..., None])[..., 0]
            confidence[:, end:] = -torch.inf
            confidence = torch.where(masked, confidence, -torch.inf)
            quota = block_length // each + (i < block_length % each)
            best = confidence.topk(quota, dim=1).indices
            ids.scatter_(1, best, token.gather(1, best))
    return ids[:, P:]


@torch.no_grad()
def plain_dream(m, prompt, new, steps, temperature, top_p):
    """Dream's decoder with entropy as the score, straightforwardly."""
    ids = torch.cat((prompt, prompt.new_full((len(prompt), new), m.config.mask_id)), dim=1)
    P, mask_id = prompt.shape[1], m.config.mask_id
    time_of = torch.linspace(1, 1e-3, steps + 1)
    for i in range(steps):
        masked = ids == mask_id
        logits = m(ids)[masked] / temperature  # [K, V]
        ranked, index = logits.sort(descending=True)
        removed = ranked.softmax(-1).cumsum(-1) > top_p
        removed = torch.cat((torch.zeros_like(removed[:, :1]), removed[:, :-1]), dim=1)
        removed = torch.zeros_like(removed).scatter(-1, index, removed)
        p = logits.masked_fill(removed, torch.finfo(logits.dtype).min).softmax(-1)
        token = torch.multinomial(p, 1)[:, 0]
        score = (p * torch.log(p + 1e-10)).sum(-1)
        count = masked.sum(1).float().mean()
        quota = int(count * (1 - time_of[i + 1] / time_of[i])) if i < steps - 1 else int(count)
        if quota:
            all_scores = torch.full(ids.shape, -torch.inf, device=ids.device)
            all_scores[masked] = score.float()
            all_tokens = torch.full_like(ids, mask_id)
            all_tokens[masked] = token
            best = all_scores.topk(quota, dim=1).indices
            ids.scatter_(1, best, all_tokens.gather(1, best))
    return ids[:, P:]


def plain_tabom(m, batch, start, window=32, margin=0.2):
    """Eq. 9 from the logits of the whole sequence."""
    P = batch["prompt_ids"].shape[1]
    rank = batch["order"] - start[:, None]
    ids = torch.cat((batch["prompt_ids"], batch["response_ids"].masked_fill(rank >= 0, m.config.mask_id)), dim=1)
    logp = m(ids)[:, P:].float().log_softmax(-1)  # [B, N, V]
    h = -(logp.exp() * logp).sum(-1)
    ce = -logp.gather(-1, batch["response_ids"][..., None])[..., 0]
    loss = 0
    for b in range(len(rank)):
        place = rank[b].argsort()[(rank[b].sort().values >= 0) & (rank[b].sort().values < window)]
        gap = h[b, place][:, None] - h[b, place][None] + margin
        pair = torch.ones_like(gap, dtype=torch.bool).triu(1)
        loss = loss + (ce[b, place].mean() + gap[pair].clamp(min=0).mean()) / len(rank)
    return loss


# ------------------------------------------------------------------------------------------------------- measurements


def sync(device):
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def resident():
    """Bytes that this process holds now; from here on the peak counts anew where the kernel allows it (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return peak_resident()


def peak_resident():
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


class Memory:
    """The peak of this process, or of its GPU, above what it holds when this is made: peak() in bytes."""

    def __init__(self, device):
        self.cuda = device.startswith("cuda")
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            self.before = resident()

    def peak(self):
        return max(0, (torch.cuda.max_memory_allocated() if self.cuda else peak_resident()) - self.before)


class Body:
    """Seconds that a model spends up to its final norm: embedding and blocks."""

    def __init__(self, m, device):
        self.seconds, self.device = 0.0, device
        m.register_forward_pre_hook(self.start)
        m.norm.register_forward_pre_hook(self.stop)

    def start(self, *_):
        sync(self.device)
        self.begun = time.perf_counter()

    def stop(self, *_):
        sync(self.device)
        self.seconds += time.perf_counter() - self.begun


def measure(kind, family, size, way, device, dtype, steps, batch_size, repeat):
    """One way of decoding or training on one model -> dict(seconds per step, outside, tokens_per_second, memory)."""
    m = small(family, size, device, model.DTYPES[dtype])
    g = torch.Generator().manual_seed(2)
    prompt = torch.randint(0, 1000, (batch_size, PROMPT), generator=g).to(device)
    per_call = steps
    if kind == "train":
        call, per_call = training(m, prompt, way, g), 1
    else:
        call = functools.partial(decoding(family, way), m, prompt)
    call() if kind == "train" else call(steps=4)  # warm up: libraries set up buffers of their own, which are not ours
    sync(device)
    memory, body, best = Memory(device), Body(m, device), math.inf
    for _ in range(repeat):
        body.seconds, begun = 0.0, time.perf_counter()
        for _ in range(3 if kind == "train" else 1):
            tokens = call() if kind == "train" else call(steps=steps)
        sync(device)
        seconds = (time.perf_counter() - begun) / (3 if kind == "train" else 1)
        if seconds < best:
            best, outside = seconds, 1 - body.seconds / (time.perf_counter() - begun)
    return dict(
        seconds=best / per_call,
        outside=None if kind == "train" else outside,
        tokens_per_second=(4 * (PROMPT + NEW) if kind == "train" else batch_size * NEW) / best,
        memory=memory.peak(),
        response=None if kind == "train" else tokens.tolist(),
    )


def decoding(family, way):
    """A function of a model, prompts and steps that decodes in one way: plain, ours, or ours with a cache."""
    if way == "plain":
        return functools.partial(
            plain_llada if family == "llada" else plain_dream,
            new=NEW,
            **(dict(block_length=32) if family == "llada" else dict(temperature=0.1, top_p=0.9)),
        )

    def ours(m, prompt, steps):
        own = dict(strategy="entropy", schedule="dream", temperature=0.1, top_p=0.9)
        if family == "llada":
            own = dict(strategy="confidence", schedule="llada", block_length=32)
        if way in decode.CACHES:
            own["approximate_cache"] = way
        generators = [torch.Generator(prompt.device).manual_seed(b) for b in range(len(prompt))]
        return decode.generate(m, prompt, max_new_tokens=NEW, steps=steps, generator=generators, **own).response

    return ours


def training(m, prompt, way, g):
    """A TABOM step at batch 4 and window 32: forward, backward, AdamW on a LoRA of rank 16."""
    lora.inject(m)
    weights = [p for p in m.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4)
    device = prompt.device
    batch = dict(
        prompt_ids=prompt[:1].expand(4, -1).contiguous(),
        prompt_mask=torch.ones(4, PROMPT, dtype=torch.long, device=device),
        response_ids=torch.randint(0, 1000, (4, NEW), generator=g).to(device),
        order=torch.stack([torch.randperm(NEW, generator=g) for _ in range(4)]).to(device),
        length=torch.full((4,), NEW, device=device),
    )
    start = torch.tensor([0, 30, 60, 90], device=device)

    def step():
        loss = plain_tabom(m, batch, start) if way == "plain" else objectives.tabom(m, batch, start=start)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


CASES = [("decode", family, size) for size in ("a", "b") for family in ("llada", "dream")]
CASES += [("train", family, "b") for family in ("llada", "dream")]


def bench(c):
    """Every case in both ways, and the approximate caches -> the ratios."""
    found = {(*case, way): worker(c, *case, way) for case in CASES for way in ("ours", "plain")}
    print(speed_table(found))

    def ratio(kind, family, key):
        ours, plain = (found[kind, family, "b", way][key] for way in ("ours", "plain"))
        return plain / ours if key == "seconds" else ours / plain

    families = ("llada", "dream")
    result = {f"outside_body_{f}": found["decode", f, "a", "ours"]["outside"] for f in families}
    result |= {f"decode_speedup_{f}": ratio("decode", f, "seconds") for f in families}
    result["decode_memory_ratio"] = max(ratio("decode", f, "memory") for f in families)
    result["train_speedup"] = min(ratio("train", f, "seconds") for f in families)
    result["train_memory_ratio"] = max(ratio("train", f, "memory") for f in families)

    exact, *cached = (worker(c, "decode", "llada", "a", way, steps=NEW) for way in ("ours", *decode.CACHES))
    print("\n| approximate cache, llada, blocks of 32 | s per step | speed-up | tokens as in exact decoding % |")
    print("| --- | --- | --- | --- |")
    for name, one in zip(decode.CACHES, cached):
        same = torch.tensor(one["response"]).eq(torch.tensor(exact["response"])).float().mean().item()
        speedup = exact["seconds"] / one["seconds"]
        print(f"| {name} | {one['seconds']:.3f} | {speedup:.2f} | {100 * same:.1f} |")
        result |= {f"cache_speedup_{name}": speedup, f"cache_agreement_{name}": same}
    return {k: round(v, 4) for k, v in result.items()}


def worker(c, kind, family, size, way, **changes):
    """measure() in a process of its own."""
    case = dict(kind=kind, family=family, size=size, way=way)
    settings = {k: getattr(c, k) for k in ("device", "dtype", "steps", "batch_size", "repeat")} | changes
    command = [sys.executable, "-m", "experiments.speed", "--worker", json.dumps(case | settings)]
    env = {**os.environ, "OMP_NUM_THREADS": str(c.threads)}
    env["MALLOC_MMAP_THRESHOLD_"] = str(
        2**20
    )  # glibc gives larger pieces back when freed: a peak is a peak of this run
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{case}: {done.stderr.strip().splitlines()[-1] if done.stderr else 'killed'}")
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"{kind} {family} {size} {way}: {found['seconds']:.3f} s", file=sys.stderr)
    return found


def speed_table(found):
    lines = [
        "| | vocabulary | way | s per step | outside the body % | tokens per s | peak memory above the weights, MB |"
    ]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for (kind, family, size, way), r in found.items():
        outside = "" if r["outside"] is None else f"{100 * r['outside']:.1f}"
        cells = [f"{kind}, {family}", SIZES[size][family], way, f"{r['seconds']:.3f}", outside]
        cells += [f"{r['tokens_per_second']:.1f}", f"{r['memory'] / 1e6:.0f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------- command line


def command_line():
    parser = argparse.ArgumentParser(
        prog="python -m experiments.speed", description=__doc__.split("\n")[0], allow_abbrev=False
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or mps")
    parser.add_argument("--dtype", default="float32", choices=tuple(model.DTYPES))
    parser.add_argument("--steps", type=int, default=32, help=f"decoding steps for {NEW} tokens")
    parser.add_argument("--batch-size", type=int, default=1, help="prompts decoded together")
    parser.add_argument("--repeat", type=int, default=2, help="measure so often and take the fastest")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser


def main(argv=None):
    c = command_line().parse_args(argv)
    try:
        low = [k for k, v in vars(c).items() if isinstance(v, (int, float)) and not v > 0]
        if low:
            raise ValueError(f"--{low[0].replace('_', '-')} {getattr(c, low[0])}: must be above 0")
        result = measure(**json.loads(c.worker)) if c.worker else bench(c)
    except (ValueError, OSError, RuntimeError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
