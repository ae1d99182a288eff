"""TABOM: post-training of masked diffusion language models along the trajectories that they decode themselves.

    python tabom.py demo                                                     # the whole method on a CPU, from nothing
    torchrun --nproc_per_node 8 tabom.py distill --model GSAI-ML/LLaDA-8B-Instruct --data prompts.jsonl --out out/T
    torchrun --nproc_per_node 8 tabom.py train --model GSAI-ML/LLaDA-8B-Instruct --data out/T --out out/R
    torchrun --nproc_per_node 8 tabom.py evaluate --model GSAI-ML/LLaDA-8B-Instruct --tasks gsm8k --out out/E

This file is the command line: one table. A command is a function of its name in the file named there, which is
imported when the command is called. Results go to stdout, ending in one line of JSON; progress and errors go to stderr.
TABOM_DEBUG=1 shows the traceback of an error.
"""

import json
import sys

from runs import streams
from runs.options import check_values, idle, parse

COMMANDS = {  # name -> (module, what it does)
    "demo": ("experiments.demo", "distill, train and evaluate a tiny model on puzzles: the whole method on a CPU"),
    "distill": ("distill", "decode every prompt as the model's family does and log the order: trajectories"),
    "train": ("train", "train an adapter (or all weights) along trajectories; the same command continues"),
    "evaluate": ("evaluate", "answer the questions of benchmarks and grade the answers"),
    "tables": ("release.tables", "the papers' tables, their numbers beside those of the runs that are there"),
    "grade": ("tools.grade", "grade responses that were made elsewhere"),
    "generate": ("tools.generate", "answer one prompt, those of a file, or chat"),
    "check": ("tools.check", "whether all of this works on this machine, and how fast; a table"),
    "merge": ("tools.merge", "fold an adapter into its base model"),
    "sweep": ("experiments.sweep", "train and test over a grid of options and seeds"),
    "diagnose": ("experiments.diagnose", "TDS, decode order and loss against mask ratio of checkpoints"),
    "claims": ("experiments.claims", "the paper's claims on puzzles, from new base models on; hours"),
}
VERSION = "0.3.0"
ALONE = ("generate", "grade", "merge", "check", "tables")  # nothing to share: under torchrun the first does them


def main(argv=None):
    """Run a command -> exit status. An error is one line on stderr."""
    command, run, options_class, given = parse(COMMANDS, __doc__.split("\n")[0], f"tabom {VERSION}", argv)
    from runs import torchrun  # with torch: not before the command line is understood

    try:
        first = torchrun.place_among_processes()[0] == 0
        if command in ALONE and not first:
            return 0
        c = options_class(**given)  # only of the flags that are there: a recipe sets the others
        check_values(c)
        for line in idle(c, given) if first else ():
            print(f"warning: {line}", file=sys.stderr)
        result = run(c)
        if first:
            print(json.dumps(result, ensure_ascii=False), flush=True)
        return int(bool(result and result.get("failed")))  # rows of check; only the first process has a result
    except KeyboardInterrupt:
        torchrun.last_words("stopped" + ("" if command in (*ALONE, "diagnose") else "; the same command continues"))
        return 130
    except torchrun.ERRORS as e:
        return torchrun.tell(e)


if __name__ == "__main__":
    streams.guard()
    status = main()
    from runs import torchrun

    torchrun.leave(status)
