"""Speed and memory, ours against the plain way, in one run.

    python -m experiments.speed                                   # a table, and a last line of JSON
    python -m experiments.speed --device cuda --dtype bfloat16

The plain way is what a straightforward script does: the logits of every position at every step,
softmax in float64 (LLaDA's decoder), a sort of the vocabulary at every masked position (Dream's),
and training losses from the logits of the whole sequence. Both ways decode with the same model, the
same prompts and the same number of steps.

    a   a small model whose head costs the share of a forward pass that it costs in LLaDA-8B (7 %)
    b   the same body with the real vocabularies: 126,464 (LLaDA) and 152,064 (Dream)

Each measurement runs in a process of its own; its memory is the peak above what it held with the
weights loaded.

How to read the JSON. All ratios are of measurements of one run, so that a slow or busy machine
cancels out in part; on a machine that others use, only a factor means anything, not a tenth.

    outside_body_*      the share of our decoding step, on model a, that is not the transformer's body:
                        all that a better decoder could still save on a model of 8B
    decode_speedup_*    seconds of the plain way / seconds of ours, on model b: above 1, ours is faster.
                        The vocabulary is real there and the body small, so this is the most that can
                        be gained. On a model of 8B the body is most of a step in both ways: the lines
                        of model a in the table are closer to it
    *_memory_ratio      bytes of ours / bytes of the plain way, on model b: below 1, ours needs less.
                        The larger of both families
    train_speedup       as decode_speedup_*, of a training step; the smaller of both families

Dimensions: B batch, P prompt, N response, L = P + N, K masked positions, V vocabulary.
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

# --------------------------------------------------------------------------------------- the models

ROOT = Path(__file__).parent.parent
WIDTH, LAYERS, HEADS, MLP = 512, 8, 8, 1536
SIZES = {"a": dict(llada=3968, dream=3968), "b": dict(llada=126464, dream=152064)}  # ids of the vocabulary
PROMPT, NEW = 64, 128
TRAINED = 4  # examples of a training step
HEAD_STD = 0.2  # random weights with entropies like a trained model's (about 2 nats), not a flat distribution


def small(family, size, device, dtype):
    """A random model with the body of both sizes and the vocabulary of one of SIZES."""
    V = SIZES[size][family]
    special = dict(mask_token_id=V - 1, eos_token_id=V - 2, pad_token_id=V - 2)
    if family == "llada":
        shape = dict(d_model=WIDTH, n_layers=LAYERS, n_heads=HEADS, n_kv_heads=HEADS)
        shape.update(mlp_hidden_size=MLP, vocab_size=V, embedding_size=V)
        raw = cost.LLADA | shape | special
    else:
        shape = dict(hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS)
        shape.update(num_key_value_heads=2, intermediate_size=MLP, vocab_size=V)
        raw = cost.DREAM | shape | special
    m = model.create(raw, torch.Generator().manual_seed(0), dtype=dtype)
    torch.nn.init.normal_(m.head.weight, std=HEAD_STD, generator=torch.Generator().manual_seed(1))
    return m.to(device)


# ------------------------------------------------------------------------------------ the plain way


@torch.no_grad()
def plain_llada(m, prompt, new, steps, block_length):
    """LLaDA's decoder at temperature 0, straightforwardly: prompt [B, P] -> response [B, N]."""
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
    """Dream's decoder with entropy as the score, straightforwardly: prompt [B, P] -> response [B,
    N]."""
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
        quota = int(count)  # the last step takes all that is left
        if i < steps - 1:
            quota = int(count * (1 - time_of[i + 1] / time_of[i]))
        if quota:
            all_scores = torch.full(ids.shape, -torch.inf, device=ids.device)
            all_scores[masked] = score.float()
            all_tokens = torch.full_like(ids, mask_id)
            all_tokens[masked] = token
            best = all_scores.topk(quota, dim=1).indices
            ids.scatter_(1, best, all_tokens.gather(1, best))
    return ids[:, P:]


def plain_tabom(m, batch, start, window=32, margin=0.2):
    """Eq. 9 from the logits of the whole sequence -> scalar. start [B]: where the windows begin."""
    P = batch["prompt_ids"].shape[1]
    since = batch["order"] - start[:, None]  # [B, N], steps since the start of the window
    seen = batch["response_ids"].masked_fill(since >= 0, m.config.mask_id)
    ids = torch.cat((batch["prompt_ids"], seen), dim=1)  # [B, L]
    logp = m(ids)[:, P:].float().log_softmax(-1)  # [B, N, V]
    h = -(logp.exp() * logp).sum(-1)
    ce = -logp.gather(-1, batch["response_ids"][..., None])[..., 0]
    loss = 0
    for b in range(len(since)):
        steps, position = since[b].sort()
        inside = position[(steps >= 0) & (steps < window)]  # in decode order
        gap = h[b, inside][:, None] - h[b, inside][None] + margin
        pair = torch.ones_like(gap, dtype=torch.bool).triu(1)
        loss = loss + (ce[b, inside].mean() + gap[pair].clamp(min=0).mean()) / len(since)
    return loss


# ------------------------------------------------------------------------------------- measurements


def sync(device):
    """Wait until a GPU has done what it was told."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def resident():
    """Bytes that this process holds now. From here on the peak counts anew, on Linux."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return peak_resident()


def peak_resident():
    """The most bytes that this process has held; on Linux, since resident() was called last."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Memory:
    """peak() is the most that this process, or its GPU, has held above what it holds now, in bytes."""

    def __init__(self, device):
        self.cuda = device.startswith("cuda")
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            self.before = resident()

    def peak(self):
        now = torch.cuda.max_memory_allocated() if self.cuda else peak_resident()
        return max(0, now - self.before)


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
    """Measure one way of decoding or training on one model `repeat` times -> a dict of the fastest:
    seconds of a step, outside (the share of it outside the body), tokens_per_second, memory (the
    peak in bytes) and response.

    kind: decode or train. way: plain or ours. outside and response are None in training."""
    m = small(family, size, device, model.DTYPES[dtype])
    g = torch.Generator().manual_seed(2)
    prompt = torch.randint(0, 1000, (batch_size, PROMPT), generator=g).to(device)
    if kind == "train":
        call, tokens = step_of(m, prompt, way, g), TRAINED * (PROMPT + NEW)
        call()  # warm up: libraries set up buffers of their own, which are not ours
        found = fastest(m, device, repeat, call, calls=3)
        return dict(found, tokens_per_second=tokens / found["seconds"], outside=None, response=None)
    call = functools.partial(decoder_of(family, way), m, prompt)
    call(steps=4)
    found = fastest(m, device, repeat, functools.partial(call, steps=steps))
    found["tokens_per_second"] = batch_size * NEW / found["seconds"]
    return dict(found, seconds=found["seconds"] / steps, response=found["response"].tolist())


def fastest(m, device, repeat, call, calls=1):
    """Make some calls, `repeat` times -> a dict of the fastest time: seconds of a call, outside and
    response as in measure(), and memory, the peak of all times."""
    sync(device)
    memory, body, best = Memory(device), Body(m, device), dict(seconds=math.inf)
    for _ in range(repeat):
        body.seconds, begun = 0.0, time.perf_counter()
        for _ in range(calls):
            response = call()
        sync(device)
        seconds = time.perf_counter() - begun
        if seconds / calls < best["seconds"]:
            outside = 1 - body.seconds / seconds
            best = dict(seconds=seconds / calls, outside=outside, response=response)
    return dict(best, memory=memory.peak())


def decoder_of(family, way):
    """A function of a model, prompts [B, P] and steps that decodes in one way: plain or ours."""
    if way == "plain" and family == "llada":
        return functools.partial(plain_llada, new=NEW, block_length=32)
    if way == "plain":
        return functools.partial(plain_dream, new=NEW, temperature=0.1, top_p=0.9)
    own = dict(strategy="entropy", schedule="dream", temperature=0.1, top_p=0.9)
    if family == "llada":
        own = dict(strategy="confidence", schedule="llada", block_length=32)

    def ours(m, prompt, steps):
        g = [torch.Generator(prompt.device).manual_seed(b) for b in range(len(prompt))]
        t = decode.generate(m, prompt, max_new_tokens=NEW, steps=steps, generator=g, **own)
        return t.response

    return ours


def step_of(m, prompt, way, g):
    """A function that makes a TABOM step at batch 4 and window 32: forward, backward, AdamW on a
    LoRA of rank 16."""
    lora.inject(m)
    weights = [p for p in m.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4)
    device, response = prompt.device, torch.randint(0, 1000, (TRAINED, NEW), generator=g)
    order = [torch.randperm(NEW, generator=g) for _ in range(TRAINED)]
    batch = dict(
        prompt_ids=prompt[:1].expand(TRAINED, -1).contiguous(),
        prompt_mask=torch.ones(TRAINED, PROMPT, dtype=torch.long, device=device),
        response_ids=response.to(device),
        order=torch.stack(order).to(device),
        length=torch.full((TRAINED,), NEW, device=device),
    )
    start = torch.tensor([0, 30, 60, 90], device=device)

    def ours():
        return objectives.tabom(m, batch, start=start)["loss"]

    def plain():
        return plain_tabom(m, batch, start)

    loss = dict(ours=ours, plain=plain)[way]

    def step():
        loss().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


# ----------------------------------------------------------------------------------- the comparison

FAMILIES = ("llada", "dream")
CASES = [("decode", family, size) for size in SIZES for family in FAMILIES]
CASES += [("train", family, "b") for family in FAMILIES]


def bench(c):
    """Every case in both ways -> the ratios. Prints a table."""
    found = {}
    for case in CASES:
        for way in ("ours", "plain"):
            found[*case, way] = worker(c, *case, way)
    print(speed_table(found))
    result = ratios(found)
    for name, value in result.items():
        result[name] = round(value, 4)
    return result


def ratios(found):
    """The ratios of ours and the plain way that the docstring above explains. found: {(*case, way):
    measurement}."""
    result, memory, speed = {}, {"decode": [], "train": []}, []
    for family in FAMILIES:
        result[f"outside_body_{family}"] = found["decode", family, "a", "ours"]["outside"]
    for family in FAMILIES:
        ours, plain = found["decode", family, "b", "ours"], found["decode", family, "b", "plain"]
        result[f"decode_speedup_{family}"] = plain["seconds"] / ours["seconds"]
        memory["decode"].append(ours["memory"] / plain["memory"])
        ours, plain = found["train", family, "b", "ours"], found["train", family, "b", "plain"]
        speed.append(plain["seconds"] / ours["seconds"])
        memory["train"].append(ours["memory"] / plain["memory"])
    result["decode_memory_ratio"] = max(memory["decode"])
    result["train_speedup"] = min(speed)
    result["train_memory_ratio"] = max(memory["train"])
    return result


def worker(c, kind, family, size, way, **changes):
    """measure() in a process of its own. Raises RuntimeError with its last words if it fails."""
    case = dict(kind=kind, family=family, size=size, way=way)
    settings = dict(device=c.device, dtype=c.dtype, steps=c.steps, batch_size=c.batch_size)
    settings = json.dumps({**case, **settings, "repeat": c.repeat, **changes})
    command = [sys.executable, "-m", "experiments.speed", "--worker", settings]
    env = {**os.environ, "OMP_NUM_THREADS": str(c.threads)}
    env["MALLOC_MMAP_THRESHOLD_"] = str(2**20)  # glibc gives larger pieces back at once when freed
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["killed"]
        raise RuntimeError(f"{case}: {said[-1]}")
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"{kind} {family} {size} {way}: {found['seconds']:.3f} s", file=sys.stderr)
    return found


def speed_table(found):
    """A line for each measurement."""
    columns = (
        "| | vocabulary | way | s per step | outside the body % | tokens per s | peak memory above the weights, MB |"
    )
    lines = [columns, "| --- | --- | --- | --- | --- | --- | --- |"]
    for (kind, family, size, way), r in found.items():
        outside = ""
        if r["outside"] is not None:
            outside = f"{100 * r['outside']:.1f}"
        cells = [f"{kind}, {family}", str(SIZES[size][family]), way, f"{r['seconds']:.3f}", outside]
        cells += [f"{r['tokens_per_second']:.1f}", f"{r['memory'] / 1e6:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------- command line


def command_line():
    """The parser of this command."""
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
    """The command line -> exit status."""
    c = command_line().parse_args(argv)
    try:
        for name, value in vars(c).items():
            if isinstance(value, int) and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} {value}: must be above 0")
        result = measure(**json.loads(c.worker)) if c.worker else bench(c)
    except (ValueError, OSError, RuntimeError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
