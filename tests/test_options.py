"""runs/options.py: fields become flags, --help in groups, misspelt options, lists, bounds.

python -m pytest tests/test_options.py

The program is a small one of the tests' own; the real commands are parsed at the end."""

import dataclasses
import math
import subprocess
import sys
from dataclasses import dataclass

import pytest
from helpers import interpreter
from hypothesis import given
from hypothesis import strategies as st

import tabom
from runs import loading, options
from runs.options import opt


@dataclass
class Shared:
    """what both commands have"""

    model: str = opt(None, "model folder", required=True)
    seed: int = opt(0, "of every random choice")


@dataclass
class CookOptions(Shared):
    """the kitchen"""

    heat: float = opt(0.5, "how hot, at most 100% of the stove", low=0, high=1)
    minutes: int | None = opt(None, "how long", low=1)
    fast: bool = opt(False, "in a hurry")
    pan: str | None = opt(None, "what in", choices=("iron", "copper"))
    spices: tuple | None = opt(None, "names, comma-separated", parse=options.name_list)
    dishes: tuple = opt(("soup", "rice"), "what", nargs="+", parse=str)
    sizes: tuple = opt((1, 2), "of portions", parse=options.number_list)
    level: float | None = opt(None, "given by the dish")


@dataclass
class WashOptions(Shared):
    """the sink"""

    minutes_of_soaking: int = opt(3, "before the wash")
    plates: tuple = opt(("all",), "what", parse=str, nargs="*", positional=True)


def cook(c):
    """Cook a meal."""


def wash(c):
    """Wash the dishes."""


@pytest.fixture
def parser(monkeypatch):
    """The words of a command line -> what parse() makes of them. This file is the commands' module."""
    commands = dict(cook=("tests.test_options", "Cook a meal."), wash=("tests.test_options", "Wash the dishes."))
    monkeypatch.setitem(sys.modules, "tests.test_options", sys.modules[__name__])
    return lambda text: options.parse(commands, "a kitchen", "kitchen 1.0", text.split())


def parse(parser, text):
    name, run, cls, found = parser(text)
    assert (run, cls) == {"cook": (cook, CookOptions), "wash": (wash, WashOptions)}[name]
    return dict(found, command=name)


# ------------------------------------------------------------------------------------------------------ flags, values


def test_only_the_flags_that_are_given_are_there(parser):
    assert parse(parser, "wash --model M") == dict(command="wash", model="M")
    given = parse(parser, "cook --model M --minutes 3 --fast")
    assert given == dict(command="cook", model="M", minutes=3, fast=True)


def test_values_have_the_types_of_their_fields(parser):
    given = parse(parser, "cook --model M --heat 1 --minutes 7 --pan iron --dishes pie --sizes 3,4 --level 2")
    del given["command"]
    c = CookOptions(**given)
    assert (c.heat, c.minutes, c.pan, c.dishes, c.sizes, c.level) == (1.0, 7, "iron", ["pie"], (3, 4), 2.0)
    assert type(c.heat) is float
    assert (c.fast, c.seed, c.spices) == (False, 0, None)  # the defaults of the dataclass


def test_a_positional_field_has_no_flag(parser, capsys):
    assert parse(parser, "wash --model M small large")["plates"] == ["small", "large"]
    assert parse(parser, "wash large --model M")["plates"] == ["large"]
    with pytest.raises(SystemExit):
        parser("wash --model M --plates large")
    assert "unrecognized arguments: --plates" in capsys.readouterr().err


def test_names_of_flags():
    assert options.flag("max_new_tokens") == "--max-new-tokens"
    assert options.field_names(WashOptions) == ["model", "seed", "minutes_of_soaking", "plates"]


def test_the_kind_of_a_field():
    kinds = {f.name: options.kind(f) for f in dataclasses.fields(CookOptions)}
    assert kinds["heat"] is float
    assert kinds["minutes"] is int
    assert kinds["fast"] is bool
    assert kinds["spices"] is tuple


@pytest.mark.parametrize("text", ["gsm8k,math500", "gsm8k, math500", " gsm8k , math500 "])
def test_lists_may_have_spaces(text):
    assert options.name_list(text) == ("gsm8k", "math500")


@pytest.mark.parametrize("text", ["a,", ",a", "a,,b", "", " "])
def test_a_comma_too_many_is_an_error(text):
    with pytest.raises(ValueError, match="a comma too many"):
        options.name_list(text)


def test_other_lists():
    assert options.number_list("1, 2,-3") == (1, 2, -3)
    assert options.row_list("tabom, 1 a step; base") == ("tabom, 1 a step", "base")
    with pytest.raises(ValueError):
        options.number_list("1,x")


@given(st.lists(st.text("abc-_0", min_size=1), min_size=1), st.text(" ", max_size=2))
def test_every_list_of_names_is_read_back(names, space):
    assert options.name_list(f"{space},{space}".join(names)) == tuple(names)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(heat=-0.1), "--heat -0.1: must be a number of at least 0"),
        (dict(heat=1.1), "--heat 1.1: must be at most 1"),
        (dict(heat=math.nan), "--heat nan: must be a number"),
        (dict(heat=math.inf), "--heat inf: must be a number"),
        (dict(minutes=0), "--minutes 0: must be a number of at least 1"),
    ],
)
def test_numbers_have_bounds(changes, message):
    with pytest.raises(ValueError, match=message):
        options.check_values(CookOptions(model="M", **changes))


@given(st.floats(0, 1), st.none() | st.integers(1, 10**9))
def test_numbers_within_their_bounds_pass(heat, minutes):
    options.check_values(CookOptions(model="M", heat=heat, minutes=minutes))


@dataclass
class Many:
    """several numbers in one field"""

    sizes: tuple = opt((1,), "sizes", parse=options.number_list, low=1)
    window: int | str = opt("global", "or a number", low=2)


def test_bounds_hold_for_each_number_of_a_list_and_for_no_text():
    options.check_values(Many(sizes=(1, 2), window="global"))
    with pytest.raises(ValueError, match="--sizes 0: must be"):
        options.check_values(Many(sizes=(1, 0)))
    with pytest.raises(ValueError, match="--window 1: must be"):
        options.check_values(Many(window=1))


def test_a_value_from_a_text_as_on_the_command_line():
    fields = {f.name: f for f in dataclasses.fields(CookOptions)}
    assert options.parse_value(fields["heat"], "0.25") == 0.25
    assert options.parse_value(fields["minutes"], "4") == 4
    assert options.parse_value(fields["spices"], "salt, dill") == ("salt", "dill")
    assert options.parse_value(fields["pan"], "iron") == "iron"
    assert options.parse_value(fields["pan"], "base", extra=("base",)) == "base"
    with pytest.raises(ValueError, match="--minutes 'x': must be int"):
        options.parse_value(fields["minutes"], "x")
    with pytest.raises(ValueError, match="--pan 'tin': must be one of iron, copper"):
        options.parse_value(fields["pan"], "tin")


# ------------------------------------------------------------------------------------------------------------- errors


def refused(parser, capsys, text):
    """What argparse writes to stderr before it leaves with status 2."""
    with pytest.raises(SystemExit) as stop:
        parser(text)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_a_misspelt_option_shows_the_usage_of_its_command_and_the_nearest_option(parser, capsys):
    err = refused(parser, capsys, "cook --model M --minuts 3")
    assert err.startswith("usage: tabom.py cook ")
    assert err.endswith("error: unrecognized arguments: --minuts (did you mean --minutes?)\n")


def test_an_option_of_another_command_is_refused_with_the_usage_of_this_one(parser, capsys):
    err = refused(parser, capsys, "cook --model M --minutes-of-soaking 3")
    assert "--minutes MINUTES" in err
    assert err.endswith("unrecognized arguments: --minutes-of-soaking (did you mean --minutes?)\n")


def test_the_nearest_option_is_named_if_one_is_near(parser, capsys):
    assert "(did you mean --minutes-of-soaking?)" in refused(parser, capsys, "wash --model M --minutes-of-soap=3")
    assert "did you mean" not in refused(parser, capsys, "wash --model M --qqq")


def test_an_option_may_not_be_abbreviated(parser, capsys):
    assert "unrecognized arguments: --minute (did" in refused(parser, capsys, "cook --model M --minute 3")


def test_a_misspelt_option_is_named_before_one_that_is_missing(parser, capsys):
    assert "error: unrecognized arguments: --modl (did you mean --model?)" in refused(parser, capsys, "cook --modl M")


def test_a_value_may_look_like_an_option_or_a_command(parser):
    assert parse(parser, "wash --model=--minuts")["model"] == "--minuts"
    assert parse(parser, "wash --model cook --minutes-of-soaking 3")["command"] == "wash"


@dataclass
class OvenOptions:
    """the oven"""

    watch: bool = opt(False, "look")
    delay: float = opt(0.0, "between looks", idle=dict(watch=False))
    rank: int = opt(8, "of the oven")
    alpha: float | None = opt(None, "scale", idle=dict(rank=0))


def test_a_flag_without_effect_beside_others_is_said():
    def said(**given):
        return list(options.idle(OvenOptions(**given), given))

    assert said(delay=2.0) == ["--delay has no effect without --watch"] and said(delay=2.0, watch=True) == []
    assert said(alpha=1.0, rank=0) == ["--alpha has no effect with --rank 0"] and said(alpha=1.0) == said(rank=0) == []
    sure = loading.DecodeOptions(greedy=True, temperature=0.0)
    assert list(options.idle(sure, ["greedy", "temperature"])) == ["--greedy has no effect with --temperature 0"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("cook", "the following arguments are required: --model"),
        ("cook --model M --minutes x", "argument --minutes: invalid int value: 'x'"),
        ("cook --model M --spices a,,b", "argument --spices: 'a,,b' has a comma too many"),
        ("cook --model M --pan tin", "invalid choice: 'tin'"),
        ("fly", "invalid choice: 'fly'"),
        ("", "the following arguments are required: cook|wash"),
    ],
)
def test_other_mistakes_are_named(parser, capsys, text, message):
    assert message in refused(parser, capsys, text)


# --------------------------------------------------------------------------------------------------------------- help


def shown(parser, capsys, text):
    with pytest.raises(SystemExit) as stop:
        parser(text)
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_the_help_of_a_command_has_a_group_for_each_dataclass(parser, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    out = shown(parser, capsys, "cook --help")
    assert "Cook a meal." in out
    shared, own = out.index("what both commands have:\n"), out.index("the kitchen:\n")
    assert shared < out.index("\n  --seed SEED") < own < out.index("\n  --heat HEAT")
    assert "how hot, at most 100% of the stove (default 0.5)" in out
    assert "(default soup rice)" in out  # several words
    assert "(default 1,2)" in out  # one word
    assert "None" not in out


def test_the_help_of_the_program_lists_its_commands(parser, capsys):
    out = shown(parser, capsys, "--help")
    assert "a kitchen" in out
    assert "Cook a meal." in out
    assert "Wash the dishes." in out
    assert shown(parser, capsys, "--version") == "kitchen 1.0\n"


# ------------------------------------------------------------------------------------------------- the real commands


def options_of(command):
    return options.load(None, tabom.COMMANDS[command][0], command)[1]


@pytest.mark.parametrize("command", tabom.COMMANDS)
def test_every_command_has_help_for_every_field(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stop:
        tabom.main([command, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    for f in dataclasses.fields(options_of(command)):
        shown = f.name if f.metadata.get("positional") else options.flag(f.name)
        assert f"\n  {shown}" in out, f.name


@pytest.mark.parametrize("command", tabom.COMMANDS)
def test_every_default_is_within_its_bounds(command):
    cls = options_of(command)
    for f in dataclasses.fields(cls):
        options.kind(f)
        if f.metadata.get("choices"):
            assert f.default is None or f.default in f.metadata["choices"], f.name
    options.check_values(cls())


@pytest.mark.parametrize("command", tabom.COMMANDS)
def test_what_is_declared_for_a_command_has_all_of_its_options(command):
    declared = options.declared_for(tabom.COMMANDS[command][0])
    assert {options.flag(name) for name in options.field_names(options_of(command))} <= set(declared)


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None  # an import of it fails
import tabom
tabom.main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    "words, status, message",
    [
        (["--help"], 0, "diagnose"),
        (["train", "--windw", "3"], 2, "unrecognized arguments: --windw (did you mean --window?)"),
        (["trian"], 2, "invalid choice: 'trian'"),
    ],
)
def test_help_and_mistakes_are_answered_without_torch(words, status, message):
    command, env = interpreter("-c")
    done = subprocess.run([*command, WITHOUT_TORCH, *words], env=env, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert message in done.stdout + done.stderr
