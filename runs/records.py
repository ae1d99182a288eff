"""What a training run trains on: the usable trajectories of a folder or file, or a dataset's answers.

    found = records.training_records(c, loaded, parameters, processes)    # c: TrainOptions; dicts, sorted by id

Which trajectories are usable is data.usable's to say (--keep).
"""

import collections
import itertools
import sys
from pathlib import Path

import data
import objectives
import tokenizer
from release import recipes
from runs import torchrun
from runs.options import flag


def training_records(c, loaded, parameters, processes):
    """What to train on, sorted by id: the usable trajectories, or a dataset's prompts with their answers, as dicts of
    id, prompt_ids, response_ids, order (None for an answer) and what else the objective's parameters ask for. A model
    that has a method `complete` gets each record as it needs it."""
    path, say = Path(c.data), torchrun.warner(processes)
    if not data.trajectory_files(path) and prompts_of(path, 0):
        raise ValueError(f"{path}: no prompt is answered yet: the same distill command continues it")
    # A dataset's answers have no decode order: only an objective like Eq. 1 does without one.
    needs = objectives.OBJECTIVES[c.objective].needs(parameters)
    if data.holds_trajectories(path):
        kept = usable_trajectories(c, path, loaded, processes, say)
        gaps = sum(map(has_gap, kept))
        if gaps and "order" in needs:
            what = f"{gaps} of {len(kept)} trajectories have steps in which nothing was decoded"
            say(f"{what}: a window of such steps has fewer tokens, and an empty one trains on nothing")
    elif "order" not in needs:
        recipe = recipes.settings(c.recipe)  # whose settings nobody asked for one by one
        for name in ("methods", "cut_eos", "unfinished"):
            if getattr(c, name) not in (None, False, recipe.get(name)):
                say(f"{flag(name)} acts on trajectories: {path} has answers")
        kept = data.read_examples(path, c.prompt_field, c.answer_field, c.limit, say)
        tokenizer.encode_examples(loaded.tok, kept, c.raw, c.max_prompt_tokens, answers=True)
        several = sum(map(has_several, kept))
        if several:
            say(f"{several} of {len(kept)} rows have several answers: the first of each is trained on")
        kept = without_long_answers(kept, c.max_answer_tokens, path, say)
    else:
        raise ValueError(
            f"{path} has no trajectories, and {c.objective} needs them: distill first, or --objective nelbo"
        )
    fields = dict.fromkeys(("id", "prompt_ids", "response_ids", "order", *needs))
    complete, records = getattr(loaded.m, "complete", dict), []
    # An entropy at its token's own step is taken given whole steps; ranks would show it tokens of that same step.
    own_step = "entropy" in needs or parameters.get("entropy_context") == "step"
    for record in kept:
        if own_step and record.get("step"):
            record = dict(record, order=whole_steps(record))
        records.append(complete({name: record.get(name) for name in fields}))
    if "entropy" in fields and any(record["entropy"] is None for record in records):
        raise ValueError(
            f"{path}: --ranking kl and --objective ideal need the entropies that distill logs, and some rows have none"
        )
    return records


def has_several(example):
    """Whether a question has more than one right answer."""
    return isinstance(example["answer"], list) and len(example["answer"]) > 1


def whole_steps(record):
    """The order of a trajectory in which tokens that were decoded together have the same number; -1 for none."""
    steps = list(map(lambda step, rank: step if rank >= 0 else -1, record["step"], record["order"]))
    number = {-1: -1, **dict(zip(sorted({*steps} - {-1}), itertools.count()))}
    return list(map(number.get, steps))


def without_long_answers(examples, most, path, say):
    """The examples whose answer has at most so many tokens, with the one that ends it; all where most is None. Cut
    answers would teach to stop in the middle. Raises ValueError where none is left."""
    lengths = [len(e["response_ids"]) for e in examples]
    if most is None or max(lengths) <= most:
        return examples
    kept = [e for e in examples if len(e["response_ids"]) <= most]
    if not kept:
        raise ValueError(
            f"{path}: --max-answer-tokens {most} leaves none; the shortest answer has {min(lengths)} tokens"
        )
    what = f"{len(examples) - len(kept)} of {len(examples)} answers are left out"
    say(f"{what}: they have more than --max-answer-tokens {most}, up to {max(lengths)}")
    return kept


def usable_trajectories(c, path, loaded, processes, say):
    """The trajectories that --keep lets through. Raises ValueError where none is left, for another vocabulary, and for
    a distillation that is not finished."""
    config, tok = loaded.m.config, loaded.tok
    methods = c.methods
    if methods is not None and "all" in methods:
        methods = None
    for folder in filter(Path.is_dir, data.names_of(path)):
        meta = data.read_json(folder / "meta.json", missing={})
        if meta.get("vocab_size", config.vocab_size) != config.vocab_size:
            what = f"made with a vocabulary of {meta['vocab_size']}; {c.model} has {config.vocab_size}"
            raise ValueError(f"{folder}: {what}")
        check_finished(c, folder, answered(folder), processes, say)
    how = (tok, methods, config.mask_id, c.max_prompt_tokens, say, c.raw)
    records = data.read_trajectories(path, config.vocab_size, *how)
    if methods is not None:
        say_other_methods(path, methods, len(records), say)
    records = records[: c.limit]
    kept = [r for r in records if data.usable(r, c.keep)]
    say_what_is_kept(c, path, records, len(kept), processes)
    unordered = sum(r.get("ordered") is False for r in kept)
    if unordered:
        what = f"{unordered} of {len(kept)} rows have no step for each token"
        say(f"{path}: {what}, and count as decoded from left to right")
    recipe = recipes.settings(c.recipe)  # whose settings nobody asked for one by one
    names = ("methods", "max_prompt_tokens", "raw")
    asked = [name for name in names if getattr(c, name) not in (None, False, recipe.get(name))]
    if asked and "method" not in kept[0]:
        say(f"{' and '.join(map(flag, asked))}: for the authors' files only, these have their prompts already")
    for name in ("max_answer_tokens", "prompt_field", "answer_field"):
        if getattr(c, name) is not None:
            say(f"{flag(name)} acts on the rows of a dataset: {path} has trajectories, as they were decoded")
    wrong = sum(r.get("correct") is False for r in kept)
    if wrong:
        say(f"{wrong} of {len(kept)} trajectories are wrong and are trained on: --keep correct leaves them out")
    if c.cut_eos:
        kept = [data.cut_at_eos(r, tok.stop_ids) for r in kept]
    return kept


def say_what_is_kept(c, path, records, kept, processes):
    """Say how many of these trajectories --keep lets through. Raises ValueError where it is none, and says why: an
    answer that is cut off and a wrong one want different remedies."""
    finished = sum(bool(r.get("finished")) for r in records)
    wrong = sum(r.get("correct") is False for r in records)
    counts = f"{finished} finished, {wrong} wrong"
    if kept == 0:
        how = "take another --keep, or distill with a larger --max-new-tokens"
        if records and not any("finished" in r for r in records):
            how = "no row says `finished`: take --keep all"
        raise ValueError(f"{path}: --keep {c.keep} keeps none of {len(records)} ({counts}): {how}")
    if kept < len(records) and processes.first:
        print(f"{path}: --keep {c.keep} trains on {kept} of {len(records)} trajectories ({counts})", file=sys.stderr)


def say_other_methods(path, methods, there, say):
    """Say how many rows of the authors' files are left out because they were decoded by other methods. Raises
    ValueError where all are."""
    others = collections.Counter()
    for _, row in itertools.chain.from_iterable(map(data.read_rows, data.files_of(path))):
        if not data.is_ours(row) and row.get("method") not in methods:
            others[row.get("method")] += 1
    named = ", ".join(f"{name} {count}" for name, count in others.items())
    if others and not there:
        raise ValueError(f"{path}: no row is of the methods {', '.join(methods)} ({named}): --methods all takes them")
    if others:
        say(f"{path}: {others.total()} rows of other methods are left out ({named}): --methods all takes them")


def answered(folder):
    """How many prompts are answered in a trajectory folder. A kill may have torn a last line, which does not count."""
    return "".join(map(data.read_text, data.trajectory_files(folder))).count("\n")


def has_gap(record):
    """Whether a trajectory has steps, before its last one, in which nothing was decoded."""
    steps = set(record["order"]) - {-1}
    return len(steps) <= max(steps)


def prompts_of(folder, otherwise):
    """How many prompts a trajectory folder answers once it is finished; a stranger's may not say it."""
    prompts = data.read_json(Path(folder) / "meta.json", missing={}).get("prompts")
    return prompts if type(prompts) is int else otherwise


def check_finished(c, path, there, processes, say):
    """Raises ValueError for a distillation that is still running, or that ended before its last prompt."""
    if processes.locked_by_another(path):
        raise ValueError(f"{path}: distill is still writing into it: wait for it")
    prompts = prompts_of(path, there)
    wanted = min(prompts, c.limit or prompts)
    if there < wanted and not c.unfinished:
        how = "the same distill command continues it; --unfinished trains on what is there"
        raise ValueError(f"{path}: {there} of {wanted} prompts are answered: {how}")
    if there < prompts:
        say(f"{path}: {there} of {prompts} prompts are answered, the longest first: these are not the dataset's first")
