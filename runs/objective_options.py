"""The options of the objectives, which stand beside them in objectives.OBJECTIVES, as flags of the command line.

    class TrainOptions(objective_options.ObjectiveOptions, ...): ...
    parameters, unused = objective_options.chosen(c)    # c: TrainOptions; what its objective is called with

An objective that is added to the table before this file is imported has its flags in every command that trains.
"""

import dataclasses
import inspect
import re

import baselines  # noqa: F401, it adds its objectives
import objectives
from runs.options import field_names, flag, opt


def fields_of_all():
    """--objective and every option in objectives.OBJECTIVES as fields for make_dataclass: [(name, type, field)]."""
    sources = ", ".join(f"{name} ({objective.source})" for name, objective in objectives.OBJECTIVES.items())
    objective = opt("tabom", f"what to train: {sources}", choices=tuple(objectives.OBJECTIVES))
    users = {}  # option -> {objective: Option}
    for name, entry in objectives.OBJECTIVES.items():
        for option, declared in entry.options.items():
            users.setdefault(option, {})[name] = declared
    return [("objective", str, objective), *(field_of(option, declared) for option, declared in users.items())]


def field_of(name, declared):
    """An option that some objectives have, declared {objective: Option}, as (name, type, field). None = each one's
    default, which the help shows."""
    first, *others = declared.values()
    help = first.help
    if any(one.help != help for one in others):
        help = "; ".join(f"{objective}: {one.help}" for objective, one in declared.items())
    defaults = {objective: default_of(objective, name) for objective in declared}
    shown = ", ".join(f"{objective} {value}" for objective, value in defaults.items() if value is not None)
    if shown:  # None: the help says what it means
        help = f"{help} (default: {shown})"
    more = {limit: getattr(first, limit) for limit in ("low", "high", "choices") if getattr(first, limit) is not None}
    if first.choices:
        kind, more["choices"] = str, tuple(first.choices)
    elif isinstance(first.kind, type):
        kind = first.kind
    else:
        kind, more["parse"] = int | str, first.kind
    return name, kind | None, opt(None, help, **more)


def default_of(objective, option):
    """The default of an objective's option: it stands in the signature of its loss."""
    return inspect.signature(objectives.OBJECTIVES[objective].loss).parameters[option].default


ObjectiveOptions = dataclasses.make_dataclass(
    "ObjectiveOptions", fields_of_all(), namespace=dict(__doc__="the objective", __module__=__name__)
)


def chosen(c):
    """(the parameters of the objective that c names: those given and its defaults; the names of the options that are
    given and not used). Raises ValueError for options that exclude each other."""
    objective, used, unused = objectives.OBJECTIVES[c.objective], {}, []
    for name in field_names(ObjectiveOptions)[1:]:  # all but the objective itself
        given = getattr(c, name)
        if name in objective.options:
            used[name] = default_of(c.objective, name) if given is None else given
        elif given is not None:
            unused.append(name)
    try:
        idle = objective.check(used) or ()
    except ValueError as e:  # it speaks of parameters
        named = re.compile(rf"\b({'|'.join(used)}) (?:'([^']*)')?")  # window 1, starts 'non-ltr'
        raise ValueError(named.sub(lambda found: f"{flag(found[1])} {found[2] or ''}", str(e))) from e
    return used, unused + [name for name in idle if getattr(c, name) is not None]
