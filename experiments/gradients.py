"""The exchange of gradients between processes: our sum against torch's DistributedDataParallel, in one run.

    OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 -m experiments.gradients [--repeat 20]    # the last line is JSON

The loss is a mean over the rows of a global batch, which need not divide evenly among the processes: some may have no
row at all. DistributedDataParallel takes the mean over processes, and waits for one that has nothing to compute; a sum
of shares is right however the rows lie. An adapter has few gradients, so there is little to gain from sending some of
them while others are still being computed. This measures what that costs: a forward and a backward pass of TABOM, both
ways in turn, on the small model of experiments/speed.py, with as many rows on each process.
"""

import argparse
import json
import math
import time

import torch
from torch.nn.parallel import DistributedDataParallel

import lora
import objectives
import train
from experiments import speed
from runs import torchrun

ROWS, NEW = 4, 128  # of each process; response tokens


def ways(processes):
    """Two functions that leave the gradients of the global batch on every process: by our sum, and by torch's mean;
    and the parameters that have them."""
    device = str(processes.device)
    m = lora.inject(speed.small("llada", "a", device, torch.float32), generator=torch.Generator().manual_seed(3))
    weights = [p for p in m.parameters() if p.requires_grad]
    g = torch.Generator().manual_seed(processes.index)
    ids = torch.randint(0, 1000, (ROWS, 64 + NEW), generator=g).to(device)  # [B, P + N]
    order = torch.stack([torch.randperm(NEW, generator=g) for _ in range(ROWS)]).to(device)
    batch = dict(
        prompt_ids=ids[:, :64], prompt_mask=torch.ones_like(ids[:, :64]), response_ids=ids[:, 64:], order=order
    )
    batch["length"] = torch.full((ROWS,), NEW, device=device)
    start, wrapped = torch.zeros(ROWS, dtype=torch.long, device=device), DistributedDataParallel(m)

    def loss(model):
        return objectives.tabom(model, batch, start=start, mask_id=m.config.mask_id)["loss"]

    def ours():
        (loss(m) / processes.count).backward()
        train.sum_gradients(weights, processes)

    def theirs():
        loss(wrapped).backward()

    return dict(ours=ours, ddp=theirs), weights


def compare(processes, repeat):
    """Both ways in turn, `repeat` times each -> a dict of the fastest of each in seconds, their ratio, and the largest
    difference of their gradients."""
    calls, weights = ways(processes)
    best, gradients = dict.fromkeys(calls, math.inf), {}
    for i in range(repeat + 1):  # the first time warms up
        for name, call in calls.items():
            for p in weights:
                p.grad = None
            processes.barrier()
            begun = time.perf_counter()
            call()
            speed.sync(str(processes.device))
            if i:
                best[name] = min(best[name], time.perf_counter() - begun)
            gradients[name] = torch.cat([p.grad.flatten() for p in weights])
    apart = (gradients["ours"] - gradients["ddp"]).abs().max().item()
    seconds = {f"{name}_seconds": round(x, 4) for name, x in best.items()}
    return dict(seconds, ratio=round(best["ours"] / best["ddp"], 4), apart=apart)


def main(argv=None):
    """The command line -> exit status."""
    parser = argparse.ArgumentParser(prog="python -m experiments.gradients", description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="auto", help="cuda or cpu")
    parser.add_argument("--repeat", type=int, default=20, help="measure so often and take the fastest")
    c = parser.parse_args(argv)
    try:
        if torchrun.place_among_processes()[1] == 1:
            raise ValueError("one process has nothing to exchange: start it with torchrun --nproc_per_node 2")
        if c.repeat < 1:
            raise ValueError(f"--repeat {c.repeat}: must be above 0")
        processes = torchrun.Processes(c.device)
        result = compare(processes, c.repeat)
    except torchrun.ERRORS as e:
        return torchrun.tell(e)
    if processes.first:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    torchrun.leave(main())
