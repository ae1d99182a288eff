"""Where the metrics of a training run go besides metrics.jsonl: tensorboard or wandb, if asked for.

    logs.check("wandb")                                     # before anything is written: is the package there?
    write = logs.opened("wandb", out, settings, done=120)   # done: steps made before, of a run that continues
    write(dict(step=121, loss=0.5))

A run that continues goes on in the same log: steps that were logged and are made again replace the old ones.
"""

import importlib
import uuid

MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}  # --log -> the module that it needs


def check(name):
    """Raises ImportError where the package of a log is not installed. name: of MODULES, or None for no log."""
    if name is None:
        return
    try:
        importlib.import_module(MODULES[name])
    except ImportError as e:
        raise ImportError(f"--log {name} needs a package that is not here: pip install {name}") from e


def opened(name, out, settings, done=0):
    """A function that writes a step's metrics, a dict with "step", to the log in a run folder. settings: of the run."""
    openers = {None: lambda *_: lambda metrics: None, "tensorboard": tensorboard, "wandb": wandb_run}
    return openers[name](out, settings, done)


def tensorboard(out, settings, done):
    from torch.utils.tensorboard import SummaryWriter  # needs the package tensorboard

    # A killed run may have logged steps that its last checkpoint does not know: they are not shown twice.
    begun = done or (out / "tensorboard").is_dir()
    writer = SummaryWriter(out / "tensorboard", purge_step=done + 1 if begun else None)

    def write(metrics):
        for name, value in metrics.items():
            if isinstance(value, (int, float)):
                writer.add_scalar(name, value, metrics["step"])
        writer.flush()

    return write


def wandb_run(out, settings, done):
    import wandb

    kept = out / "wandb-id"  # so that a run that continues is the same one there
    if not kept.is_file():
        kept.write_text(f"{uuid.uuid4().hex[:8]}\n")
    wandb.init(project="tabom", name=out.name, dir=out, config=settings, id=kept.read_text().strip(), resume="allow")
    return lambda metrics: wandb.log(metrics, step=metrics["step"])
