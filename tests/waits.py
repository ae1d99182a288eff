"""A second device without one: tensors that say they are on "meta" and keep their data, and a count of how often the
host waits for them.

    with Recorder() as r:
        ids = r.put(torch.arange(5))      # to the device; r.model(m) moves a model
        int(ids.sum())                    # r.waits == 1: a number of the device is asked for
        ids[torch.tensor([1, 2])]         # r.copies == 1: to the device, after which the host waits, too

What mixes devices is refused, as CUDA does, but for tensors without dimensions beside it and indices from the CPU. What
is not seen: speed, kernels, rounding, and code that asks for the device "cuda" by name.
"""

import collections
import sys
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

ROOT = Path(__file__).parent.parent
SOURCES = {ROOT, *(ROOT / name for name in ("blocks", "baselines", "runs"))}  # whose lines are reported
DEVICE = torch.device("meta")
# The host has to know a number, or the size of a result
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal"}
WAITS |= {"bincount", "multinomial"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
COPIES = {"copy_", "_to_copy"}


class Card(torch.Tensor):
    """A tensor on the device; `data_there` has its numbers."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, data):
        made = torch.Tensor._make_wrapper_subclass(
            cls, data.size(), strides=data.stride(), storage_offset=data.storage_offset(), dtype=data.dtype,
            device=DEVICE,
        )  # fmt: skip
        made.data_there = data
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return Recorder.current.run(func, args, kwargs or {})

    def tolist(self):  # torch's does not know of subclasses
        return self.cpu().tolist()


def wrapped(x):
    return Card(x) if isinstance(x, torch.Tensor) and not isinstance(x, Card) else x


def bare(x):
    return x.data_there if isinstance(x, Card) else x


class Recorder(TorchDispatchMode):
    """Inside, tensors live on the device that Card makes up. waits, copies: how often the host has waited for it, and
    copied to it; places: which line of the project did so -> how often."""

    current = None

    def __enter__(self):
        Recorder.current = self
        self.reset()
        self.made = {name: getattr(torch, name) for name in ("tensor", "as_tensor")}
        for name in self.made:  # they copy where no mode sees it
            setattr(torch, name, self.placed)
        return super().__enter__()

    def __exit__(self, *error):
        for name, function in self.made.items():
            setattr(torch, name, function)
        return super().__exit__(*error)

    def reset(self):
        self.waits = self.copies = 0
        self.places = collections.Counter()

    def placed(self, values, *, dtype=None, device=None, **more):
        if isinstance(values, Card):
            return values.to(dtype or values.dtype)
        made = self.made["tensor" if more else "as_tensor"](values, dtype=dtype, **more)
        return made if device is None else made.to(device)

    def put(self, x):
        """A tensor on the device, without a count."""
        return wrapped(x)

    def model(self, m):
        """Move a model's parameters to the device, in place."""
        for part in m.modules():
            for name, p in part.named_parameters(recurse=False):
                setattr(part, name, torch.nn.Parameter(wrapped(p.detach()), requires_grad=p.requires_grad))
        return m

    def count(self, kind):
        frame = sys._getframe()
        while frame and Path(frame.f_code.co_filename).parent not in SOURCES:
            frame = frame.f_back
        place = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame else "torch"
        setattr(self, kind, getattr(self, kind) + 1)
        self.places[kind, place] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.run(func, args, kwargs or {})

    def run(self, func, args, kwargs):
        name = func._schema.name.split("::")[1]
        tensors = [x for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)]
        cards = [x for x in tensors if isinstance(x, Card)]
        target = kwargs.get("device")
        there = target is not None and torch.device(target) == DEVICE
        if not cards and not there:
            return func(*args, **kwargs)
        self.tally(name, args, tensors, cards, target)
        if there or target is not None:
            kwargs = dict(kwargs, device="cpu")
        out = func(*tree_map(bare, args), **tree_map(bare, kwargs))
        if name == "_local_scalar_dense" or (name == "_to_copy" and target is not None and not there):
            return out
        for i, argument in enumerate(func._schema.arguments):  # what is written in place is what comes back
            if argument.alias_info is not None and argument.alias_info.is_write:
                return args[i] if i < len(args) else kwargs[argument.name]
        return tree_map(wrapped, out)

    def tally(self, name, args, tensors, cards, target):
        others = [x for x in tensors if not isinstance(x, Card)]
        if name in COPIES:
            source = args[1] if name == "copy_" else args[0]
            to_cpu = torch.device(target).type == "cpu" if target is not None else not isinstance(args[0], Card)
            if isinstance(source, Card) and to_cpu:
                self.count("waits")
            elif not isinstance(source, Card):
                self.count("copies")
            return
        if name in INDEXING:
            if not isinstance(args[0], Card):
                raise RuntimeError(f"{name}: an index or value of the device for a tensor of the CPU")
            for index in args[1]:
                if index is not None and index.dtype == torch.bool:
                    self.count("waits")
                if index is not None and not isinstance(index, Card):
                    self.count("copies")
            return
        if name in WAITS:
            self.count("waits")
        if cards and any(x.dim() > 0 for x in others):
            raise RuntimeError(f"{name}: tensors of the CPU, {[list(x.shape) for x in others]}, beside the device's")
