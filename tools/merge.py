"""An adapter folded into its base model, as a model folder that anything loads.

python tabom.py merge --model GSAI-ML/LLaDA-8B-Instruct --adapter out/R/epoch-5 --out out/M
"""

from dataclasses import dataclass

import lora
import model
from runs import disk, loading, resume, torchrun
from runs.options import opt


@dataclass
class MergeOptions:
    """the adapter and its base"""

    model: str = opt(None, "base model", required=True)
    adapter: str = opt(None, "adapter folder", required=True)
    out: str = opt(None, "folder for the merged model", required=True)


def merge(c):
    """Fold an adapter into its base model and write a model folder in the base's own layout and dtype."""
    disk.must_be_free(c.out)
    folder, say = model.resolve(c.model), torchrun.warner(torchrun.Processes("cpu", alone=True))
    loading.warn_of_another_base(c.adapter, folder, say)
    m = lora.load(model.load(folder, dtype=None), c.adapter)
    changed = len(lora.layers(m))
    with disk.atomic_folder(c.out) as beside:
        model.save(lora.merge(m), beside)
        resume.copy_extras(folder, beside)
    return dict(out=c.out, merged_layers=changed)
