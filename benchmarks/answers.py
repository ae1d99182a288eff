r"""Is an answer right? The --check of datasets that are no benchmark: a response against its reference answer.

    from benchmarks.answers import check
    check("number", "so she pays $18 a day", "9 * 2 = 18 #### 18")     # True
    check("auto", r"\boxed{\frac{6}{8}}", r"\frac{3}{4}")              # True, by math-verify
    check("auto", "It depends.", "a long walk")                        # None: nobody can tell

A response marks its answer with #### or \boxed{}; without a mark its final number, letter or text counts. The kinds:

    number  the final number
    math    math-verify (pip install math-verify), as for MATH500
    exact   the same text but for space around it
    auto    by what the reference is: see check_auto
    none    no verdict

benchmarks.math500 is imported where mathematics is judged, and nowhere else.
"""

import re
import unicodedata
from decimal import Decimal

CHECKS = ("auto", "number", "math", "exact", "none")


def check(kind, response, answer):
    """Whether a response agrees with the reference answer, or with one of a list of them: True, False, or None where
    nobody can tell.

    A list is False where no answer is right and at least one was judged, None where none was judged. Raises ValueError
    for a kind that is not one of CHECKS."""
    if kind not in CHECKS:
        raise ValueError(f"check {kind!r} is not one of {', '.join(CHECKS)}")
    if kind == "none" or answer is None:
        return None
    if isinstance(answer, list):
        verdicts = [check(kind, response, one) for one in answer]
        judged = [verdict for verdict in verdicts if verdict is not None]
        return any(judged) if judged else None
    if kind == "exact":
        return response.strip() == answer.strip()
    asked = reference(answer)
    if kind == "number":
        return check_number(response, asked)
    if kind == "math":
        return says(response, asked) or check_math(response, asked)
    return check_auto(response, asked)


def reference(answer):
    """What a reference answer asks for: what it marks, else all of it."""
    marked = marked_answer(answer)
    return (answer if marked is None else marked).strip()


def check_auto(response, asked):
    """The verdict of the first rule that applies to the reference. A response that says just the reference is never
    wrong."""
    if says(response, asked):  # 1. anything: "no", "12:30", "x^2"
        return True
    letter = sole_letter(asked)
    if letter is not None:  # 2. a letter: "B", "(B)", "B."
        chosen = final_choice(response)
        if chosen is None and asked != letter:  # "(B)" names an option, which the response may spell out: "Paris"
            return None
        return chosen == letter
    gold, found = sole_number(asked), final_number(response)
    if gold is not None and (found is not None or not EXPRESSION.search(response)):  # 3. a number: "72", "US$1,000"
        return found == gold
    if gold is None and not is_mathematics(asked):  # 4. prose and codes: "Paris", "нет", "H2O", "12:30"
        return None
    return check_math(response, asked)  # 5. mathematics: "\\frac{3}{4}", "x + 1"; or a number against "\\frac{8}{2}"


def check_number(response, asked):
    """Whether the final number of a response is the reference; None for a reference that is not one number."""
    gold = sole_number(PERCENT.sub("", asked))
    if gold is None:
        return None
    return final_number(PERCENT.sub("", response)) == gold


def check_math(response, asked):
    """math-verify's verdict; None for a reference that it cannot read. An answer in a box that never closes is judged
    by itself: math-verify would take an earlier box in its place."""
    from benchmarks import math500

    return math500.grade(dict(answer=asked), with_last_box_closed(response))["correct"]


# ------------------------------------------------------------------------------------- the answer of a response

BOX = re.compile(r"(?:\\f?box|\\?\bboxed)\s*\{")  # some write boxed{27}
JOINT = re.compile(r"}[$\s]*(?:,|,?\s*(?:and|or))[$\s]*")  # between two boxes of one answer
HASHES = re.compile(r"####+[ \t]*\n?([^\n]*)")
NUMBER_FIRST = re.compile(r"[-\s$]*\d[\d,]*(?:\.\d+)?(?![\d.)])")  # "18 km", and not "Step 3" or "3. Add"


def marked_answer(text):
    """What a text marks as its answer: the line after the last ####, or the inside of the last \\boxed{}, whichever
    comes later; None without either. Boxes that a comma, "and" or "or" joins are one mark: 18, 19. A box that is cut
    short goes to the end of its line; an empty one marks nothing, and neither does a heading of Markdown."""
    start = last_box(text)
    for found in reversed(list(HASHES.finditer(text, start or 0))):
        ends = not text[found.end() :].strip()
        if found[1].strip() and (ends or NUMBER_FIRST.match(found[1])):
            return found[1]
    return ", ".join(dict.fromkeys(filter(str.strip, joined_boxes(text)))) or None


def joined_boxes(text):
    """The inside of the last \\boxed{} and of those joined to it, as MATH500's answers are; [] without one."""
    found, later = [], None
    for box in reversed(list(BOX.finditer(text))):
        end = box_end(text, box.end())
        if later is not None and not JOINT.fullmatch(text[end:later]):
            break
        found.insert(0, text[box.end() : end])
        later = box.start()
    return found


def last_box(text):
    """The place behind the brace of the last \\boxed{, or None."""
    boxes = list(BOX.finditer(text))
    return boxes[-1].end() if boxes else None


def box_end(text, start):
    """The place of the brace that closes a box; the end of the line where none does."""
    depth = 1
    for brace in re.compile(r"(?<!\\)[{}]").finditer(text, start):
        depth += {"{": 1, "}": -1}[brace[0]]
        if depth == 0:
            return brace.start()
    end = text.find("\n", start)
    return len(text) if end < 0 else end


def with_last_box_closed(response):
    """A response whose last \\boxed{ never closes, as that box alone, closed; any other as it is."""
    start = last_box(response)
    if start is None:
        return response
    end = box_end(response, start)
    if response[end : end + 1] == "}":
        return response
    return f"\\boxed{{{response[start:end]}}}"


INTRODUCTION = re.compile(r"\banswer\s*(?:is|:)\s*:?", re.IGNORECASE)


def says(response, asked):
    """Whether a response is just the reference, but for space, case (which math-verify ignores, too), delimiters and a
    final point: all of it, what it marks, or else its last line or what follows its last "answer is"."""
    mathematics, final = is_mathematics(asked), [response]
    marked = marked_answer(response)
    if marked is not None:
        final.append(marked)
    elif response.strip():
        final += [response.strip().splitlines()[-1], INTRODUCTION.split(response)[-1]]
    same = [bare(text, mathematics) for text in (asked, *final)]
    return bool(same[0]) and same[0] in same[1:]


DELIMITERS = re.compile(r"\\[()\[\]]|\$|(?<!\w)\*\*|\*\*(?!\w)|<\|[^|<>]*\|>")


def bare(text, mathematics=False):
    """A text as says() compares it: no case, no delimiters, no final point, no space but between two words. In
    mathematics 5! is not 5, and f' not f."""
    quotes, ends = ('*`"', ' *`".\u3002') if mathematics else ("*`\"'", " *`\"'.\u3002!")
    text = DELIMITERS.sub("", spelled_plainly(unicodedata.normalize("NFC", text)))
    text = " ".join(text.split()).strip(quotes).rstrip(ends)
    return re.sub(r"(?<!\w) | (?!\w)", "", text).casefold()


# ------------------------------------------------------------------------------------------------------ letters

# A capital letter on its own, but for the article in "A dog" and the pronoun in "I think".
# Beside it there may be kana, Chinese characters and Hangul, which write no spaces.
BESIDE = r"(?:[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|')"
LETTER = rf"(?<!{BESIDE})(?:[B-HJ-Z]|[AI](?!\s+(?!(?:is|are|was|must|would|seems)\b)[a-z]))(?!{BESIDE})"
IS = r"(?:is|are|was|must be|would be|seems)"
DENIED = re.compile(  # not D; D is wrong
    rf"(?i:\b(?:not|than|eliminate|reject)\s+(?:option\s+|choice\s+)?)\(?{LETTER}"
    rf"|{LETTER}[\W_]{{0,3}}\s*(?:{IS}\s+(?:not|wrong|incorrect|false)\b|(?:isn|can|doesn)'t\b|cannot\b)"
)
ANY, GAP = rf"(?<!{BESIDE})[A-Z](?!{BESIDE})", r"[\W_]{0,3}"
OR = rf"{GAP}(?:[/&]|\b(?:and|or)\b|\u6216){GAP}{ANY}"
TOKEN = re.compile(  # A, B or C; C is correct; the answer ...; any letter
    rf"(?P<several>{ANY}(?:(?:{GAP},{GAP}{ANY}){{2,}}(?:{OR})?|(?:{GAP},{GAP}{ANY})?,?{OR}))"
    rf"|(?P<right>{LETTER})[\W_]{{0,3}}\s*{IS}\s+(?:(?:the|my)\s+)?(?:final\s+)?(?:correct|right|true|best|answer)\b"
    rf"(?:\s+(?:answer|option|choice))?"
    rf"|(?i:\b(?P<answer>answer|(?:correct|right|best)\s+(?:option|choice))\b)"
    rf"|(?P<letter>{LETTER})"
)
FIRST = re.compile(r"\(?([A-Z])[.):]")  # of a marked answer: B. Vitamin C
SMALL = re.compile(r"\(?([a-z])\)\.?")  # (b), and not x, which may be what an option says


def sole_letter(asked):
    """The letter that is all of a reference: A, (A), A., A), \\text{(A)}; None for any other text."""
    found = re.fullmatch(r"\(?([A-Z])[.):]?", spelled_plainly(asked).strip().strip("*$").strip())
    return found[1] if found else None


def final_choice(response):
    """The letter that a response to a multiple-choice question chooses: that of its marked answer, else the last that
    it calls right ("C is correct", "the answer is C"), else its last one; None without any. A letter that it denies
    ("D is not", "not D") does not count, and "A or B" is no choice."""
    marked = marked_answer(response)
    if marked is not None and (first := FIRST.match(marked)):
        return first[1]
    said = INTRODUCTION.split(response)[-1] if marked is None else marked
    if small := SMALL.fullmatch(said.strip()):
        return small[1].upper()
    text = DENIED.sub(" ", response if marked is None else marked.replace(",", " or "))
    chosen, last, expected = None, None, False
    for token in TOKEN.finditer(text):
        letter = token["right"] or token["letter"]
        if token["answer"]:
            expected = True
        elif token["right"] or letter and expected:  # behind the word "answer" the first letter counts
            chosen, expected = letter, False
        if not token["answer"]:
            last = letter
    return chosen or last


# ------------------------------------------------------------------------------------------------------ numbers

DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|(?<![A-Za-z\d])\.\d+"  # .5, but not the point of "Rs.18"
PERCENT = re.compile(r"(?<=\d)\s*\\?%")  # 12\% and 12 % are 12; math-verify knows that they may be 0.12 too
CURRENCY = re.compile(r"(?:[A-Z]{0,3}\$|[\u20ac\u00a3\u00a5\u20b9]|(?<![A-Za-z])(?:Rs\.?|USD|EUR|GBP|INR))\s?\Z")
PLAIN = re.compile(rf"-?(?:[A-Z]{{0,3}}\$|[\u20ac\u00a3\u00a5\u20b9])?\s?-?(?:{DIGITS})")
UNIT = r"[mghslL](?![A-Za-z])"  # one letter behind a number: 18m, and not 3x
# What follows a number that is only a part of the answer: of a fraction, a power, a product, a time, a list.
PART = re.compile(
    rf"\s*/\s*(?:[\d(\\]|(?!{UNIT})[A-Za-z](?![A-Za-z]))|\s*[\u00d7\u00b7\u00f7\u2044\u2215\u221a\u03c0]|\s*\^|_"
    rf"|\s*\\(?:sqrt|pi|d?frac|cdot|times)|\s*\*\s*\d|\*\*\d|\s*pi\b|[:,]\d|(?!{UNIT})[A-Za-z](?![A-Za-z])|\("
    r"|[\u00b2\u00b3\u00b9\u2070-\u2079\u00bc-\u00be]"
)
# And what stands before one: the signs of a quotient, a power, two values, an index, a command, a time, a product, a
# list.
PART_BEFORE = re.compile(
    r"(?:[/^_\\\u00d7\u00b7\u00f7\u2044\u2215\u221a\u00b1]\s*|\\pm\s*|[A-Za-z}^_]\{|\d:|\d\s+:\s*"
    r"|\d\s*\*\s*|\d\s*x\s+|\d\*\*|\d,\s*|[A-Za-z]\(?)\Z"
)
PLAINLY = {"{,}": ",", "\\,": "", "\\!": "", "\\;": " ", "\\ ": " ", "\u2212": "-", "\u2013": "-", "\\$": "$"}
PLAINLY |= {"\\approx": "\u2248", "^\\circ": "\u00b0", "^{\\circ}": "\u00b0"}
TEXT = re.compile(r"\\(?:text(?:bf|it|rm|sf|tt)?|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")  # \text{18}
BRACES = re.compile(r"(?<![\\A-Za-z}^_]){([^{}]*)}")  # {18}, and not the braces of a command
AREA = re.compile(  # 18 cm^2, 9.8 m/s^2, and not the variable of m^2
    r"(\d\s+(?:[ck]?m\s*/\s*s|[mck]?m|in|ft|yd|yards?|mi|miles?|units?|meters?|feet|inches)\s*)\^\s*(?:\{[23]\}|[23])"
)


def spelled_plainly(text):
    """LaTeX's spellings of numbers, 1{,}000, 1\\,000 and \\text{18}, and the minus signs U+2212 and U+2013, in plain
    characters."""
    for written, plain in PLAINLY.items():
        text = text.replace(written, plain)
    return BRACES.sub(r"\1", TEXT.sub(r" \1 ", text))


def without_powers(text):
    """The same without the powers of units: 18 cm^2 is the number 18 with a unit."""
    return AREA.sub(r"\1", spelled_plainly(text))


def sole_number(text):
    """The number that is all of a text, apart from space, a currency and a final point: Decimal, or None.

    "72 apples", "3/4" and "2x" are not plain numbers."""
    text = without_powers(text).replace("\\(", "").replace("\\)", "")
    text = text.strip().strip("*$").strip().removesuffix(".")
    if not PLAIN.fullmatch(text):
        return None
    number = Decimal(re.search(DIGITS, text)[0].replace(",", ""))
    return number.copy_negate() if "-" in text else number


def final_number(response):
    """The number of a marked answer, else the last number of a response: Decimal; None where there is none, or where it
    is part of a fraction, a power or a product."""
    marked = marked_answer(response)
    if marked is not None:
        return marked_number(marked)
    text = without_powers(response)
    found = list(re.finditer(DIGITS, text))
    return number_at(text, found[-1]) if found else None


# What may stand around the only number of a marked answer: "x = 18", "18 white hats", "US$18/day"; no "> 18", "n - 18",
# "18 x" or "18 million".
AROUND = re.compile(r"[^\d+*^_=<>\\{}()|\[\]%\u2264\u2265\u2260\u00b1\u221a]*")
LIST = re.compile(r"[,;]|\b(?:or|and)\b")
MINUS = re.compile(r"[\w)]\s*-\s*\Z")
TIMES = re.compile(
    rf"(?<![A-Za-z'])(?!{UNIT}|a\s)[A-Za-z](?![A-Za-z])|\b(?:hundred|thousand|million|billion|trillion|dozen|half|squared|cubed)"
)


def marked_number(text):
    """The number of a marked answer, which may have a name before it and a unit behind it; None for two numbers and for
    an expression."""
    text = text.strip().split("\n")[0]
    number = sole_number(text)
    if number is not None:
        return number
    name, equals, text = without_powers(text).rpartition("=")
    found = list(re.finditer(DIGITS, text))
    if len(found) != 1 or LIST.search(name):
        return None
    before, after = text[: found[0].start()], text[found[0].end() :]
    if not (AROUND.fullmatch(before) and AROUND.fullmatch(after)) or MINUS.search(before) or TIMES.search(after):
        return None
    if after.startswith("!"):  # a factorial
        return None
    return number_at(text, found[0])


def number_at(text, found):
    """The number that a match of DIGITS in a text is, with its sign, or None where it is only a part of an answer."""
    before = CURRENCY.sub("", text[max(found.start() - 20, 0) : found.start()])
    if PART_BEFORE.search(before) or PART.match(text, found.end()):
        return None
    number = Decimal(found[0].replace(",", ""))
    negative = re.search(r"(?:(?<![\w)])-|(?:=|\bis)[ \t]*-[ \t]+)\Z", before)  # the minus of 5-3 subtracts
    return number.copy_negate() if negative else number


# -------------------------------------------------------------------------------------------------- mathematics

LATEX = re.compile(r"\\[A-Za-z(\[]|\$")
EXPRESSION = re.compile(rf"{LATEX.pattern}|\d\s*/\s*\d")  # what math-verify finds in a response
WORD = re.compile(r"[^\W\d_]{2,}")  # of any script
UNITS = {"mm", "cm", "km", "mg", "kg", "ml", "ft"}  # which math-verify leaves out
# 12:30 and 2:3, 2024-01-02, H2O, N/A, 1e-5, 5'11": math-verify would read a quotient, a difference or a product.
READ_WRONGLY = re.compile(r"\d\s*:\s*\d|\d-\d+-\d|[A-Z]\d|^[Nn]/[Aa]$|\d[eE][-+]?\d|\d['\"]")


def is_mathematics(asked):
    """Whether a reference is for math-verify: LaTeX, or short and without words. Letters of a product, as in xy + 1,
    are no word beside an operator."""
    if LATEX.search(asked):
        return True
    if len(asked) > 100 or READ_WRONGLY.search(asked):
        return False
    words = set(WORD.findall(asked)) - UNITS
    if re.search(r"[+*^=<>]", asked):
        words = {word for word in words if len(word) > 2 or not word.isascii()}
    return not words
