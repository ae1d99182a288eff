"""Statistics of the experiments: means with their errors, intervals over base models, paired differences.

    stats.interval({("base-0", 0): 52.1, ("base-1", 0): 50.9})      # mean, low, high and the value of each base model
    stats.paired(ours, theirs)                                      # the same of differences, and p

The unit of interval() and paired() is the base model: the runs on one of them share its weights, trajectories and test
puzzles, so their mean is one value. Student's t, from scipy.
"""

import math

from scipy import stats as scipy_stats


def mean_and_error(name, values):
    """The mean of the values that are there and its standard error, under name and name_se; None without any, and no
    error of a single one."""
    values = [x for x in values if x is not None]
    if not values:
        return {name: None, f"{name}_se": None}
    mean = sum(values) / len(values)
    if len(values) == 1:
        return {name: mean, f"{name}_se": None}
    variance = sum((x - mean) ** 2 for x in values) / (len(values) - 1)
    return {name: mean, f"{name}_se": math.sqrt(variance / len(values))}


def by_base(values):
    """{(base, seed): value} -> {base: mean over its runs}; a value that is None is none."""
    bases = {}
    for (base, _), value in values.items():
        if value is not None:
            bases.setdefault(base, []).append(value)
    return {base: sum(ours) / len(ours) for base, ours in bases.items()}


def interval(values, level=0.95):
    """The mean over base models of {(base, seed): value} and its Student t interval -> dict(mean, low, high, bases: the
    value of each); low and high are None below two base models, and all is None without a value."""
    bases = by_base(values)
    if not bases:
        return None
    ours, low, high = list(bases.values()), None, None
    if len(ours) > 1 and max(ours) > min(ours):
        low, high = map(
            float, scipy_stats.t.interval(level, len(ours) - 1, loc=sum(ours) / len(ours), scale=scipy_stats.sem(ours))
        )
    return dict(mean=sum(ours) / len(ours), low=low, high=high, bases=bases)


def paired(ours, theirs):
    """interval() of the differences of two rows over the runs that both have, and p of Student's paired two-sided test
    over the base models. A run without a seed (the model before training) goes with every run of its base model."""
    differences = {}
    for (base, seed), our in ours.items():
        for (other, another), their in theirs.items():
            if base == other and (seed == another or None in (seed, another)) and None not in (our, their):
                differences[base, another if seed is None else seed] = our - their
    found = interval(differences)
    if found is not None:
        spread = found["low"] is not None
        found["p"] = float(scipy_stats.ttest_1samp(list(found["bases"].values()), 0).pvalue) if spread else None
    return found


def pearson(x, y):
    """Pearson's correlation of two lists."""
    return float(scipy_stats.pearsonr(x, y).statistic)
