"""What a device computes, against what it should: the checks of `tabom.py check` that need no process of their own.

    for row in checks.logits(torch.device("cuda")): print(row.name, row.ours, row.reference, row.limit, row.passed)

A check is a function of a device that yields Rows, or raises Skip with the reason. References are the outputs of the
official code in tests/golden, where that folder is there, and else the same computation on a CPU.

Dimensions: B batch, P prompt, N response, L length, V vocabulary, H query heads, K key-value heads, E width of a head.
"""

import contextlib
import dataclasses
import json
import math
import subprocess
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend
from torch.overrides import TorchFunctionMode

import baselines  # noqa: F401, adds its objectives to the table
import data
import decode
import lora
import model
import objectives
from experiments import speed
from runs import loading, objective_options, queue

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"
FAMILIES = ("llada", "dream", "sdar", "a2d")
WAITS = 4 + 4  # of the host in a decoding step: for numbers of the device, and for copies to it


class Skip(Exception):
    """A check that cannot be made here; its text says why."""


class Row(NamedTuple):
    """One comparison. Passed, where the number that has to be small, off or else ours, is within the limit; without a
    limit it is only shown."""

    name: str
    ours: Any
    reference: Any = None
    off: float | None = None  # the largest difference of the two
    limit: float | None = None

    @property
    def passed(self):
        small = self.ours if self.off is None else self.off
        return self.limit is None or small <= self.limit  # NaN is not


def equal(name, ours, reference, limit=0.0):
    """A Row of two numbers, or of two tensors of one shape: these it shows as the root of their mean square."""
    if not isinstance(ours, torch.Tensor):
        return Row(name, ours, reference, abs(ours - reference), limit)
    ours, reference = ours.detach().cpu().double(), reference.detach().cpu().double()
    off = (ours - reference).abs().max().item()
    return Row(name, ours.square().mean().sqrt().item(), reference.square().mean().sqrt().item(), off, limit)


def same(name, ours, reference):
    """A Row of how many elements of two integer tensors are equal: all have to be."""
    found = int((ours.cpu() == reference.cpu()).sum())
    return equal(name, found, reference.numel())


def rounding(device):
    """The largest difference that float32 may make in a logit, an entropy or a loss of the golden models."""
    return 1e-4 if device.type == "cpu" else 1e-3


class Golden:
    """A tiny checkpoint of a family in its official layout, and what the official code computed with it."""

    def __init__(self, family):
        self.family, self.folder = family, GOLDEN / f"{family}-tiny"
        if not self.folder.is_dir():
            raise Skip(f"{self.folder} is not there: the golden files come with a clone of the project")
        self.tensors = load_file(self.folder / "expected.safetensors")
        self.cases = json.loads((self.folder / "expected.json").read_text())

    def load(self, device, block_length=None, dtype=torch.float32):
        """The model; block_length: of its attention, where it has blocks; None = the model's own."""
        m = model.load(self.folder, dtype=dtype, device=device)
        if block_length is not None:
            m.config = dataclasses.replace(m.config, block_length=block_length)
        return m


# ------------------------------------------------------------------------------------------------------ the machine


def environment(device):
    """What the machine is, and whether its products are as exact as their dtype."""
    yield Row("torch", torch.__version__)
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        yield Row("card", f"{card.name}, {card.total_memory / 1e9:.0f} GB, {torch.cuda.device_count()} visible")
        yield Row("driver, CUDA of torch", f"{driver()}, {torch.version.cuda}")
        yield Row("capability", f"{card.major}.{card.minor}")
        yield equal("bfloat16 is supported", int(torch.cuda.is_bf16_supported()), 1)
    else:
        yield Row("processor, threads", f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()}")
    for name, limit in (("float32", 1e-5), ("bfloat16", 1e-2)):  # TensorFloat-32 is 1e-3 off
        x = torch.linspace(-1, 1, 4096).view(64, 64).to(model.DTYPES[name])
        exact = x.double() @ x.double()
        yield equal(f"a product in {name}", x.to(device) @ x.to(device), exact, limit * exact.abs().max().item())


def driver():
    """The version of NVIDIA's driver."""
    words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


# ------------------------------------------------------------------------------------------------------- the network


@torch.no_grad()
def logits(device):
    """Logits of all families against the official ones: plain, padded, at some positions, in blocks with a cache and
    with a clean copy; and the error of bfloat16, which may be half as large again as that of the official code."""
    limit = rounding(device)
    for family in FAMILIES:
        golden = Golden(family)
        m, e = golden.load(device), golden.tensors
        ids, exact = e["logits.ids"].to(device), e["logits.aligned"]
        yield equal(f"{family}: logits", m(ids), exact, limit)
        at = torch.tensor([[1, 9, 5], [20, 3, 3]])
        some = torch.stack([exact[b, at[b]] for b in range(2)])
        yield equal(f"{family}: at some positions", m(ids, positions=at.to(device)), some, limit)
        for side, name in dict(left="padded", right="right").items():
            if f"{name}.ids" in e:
                real = e[f"{name}.mask"].bool()
                real &= real.roll(1, 1)  # Dream's first token after padding is predicted from the padding
                found = m(e[f"{name}.ids"].to(device), e[f"{name}.mask"].to(device)).cpu()
                yield equal(f"{family}: padded on the {side}", found[real], e[f"{name}.aligned"][real], limit)
        half = golden.load(device, dtype=torch.bfloat16)(ids).float().cpu()
        official = (e["bf16.aligned"].float() - exact).abs().mean().item()
        error = (half - exact).abs().mean().item()
        yield Row(f"{family}: mean error of bfloat16", error, official, limit=1.5 * official)
        if hasattr(m, "new_cache"):
            yield from logits_in_blocks(golden, device, limit)


def logits_in_blocks(golden, device, limit):
    """Of attention in blocks of 4: whole rows, one block after the other with a cache, and with a clean copy."""
    ids, e = golden.tensors["logits.ids"][:1].to(device), golden.tensors
    exact = e.get("blocks.4.aligned", e["logits.aligned"][:1])  # 4 is what SDAR has anyway
    m, L = golden.load(device, block_length=4), ids.shape[1]
    yield equal(f"{golden.family}: in blocks", m(ids), exact, limit)
    cache, found = m.new_cache(1, L), []
    for first in range(0, L, 4):
        end = min(first + 4, L)
        found.append(m(ids[:, :end], cache=cache.of(ids, first, end - first)))
    yield equal(f"{golden.family}: with a cache", torch.cat(found, dim=1), exact, limit)
    yield equal(f"{golden.family}: with a clean copy", m(ids, clean=ids, start=0), exact, limit)


class Asked(TorchFunctionMode):
    """Inside, `kernel` is the name of the attention kernel that torch has chosen last."""

    kernel = None

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            self.kernel = SDPBackend(torch._fused_sdp_choice(*args, **(kwargs or {}))).name.lower()
        return function(*args, **(kwargs or {}))


def attention(device):
    """Which kernel is chosen for each mask that we use, its time, and whether a shape that is new costs more: the last
    block of the network has a new number of queries at almost every decoding step."""
    cuda = device.type == "cuda"
    B, H, L, E = (4, 32, 512, 128) if cuda else (1, 4, 128, 64)
    dtype = torch.bfloat16 if cuda else torch.float32
    padding = torch.ones(B, 1, 1, L, dtype=torch.bool, device=device)
    padding[0, :, :, :9] = False
    blocks = torch.arange(L, device=device) // 4
    blocks = (blocks[None, :] <= blocks[:, None])[None, None]  # [1, 1, L, L]: query, key
    for name, K, mask in (
        ("no mask", H, None), ("padding", H, padding), ("blocks", H, blocks),
        ("no mask, 4 queries a key", H // 4, None), ("padding, 4 queries a key", H // 4, padding),
    ):  # fmt: skip
        k, v = torch.randn(2, B, K, L, E, device=device, dtype=dtype)

        def call(n, k=k, v=v, mask=mask):
            q = torch.zeros(B, H, n, E, device=device, dtype=dtype)
            rows = mask[:, :, :n] if mask is not None and mask.shape[2] > 1 else mask
            return model.attend(q, k, v, rows)

        with Asked() as asked:
            call(L)
        yield Row(f"{name}: kernel", asked.kernel)
        again = milliseconds(call, [L // 2] * 21, device)
        new = milliseconds(call, [L // 2, *range(L // 2 - 31, L // 2 + 9, 2)], device)
        yield Row(f"{name}: ms, one shape 20 times", again)
        # A plan for each new shape, as cuDNN makes one, takes tens of milliseconds
        yield Row(f"{name}: ms, 20 new shapes", new, again, max(0.0, new - again), 5.0 if cuda else None)


def milliseconds(call, sizes, device):
    """The mean time of call(size) over all sizes but the first, which is there to warm up."""
    call(sizes[0])
    speed.sync(device.type)
    begun = time.perf_counter()
    for size in sizes[1:]:
        call(size)
    speed.sync(device.type)
    return 1000 * (time.perf_counter() - begun) / (len(sizes) - 1)


def compiled(device):
    """--compile: the same logits, and how many graphs rows of several lengths take."""
    golden = Golden("llada")
    m, plain = golden.load(device), golden.load(device)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    loading.compile_blocks(m)
    begun = time.perf_counter()
    with torch.no_grad():
        for n in (24, 19, 13):
            ids = golden.tensors["logits.ids"][:, :n].to(device)
            try:
                found = m(ids)
            except torch._inductor.exc.InductorError as e:  # without a C++ compiler, say
                raise Skip(f"torch.compile does not work here: {str(e).splitlines()[0]}") from e
            yield equal(f"logits of {n} tokens", found, plain(ids), rounding(device))
    yield Row("graphs", torch._dynamo.utils.counters["stats"]["unique_graphs"], limit=6)
    yield Row("seconds", time.perf_counter() - begun)


# ------------------------------------------------------------------------------------------------------- decoding

STRATEGIES = dict(
    maskgit_plus="confidence", topk_margin="margin", entropy="entropy",  # Dream's names
    static="confidence", dynamic="confidence", sequential="left", entropy_bounded="entropy",  # SDAR's
)  # fmt: skip
PARTS = dict(cases="decode", rounded="rounded", bd3lm="bd3lm")  # list in expected.json -> how its tensors begin


def settings_of(family, case):
    """The arguments of decode.generate for a case of expected.json."""
    how = dict(max_new_tokens=case["new"], steps=case["steps"], block_length=case.get("block"), stop=case.get("stop"))
    if family == "dream":
        return dict(how, strategy=STRATEGIES[case["alg"]], top_p=case.get("top_p"))
    how.update(schedule=family, strategy="confidence")
    if family == "sdar":
        how.update(strategy=STRATEGIES[case["strategy"]], threshold=case.get("threshold", case.get("eb_threshold")))
        how["steps"] *= math.ceil(case["new"] / case["block"])  # of a block there, of the response here
    return how


def decoding(device):
    """Every stored decoding of the official code, at temperature 0: its tokens, and the step of each."""
    for family in FAMILIES:
        golden, tokens, steps = Golden(family), [], []
        for part, prefix in PARTS.items():
            for k, case in enumerate(golden.cases.get(part, ())):
                official = {x: golden.tensors.get(f"{prefix}.{k}.{x}") for x in ("prompt", "prompt_mask")}
                prompt, mask = (x if x is None else x.to(device) for x in official.values())
                blocks = family == "sdar" or part == "bd3lm"
                m = golden.load(device, block_length=case["block"] if blocks else None)
                t = decode.generate(m, prompt, mask, **settings_of(family, case))
                step = golden.tensors[f"{prefix}.{k}.step"]
                tokens.append((t.response.flatten().cpu(), golden.tensors[f"{prefix}.{k}.response"].flatten()))
                steps.append((t.step.cpu()[step >= 0], step[step >= 0]))  # -1: never decoded
        for name, pairs in (("tokens", tokens), ("steps", steps)):
            yield same(f"{family}: {name} of {len(pairs)} decodings", *map(torch.cat, zip(*pairs)))


SMALL = dict(  # settings of a short decoding with each family's decoder
    llada=dict(strategy="confidence", schedule="llada", block_length=8), dream=dict(strategy="entropy"),
    sdar=dict(strategy="confidence", schedule="sdar", block_length=4),
    a2d=dict(strategy="confidence", schedule="a2d", block_length=8),
)  # fmt: skip


def prompts_of(golden, lengths, device):
    """Prompts of these lengths, on the device."""
    ids = golden.tensors["logits.ids"].flatten()
    return [ids[:n].to(device) for n in lengths]


def answers(golden, device, prompts, batch_size, **how):
    """Decode 16 tokens for each prompt -> their tokens and entropies, two [B, N]."""
    m, rows = golden.load(device), {}
    how = dict(SMALL[golden.family], max_new_tokens=16, suppress=[m.config.mask_id], **how)
    for numbers, t in queue.stream(m, prompts, batch_size, **how):
        rows.update(zip(numbers, zip(t.response, t.entropy)))
    return tuple(map(torch.stack, zip(*(rows[i] for i in range(len(prompts))))))


def batches(device):
    """Rows decoded together and alone, in float32: the same tokens. And the same seed twice: the same draws."""
    for family in FAMILIES:
        golden = Golden(family)
        prompts = prompts_of(golden, (11, 4, 7, 16, 9), device)
        (together, h), (alone, h_alone) = (answers(golden, device, prompts, size) for size in (5, 1))
        yield same(f"{family}: tokens, 5 rows together and alone", together, alone)
        yield equal(f"{family}: their entropies", h, h_alone, rounding(device))

        def generator(i):
            return data.generator(0, i, device=device)

        drawn = [answers(golden, device, prompts, 5, temperature=0.7, generator=generator)[0] for _ in range(2)]
        yield same(f"{family}: tokens drawn twice with one seed", *drawn)


def waits(device):
    """How often the host waits for a CUDA device, or copies to it, in a decoding step, and in a training batch: torch
    says so of each."""
    if device.type != "cuda":
        raise Skip("torch counts waits on CUDA alone; on a CPU tests/test_device.py counts them")
    for family in FAMILIES:
        golden = Golden(family)
        for B in (1, 16):
            steps = sorted(waits_of_steps(golden, device, B))
            yield Row(f"{family}: median of a step, batch {B}", steps[len(steps) // 2], limit=WAITS)
        m, batch = trainable(golden, device)
        with warned() as said:
            loss_and_gradient(m, batch, "tabom")
        yield Row(f"{family}: loss and gradient of a batch", len(said))


def waits_of_steps(golden, device, B):
    """The number of waits in each decoding step of so many rows, but for the first."""
    prompts, at = prompts_of(golden, [9 + i % 3 for i in range(B)], device), []
    with warned() as said:
        answers(golden, device, prompts, B, on_step=lambda *_: at.append(len(said)))
    return [after - before for before, after in zip(at, at[1:])]


@contextlib.contextmanager
def warned():
    """Inside, torch warns of each wait -> the list that gets the warnings."""
    with warnings.catch_warnings(record=True, action="always") as said:
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield said
        finally:
            torch.cuda.set_sync_debug_mode("default")


# -------------------------------------------------------------------------------------------------------- training


def trainable(golden, device):
    """A golden model with an adapter that changes something, and a batch for it, on the device."""
    m = golden.load(device)
    lora.inject(m, rank=4, alpha=4, generator=torch.Generator().manual_seed(0)).train()
    records, g = [], torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in [p for name, p in lora.tensors(m).items() if "lora_B" in name]:
            p.copy_(0.1 * torch.randn(p.shape, generator=g))
    for P, N in ((9, 24), (5, 17), (11, 20)):
        tokens = torch.randint(0, 300, (P + N,), generator=g).tolist()
        order = torch.randperm(N, generator=g).tolist()
        record = dict(prompt_ids=tokens[:P], response_ids=tokens[P:], order=order, entropy=[1.0] * N)
        records.append(m.complete(record) if hasattr(m, "complete") else record)
    batch = data.collate(records, m.config.pad_id)
    return m, {name: tensor.to(device) for name, tensor in batch.items()}


def loss_and_gradient(m, batch, name):
    """An objective of the table with its defaults: its loss, and the gradient of the adapter as one vector."""
    entry, more = objectives.OBJECTIVES[name], {}
    if entry.reference is not None:
        defaults = {x: objective_options.default_of(name, x) for x in entry.options}
        more["reference"] = entry.reference(m, None, defaults)
    if "window" in entry.options:
        more["window"] = 8
    m.zero_grad()
    generators = [data.generator(0, i) for i in range(len(batch["length"]))]
    loss = entry.loss(m, batch, generator=generators, **more)["loss"]
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None])
    return loss.item(), gradient


def losses(device):
    """The official loss and gradient of Eq. 9; then every objective of the table, against the CPU."""
    for family in ("llada", "dream"):
        yield from official_loss(Golden(family), device)
    if device.type == "cpu":
        raise Skip("the other objectives are compared with the CPU, and this is it")
    for family in ("llada", "sdar"):
        golden = Golden(family)
        here, there = trainable(golden, device), trainable(golden, "cpu")
        for name in objectives.OBJECTIVES:
            (loss, gradient), (exact, expected) = (loss_and_gradient(*place, name) for place in (here, there))
            yield equal(f"{family}, {name}: loss", loss, exact, rounding(device))
            yield equal(f"{family}, {name}: gradient", gradient, expected, 1e-3 * expected.abs().max().item())


def official_loss(golden, device):
    """Eq. 9 on a stored batch with the stored adapter."""
    e = load_file(golden.folder / "objective.safetensors")
    case = json.loads((golden.folder / "objective.json").read_text())[0]
    get = {x: e[f"tabom.0.{x}"].to(device) for x in ("prompt", "prompt_mask", "response", "order", "start")}
    batch = dict(prompt_ids=get["prompt"], prompt_mask=get["prompt_mask"], response_ids=get["response"])
    batch.update(order=get["order"], length=torch.full((2,), get["order"].shape[1], device=device))
    m = lora.load(golden.load(device), golden.folder / "adapter")
    options = dict(window=case["W"], margin=case["margin"], weight=case["weight"])
    loss = objectives.tabom(m, batch, start=get["start"], **options)["loss"]
    yield equal(f"{golden.family}: official loss of Eq. 9", loss.item(), case["loss"], rounding(device))
    loss.backward()
    ours, official = [], []
    for name, p in lora.tensors(m).items():
        ours.append(p.grad.flatten().cpu())
        official.append(e[f"tabom.0.grad.{name}"].flatten())
    ours, official = torch.cat(ours), torch.cat(official)
    yield equal(f"{golden.family}: its gradient", ours, official, 1e-3 * official.abs().max().item())


def speeds(device):
    """Tokens a second and the peak of memory at the real vocabularies, on a model of width 512 with few layers."""
    cuda = device.type == "cuda"
    how = dict(device=str(device), dtype="bfloat16" if cuda else "float32", repeat=1)
    how.update(dict(steps=8, batch_size=16, new=256) if cuda else dict(steps=2, batch_size=1, new=32))
    for kind in ("decode", "train"):
        for family, V in speed.SIZES["b"].items():
            if cuda or family == "llada":  # a CPU takes ten seconds for each
                found = speed.measure(kind, family, "b", "ours", **how)
                yield Row(f"{kind}, {family}, V {V}: tokens a second", found["tokens_per_second"])
                yield Row(f"{kind}, {family}, V {V}: peak above the weights, MB", found["memory"] / 1e6)
