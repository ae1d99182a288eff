"""What "best results" means: which epoch of a training a table shows, and how much the choice flatters.

    found = epochs.report({1: [True, False, ...], 2: [...]})    # epoch -> whether each question was answered right
    python -m release.epochs --epochs 5 --questions 164,500,1319

The paper shows the best of five epochs, chosen on the test task itself. The maximum of five noisy scores is above the
truth even where all epochs are equally good. Beside it stand the last epoch, and an epoch that was chosen on questions
that it is not scored on. The command shows by how much each is off, in a simulation of equally good epochs.

Dimensions: E epochs, Q questions.
"""

import argparse
import itertools
import json
import sys

import numpy as np

from runs.options import number_list, saying_why


def report(verdicts, validation=None, seed=0):
    """How good the epochs of a training are on a task -> dict(questions, best, last, honest), each of the three a
    choice(): the best on the task itself, as in the paper; the last; and one chosen on held-out questions.

    verdicts: {epoch: [Q] whether each question was answered right}, the same questions for each. validation: the same
    of other questions, which then choose the honest epoch. Without them each half of the task's questions chooses the
    epoch that answers the other half; seed splits them. Raises ValueError for epochs with different questions."""
    epochs, right = list(verdicts), table(verdicts)  # [E, Q]
    Q = right.shape[1]
    if validation is None:
        mixed = np.random.default_rng(seed % 2**64).permutation(Q)
        one, other = mixed[: Q // 2], mixed[Q // 2 :]
        first, second = right[:, one].sum(1).argmax(), right[:, other].sum(1).argmax()
        correct = right[second, one].sum() + right[first, other].sum()
        honest = choice([epochs[first], epochs[second]], correct, Q, chosen_on=f"the other half of {Q} questions")
    else:
        if list(validation) != epochs:
            raise ValueError(f"validation has the epochs {list(validation)}, the task has {epochs}")
        other = table(validation)  # [E, held-out questions]
        chosen = other.sum(1).argmax()
        honest = choice([epochs[chosen]], right[chosen].sum(), Q, chosen_on=f"{other.shape[1]} other questions")
    best = right.sum(1).argmax()  # the earliest of equal ones
    return dict(
        questions=Q,
        best=choice([epochs[best]], right[best].sum(), Q, chosen_on=f"the best of {len(epochs)} on the test task"),
        last=choice([epochs[-1]], right[-1].sum(), Q, chosen_on="nothing"),
        honest=honest,
    )


def table(verdicts):
    """{epoch: verdicts} as bool [E, Q]. Raises ValueError where there are none, or not equally many."""
    counts = {epoch: len(one) for epoch, one in verdicts.items()}
    if not counts or min(counts.values()) == 0 or len(set(counts.values())) > 1:
        raise ValueError(f"verdicts of the same questions are needed for each epoch; there are {counts}")
    return np.array(list(verdicts.values()), dtype=bool)


def choice(epochs, correct, n, chosen_on):
    """What a choice of an epoch reached: `correct` of n questions."""
    return dict(epochs=epochs, correct=int(correct), n=n, score=round(100 * int(correct) / n, 2), chosen_on=chosen_on)


# ----------------------------------------------------------------------------------------------------- the simulation


def simulate(epochs, questions, accuracy=0.6, correlation=0.0, runs=20000, seed=0):
    """What equally good epochs seem to reach -> dict(error, best, honest) in points: the standard error of one score,
    and how far, on average, the best epoch's score and the honest one's are above the truth.

    accuracy: of every epoch, on every question. correlation: between the verdicts of two epochs on one question. An
    epoch takes a draw that all share with probability sqrt(correlation), else one of its own."""
    random, share = np.random.default_rng(seed % 2**64), correlation**0.5
    right = []  # of each half of the questions, [E, runs]
    for size in (questions // 2, questions - questions // 2):
        shared = random.binomial(size, accuracy, runs)  # [runs], questions whose shared draw is right
        own = (1 - share) * accuracy
        there = random.binomial(shared, share + own, (epochs, runs))
        right.append(there + random.binomial(size - shared, own, (epochs, runs)))
    one, other = right
    run = np.arange(runs)
    best = (one + other).max(0)
    honest = other[one.argmax(0), run] + one[other.argmax(0), run]
    return dict(
        error=100 * (accuracy * (1 - accuracy) / questions) ** 0.5,
        best=float(100 * (best.mean() / questions - accuracy)),
        honest=float(100 * (honest.mean() / questions - accuracy)),
    )


def shares(text):
    """ "0,0.5" -> (0.0, 0.5); raises ValueError for a number that is not from 0 to 1."""
    found = tuple(map(float, text.split(",")))
    if not 0 <= min(found) <= max(found) <= 1:
        raise ValueError("must be shares from 0 to 1, separated by commas")
    return found


def command_line():
    """The parser of this command."""
    parser = argparse.ArgumentParser(
        prog="python -m release.epochs", description=__doc__.split("\n")[0], allow_abbrev=False
    )
    parser.add_argument("--epochs", type=int, default=5, help="epochs to choose from (5)")
    questions, correlations = "of the task, comma-separated (164,500,1319)", "of two epochs' verdicts (0,0.5,0.8)"
    parser.add_argument("--questions", type=number_list, default=(164, 500, 1319), help=questions)
    parser.add_argument("--accuracy", type=saying_why(shares), default=(0.6,), help="of every epoch, a share (0.6)")
    parser.add_argument("--correlation", type=saying_why(shares), default=(0.0, 0.5, 0.8), help=correlations)
    parser.add_argument("--runs", type=int, default=20000, help="trainings that are simulated (20000)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (0)")
    return parser


def main(argv=None):
    """The command line -> exit status."""
    c, found = command_line().parse_args(argv), []
    for name, value, low in (("epochs", c.epochs, 1), ("questions", min(c.questions), 2), ("runs", c.runs, 1)):
        if value < low:
            print(f"error: --{name} {value}: must be at least {low}", file=sys.stderr)
            return 1
    print(
        "| questions | accuracy | correlation | standard error | best of", c.epochs, "| chosen on held-out questions |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    for n, accuracy, correlation in itertools.product(c.questions, c.accuracy, c.correlation):
        off = simulate(c.epochs, n, accuracy, correlation, c.runs, c.seed)
        found.append(dict(questions=n, accuracy=accuracy, correlation=correlation, **off))
        errors = f"{off['error']:.2f} | {off['best']:+.2f} | {off['honest']:+.2f}"
        print(f"| {n} | {accuracy:.2f} | {correlation:.1f} | {errors} |")
    print(json.dumps(dict(epochs=c.epochs, runs=c.runs, seed=c.seed, found=found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
