"""What the paper and its code say of an evaluation: which models, which text is graded, and the scores to compare with.

    published.published(c, m.config, "gsm8k", 1319)    # {} or dict(paper={"base": 76.12, ...}, paper_about="...")

A score stands beside ours only for the checkpoint that the paper has, on all questions of the benchmark, with the
protocol's own decoder settings and prompts; beside anything else it would mislead.
"""

from pathlib import Path

import data

# The numbers of the tables of TABOM's paper and T3D's, and which models they are of.
PAPER = data.read_json(Path(__file__).with_name("paper.json"))
ABOUT = "paper %: before training / TABOM on PRM12K / TABOM on Ling-Coder"
SHOWN = {"base": ("3", "No-SFT"), "prm12k": ("3", "TABOM"), "ling_coder": ("2", "TABOM")}  # name -> table, row
QUESTIONS = dict(gsm8k=1319, math500=500, humaneval=164, mbpp=500, ifeval=541)
CHECKPOINTS = PAPER["checkpoints"]  # name in the tables -> Hub repo, family, and layers, width, rows of the vocabulary
FAMILIES = {"llada": "LLaDA", "dream": "Dream"}  # those of the authors' code, and their names in the tables


def checkpoint_of(names, config):
    """The name in the tables of the model that is called one of `names` and has its shape, else None."""
    for label, known in CHECKPOINTS.items():
        shape = [config.layers, config.width, config.vocab_size]
        if Path(known["hub"]).name in names and (known["family"], known["shape"]) == (config.family, shape):
            return label
    return None


def is_checkpoint(c, config):
    """Whether a model is one of the papers', by its name, or the one in its config.json, and its shape."""
    names = {Path(str(path)).name for path in (c.model, config.raw.get("_name_or_path"))}
    return checkpoint_of(names, config) is not None


def check_model(c, loaded, warn):
    """Warn where the settings of a protocol were made for another model of the family.

    Raises ValueError for --protocol release with a family that the authors' code does not have."""
    config = loaded.m.config
    known = {family: Path(CHECKPOINTS[label]["hub"]).name for family, label in FAMILIES.items()}
    if c.protocol == "release" and config.family not in known:
        theirs = " and ".join(known.values())
        raise ValueError(
            f"--protocol release: the authors' code has {theirs}, no {config.family} model; use paper or official"
        )
    if config.family in known and not is_checkpoint(c, config):
        name = known[config.family]
        warn(f"--protocol {c.protocol} has the lengths and steps of {name}; {c.model} is another model")


def graded_text(c, loaded, record):
    """The text of a response that is graded. The authors' code cuts LLaDA's at the EOS alone: an end of turn stays."""
    if c.protocol != "release" or loaded.m.config.family != "llada":
        return record["text"]
    ids, eos = record["response_ids"], loaded.m.config.eos_id  # exactly this id
    return loaded.tok.decode(ids[: ids.index(eos)] if eos in ids else ids)


def published(c, config, task, n):
    """dict(paper=dict(base, prm12k, ling_coder), paper_about): the paper's scores in percent on a task. Empty for
    another checkpoint, or where n, the number of questions, is not the benchmark's."""
    if n != QUESTIONS.get(task) or config.family not in FAMILIES or not is_checkpoint(c, config):
        return {}
    scores = {}
    for name, (number, row) in SHOWN.items():
        table = PAPER["tables"]["tabom"][number]
        column = list(table["columns"].values()).index(dict(task=task))
        scores[name] = table["sections"][FAMILIES[config.family]]["rows"][row][column]
    return dict(paper=scores, paper_about=ABOUT)
