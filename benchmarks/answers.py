"""Is an answer right? A response against a reference answer of a dataset, by its kind.

    answers.check("number", response, reference_answer)                    # True, False, or None: cannot be told

"math" asks benchmarks/math500.py, and so does "auto" for mathematics.
"""

import re
from decimal import Decimal

CHECKS = ("auto", "number", "math", "exact", "none")


def check(kind, response, answer):
    """Whether a response agrees with the reference answer, or with any of a list of them: True, False, or None where
    that cannot be decided.

    "number": the final number of the response against the answer, without percent signs; None for an answer that is
    not one plain number.
    "math": math-verify's verdict, as for MATH500. "auto": number for a plain number, the letter chosen for a letter,
    math for other mathematics, None for prose. "exact": the same text, but for space around it. "none": None. Raises
    ValueError for another kind."""
    if kind not in CHECKS:
        raise ValueError(f"check {kind!r} is not one of {', '.join(CHECKS)}")
    if kind == "none" or answer is None:
        return None
    if isinstance(answer, list):
        verdicts = [check(kind, response, one) for one in answer]
        if None in verdicts and True not in verdicts:
            return None
        return True in verdicts
    if kind == "exact":
        return response.strip() == answer.strip()
    if kind == "number":  # 12\% and 12 % are 12; math-verify, which auto asks, knows that they may be 0.12 too
        response, answer = PERCENT.sub("", response), PERCENT.sub("", answer)
    marked = marked_answer(answer)
    if kind == "auto" and re.fullmatch("[A-Z]", (marked or answer).strip()):
        return final_choice(response) == (marked or answer).strip()
    gold = sole_number(answer if marked is None else marked)
    if gold is not None and kind != "math":
        found = final_number(response)
        if found is not None or kind == "number":
            return found == gold
    if kind == "number" or (kind == "auto" and gold is None and not is_mathematics(answer)):
        return None
    from benchmarks import math500  # at the point of use: this file works alone

    return math500.grade(dict(answer=(answer if marked is None else marked).strip()), response)["correct"]


def marked_answer(text):
    """The text after the last ####, else inside the last \\boxed{} whose braces close; None without either."""
    if "####" in text:
        return text.rsplit("####", 1)[1]
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for place in range(start + len("\\boxed"), len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start + len("\\boxed{") : place]
    return None


PERCENT = re.compile(r"(?<=\d)\s*\\?%")
DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+"
PLAIN = re.compile(rf"-?\$?-?(?:{DIGITS})")
# What follows a number that is only a part of the answer: of a fraction, a power, a product, a time, a list.
PART = re.compile(
    r"\s*[/\u00d7\u00b7\u00f7\u2044\u2215\u221a\u03c0]|\s*\^|_|\s*\\(?:sqrt|pi|d?frac|cdot|times)|\s*\*\s*\d|\s*pi\b"
    r"|[:,]\d|[A-Za-z](?![A-Za-z])|\(|[\u00b2\u00b3\u00b9\u2070-\u2079\u00bc-\u00be]"
)
# And what stands before one: the signs are those of a product, a quotient, a fraction and a root.
PART_BEFORE = re.compile(r"[/^_{\\:\u00d7\u00b7\u00f7\u2044\u2215\u221a]\s*$|\d\s*\*\s*$|\d,\s*$|[A-Za-z]\(?$")


def spelled_plainly(text):
    """LaTeX's spellings of numbers, 1{,}000 and 1\\,000, and the minus signs U+2212 and U+2013, in plain characters."""
    for written, plain in (("{,}", ","), ("\\,", ""), ("\\!", ""), ("\u2212", "-"), ("\u2013", "-"), ("\\$", "$")):
        text = text.replace(written, plain)
    return text


def sole_number(text):
    """The number that is all of a text, apart from space, a dollar sign and a final point: Decimal, or None.

    "72 apples", "3/4" and "2x" are not plain numbers."""
    text = spelled_plainly(text).strip().strip("$").strip()
    text = text.removeprefix("\\(").removesuffix("\\)").strip().removesuffix(".")
    if not PLAIN.fullmatch(text):
        return None
    return Decimal(text.replace(",", "").replace("$", ""))


def final_number(text):
    """The marked answer of a response if it has one, else its last number: Decimal; None where there is no number, or
    where it is part of a fraction, a power or a product."""
    marked = marked_answer(text)
    if marked is not None:
        return sole_number(marked)
    text = spelled_plainly(text)
    found = list(re.finditer(DIGITS, text))
    if not found:
        return None
    last = found[-1]
    before, after = text[: last.start()].removesuffix("$"), text[last.end() :]
    if PART_BEFORE.search(before) or PART.match(after):
        return None
    number = Decimal(last[0].replace(",", ""))
    negative = re.search(r"(?<![\w)])-$", before)  # the minus of 5-3 subtracts
    return number.copy_negate() if negative else number


# A capital letter on its own, but for the article in "A dog" and the pronoun in "I think".
LETTER = re.compile(r"(?<![\w'])(?:[B-HJ-Z]|[AI](?!\s+(?!is\b)[a-z]))(?![\w'])")


def final_choice(text):
    """The letter that a response to a multiple-choice question chooses: that of its marked answer, else the first
    behind its last word "answer", else its last one; None without any."""
    marked = marked_answer(text)
    if marked is not None:
        text = marked
    found = LETTER.findall(re.split("answer", text, flags=re.IGNORECASE)[-1])
    if found:
        return found[0 if re.search("answer", text, re.IGNORECASE) else -1]
    found = LETTER.findall(text)
    return found[-1] if found else None


def is_mathematics(answer):
    """Whether math-verify can make sense of a reference answer: marked, or short and without words."""
    if marked_answer(answer) is not None or "\\" in answer:
        return True
    return len(answer) <= 100 and not re.search(r"[A-Za-z]{3,}", answer)
