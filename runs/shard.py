"""One model spread over processes: each holds a part of every weight, gradient and optimizer state (torch's FSDP2).

    spread = functools.partial(shard.spread, compute=torch.bfloat16)
    m = model.load(folder, spread=spread, fill=shard.fill)                  # on every process, which reads its part
    model.save(m, "out/model", whole=shard.whole, write=processes.first)                     # likewise
    shard.save(state, "out/state")                                          # name -> tensor, each process its part
    shard.load(state, "out/state")                              # in place, on any number of processes

An 8B model with AdamW in float32 takes 128 GB, which no process has to hold. All processes run the model and gather
tensors together: one that does not take part leaves the others waiting.
"""

import contextlib
import logging
import warnings

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor


def spread(m, device="cpu", compute=None):
    """Spread a model over all processes, block by block, in place. It may be on the meta device still.

    compute: the dtype to compute in, where it is not that of the weights; gradients add up in float32."""
    mesh = init_device_mesh(torch.device(device).type, (dist.get_world_size(),))
    # The model itself decides what is cast: LLaDA's rotations, for one, are in float32.
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for part in (*m.layers, m):
        fully_shard(part, mesh=mesh, mp_policy=policy)
        # A process's loss is its share of the mean over the global batch already, whatever the number of its rows: the
        # gradients add up, where FSDP would take their mean.
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum
    return m


def is_spread(tensors):
    """Whether any of the tensors is a part of one that is spread over processes."""
    return any(isinstance(tensor, DTensor) for tensor in tensors)


def settle(m):
    """Leave the model with its parts only: a forward pass without a backward leaves embedding and head whole."""
    if isinstance(m, FSDPModule):
        m.reshard()


def whole(tensor):
    """All of a tensor on the CPU, gathered from all processes if it is spread over them."""
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return tensor.detach().cpu().contiguous()


def fill(target, file, name):
    """Copy a tensor of an open safetensors file into target -> the part of target that this process holds: of one that
    is spread over processes only its rows, which alone are read."""
    target = target.detach()
    if not isinstance(target, DTensor):
        return target.copy_(file.get_tensor(name))
    part, each = target.to_local(), -(-len(target) // target.device_mesh.size())  # FSDP2 cuts rows as torch.chunk does
    start = min(each * target.device_mesh.get_local_rank(), len(target))
    return part.copy_(file.get_slice(name)[start : start + len(part)])


def save(state, folder):
    """Write tensors, name -> tensor: each process its parts, into one safetensors file a process.

    Raises OSError on every process where one cannot write."""
    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with one_line():
        dcp.save(state, storage_writer=writer, no_dist=not dist.is_initialized())


def load(state, folder):
    """Fill tensors, name -> tensor, from what save() wrote, perhaps on another number of processes.

    Raises OSError for files that are missing or damaged."""
    reader = dcp.HuggingFaceStorageReader(str(folder))
    with one_line():
        dcp.load(state, storage_reader=reader, no_dist=not dist.is_initialized())


@contextlib.contextmanager
def one_line():
    """What a process could not do, as an OSError of one line. torch has the tracebacks of all processes for it, and
    warns of a process that is alone."""
    logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except dcp.api.CheckpointException as e:
        process, (error, _) = next(iter(e.failures.items()))
        raise OSError(f"process {process}: {error}") from e
