"""Fields of a dataclass become flags of a command line, with their help texts. A leaf: it depends on no command.

    @dataclass
    class TrainOptions:
        "the training loop"                                                 # the title of a group in --help
        lr: float = opt(2e-5, "peak learning rate", low=0)                  # becomes --lr

    parser = command_line({"train": (train, TrainOptions)}, "what this program does")
    given = vars(parser.parse_args())                                       # the flags that are there, and no others
    c = TrainOptions(**given)
    check_values(c)                                                         # ValueError for a number out of bounds

A field may state: low and high (the bounds of a number), choices, parse (text -> value; its ValueError says what the
text must be), nargs, required. The type is read from the annotation: `int | None` takes whole numbers and is None where
the flag is absent.
"""

import argparse
import dataclasses
import difflib
import inspect
import math
import sys
import typing

OURS = ("low", "high", "own_default")  # metadata that argparse does not know


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


class Parser(argparse.ArgumentParser):
    """A parser that answers a misspelt option with the usage of its command and the nearest option it has."""

    def parse_args(self, argv=None, namespace=None):
        words = sys.argv[1:] if argv is None else list(argv)
        command = next((self.commands[word] for word in words if word in self.commands), self)
        for word in words:
            option = word.split("=")[0]
            text = " " in option  # a prompt that begins with two dashes, say: argparse takes it as a value, too
            if option.startswith("--") and not text and option not in command._option_string_actions:
                command.error(f"unrecognized arguments: {option}{command.nearest(option)}")
        return super().parse_args(words, namespace)

    def nearest(self, word):
        """A hint at the option that looks most like a word; empty if none does."""
        close = difflib.get_close_matches(word, self._option_string_actions, 1)
        return f" (did you mean {close[0]}?)" if close else ""


def command_line(commands, description, version=None):
    """The parser of all commands. commands: {name: (function, options dataclass)}; the first paragraph of a function's
    docstring describes it, and each dataclass that its options inherit from is a group of its --help."""
    top = Parser(prog="tabom.py", description=description, allow_abbrev=False)
    if version:
        top.add_argument("--version", action="version", version=version)
    subs = top.add_subparsers(dest="command", required=True, metavar="|".join(commands), parser_class=Parser)
    top.commands = {}
    for name, (run, cls) in commands.items():
        summary = inspect.getdoc(run).split("\n\n")[0]
        sub = subs.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        top.commands[name], groups = sub, {}
        for f in dataclasses.fields(cls):
            owner = defined_in(cls, f.name)
            if owner not in groups:
                groups[owner] = sub.add_argument_group(inspect.cleandoc(owner.__doc__))
            add_flag(groups[owner], f)
    return top


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
    shown = f.default
    if isinstance(shown, tuple):
        shown = (" " if "nargs" in more else ",").join(map(str, shown))
    if shown not in (None, ""):
        more["help"] += f" (default {shown})"
    more["help"] = more["help"].replace("%", "%%")
    parse = more.pop("parse", None)
    parse = saying_why(parse) if parse else kind(f)  # argparse names the types that it knows itself
    group.add_argument(flag(f.name), default=argparse.SUPPRESS, type=parse, **more)


def saying_why(parse):
    """A parser of texts whose ValueError is the message that argparse shows."""

    def typed(text):
        try:
            return parse(text)
        except ValueError as e:
            raise argparse.ArgumentTypeError(f"{text!r} {e}") from e

    return typed
