"""Statistics of the experiments: means with errors, intervals over base models, paired differences.

    stats.interval({("base-0", 0): 52.1, ("base-1", 0): 50.9})    # mean, low, high, bases
    stats.paired(ours, theirs)                                    # the same of differences, and p
    stats.mean_and_error("tds", [0.1, 0.2])                       # tds, and its standard error
    stats.mean_and_spread([50.0, 52.0])                           # mean, sd and the values

The unit of interval() and paired() is the base model: the runs on one of them share its weights,
trajectories and test puzzles, so their mean is one value. Student's t, from scipy. A value that is
None is left out everywhere.
"""

import math
import statistics

from scipy import stats as scipy_stats


def present(values):
    """The values that are not None."""
    return [x for x in values if x is not None]


def mean_and_error(name, values):
    """The mean of some values under name, and its standard error under name_se. The mean of no
    value is None, and so is the error of a single one."""
    values = present(values)
    mean, error = None, None
    if values:
        mean = sum(values) / len(values)
    if len(values) > 1:
        variance = sum((x - mean) ** 2 for x in values) / (len(values) - 1)
        error = math.sqrt(variance / len(values))
    return {name: mean, f"{name}_se": error}


def mean_and_spread(values):
    """dict(mean, sd, values). The mean of no value is None, and so is the standard deviation of a
    single one."""
    there = present(values)
    mean, sd = None, None
    if there:
        mean = statistics.fmean(there)
    if len(there) > 1:
        sd = statistics.stdev(there)
    return dict(mean=mean, sd=sd, values=values)


def by_base(values):
    """{(base, seed): value} -> {base: mean over its runs}, for the base models that have a
    value."""
    bases = {}
    for (base, _), value in values.items():
        if value is not None:
            bases.setdefault(base, []).append(value)
    for base, ours in bases.items():
        bases[base] = sum(ours) / len(ours)
    return bases


def interval(values, level=0.95):
    """The mean over base models of {(base, seed): value}, with its Student t interval -> dict(mean,
    low, high, bases).

    bases: the value of each base model. low and high are None for a single base model, and where
    all have the same value. Without any value the result is None."""
    bases = by_base(values)
    if not bases:
        return None
    ours, low, high = list(bases.values()), None, None
    mean = sum(ours) / len(ours)
    if len(ours) > 1 and max(ours) > min(ours):
        error = scipy_stats.sem(ours)
        low, high = map(float, scipy_stats.t.interval(level, len(ours) - 1, loc=mean, scale=error))
    return dict(mean=mean, low=low, high=high, bases=bases)


def paired(ours, theirs):
    """interval() of the differences of two rows over the runs that both have, and p of Student's
    paired two-sided test over the base models. A run without a seed (the model before training)
    goes with every run of its base model."""
    differences = {}
    for (base, seed), our in ours.items():
        for (other, another), their in theirs.items():
            same_seed = seed == another or None in (seed, another)
            if base == other and same_seed and None not in (our, their):
                differences[base, another if seed is None else seed] = our - their
    found = interval(differences)
    if found is None:
        return None
    found["p"] = None
    if found["low"] is not None:
        found["p"] = float(scipy_stats.ttest_1samp(list(found["bases"].values()), 0).pvalue)
    return found


def pearson(x, y):
    """Pearson's correlation of two lists."""
    return float(scipy_stats.pearsonr(x, y).statistic)


def markdown_table(columns, lines):
    """Titles of columns and lines of cells, all of them texts -> a table of Markdown."""
    rows = []
    for cells in (columns, ["---"] * len(columns), *lines):
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)
