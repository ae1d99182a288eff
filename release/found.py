"""Which results there are: the folders of evaluate and diagnose, each score as a cell of the papers' tables.

    cells, left_out, folders = found.find(c)    # c: tables.TablesOptions

A cell says in `where` what it is: base, method, data, task, decoding, measure, and the settings that rows differ in. An
adapter, or a model trained as a whole, is known by the meta.json of its training run. What does not fit is left out,
with the reason: another number of questions, protocol or decoder than the paper's, a model that is none of its
checkpoints, a checkpoint that has changed since.
"""

import dataclasses
import itertools
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import data
import evaluate
from release import recipes, rows
from release.published import CHECKPOINTS, QUESTIONS, checkpoint_of
from runs import disk, loading
from runs.objective_options import ObjectiveOptions
from runs.options import field_names

# The adapters in the authors' repository, by the names of their folders, and what they were trained on.
AUTHORS_ROW = "TABOM, the authors' adapter"
AUTHORS = dict(dream_prm12k="math", llada_prm12k="math", dream_ling_coder="code", llada_ling_coder="code")
RECIPES = {"prm12k": "math", "ling-coder": "code"}  # the end of a recipe's name -> the data
ENDS = dict(map(reversed, RECIPES.items()))
ONE = "1 a step"  # as sweep and claims test: full decoding, but for where Dream's schedule has no step for a token
# How fast an evaluation decodes: the name in the tables, and the options of evaluate beside the protocol's.
DECODINGS = {
    "full": {},
    ONE: dict(tokens_per_step=1),
    "2 a step": dict(tokens_per_step=2),
    "4 a step": dict(tokens_per_step=4),
    "8 a step": dict(tokens_per_step=8),
    "dynamic": dict(threshold=0.9),
}
PAPERS = {  # paper -> what all its evaluations have in common
    "tabom": {},
    "t3d": dict(protocol="official", temperature=0.1, max_new_tokens=2000),
}
NO_SHOTS = evaluate.digest([])
Z = 1.96  # standard errors on each side of a mean: its 95 % interval


# What the authors' recipes have in common, and what else a training run may change: said where it is something else.
USUAL = recipes.SHARED | dict(lora_targets=", ".join(recipes.SHARED["lora_targets"]), lora_dropout=0.0, final_lr=0.0)
USUAL |= dict.fromkeys(("keep", "methods", "limit", "max_answer_tokens", "block_causal", "grid"))  # said where given
USUAL |= dict.fromkeys(("raw", "unfinished", "cut_eos", "draw_once"), False)


class Misfit(ValueError):
    """Why a folder has no place in the tables."""


@dataclasses.dataclass
class Cell:
    """A score of one model on one benchmark."""

    where: dict
    value: float
    low: float | None
    high: float | None
    n: int  # questions, or trajectories
    folder: str
    about: str  # the settings of its training, in words
    run: str  # its training run; for a base model its own name
    epoch: int | None
    recipe: dict  # margin and weight of the recipe that fits
    same: dict  # what all rows that are compared must share

    @property
    def run_and_epoch(self):
        return self.run, self.epoch

    @property
    def measured(self):
        """What is the same where the same model was measured twice, with the same result."""
        return *self.run_and_epoch, self.value, self.n, self.same


def find(c):
    """All cells below the folders c.folders -> (cells, [(folder, reason)], folders of evaluate, diagnose and train).

    Raises FileNotFoundError for a folder that is not there."""
    cells, left_out, evaluations, runs = [], [], [], {}
    for folder in c.folders:
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"{folder}: no such folder; give folders of evaluate, diagnose and train")
    for folder in walk(c.folders):
        try:
            command = command_of(folder)
        except (OSError, ValueError) as e:
            left_out.append((str(folder), str(e)))
            continue
        if command == "train":
            runs.setdefault(folder.name, []).append(folder)
        elif command:
            evaluations.append((folder, command))
    named = set()
    for folder, command in evaluations:
        read = read_evaluation if command == "evaluate" else read_diagnosis
        for found in each(folder, read(c, folder, runs)):
            if isinstance(found, Cell):
                cells.append(found)
                named.add(found.run)
            else:
                left_out.append(found)
    trained = list(itertools.chain.from_iterable(runs.values()))
    for folder in trained:
        if os.path.realpath(folder) not in named:
            left_out.append((str(folder), "trained, and no evaluation of it fits"))
    return cells, left_out, list(map(str, (*dict(evaluations), *trained)))


def each(folder, cells, what=""):
    """The cells of a generator; its fault as (folder, reason). what: the benchmark or model that the cells are of."""
    try:
        yield from cells
    except (Misfit, OSError, ValueError) as e:
        yield str(folder), f"{what}{e}"
    except (AttributeError, IndexError, KeyError, TypeError) as e:
        yield str(folder), f"{what}not as evaluate and diagnose write it ({type(e).__name__}: {e})"


def walk(folders):
    """Every folder below some, once, by name; checkpoints and hidden ones left out."""
    seen = set()
    for top in folders:
        for path, inside, _ in os.walk(top):
            inside[:] = sorted(name for name in inside if not re.match(r"\.|(epoch|step)-\d+$", name))
            if os.path.realpath(path) not in seen:
                seen.add(os.path.realpath(path))
                yield Path(path)


def command_of(folder):
    """ "evaluate", "diagnose" or "train" for a folder that such a run wrote, else None."""
    if (folder / "results.json").is_file():
        results = data.read_json(folder / "results.json")
        if "rows" in results:  # of sweep and claims
            return None
        if not isinstance(results.get("scores"), list):
            raise ValueError(f"{folder / 'results.json'}: no scores of evaluate")
        return "evaluate"
    command = data.read_json(folder / "meta.json", missing={}).get("command")
    return command if command in ("diagnose", "train") else None


# --------------------------------------------------------------------------------------------------- one folder


def read_evaluation(c, folder, runs):
    """Yield the cells of a folder of evaluate, and (folder, reason) for each benchmark that has none."""
    results = data.read_json(folder / "results.json")
    if "shape" not in results:
        raise Misfit("results.json does not say which checkpoint it is of: the same evaluate command adds it")
    answered = {path.parent.name for path in folder.glob("*/meta.json")}
    for task in sorted(answered - {score["task"] for score in results["scores"]}):
        yield str(folder), f"{task}: no score in results.json, which is of the last call: name all tasks in one"
    for score in results["scores"]:
        yield from each(folder, cells_of_score(c, folder, results, score, runs), f"{score['task']}: ")


def cells_of_score(c, folder, results, score, runs):
    """Yield the cells of one benchmark: the score, and what else evaluate measured that a table has."""
    command, meta = results["command"], data.read_json(folder / score["task"] / "meta.json")
    who = identify(c, command["model"], command["adapter"], results["shape"], meta, runs)
    check_questions(c, score, meta, who["where"]["base"])
    decoding = decoding_of(c, score, command, results["shape"]["family"])
    if decoding == ONE:
        decoding, who["run"]["about"] = "full", f"{who['run']['about']}, exactly one token a step"
    where = dict(who["where"], task=score["task"], decoding=decoding, b=score["decoder"]["block_length"])
    same = dict(who["same"], questions=meta["questions_sha256"])
    if score.get("timed", score["n"]) != score["n"]:  # the others were decoded by an earlier call
        score = dict(score, tokens_per_second=None)
    for name in ("score", "tokens_per_second", "mean_steps", "mean_length"):
        if isinstance(score.get(name), (int, float)):
            low, high = score["interval"] if name == "score" else (None, None)
            measured = (score[name], low, high, score["n"], str(folder))
            yield Cell(dict(where, measure=name), *measured, same=same, **who["run"])


def read_diagnosis(c, folder, runs):
    """Yield the TDS of the models of a folder of diagnose that were measured on answers of their own."""
    meta = data.read_json(folder / "meta.json")
    if meta["made_by"].get("task") not in evaluate.TASKS:
        raise Misfit("its trajectories are of no benchmark: --data of diagnose must be a folder E/TASK of evaluate")
    check_prompts(c, meta["made_by"])
    whose, own = meta["made_by"]["adapter_sha256"] or meta["made_by"]["model_sha256"], 0
    for model, sha256 in zip(meta["models"], (meta["model_sha256"], *meta["checkpoint_sha256"])):
        if meta["options"]["fresh"] or sha256 == whose:
            own += 1
            yield from each(folder, cells_of_model(c, folder, meta, model, sha256, runs), f"{model['model']}: ")
    if not own:
        raise Misfit("none of its models replays its own answers: give it those, or --fresh")


def cells_of_model(c, folder, meta, model, sha256, runs):
    """Yield the TDS of one model."""
    options, value, error = meta["options"], model["tds"], model["tds_se"]
    checkpoint = None if model["model"] == "base" else model["model"]
    hashes = dict(model_sha256=meta["model_sha256"], adapter_sha256=checkpoint and sha256)
    who = identify(c, options["model"], checkpoint, meta["shape"], hashes, runs)
    if value is None:
        raise Misfit("no trajectory has a TDS")
    decoder, task = meta["made_by"]["decoder"], meta["made_by"]["task"]
    if options["fresh"]:
        decoder = {name: options[name] for name in loading.DECODER_FIELDS}
        given = [f"{name} {value}" for name, value in decoder.items() if value not in (None, False)]
        who["run"]["about"] += f", decoded anew with {', '.join(given) or 'the decoder of its family'}"
    else:
        decoding = decoding_of(c, dict(task=task, decoder=decoder), options, meta["shape"]["family"])
        if decoding not in ("full", ONE):
            raise Misfit(f"its trajectories have {decoding}: the TDS is of one token a step")
    same = dict(who["same"], decoder=decoder, questions=meta["made_by"]["questions_sha256"])
    same.update(limit=options["limit"], tds_eos=options["tds_eos"])
    where = dict(who["where"], task=task, measure="tds")
    low, high = (None, None) if error is None else (value - Z * error, value + Z * error)
    measured = (value, low, high, model.get("tds_of", model["trajectories"]), str(folder))
    yield Cell(where, *measured, same=same, **who["run"])


def check_questions(c, score, meta, base):
    """Raises Misfit where a score is not of the whole benchmark, or was not asked as the paper asks."""
    wanted = QUESTIONS[score["task"]]
    if base in CHECKPOINTS and score["n"] != wanted:
        raise Misfit(f"{score['n']} questions, and the benchmark has {wanted}")
    check_prompts(c, meta)
    if (meta["decoder"], meta["protocol"]) != (score["decoder"], score["protocol"]):
        raise Misfit(f"results.json and {score['task']}/meta.json have other decoders: not of one run")


def check_prompts(c, meta):
    """Raises Misfit where a benchmark was not asked as the paper asks. meta: meta.json of its answers."""
    protocol = PAPERS[c.paper].get("protocol", c.protocol)
    if meta["protocol"] != protocol:
        raise Misfit(f"protocol {meta['protocol']}, and these tables are of {protocol}: see --protocol")
    if meta.get("shots_sha256", NO_SHOTS) != NO_SHOTS or meta["raw"]:
        raise Misfit(f"asked with --shots or raw ({meta['raw']}); the paper has no examples and the chat template")
    if meta.get("prompt_tokens") is not None:
        raise Misfit(f"asked with --prompt-tokens {meta['prompt_tokens']}; the paper's prompts are the protocol's")


def decoding_of(c, score, command, family):
    """The name of a decoder's settings in DECODINGS. Raises Misfit for settings that no table has."""
    blocks = score["decoder"]["block_length"] if family == "sdar" else command["block_causal"]
    expected = {}
    for name, given in DECODINGS.items():
        config = SimpleNamespace(family=family, block_length=blocks)
        loaded = loading.Loaded(SimpleNamespace(config=config), None, Path(command["model"]))
        options = evaluate.EvaluateOptions(**{"protocol": c.protocol, **PAPERS[c.paper], **given})
        settings = evaluate.task_settings(options, score["task"], loaded)
        expected[name] = json.loads(json.dumps(settings))  # as it is read
        if expected[name] == score["decoder"]:
            return name
    differ = []
    for key in sorted({*expected["full"], *score["decoder"]}):
        ours, theirs = score["decoder"].get(key), expected["full"].get(key)
        if ours != theirs:
            differ.append(f"{key} {unset(ours)} for {unset(theirs)}")
    raise Misfit(f"decoded with {', '.join(differ)}: a decoder of no table")


def unset(value):
    return "unset" if value is None else value


# ------------------------------------------------------------------------------------------- which model it is


def identify(c, model, adapter, shape, hashes, runs):
    """What a model is -> dict(where, same, run) of its cells. hashes: with model_sha256 and adapter_sha256."""
    checkpoint, sha256 = adapter or model, hashes["adapter_sha256"] or hashes["model_sha256"]
    folder, run = training_run(checkpoint, sha256, runs, adapter is not None)
    base_model, base_sha256 = model, hashes["model_sha256"]
    if run is not None and adapter is None:  # all weights were trained: the base is the run's
        base_model, base_sha256 = run["model"], run["model_sha256"]
    base = base_of(c, base_model, shape)
    where, about = dict(base=base, method="No-SFT", data=None), "as published"
    epoch, recipe = None, {}
    if adapter is not None and run is None:
        name = Path(adapter).name
        if name not in AUTHORS or not name.startswith(str(shape["family"])):
            raise Misfit(f"{adapter} lies in no training run, and is none of the authors' adapters")
        where.update(method=AUTHORS_ROW, data=AUTHORS[name])
        about = "the authors' adapter"
    if run is not None:
        if run["model_sha256"] != base_sha256:
            raise Misfit(f"{checkpoint} was trained on another model than {model}")
        epoch = epoch_of(checkpoint)
        where.update(trained(c, run))
        recipe = recipe_of(base, where["data"])
        about = settings_of(run, epoch)
    run = dict(about=about, run=os.path.realpath(folder or checkpoint), epoch=epoch, recipe=recipe)
    return dict(where=where, same=dict(base_sha256=base_sha256), run=run)


def settings_of(run, epoch):
    """The settings of a training run that a reader asks for, in words: some always, others where they are not USUAL."""
    always = (*field_names(ObjectiveOptions), "recipe", "lr", "global_batch", "lora_rank")
    said = []
    for name in dict.fromkeys((*always, *USUAL)):
        value, usual = run.get(name), None if name in always else USUAL[name]
        shown = ", ".join(value) if isinstance(value, (list, tuple)) else value
        if value is not None and value is not False and shown != usual:
            said.append(f"{name.replace('_', ' ')} {shown}")
    return f"{', '.join(said)}, {run['examples']} examples, seed {run['seed']}, epoch {epoch} of {run['epochs']}"


def training_run(checkpoint, sha256, runs, adapter):
    """(folder, meta.json) of the training run that a checkpoint is of; (None, None) where it is of none.

    runs: folders of training runs by name, where its own has moved. Raises Misfit where it is gone or another now."""
    path = Path(checkpoint)
    moved = (run / path.name for run in runs.get(path.parent.name, ()))
    there = list(filter(Path.is_dir, (path, *moved)))
    changed = None
    for one in there:
        meta = data.read_json(one.parent / "meta.json", missing={})
        if meta.get("command") != "train":
            continue
        if disk.fingerprint(one) == sha256:
            return one.parent, meta
        changed = one
    if changed:
        raise Misfit(f"{changed} is not what was evaluated: it has changed since, or is another run's")
    if adapter and not there and path.name not in AUTHORS:
        raise Misfit(f"the adapter {checkpoint} is not there: name the folder of its training run, too")
    return None, None


def base_of(c, model, shape):
    """The base model's name in the tables. Only the name that evaluate was given counts, not the one in config.json,
    which a merged model shares with its base."""
    name = Path(str(model)).name
    label = checkpoint_of({name}, SimpleNamespace(**shape))
    if label is None and name not in c.base:
        shown = ", ".join(f"{key} {value}" for key, value in shape.items())
        raise Misfit(f"{model} ({shown}) is no checkpoint of the paper: --base {name} shows it under its own name")
    return label or name


def epoch_of(checkpoint):
    """5 for a folder epoch-5. Raises Misfit for a checkpoint inside an epoch."""
    number = re.fullmatch(r"epoch-(\d+)", Path(checkpoint).name)
    if number is None:
        raise Misfit(f"{checkpoint} is no checkpoint of a whole epoch")
    return int(number[1])


def trained(c, run):
    """Where a training run stands in the tables: its method, data, and the settings that rows differ in."""
    if run["adapter"]:
        raise Misfit(f"it was trained from another adapter, {run['adapter']}: no row of the paper")
    where = {name: run.get(name) for name in ("window", "margin", "weight", "path_weight")}
    method = method_of(run)
    if c.paper == "t3d" and method == "SFT-GT":  # one model, on answers of another model to both
        return dict(where, method=method, data="answers")
    return dict(where, method=method, data=data_of(c, run))


def method_of(run):
    """The paper's name of what a training run trained. Raises Misfit for one that is of two rows at once."""
    settings = dict(run)
    if run["objective"] == "nelbo" and "trained_on" not in run:
        raise Misfit("its run does not say whether on answers or trajectories: the same train command adds it")
    if run.get("trained_on") == "answers":
        settings["objective"] = rows.GROUND_TRUTH
    if run.get("cut_eos") and run["objective"] != "tabom":
        raise Misfit("it was trained with --cut-eos: the paper's rows keep what is decoded after EOS")
    if run["objective"] == "t3d":
        return method_of_t3d(run)
    name = rows.name_of(settings)
    for other, row in rows.ROWS.items():
        if row.items() <= settings.items() and not row.items() <= rows.ROWS[name].items():
            raise Misfit(f"it is of two rows at once, {name} and {other}")
    return name


def method_of_t3d(run):
    """T3D, or a row of its Tables 5 to 7: which parts of its loss a run has."""
    parts = [word for word, name in (("path", "path_weight"), ("random", "random_tokens")) if run[name]]
    if run.get("preference") == "none":
        return " + ".join(["naive TD", *({2: ["both"]}.get(len(parts), parts))])
    return "T3D" if len(parts) == 2 else " + ".join(["DDO", *parts])


def data_of(c, run):
    """ "math" or "code": what a training run's queries are, by its recipe, else by the names of its files."""
    source = Path(run["data"])
    distilled = data.read_json(source / "meta.json", missing={})
    if distilled.get("model_sha256") not in (None, run["model_sha256"]):
        raise Misfit(f"its trajectories in {source} are of another model: no self-distillation")
    if distilled.get("adapter_sha256") is not None:
        raise Misfit(f"its trajectories in {source} are of a model with an adapter: no row of the paper")
    for end, kind in RECIPES.items():
        if (run.get("recipe") or "").endswith(end):
            return kind
    for name in (distilled.get("data"), str(source)):
        kinds = [kind for kind in ("math", "code") if re.search("|".join(map(re.escape, getattr(c, kind))), str(name))]
        if len(kinds) == 1:
            return kinds[0]
    raise Misfit(f"trained on {source}, which names neither of the paper's data sets: see --math and --code")


def recipe_of(base, kind):
    """Margin and weight of the authors' recipe for a base model and data; empty where there is none."""
    recipe = recipes.RECIPES.get(f"{base.lower()}-{ENDS.get(kind)}")
    return {} if recipe is None else dict(margin=recipe["margin"], weight=recipe["weight"])
