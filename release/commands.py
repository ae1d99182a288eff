"""The commands that fill a cell of the papers' tables, from nothing: distill, train, evaluate or diagnose.

    commands.lines(c, where, ("gsm8k", "math500"), ())    # c: TablesOptions; where: of a cell, see found.py

The names of data files are those of docs/recipes.md and docs/t3d.md, and so are the folders of TABOM's tables. A
command whose folder is finished does nothing, so all of them may be run in turn.
"""

import re

from release import rows
from release.found import AUTHORS_ROW, DECODINGS, ENDS, PAPERS
from release.published import CHECKPOINTS
from runs.options import flag

RUN = "torchrun --nproc_per_node 8 tabom.py"
PROMPTS = {
    "tabom": {
        "math": "prm12k.parquet --check math",
        "code": "ling_coder.parquet --limit 18000 --check none",
    },
    "t3d": {
        "math": "math_train.jsonl --check none",
        "code": "prime_code.jsonl --check none",
    },
}
ANSWERS = {"math": "prm12k.parquet", "code": "ling_coder.parquet --limit 18000", "answers": "stratos.jsonl"}
KEEP = {"tabom": {"math": "correct", "code": "finished"}, "t3d": {"math": "all", "code": "all"}}
# The epoch whose adapter the authors published, and the last of any other run.
PUBLISHED = {"dream-prm12k": 1, "dream-ling-coder": 3, "llada-prm12k": 5, "llada-ling-coder": 1}
LAST = {"tabom": 5, "t3d": 30}
# T3D trains all weights; its paper and repository: docs/t3d.md
ALL_WEIGHTS = (
    "--grid prompt --lora-rank 0 --lr 1e-5 --final-lr 1e-6 --warmup 20 --global-batch 256 --epochs 30 "
    "--gradient-checkpointing --shard"
)
UNIFORM = "--weighting uniform --norm batch"
PATHS = "--masked earlier --path levels"
# Rows of T3D's tables -> the end of their runs' folders, the options of train. TABOM's are those of rows.py.
T3D = {
    "SFT-GT": ("-sft", f"--objective nelbo {UNIFORM}"),
    "SFT-SD": ("-redi", f"--objective nelbo {UNIFORM}"),
    "dParallel": ("-dparallel", "--objective dparallel"),
    "naive TD": ("-naive", "--objective t3d --preference none --path-weight 0 --random-tokens 0 --masked earlier"),
    "naive TD + path": ("-naive-path", f"--objective t3d --preference none --random-tokens 0 {PATHS}"),
    "naive TD + random": ("-naive-random", "--objective t3d --preference none --path-weight 0 --masked earlier"),
    "naive TD + both": ("-naive-both", f"--objective t3d --preference none {PATHS}"),
    "DDO": ("-ddo", "--objective t3d --path-weight 0 --random-tokens 0 --masked earlier"),
    "DDO + random": ("-ddo-random", "--objective t3d --path-weight 0 --masked earlier"),
    "DDO + path": ("-ddo-path", f"--objective t3d --random-tokens 0 {PATHS}"),
    "T3D": ("", f"--objective t3d {PATHS}"),
}


def lines(c, where, tasks, tds):
    """The commands that fill the cells of some benchmarks in one row, and the TDS on those in `tds`, as texts."""
    paper, hub = c.paper, CHECKPOINTS[where["base"]]["hub"]
    made, run, checkpoint = [], None, None
    if where["method"] == AUTHORS_ROW:
        run = f"{folder_of(paper, where)}/R-authors"
        name = folder_of(paper, where).removeprefix("out/").replace("-", "_")
        checkpoint = f"TABOM/checkpoints/{name}"  # of a clone of their repository
    elif where["data"]:
        made, run = training(paper, hub, where)
        last = PUBLISHED.get(run.removeprefix("out/").removesuffix("/R"), LAST[paper])
        checkpoint = f"{run}/epoch-{last if c.epoch == 'last' else c.epoch}"
    line, folder = evaluation(c, hub, where, run, checkpoint, tasks)
    made.append(line)
    for task in tds:
        made.append(diagnosis(hub, checkpoint, f"{folder}/{task}"))
    return made


def folder_of(paper, where):
    """The folder of all that is trained on one data set: out/dream-prm12k."""
    end = ENDS[where["data"]] if paper == "tabom" else where["data"]
    return f"out/{where['base'].lower()}-{end}"


def options_of(where, folder):
    """(the end of the run's folder, the options of train) of a row of rows.py, for TABOM's with the authors' recipe."""
    name, options = where["method"].removeprefix("TABOM").strip(", "), []
    for option, value in rows.ROWS[where["method"]].items():
        if (option, value) != ("objective", "tabom"):
            options.append(f"{flag(option)} {value}")
    words = " ".join([*options, "--global-batch 32"])
    words = words.replace(rows.GROUND_TRUTH, "nelbo --max-answer-tokens 2048 --gradient-checkpointing")
    if where["method"].startswith("TABOM"):
        words = f"--recipe {folder.removeprefix('out/')} {words.removesuffix('--global-batch 32')}"
        if where.get("window", 32) != 32:
            words, name = f"{words} --window {where['window']}", f"{name}w{where['window']}"
    name = re.sub(r"\W+", "-", name).lower()
    return f"-{name}" if name else "", words


def training(paper, hub, where):
    """(the commands that distill and train a row, the folder of its training run)."""
    folder, method, kind = folder_of(paper, where), where["method"], where["data"]
    name, options = T3D[method] if paper == "t3d" else options_of(where, folder)
    if method == "SFT-GT":
        made, source = [], ANSWERS[kind]
    else:
        source = f"{folder}/T --keep {KEEP[paper][kind]}"
        sampled = " --block-causal 4 --temperature 0.1 --max-new-tokens 2000" if paper == "t3d" else ""
        made = [f"{RUN} distill --model {hub} --data {PROMPTS[paper][kind]}{sampled} --out {folder}/T"]
    for setting in ("margin", "weight", "path_weight"):
        if setting in where and (setting, where[setting]) != ("path_weight", 0.2):
            options, name = f"{options} {flag(setting)} {where[setting]}", f"{name}-{where[setting]}"
    blocks = f"--block-causal 8 {ALL_WEIGHTS} " if paper == "t3d" else ""
    words = f"{RUN} train --model {hub} --data {source} {options} {blocks}--out {folder}/R{name}"
    return [*made, " ".join(words.split())], f"{folder}/R{name}"


def evaluation(c, hub, where, run, checkpoint, tasks):
    """(the evaluate command of a row, its folder). run, checkpoint: of its training, None for the base model."""
    paper, decoding = c.paper, where["decoding"]
    model, more = f"--model {hub}", {**PAPERS[paper], **DECODINGS[decoding]}
    if c.protocol != "paper" and "protocol" not in more:
        more["protocol"] = c.protocol
    if run and paper == "tabom":
        model = f"{model} --adapter {checkpoint}"
    elif run:
        model = f"--model {checkpoint}"
    pace = {"full": "", "dynamic": "-dynamic"}.get(decoding, decoding.partition(" ")[0])
    name = f"E{pace}{run.rpartition('/R')[2] if run else ''}"
    if paper == "tabom" and c.protocol != "paper":
        name = f"{name}-{c.protocol}"
    if str(checkpoint).endswith(f"epoch-{c.epoch}"):
        name = f"{name}-epoch{c.epoch}"  # beside that of the last one
    if paper == "t3d":
        more, name = dict(more, block_causal=where["b"]), f"{name}-b{where['b']}"
    options = " ".join(f"{flag(option)} {value}" for option, value in more.items())
    folder = f"{folder_of(paper, where) if run else 'out/' + where['base'].lower()}/{name}"
    return " ".join(f"{RUN} evaluate {model} --tasks {','.join(tasks)} {options} --out {folder}".split()), folder


def diagnosis(hub, checkpoint, answers):
    """The diagnose command of Table 6 for a model, None the base, on its own answers to a benchmark."""
    folder, name, task = answers.rsplit("/", 2)
    model = f"--model {hub} --checkpoints {checkpoint}" if checkpoint else f"--model {hub}"
    return f"{RUN} diagnose {model} --data {answers} --out {folder}/D{name.removeprefix('E')}-{task}"
