"""What the paper and its code say of an evaluation: which models, which text is graded, and the scores to compare with.

    published.published(c, m.config, "gsm8k", 1319)    # {} or dict(paper={"base": 76.12, ...}, paper_about="...")

A score stands beside ours only for the checkpoint that the paper has, on all questions of the benchmark, with the
protocol's own decoder settings and prompts; beside anything else it would mislead.
"""

from pathlib import Path

# The paper's Tables 2 and 3, in percent: before training, and TABOM trained on PRM12K and on Ling-Coder.
# docs/recipes.md has the other rows.
PAPER = {
    ("dream", "gsm8k"): (81.41, 84.31, 81.73),
    ("dream", "math500"): (39.80, 41.10, 42.40),
    ("dream", "humaneval"): (52.66, 58.54, 60.36),
    ("dream", "mbpp"): (58.00, 59.20, 60.60),
    ("dream", "ifeval"): (56.56, 56.19, 55.45),
    ("llada", "gsm8k"): (76.12, 78.62, 77.33),
    ("llada", "math500"): (36.20, 36.80, 38.20),
    ("llada", "humaneval"): (36.01, 40.30, 42.68),
    ("llada", "mbpp"): (39.20, 40.10, 40.00),
    ("llada", "ifeval"): (33.08, 32.98, 34.19),
}
ABOUT = "paper %: before training / TABOM on PRM12K / TABOM on Ling-Coder"
QUESTIONS = dict(gsm8k=1319, math500=500, humaneval=164, mbpp=500, ifeval=541)
# family -> the checkpoint of the paper, and the shape that it must have: layers, width, rows of the vocabulary
CHECKPOINTS = {
    "llada": ("LLaDA-8B-Instruct", (32, 4096, 126464)),
    "dream": ("Dream-v0-Instruct-7B", (28, 3584, 152064)),
}


def is_checkpoint(c, config):
    """Whether a model is the paper's of its family, by its name, or the one in its config.json, and its shape."""
    name, shape = CHECKPOINTS.get(config.family, (None, None))
    names = {Path(str(path)).name for path in (c.model, config.raw.get("_name_or_path"))}
    return name in names and (config.layers, config.width, config.vocab_size) == shape


def check_model(c, loaded, warn):
    """Warn where the settings of a protocol were made for another model of the family.

    Raises ValueError for --protocol release with a family that the authors' code does not have."""
    config = loaded.m.config
    if c.protocol == "release" and config.family not in CHECKPOINTS:
        known = " and ".join(name for name, _ in CHECKPOINTS.values())
        raise ValueError(
            f"--protocol release: the authors' code has {known}, no {config.family} model; use paper or official"
        )
    if config.family in CHECKPOINTS and not is_checkpoint(c, config):
        name = CHECKPOINTS[config.family][0]
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
    if n != QUESTIONS.get(task) or (config.family, task) not in PAPER or not is_checkpoint(c, config):
        return {}
    return dict(paper=dict(zip(("base", "prm12k", "ling_coder"), PAPER[config.family, task])), paper_about=ABOUT)
