"""What is measured on the runs of claims.py, and what of it may be looked at when.

    bases = looks.on_task(report.read(folder), "in")                    # or "several"
    looked = looks.looked_at(bases)
    looks.difference(looked, "TABOM", "SFT-SD", "0.0003", "in")         # paired over base models: see stats.paired
    looks.primary(looked)                                               # the two registered measures

Differences between rows are looked at at LOOKS alone, on the base models that each look has, which
results/registered.md says. The unit of the statistics is the base model: the runs on one share its weights,
trajectories and test puzzles.
"""

import base64
import itertools
import statistics

import numpy as np

from experiments import stats

LOOKS = {12: 0.0052, 24: 0.0480}  # base models -> two-sided level (O'Brien and Fleming, together 0.05)
PRIMARY, RATE, LOW_RATE = ("TABOM", "SFT-SD"), "0.0003", "0.0001"
FRONTIER_RATES = ("0.0003", "0.001")
EPOCHS = 3
LOST = 2.0  # points of (near + far) / 2 that both rows may lose on average, so that P1 is like the paper's
SMALL, SMALL_FINE = 1.5, 0.005  # an interval within this of zero shows that there is nothing to see
FEWEST = 3  # base models of a verdict: two differences may agree by chance
SEVERAL = "several"
FINE = ("kl", "tds", "correlation")  # measures with three digits, and SMALL_FINE


# ---------------------------------------------------------------------------------------- measures


def unpack(packed):
    """The verdicts that claims.pack() packed, as a bool array."""
    count, text = packed
    return np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8))[:count].astype(bool)


def measure(run, name):
    """A measure of a run after its last epoch: accuracies in percent, TDS in nats squared, KL in nats. None where the
    run was not tested so."""
    return of_epoch(run["epochs"][-1], name)


def of_epoch(tested, name, like=None):
    """The same of one of its epochs; like: another epoch, whose puzzles alone count where it was tested on fewer."""
    if name == "elsewhere":
        return statistics.fmean(of_epoch(tested, where, like) for where in ("near", "far"))
    if name == "kl":
        return statistics.fmean(tested["kl"].values())
    if name in FINE:
        return tested["order"][name]
    if name not in tested["right"]:
        return None
    count = like["right"][name][0] if like else None
    return 100 * float(unpack(tested["right"][name])[:count].mean())


def on_task(bases, task):
    """The base models that have runs on a task, with these alone, under the names that runs in-domain have ("in" and
    "in-2" are the measures of the task too): what is measured in-domain can be measured on it. See claims.key_of."""
    found = {}
    for number, base in bases.items():
        runs = {}
        for key, run in base["runs"].items():
            name = key.removesuffix(f" {SEVERAL}")
            if (name != key) == (task == SEVERAL):
                runs[name] = dict(run, epochs=list(map(as_in_domain, run["epochs"])))
        if runs:
            found[number] = dict(base, runs=runs)
    return found


def as_in_domain(epoch):
    right = {name.replace(SEVERAL, "in"): verdicts for name, verdicts in epoch["right"].items()}
    return dict(epoch, right=right)


def key_of(row, rate):
    """Under which name a base model has the run of a row at a rate, of one task."""
    return row if row == "base" else f"{row} {rate}"


def each(bases, of_base):
    """What a function says of each base model, where it says something -> what stats.interval and stats.paired take."""
    found = {}
    for number, base in bases.items():
        value = of_base(base)
        if value is not None:
            found[number, 0] = value
    return found


def values_of(bases, row, rate, name):
    """A measure of a row on all base models that have the run."""
    key = key_of(row, rate)
    return each(bases, lambda base: measure(base["runs"][key], name) if key in base["runs"] else None)


def difference(bases, row, other, rate, name):
    """A row less another at the same rate, paired over base models: see stats.paired. None where none has both."""
    return stats.paired(values_of(bases, row, rate, name), values_of(bases, other, rate, name))


def rows_of(bases):
    """The (row, rate) that have runs, in order of the rates and then as claims.py makes them."""
    found = {}
    for base in bases.values():
        for key in base["runs"]:
            row, _, rate = key.rpartition(" ")
            if row:
                found[row, rate] = float(rate)
    return sorted(found, key=found.get)


# ------------------------------------------------------------------------- gain and loss


def points_of(base, row, rates=FRONTIER_RATES, loss="elsewhere"):
    """Gain in-domain and loss elsewhere of a row on one base model: {(rate, epoch): (gain, loss)}, of the rates that it
    has. Each epoch is compared with the base model on the puzzles that it was tested on. loss: "elsewhere", points, or
    "kl", nats."""
    before, found = base["runs"]["base"]["epochs"][-1], {}
    for rate in rates:
        run = base["runs"].get(key_of(row, rate), dict(epochs=[]))
        for epoch, tested in enumerate(run["epochs"], 1):
            gain, change = (of_epoch(tested, name) - of_epoch(before, name, like=tested) for name in ("in", loss))
            found[rate, epoch] = gain, change if loss == "kl" else -change
    return found


def loss_at(points, gain):
    """The loss on a frontier at a gain: points of equal gain are one, the lines between neighbours are straight, and
    (0, 0) is one of the points."""
    x, y = np.round([(0.0, 0.0), *points], 9).T  # equal shares of 500 and of 1,500 puzzles are equal
    xs, which = np.unique(x, return_inverse=True)
    return float(np.interp(round(gain, 9), xs, np.bincount(which, y) / np.bincount(which)))


def loss_at_equal_gain(bases, row, other, loss="elsewhere"):
    """The loss of a row less that of another, on each base model at the smaller of the two rows' largest gains -> as of
    stats.paired, and the names of the base models on which that gain is not above 0."""
    ours, theirs, without = {}, {}, []
    for number, base in bases.items():
        of_row, of_other = points_of(base, row, loss=loss), points_of(base, other, loss=loss)
        if len(of_row) == len(of_other) == EPOCHS * len(FRONTIER_RATES):
            gain = min(max(of_row.values())[0], max(of_other.values())[0])
            if gain > 0:
                ours[number, 0], theirs[number, 0] = loss_at(of_row.values(), gain), loss_at(of_other.values(), gain)
            else:
                without.append(f"base-{number}")
    return stats.paired(ours, theirs), ", ".join(without) or "none"


# ------------------------------------------------------------------------------------------ verdicts


def needed(number):
    """The runs of the primary measures on a base model, those that P1 may have to be read from among them."""
    rates = (*FRONTIER_RATES, *[LOW_RATE] * (number % 2))
    return set(itertools.starmap(key_of, itertools.product(PRIMARY, rates)))


def looked_at(bases):
    """The base models that the last look has: base-1 to base-12, or to base-24; before these are complete, none. Where
    there are odd ones alone, nothing is tested, and they are all 12 of them. They are without the runs that are still
    being made, each of whose tables would be one more look."""
    odd = odd_of(max(LOOKS))
    if odd.issuperset(bases):
        return shown(bases, max(LOOKS)) if odd == bases.keys() else {}
    ready = set(filter(lambda number: needed(number) <= bases[number]["runs"].keys(), bases))
    for look in sorted(LOOKS, reverse=True):
        if ready.issuperset(range(1, look + 1)):
            return shown(bases, look)
    return {}


def odd_of(look):
    return set(range(1, look + 1, 2))


def shown(bases, look):
    """The base models of a look, without the runs that are still being made."""
    found, hidden = {}, being_made(bases, look)
    for number in sorted(filter(lambda number: 1 <= number <= look, bases)):
        runs = filter(lambda run: run[0] not in hidden, bases[number]["runs"].items())
        found[number] = dict(bases[number], runs=dict(runs))
    return found


def being_made(bases, look):
    """The runs that are not on all base models of a look that get them, {name: how many have it}. A row is made on all
    odd ones, or on all."""
    made = {}
    for number in filter(lambda number: 1 <= number <= look, bases):
        for key in bases[number]["runs"]:
            made.setdefault(key, set()).add(number)
    return {key: len(on) for key, on in made.items() if on not in (odd_of(look), set(range(1, look + 1)))}


def verdict(found, name, sign=1):
    """What a difference says of a claim whose sign it should have."""
    if found is None or found["low"] is None:
        return "not measured"
    if len(found["bases"]) < FEWEST:
        return "not resolved"
    low, high = sorted((sign * found["low"], sign * found["high"]))
    if low > 0:
        return "confirmed"
    if high < 0:
        return "contradicted"
    return "not seen" if max(-low, high) <= (SMALL_FINE if name in FINE else SMALL) else "not resolved"


def runs_of(difference):
    """A difference as values once more, to take its interval at another level or a difference of differences."""
    return dict(zip(itertools.product(difference["bases"], [0]), difference["bases"].values()))


def rate_of_p1(bases):
    """The rate of P1: RATE where both rows lose at most LOST points, else LOW_RATE; and what they lose."""
    lost = [difference(bases, row, "base", RATE, "elsewhere")["mean"] for row in PRIMARY]
    rate, said = (RATE, "valid") if min(lost) >= -LOST else (LOW_RATE, "not valid there")
    return rate, f"{PRIMARY[0]} {lost[0]:+.1f}, {PRIMARY[1]} {lost[1]:+.1f}: {said}"


def primary(bases):
    """The two primary measures at a look: [(name, difference with its interval at its level, level, verdict, note)].
    Holm: the smaller p has half of the look's level, the other, if that holds, all of it."""
    rate, told = rate_of_p1(bases)
    first = difference(bases, *PRIMARY, rate, "in")
    second, without = loss_at_equal_gain(bases, *PRIMARY)
    notes = [f"rate {rate}; (near + far) / 2 at {RATE}: {told}", f"left out, without a gain: {without}"]
    level, found = LOOKS[len(bases)], [first, second]
    p = [one["p"] if one and one["p"] is not None else 1.0 for one in found]
    levels = [level / 2, level / 2]
    if min(p) < level / 2:
        levels[p.index(max(p))] = level
    names, lines = ("P1: TABOM - SFT-SD, in-domain", "P2: loss of TABOM - SFT-SD at equal gain"), []
    for name, one, at, note in zip(names, found, levels, notes):
        if one is not None:
            one = {**stats.interval(runs_of(one), 1 - at), "p": one["p"]}
        lines.append((name, one, at, verdict(one, "in", 1 if name.startswith("P1") else -1), note))
    return lines
