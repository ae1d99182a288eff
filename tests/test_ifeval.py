"""The 25 instructions of IFEval: python -m pytest tests/test_ifeval.py

The benchmark and 180 responses with their official verdicts are read from the folder that
TABOM_DATA names, and skipped without it.
"""

import gzip
import json
import os
import re
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import check_lengths, check_prompts

from benchmarks import ifeval

REAL = Path(os.environ.get("TABOM_DATA", "no-such-folder"))
needs_data = pytest.mark.skipif(not REAL.is_dir(), reason="TABOM_DATA names no folder")


def read(name):
    with gzip.open(REAL / name, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def grade(name, response, **kwargs):
    """(strict, loose) of one instruction."""
    verdict = ifeval.grade({"key": 1, "prompt": "?", "instruction_id_list": [name], "kwargs": [kwargs]}, response)
    return verdict["strict"][0], verdict["loose"][0]


# ---------------------------------------------------------------------------- prompts and settings


@needs_data
def test_prompts_are_the_harnesss():
    check_prompts(ifeval)
    assert ifeval.ask(dict(prompt="Write."), "llada", "official") == ("Write.", "")


def test_settings():
    check_lengths(
        ifeval, dream_paper=(1280, None), dream_release=(512, None), dream_official=(1280, None),
        llada_paper=(512, 512), llada_release=(512, 512), llada_official=(512, 512),
    )  # fmt: skip
    assert ifeval.settings("llada", "release")["strategy"] == "entropy"
    assert "strategy" not in ifeval.settings("llada")
    assert ifeval.trim("all of it") == "all of it"


# --------------------------------------------------------------------------- the official verdicts


@needs_data
def test_the_official_verdicts():
    rows = read("ifeval_gpt4_graded.jsonl.gz")
    differ, n = [], 0
    for row in rows:
        verdict = ifeval.grade(row, row["response"])
        for mode in ("strict", "loose"):
            assert len(verdict[mode]) == len(row[mode])
            for name, ours, theirs in zip(row["instruction_id_list"], verdict[mode], row[mode]):
                n += 1
                if ours is not theirs:
                    differ.append((row["key"], name, mode, ours))
    assert n == 546 and not differ
    assert {name for row in rows for name in row["instruction_id_list"]} == set(ifeval.INSTRUCTIONS)


@needs_data
@pytest.mark.parametrize("response", ["", "Yes.", "* one\n* two\n\n***\n\nP.S. <<Three>> [4]", "Ça va? 日本語。"])
def test_every_record_of_the_benchmark_can_be_graded(response):
    records = read("ifeval.jsonl.gz")
    assert len(records) == 541
    for record in records:
        verdict = ifeval.grade(record, response)
        n = len(record["instruction_id_list"])
        for mode in ("strict", "loose"):
            assert len(verdict[mode]) == n and all(type(v) is bool for v in verdict[mode])
        assert all(loose >= strict for strict, loose in zip(verdict["strict"], verdict["loose"]))
        if not response:
            assert not any(verdict["loose"])


# -------------------------------------------------------------------------- each instruction alone

ENGLISH = "the quick brown fox jumps over the lazy dog and then it goes home"
CASES = [  # instruction, arguments, responses that follow it strictly, responses that do not
    ("keywords:existence", dict(keywords=["cat", "Dog"]), ["CAT and dog", "concatenated dogs"], ["cat", "dog"]),
    ("keywords:existence", dict(keywords=["a.c"]), ["abc", "a.c"], ["ac"]),  # a regular expression
    ("keywords:frequency", dict(keyword=" cat ", frequency=2, relation="at least"), ["Cat scat"], ["cat"]),
    ("keywords:frequency", dict(keyword="cat", frequency=2, relation="less than"), ["cat", "dog"], ["cat cats"]),
    ("keywords:forbidden_words", dict(forbidden_words=["cat", "dog"]), ["cats", "do-gs"], ["a Cat.", "the-dog"]),
    ("keywords:letter_frequency", dict(letter="A", let_frequency=2, let_relation="at least"), ["Aha"], ["a"]),
    ("keywords:letter_frequency", dict(letter="a", let_frequency=2, let_relation="less than"), ["a", "b"], ["Aa"]),
    ("keywords:letter_frequency", dict(letter="#", let_frequency=2, let_relation="at least"), ["# #"], ["#"]),
    ("language:response_language", dict(language="en"), [ENGLISH, "12345"], ["Das ist ein schönes Haus am See."]),
    ("language:response_language", dict(language="de"), ["Das ist ein schönes Haus am See."], [ENGLISH]),
    ("language:response_language", dict(language="hi"), ["यह एक सुंदर घर है।"], [ENGLISH]),
    ("length_constraints:number_sentences", dict(num_sentences=2, relation="at least"), ["A b. C d."], ["A b, c d."]),
    ("length_constraints:number_sentences", dict(num_sentences=2, relation="less than"), ["Dr. No"], ["No. No."]),
    ("length_constraints:number_words", dict(num_words=3, relation="at least"), ["I don't", "a_b 1 2"], ["Two words."]),
    ("length_constraints:number_words", dict(num_words=3, relation="less than"), ["well done"], ["well-done it"]),
    (
        "length_constraints:number_paragraphs",
        dict(num_paragraphs=2),
        ["a *** b", "***a\n***\nb***", "a***b\n\nc"],  # empty ones at the ends do not count
        ["a\n\nb", "a *** *** b", "a *** b *** c"],
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        dict(num_paragraphs=2, nth_paragraph=2, first_word="Hello"),
        ["a\n\nhello b", "a\n\n'HELLO, b'", 'a\n\n"hello"', "a\n\nHello.b\n\n "],
        ["hello\n\na", "a\n\nhellos", "a\n\nb\n\nhello", "hello b", "a\n\n\n\nhello", "a\n\n(hello)"],
    ),
    ("detectable_content:number_placeholders", dict(num_placeholders=2), ["[a] [b]", "[][]"], ["[a]", "[a\n] [b]"]),
    ("detectable_content:postscript", dict(postscript_marker="P.S."), ["a\nP.S. b", "p. s.", "ap.s."], ["PS b", "p.s"]),
    ("detectable_content:postscript", dict(postscript_marker="P.P.S"), ["P.P.S", "p. p. s b"], ["P.S.", "PPS"]),
    ("detectable_content:postscript", dict(postscript_marker=" Note "), ["a NOTE"], ["P.S."]),
    (
        "detectable_format:number_bullet_lists",
        dict(num_bullets=2),
        ["* a\n* b", "x\n  - a\n  * b", "*a*\n---", "* a\n** b\n-c"],  # emphasis and rules count, ** does not
        ["* a", "* a\n* b\n* c", "1. a\n2. b"],
    ),
    (
        "detectable_format:constrained_response",
        {},
        ["My answer is yes.", "My answer is no.", "So: My answer is maybe. Ok"],
        ["No.", "my answer is no.", "My answer is no", "maybe"],
    ),
    (
        "detectable_format:number_highlighted_sections",
        dict(num_highlights=2),
        ["*a* *b*", "**a** **b**", "*a* and **b**", "* a *b* c *"],
        ["*a*", "**a**", "** ** *a*", "*a\nb* *c*", "a b", "* a *b* *"],  # a bullet's star opens too
    ),
    (
        "detectable_format:multiple_sections",
        dict(section_spliter=" Section ", num_sections=2),
        ["Section 1\na\nSection 2\nb", "Section1 Section 2 Section 3"],
        ["Section 1", "SECTION 1\nSECTION 2", "Section I\nSection II"],
    ),
    (
        "detectable_format:json_format",
        {},
        ['{"a": 1}', '```json\n{"a": 1}\n```', "```JSON\n[1]```", "```\n1\n```", ' "a" ', "NaN"],
        ["{a: 1}", 'Here: {"a": 1}', "```python\n1\n```", '{"a": 1', "[" * 100000],
    ),
    ("detectable_format:title", {}, ["<<a>>", "x <<<a>> b>>"], ["<a>", "<<>>", "<< >>", "<<a\nb>>"]),
    (
        "combination:two_responses",
        {},
        ["a ****** b", "******a******b******"],
        ["a ****** a ", "a", "a******b******c", "a************b", "a *** b"],
    ),
    ("combination:repeat_prompt", dict(prompt_to_repeat="Say It. "), [" say it. Hi", "Say It."], ["Hi. Say it.", "Sa"]),
    ("startend:end_checker", dict(end_phrase=" The End. "), ["a. the end.\n", '"a. The End."'], ["The end. a", "end"]),
    ("startend:quotation", {}, ['"a"', ' "a "b" c" ', '""'], ['"a', 'a"', '"', "“a”"]),
    (
        "change_case:capital_word_frequency",
        dict(capital_frequency=2, capital_relation="at least"),
        ["ONE TWO", "DON'T", "CANNOT", "I am A.", "ONE,TWO"],
        ["WELL-KNOWN", "One TWO", "1 2 3 FOUR"],
    ),
    ("change_case:capital_word_frequency", dict(capital_frequency=1, capital_relation="less than"), ["One"], ["ONE"]),
    ("change_case:english_capital", {}, [ENGLISH.upper()], [ENGLISH, "DAS IST EIN HAUS AM SEE", "12345"]),
    ("change_case:english_lowercase", {}, [ENGLISH], [ENGLISH.upper(), "das ist ein haus am see", "12345"]),
    ("punctuation:no_comma", {}, ["a; b", "a、b"], ["a, b"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "kwargs", "good", "bad"), CASES)
def test_an_instruction(name, kwargs, good, bad):
    for response in good:
        assert grade(name, response, **kwargs) == (True, True), response
    for response in bad:
        assert grade(name, response, **kwargs)[0] is False, response


def test_every_instruction_has_examples():
    assert len(ifeval.INSTRUCTIONS) == 25
    assert {name for name, *_ in CASES} == set(ifeval.INSTRUCTIONS)


def test_language_is_the_same_at_every_call():
    assert len({ifeval.detected("hello") for _ in range(20)}) == 1  # unseeded: Finnish or Dutch


def test_without_langdetect(monkeypatch):
    monkeypatch.setitem(sys.modules, "langdetect", None)
    with pytest.raises(ImportError, match="pip install langdetect"):
        grade("language:response_language", "Hello", language="en")
    assert grade("punctuation:no_comma", "Hello") == (True, True)


# -------------------------------------------------------------------------------- strict and loose


@pytest.mark.parametrize(
    ("response", "loose"),
    [
        ("Sure, here it is:\nIt is red", True),  # the first line removed
        ("It is red\nAnything else, Sir?", True),  # the last
        ("Sure, yes:\nIt is red\nBye, Sir!", True),  # both
        ("Sure, yes:\nIt is, well, red\nBye, Sir!", False),
        ("It is red, Sir", False),  # what is left is empty
        ("Sure, yes\nBye, Sir", False),
    ],
)
def test_loose_drops_lines(response, loose):
    assert grade("punctuation:no_comma", response) == (False, loose)


def test_loose_drops_asterisks():
    assert grade("startend:end_checker", "a **The End.**", end_phrase="The End.") == (False, True)
    assert grade("startend:end_checker", "a **The End.**\n**b**", end_phrase="The End.") == (False, True)
    assert grade("startend:end_checker", "a _The End._", end_phrase="The End.") == (False, False)


def test_loose_has_eight_versions():
    lines = ["*a*", "*b*", "*c*"]
    parts = ["\n".join(part) for part in (lines, lines[1:], lines[:-1], lines[1:-1])]
    expected = {*parts, *(part.replace("*", "") for part in parts)}
    versions = ifeval.loosened("\n".join(lines))
    assert len(versions) == 8 and set(versions) == expected and versions[0] == "*a*\n*b*\n*c*"
    assert ifeval.loosened("a\n  b  \nc")[3] == "b"  # trimmed once cut


@pytest.mark.parametrize("response", ["", " ", "\n\n", "\t\n "])
def test_an_empty_response_follows_nothing(response):
    assert grade("punctuation:no_comma", response) == (False, False)
    assert grade("keywords:forbidden_words", response, forbidden_words=["a"]) == (False, False)


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="aB.,*\n \"'!1-[", max_size=60))
def test_loose_is_never_stricter(response):
    for name, kwargs, *_ in CASES:
        if "language" not in name and "english" not in name:
            strict, loose = grade(name, response, **kwargs)
            assert loose >= strict


# --------------------------------------------------------------------------------- what is refused


def test_an_unknown_instruction():
    with pytest.raises(ValueError, match="'keywords:rhyme'"):
        grade("keywords:rhyme", "a")


def test_arguments():
    words = "length_constraints:number_words"
    assert grade(words, "a b", num_words=2, relation="at least", keyword=None, letter=None) == (True, True)
    with pytest.raises(ValueError, match=r"number_words takes .*'num_words', 'relation'.* gives \['num_words'\]"):
        grade(words, "a b", num_words=2)
    with pytest.raises(ValueError, match="number_words takes"):
        grade(words, "a b", num_words=2, relation=None)
    with pytest.raises(ValueError, match="'wrods'"):
        grade(words, "a b", num_words=2, relation="at least", wrods=3)
    with pytest.raises(ValueError, match="'at most'"):
        grade(words, "a b", num_words=2, relation="at most")
    with pytest.raises(ValueError, match="record 7 has 1 instructions, but kwargs for 0"):
        ifeval.grade({"key": 7, "instruction_id_list": ["punctuation:no_comma"], "kwargs": []}, "a")
    record = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [None]}
    found = ifeval.grade(record, "a")
    assert found["correct"] and found["strict"] == found["loose"] == [True]


# ----------------------------------------------------------------------------- sentences and words


@pytest.mark.parametrize(
    "expected",  # what NLTK's Punkt model for English finds
    [
        ["One.", "Two?", "Three!", "Four"],
        ["Mr. Smith met Dr. Jones.", "They talked."],
        ["It was 3 p.m. in the U.S. and warm."],
        ["He came at 3 p.m.", "The sun shone."],  # an abbreviation, then a frequent opener
        ["I moved to the U.S.", "Please write."],  # ... then a word that is small inside sentences
        ["Wait...", "I know."],
        ["Wait... what?"],
        ["Wait... Paris?"],
        ["1.", "Open it.", "2.", "Close it."],  # numbers of a list are sentences
        ["1. open it."],
        ["See 3. Review of it."],  # a collocation
        ["Count 1. , then 2."],
        ["1.", "administrators came."],  # the model saw it start sentences in small
        ["The non-U.S. Paris."],
        ["A.", "The first.", "B.", "The second."],
        ["J. Smith wrote it."],
        ["It costs 3.50 or so.", "Good."],
        ["Very bad!!!", "I promise."],
        ["(Is it?)", "It is."],
        ['"Stop!"', "he said."],
        ["He said (loudly.)", "Go."],
        ["What?!", "No."],
        ["See e.g.", "this one."],  # not one of the model's abbreviations
        ["etc.", "And so on."],
        ["No space.Here it is."],
        ["One."],
        ["日本語。日本語。"],
        [],
    ],
)
def test_sentences(expected):
    for gap in (" ", "\n", "\n\n"):
        assert ifeval.sentences(gap.join(expected)) == expected
    assert ifeval.sentences(" ".join(expected) + " \n") == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("IT'S HIS", ["IT", "'S", "HIS"]),
        ("DON'T STOP.", ["DO", "N'T", "STOP"]),
        ("WE’LL", ["WE", "LL"]),
        ("I CANNOT, 'TIS", ["I", "CAN", "NOT", "'T", "IS"]),
        ("U.S.A. and A/B-C", ["U.S.A.", "and", "A/B-C"]),
        ('**A** [B] (C) "D" <E>', ["A", "B", "C", "D", "E"]),
        ("A:B 10:30 1,000 X--Y", ["A", "B", "10:30", "1,000", "X", "Y"]),
    ],
)
def test_words(text, expected):
    assert ifeval.words(text) == expected


def test_a_text_that_starts_with_space():
    """The word before a candidate is looked for from the second character on, as NLTK does."""
    assert ifeval.sentences("\t.?.\n}B...") == ["\t.?.", "}B..."]


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="aBc1.?!,;:'\")( \n-", max_size=80))
def test_sentences_lose_no_words(text):
    assert "".join("".join(ifeval.sentences(text)).split()) == "".join(text.split())


# --------------------------------------------------------------------------------- hostile records


def test_an_expression_that_never_ends_is_not_followed(monkeypatch):
    monkeypatch.setattr(ifeval, "LIMIT", 0.5)
    names = ["keywords:existence", "keywords:forbidden_words", "punctuation:no_comma"]
    kwargs = [dict(keywords=["(a+)+$"]), dict(forbidden_words=["(a+)+!"]), {}]
    verdict = ifeval.grade(dict(instruction_id_list=names, kwargs=kwargs), "a" * 60 + ".")
    assert verdict["strict"] == verdict["loose"] == [False, False, True]


def test_expressions_of_a_record_are_searched_as_written():
    for text, found in (("colour", 1), ("color, Colours", 2), ("cool", 0)):
        assert ifeval.hits("colou?r", text) == found
        assert ifeval.hits("(col)(ou|o)r", text) == found
    assert ifeval.hits("art", "art, cart", r"\b{}\b") == 1
    with pytest.raises(ValueError, match="'\\(a' is no regular expression"):
        ifeval.hits("(a", "a")


pieces = st.sampled_from(["[", "]", "<<", ">>", "<", ">", "*", "-", "\n", " ", "\t", "a", "\r", "\x0b"])


@settings(max_examples=300, deadline=None)
@given(st.lists(pieces, max_size=16).map("".join))
def test_what_is_counted_by_hand_is_what_the_official_expressions_find(text):
    """They are kept here: each takes time that grows with the square of some texts."""
    count = len(re.findall(r"\[.*?\]", text))
    assert ifeval.number_placeholders(text, count) and not ifeval.number_placeholders(text, count + 1)
    titles = re.findall(r"<<[^\n]+>>", text)
    assert ifeval.title(text) == any(found.lstrip("<").rstrip(">").strip() for found in titles)
    bullets = len(re.findall(r"^\s*\*[^\*].*$", text, re.M)) + len(re.findall(r"^\s*-.*$", text, re.M))
    assert ifeval.number_bullet_lists(text, bullets)


@pytest.mark.parametrize("text", ["[", "<<", "\n", "* ", "'", ". ", "A.", "--"])
def test_no_text_takes_the_grader_down(text):
    kwargs = [dict(num_placeholders=1), {}, dict(num_bullets=1), dict(num_sentences=1, relation="at least")]
    names = ["detectable_content:number_placeholders", "detectable_format:title"]
    names += ["detectable_format:number_bullet_lists", "length_constraints:number_sentences"]
    verdict = ifeval.grade(dict(instruction_id_list=names, kwargs=kwargs), text * 50000 + "\ud800")
    assert len(verdict["strict"]) == 4
