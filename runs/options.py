"""Fields of a dataclass become flags of a command line, with their help texts. A leaf: it depends on no command.

    @dataclass
    class TrainOptions:
        "the training loop"                                                 # the title of a group in --help
        lr: float = opt(2e-5, "peak learning rate", low=0)                  # becomes --lr

    name, run, cls, given = parse({"train": ("train", "trains")}, "what this program does")
    c = cls(**given)                                                        # given: the flags that are there
    check_values(c)                                                         # ValueError for a number out of bounds

A field may state: low and high (the bounds of a number), choices, parse (text -> value; its ValueError says what the
text must be), nargs, positional (its values stand without a flag), required, otherwise (what the help shows as the
default of a field that is None where the flag is absent), idle (other fields, with the value of each beside which this
one has no effect). The type is read from the annotation: `int | None` takes
whole numbers and is None where the flag is absent.
"""

import argparse
import dataclasses
import difflib
import importlib
import inspect
import math
import re
import sys
import typing
from pathlib import Path

ROOT = Path(__file__).parent.parent
DECLARED = re.compile(r"^\s+(\w+)(?:: [^=\n]+)? ?= ?(?:opt|Option)\(", re.MULTILINE)  # an option
OURS = ("low", "high", "otherwise", "positional", "idle")  # metadata that argparse does not know


def opt(default, help, **more):
    """A field of an options dataclass. help: its text on the command line; more: see the module's docstring."""
    return dataclasses.field(default=default, metadata=dict(help=help, **more))


def flag(name):
    """max_new_tokens -> --max-new-tokens"""
    return "--" + name.replace("_", "-")


def kind(f):
    """The type of a field's value, None left out: bool, int, float, str or tuple."""
    for one in (*typing.get_args(f.type), f.type):
        if one is not type(None):
            return one
    raise TypeError(f"{f.name} has no type")


def field_names(cls):
    """The names of the fields of a dataclass, in their order."""
    return [f.name for f in dataclasses.fields(cls)]


# ----------------------------------------------------------------------------------------------------------- values


def name_list(text):
    """ "gsm8k, math500" -> ("gsm8k", "math500"); raises ValueError for an empty name, such as after a last comma."""
    names = tuple(map(str.strip, text.split(",")))
    if "" in names:
        raise ValueError("has a comma too many: must be names, separated by commas")
    return names


def row_list(text):
    """Like name_list, for names that hold commas themselves: they are separated by semicolons."""
    return tuple(map(str.strip, text.split(";")))


def number_list(text):
    """ "1, 2" -> (1, 2); raises ValueError for anything else."""
    try:
        return tuple(map(int, text.split(",")))
    except ValueError as e:
        raise ValueError("must be whole numbers, separated by commas") from e


def check_values(c):
    """Raises ValueError for a number outside the bounds of its field, one that is not finite, and a whole number that
    does not fit into 64 bits."""
    for f in dataclasses.fields(c):
        low, high, given = f.metadata.get("low"), f.metadata.get("high", math.inf), getattr(c, f.name)
        for value in given if isinstance(given, tuple) else (given,):
            if value is None or isinstance(value, str):
                continue
            if isinstance(value, int) and abs(value) > sys.maxsize:
                raise ValueError(f"{flag(f.name)} {value}: must be at most {sys.maxsize}")
            if low is None:
                continue
            if not low <= value < math.inf:
                raise ValueError(f"{flag(f.name)} {value}: must be a number of at least {low}")
            if value > high:
                raise ValueError(f"{flag(f.name)} {value}: must be at most {high}")


def idle(c, given):
    """Yield a line for each flag that is given and has no effect. given: the names of those that are."""
    for f in dataclasses.fields(c):
        for other, value in f.metadata.get("idle", {}).items():
            if f.name in given and getattr(c, other) == value:
                beside = "without" if value is False else "with"
                shown = "" if type(value) is bool else f" {value}"
                yield f"{flag(f.name)} has no effect {beside} {flag(other)}{shown}"


def parse_value(f, text, extra=()):
    """The value that a text gives a field, as on the command line. extra: values allowed besides its choices.

    Raises ValueError, which names the flag and the text."""
    try:
        value = f.metadata.get("parse", kind(f))(text)
    except ValueError as e:
        must = str(e) if "parse" in f.metadata else f"must be {kind(f).__name__}"
        raise ValueError(f"{flag(f.name)} {text!r}: {must}") from e
    allowed = (*(f.metadata.get("choices") or ()), *extra)
    if f.metadata.get("choices") and value not in allowed:
        raise ValueError(f"{flag(f.name)} {text!r}: must be one of {', '.join(allowed)}")
    return value


# ----------------------------------------------------------------------------------------------------- command line


def parse(commands, description, version=None, argv=None):
    """The words of a command line -> (command, its function, its class of options, {option that is there: value}).

    commands: {name: (module, summary)}. The module of the command that is called, and no other, is imported: it has a
    function of the command's name and a dataclass NameOptions; each class that this inherits from is a group of the
    --help. A misspelt option is refused before the import, which takes seconds where it needs torch."""
    words = sys.argv[1:] if argv is None else list(argv)
    top = argparse.ArgumentParser(prog="tabom.py", description=description, allow_abbrev=False)
    if version:
        top.add_argument("--version", action="version", version=version)
    subs, run, cls = top.add_subparsers(dest="command", required=True, metavar="|".join(commands)), None, None
    for name, (module, summary) in commands.items():
        sub = subs.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        if words[:1] == [name]:
            check_spelling(sub, words, declared_for(module))
            run, cls = load(sub, module, name)
            add_flags(sub, cls)
            check_spelling(sub, words, sub._option_string_actions)
    given = vars(top.parse_args(words))
    return given.pop("command"), run, cls, given


def load(parser, module, name):
    """A command's function and its class of options. Ends with the parser's error where a package is not there."""
    try:
        found = importlib.import_module(module)
    except ImportError as e:
        parser.error(f"{e}: pip install -r requirements.txt")
    return getattr(found, name), getattr(found, f"{name.capitalize()}Options")


def check_spelling(parser, words, known):
    """Ends with the parser's error for an option that is not known, and names the nearest one that is."""
    for word in words:
        option = word.split("=")[0]
        text = " " in option  # a prompt that begins with two dashes, say: argparse takes it as a value, too
        if option.startswith("--") and not text and option not in known:
            close = difflib.get_close_matches(option, known, 1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            parser.error(f"unrecognized arguments: {option}{hint}")


def declared_for(module):
    """The options that a command may have: of the lines that declare some in its file and in those that it imports, and
    these in turn. The text is read; nothing is imported."""
    files, found = [ROOT / f"{module.replace('.', '/')}.py"], ["--help"]
    for file in files:  # which grows
        text = file.read_text(encoding="utf-8")
        found += map(flag, DECLARED.findall(text))
        for name in re.findall(r"^(?:from|import) (\w+)", text, re.MULTILINE):
            files += [new for new in (*ROOT.glob(f"{name}.py"), *ROOT.glob(f"{name}/*.py")) if new not in files]
    return found


def add_flags(parser, cls):
    """The fields of a class of options as flags of a parser, in a group for each class that it inherits from."""
    groups = {}
    for f in dataclasses.fields(cls):
        owner = defined_in(cls, f.name)
        if owner not in groups:
            groups[owner] = parser.add_argument_group(inspect.cleandoc(owner.__doc__))
        add_flag(groups[owner], f)


def defined_in(cls, name):
    """The most basic of the classes that cls inherits from (or is) which has a field of that name."""
    owner = cls
    for base in cls.__mro__:
        if name in getattr(base, "__dataclass_fields__", {}):
            owner = base
    return owner


def add_flag(group, f):
    more = {k: v for k, v in f.metadata.items() if k not in OURS}
    if kind(f) is bool:
        group.add_argument(flag(f.name), action="store_true", default=argparse.SUPPRESS, help=more["help"])
        return
    shown = f.metadata.get("otherwise", f.default)
    if isinstance(shown, tuple):
        shown = (" " if "nargs" in more else ",").join(map(str, shown))
    if shown not in (None, ""):
        more["help"] += f" (default {shown})"
    more["help"] = more["help"].replace("%", "%%")
    parse = more.pop("parse", None)
    parse = saying_why(parse) if parse else kind(f)  # argparse names the types that it knows itself
    name = f.name if f.metadata.get("positional") else flag(f.name)
    group.add_argument(name, default=argparse.SUPPRESS, type=parse, **more)


def saying_why(parse):
    """A parser of texts whose ValueError is the message that argparse shows."""

    def typed(text):
        try:
            return parse(text)
        except ValueError as e:
            raise argparse.ArgumentTypeError(f"{text!r} {e}") from e

    return typed
