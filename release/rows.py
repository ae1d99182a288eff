"""The rows of the paper's tables and ours beside them, by name: what each changes of the options of train.

    rows.named(("SFT-SD", "dInfer"))                                # {name: {option of train: value}}
    rows.name_of(dict(objective="tabom", weight=0.0, window=16))    # "TABOM, no ranking", from a run's settings

The names without a comma are those of Tables 2 to 4 and of T3D; docs/recipes.md has a command for each.
"""

NO_SFT = "No-SFT"  # the model before training
GROUND_TRUTH = "sft-gt"  # train has no such objective: it is nelbo on a dataset's answers
ROWS = {
    NO_SFT: dict(objective="base"),
    "SFT-GT": dict(objective=GROUND_TRUTH),
    "SFT-SD": dict(objective="nelbo"),
    "TABOM": dict(objective="tabom"),
    "TABOM, no ranking": dict(objective="tabom", weight=0.0),
    # A recipe may start windows elsewhere; a global one has no other start.
    "TABOM, global window": dict(objective="tabom", window="global", starts="uniform"),
    "TABOM, global window, no ranking": dict(objective="tabom", window="global", starts="uniform", weight=0.0),
    "naive TD": dict(objective="traj"),
    "dInfer": dict(objective="transition"),
    "T3D": dict(objective="t3d"),
    "dParallel": dict(objective="dparallel"),
    "TABOM, padding cut": dict(objective="tabom", cut_eos=True),
    "TABOM, ranking alone": dict(objective="tabom", ce_weight=0.0),
    "TABOM, listwise": dict(objective="tabom", ranking="listwise"),
    "TABOM, own step": dict(objective="tabom", entropy_context="step"),
    "TABOM, kl": dict(objective="tabom", ranking="kl"),
}


def named(names):
    """{name: settings} of some rows, in the order of the names. Raises ValueError for a row that there is not."""
    for name in names:
        if name not in ROWS:
            raise ValueError(f"--rows {name}: none of {'; '.join(ROWS)}")
    return {name: ROWS[name] for name in names}


def name_of(settings):
    """The row that a run is of: the one all of whose settings are the run's, and of several the one that says most.
    settings: what a run changes, or all its options, as in its meta.json. Without such a row the objective's name."""
    fitting = [name for name, row in ROWS.items() if row.items() <= settings.items()]
    return max(fitting, key=lambda name: len(ROWS[name]), default=str(settings.get("objective")))
