"""The table of a sweep: means and spread over seeds, and gains.

lines = table.over_seeds(results)       # results: the content of the runs' result.json, the base model's first
print(table.sweep_table(lines))
"""

import itertools
import json
import statistics
from pathlib import Path

from experiments import stats
from release import rows


def source_name(source):
    """data/test_in.jsonl.gz -> test_in"""
    return Path(source).name.split(".")[0]


def over_seeds(found, in_domain=()):
    """Mean and standard deviation over the seeds of each configuration: a row for each, with its
    name (release/rows.py), its settings, the number of runs, and a list of scores (see score_list), whose gain is the
    difference to the model before training, the first of `found`."""
    groups = {}
    for result in found:
        settings = dict(result["settings"])
        settings.pop("seed", None)
        groups.setdefault(json.dumps(settings), (settings, []))[1].append(result)
    lines = []
    for settings, group in groups.values():
        scores = []
        for column in zip(*(score_list(result, in_domain) for result in group)):  # one score of all runs
            values = [score.pop("value") for score in column]
            unchecked = [score.pop("unchecked") for score in column]
            scores.append(dict(**column[0], **stats.mean_and_spread(values), unchecked=statistics.fmean(unchecked)))
            scores[-1]["runs"] = len(stats.present(values))
        lines.append(dict(row=rows.name_of(settings), **settings, runs=len(group), scores=scores))
    for line in lines[1:]:
        for score, before in zip(line["scores"], lines[0]["scores"]):
            if None not in (score["mean"], before["mean"]):
                score["gain"] = score["mean"] - before["mean"]
    return lines


def score_list(result, in_domain=()):
    """What the table shows of one run, in order: dicts of measure, value, unchecked and, of a test, source and
    tokens_per_step. Accuracies are in percent of all questions, and so are the unchecked answers; TDS is in nats
    squared. With some test sets in_domain also the means of their accuracies and of the others'."""
    found = []
    if "accuracy" in result["chosen"]:
        found.append(dict(measure="validation %", **in_percent(result["chosen"])))
    for one in result["tests"]:
        at = dict(source=one["source"], tokens_per_step=one["tokens_per_step"])
        found.append(dict(measure="test %", **at, **in_percent(one["scores"])))
    if in_domain:
        found += domain_means(found, in_domain)
    if result["tests"]:
        found.append(dict(measure="TDS", value=result["tests"][0]["scores"]["tds"], unchecked=0))
    return found


def domain_means(scores, in_domain):
    """The mean accuracy of the test sets in_domain, and of the others, for each number of tokens a step. scores: of
    score_list."""
    groups = {}
    for one in scores:
        if one["measure"] == "test %":
            measure = "in-domain %" if one["source"] in in_domain else "OOD %"
            groups.setdefault((measure, one["tokens_per_step"]), []).append(one)
    found = []
    for (measure, at_once), group in groups.items():
        mean = dict(measure=measure, source=None, tokens_per_step=at_once)
        for name in ("value", "unchecked"):
            mean[name] = statistics.fmean(one[name] for one in group)
        found.append(mean)
    return found


def in_percent(scores):
    """The accuracy of an answer_set, and the share of answers that nobody could judge (older results have none)."""
    unchecked = scores.get("unchecked", 0)
    return dict(value=100 * scores["accuracy"], unchecked=unchecked and 100 * unchecked / scores["questions"])


def sweep_table(lines):
    """A line for each configuration: its row, what else it changes, the number of runs, mean ± standard deviation
    over them, and the gain over the model before training."""
    axes = []
    for line in lines:
        axes += [name for name in line if name not in (*axes, "row", "objective", "runs", "scores")]
    shown = []
    for line in lines:
        cells = [str(line.get(name, "")) for name in axes]
        scores = map(score_cell, line["scores"], itertools.repeat(line["runs"]))
        shown.append([line["row"], *cells, str(line["runs"]), *scores])
    return stats.markdown_table(["row", *axes, "runs", *map(score_title, lines[0]["scores"])], shown)


def questions(result):
    """How many questions the accuracies of a run are of, as a line."""
    counts = {}
    if "accuracy" in result["chosen"]:
        counts["validation"] = result["chosen"]["questions"]
    for one in result["tests"]:
        counts[source_name(one["source"])] = one["scores"]["questions"]
    return f"questions: {', '.join(itertools.starmap('{} {}'.format, counts.items()))}"


def score_title(score):
    """The title of a column: validation %, test_in %, "test_in, 2 a step %", "in-domain, 2 a step %" or TDS."""
    name = score["measure"].removesuffix(" %")
    if name == score["measure"] or "tokens_per_step" not in score:  # TDS, validation
        return score["measure"]
    if score["source"] is not None:
        name = source_name(score["source"])
    return f"{name} %" if score["tokens_per_step"] == 1 else f"{name}, {score['tokens_per_step']} a step %"


def score_cell(score, runs):
    """mean ± standard deviation, the gain, of how many runs where not all have it, and the share of unchecked answers;
    what there is not is left out."""
    digits = 3 if score["measure"] == "TDS" else 1
    shown = [f"{x:.{digits}f}" for x in stats.present([score["mean"], score["sd"]])]
    cell = " ± ".join(shown) or "-"
    if score.get("gain") is not None:
        cell += f" ({score['gain']:+.{digits}f})"
    if 0 < score["runs"] < runs:
        cell += f" (of {score['runs']})"
    if score["unchecked"]:
        cell += f" ({score['unchecked']:.1f} % unchecked)"
    return cell


def epochs_table(found):
    """What the choice of an epoch does to a score, in percent: a line for each run and task."""
    shown = []
    for result in found:
        for task, report in result.get("epochs", {}).items():  # of the model before training none
            cells = [result["name"], source_name(task)]
            for name in ("best", "last", "honest"):
                one = report[name]
                cells.append(f"{one['score']} (epoch {' and '.join(map(str, dict.fromkeys(one['epochs'])))})")
            shown.append([*cells, report["honest"]["chosen_on"], str(report["questions"])])
    titles = ["run", "test", "best on the test itself %", "last %", "chosen on held-out questions %"]
    return stats.markdown_table([*titles, "held out", "n"], shown)
