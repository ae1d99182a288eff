"""Datasets whose columns have other names, or more to say than prompt and answer.

    row, lines = columns.to_plain({"question": "2 + 2?", "choices": ["3", "4"], "answer": 1})
    # {"messages": [{"role": "user", "content": "2 + 2?\nA. 3\nB. 4"}], "answer": "B"}, and what of it is not used

Known are the pairs in FIELDS, conversations (talks.py), system and history before the prompt, context and input beside
it, choices below it: the columns of the usual datasets (GSM8K, Alpaca, ShareGPT, SQuAD, MMLU, ARC, MedQA, APPS, MBPP).
data.py calls this for a row that is not plain.

Dimensions: none.
"""

import contextlib
import json
import math
import string
from decimal import Decimal

from data import IDS, has_text
from formats import talks
from formats.talks import CONVERSATIONS, are_texts

# prompt: its answers in order of preference. The first prompt that a row has is taken.
FIELDS = {
    "question": "answer response solution generated_solution output solutions answers".split(),
    "problem": "solution generated_solution answer response output".split(),
    "prompt": "response completion answer canonical_solution output code solution chosen".split(),
    "instruction": "output response answer completion".split(),
    "query": "response answer output".split(),
    "text": ["code"],
    "input": "output target answer response".split(),
    "inputs": "targets outputs".split(),
    "human": ["assistant"],
}
LAST_ANSWERS = ("answerKey", "answer_idx", "expected_answer", "target")  # where there is no other
# Columns that look like input, whatever they hold; and those that need no warning.
INPUTS = set(
    "system system_prompt choices options context input history tools passage document article story background "
    "premise hypothesis schema starter_code".split()
)
OTHERS = set(
    "test tests test_list test_setup_code test_imports challenge_test_list input_output entry_point rationale "
    "explanation reasoning thought cot rejected source dataset category subject topic level type split url license "
    "title method data_source metadata meta".split()
)
NO_INPUTS = OTHERS.union(CONVERSATIONS, IDS, LAST_ANSWERS, *FIELDS.values()) - INPUTS - FIELDS.keys()
SPELLING = {name.lower(): name for name in (*CONVERSATIONS, *INPUTS, *LAST_ANSWERS, *FIELDS, *NO_INPUTS - OTHERS)}


def to_plain(row, prompt_field=None, answer_field=None):
    """A row -> ({messages, answer}, lines about what of it is not used). The prompt is in prompt_field, or in the first
    column that is known; answer: a text, a list of several right ones, or None. Raises ValueError for a row that fits
    nothing."""
    row = with_usual_names(row, (prompt_field, answer_field))
    column, choices, answer, lines = prompt_field or find_prompt(row), find_choices(row), None, []
    talk = field(row, column)
    if isinstance(talk, list) or (column in CONVERSATIONS and prompt_field is None):
        messages = talks.to_messages(talk, say=lines.append)
        answer = talks.pop_answer(messages, talk, lines.append)
        if answer is not None and answer_field is None:
            lines += passed_over(row, answer)
    else:
        messages = [{"role": "user", "content": full_prompt(row, column, choices)}]
    if answer is None or answer_field is not None:
        answer = find_answer(row, column, answer_field, choices)
        if talks.are_turns(answer):
            answer = talks.answer_of(answer, messages, lines.append)
    if not messages or messages[-1]["role"] != "user":
        raise ValueError("the conversation has no user turn to answer")
    system, history = text_of(row.get("system")) or text_of(row.get("system_prompt")), row.get("history")
    if isinstance(history, list):
        needs = "history must hold pairs [user, assistant] or messages"
        messages = talks.to_messages(history, needs, lines.append) + messages
    if system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return {"messages": messages, "answer": answer}, lines + unused(row, messages, answer, (prompt_field, answer_field))


def with_usual_names(row, kept):
    """The row with its known columns in our spelling: Question is question. kept: names that stay as they are."""
    found = {}
    for name, value in row.items():
        usual = SPELLING.get(name.lower(), name)
        free = usual not in row and usual not in found and name not in kept
        found[usual if free else name] = value
    return found


def field(row, name):
    """The value of a column, or of a.b inside the column a; None where there is none."""
    if name in row:
        return row[name]
    for key in name.split("."):
        row = row.get(key) if isinstance(row, dict) else None
    return row


def find_prompt(row):
    """The first column that holds a conversation, or a text where texts are prompts."""
    for column in (*CONVERSATIONS, *FIELDS):
        value = row.get(column)
        talk = value and (column in CONVERSATIONS or (column == "prompt" and isinstance(value, list)))
        if talk or (column in FIELDS and isinstance(value, str)):
            return column
    known, has = ", ".join(["messages", *FIELDS]), ", ".join(row) or "no fields"
    raise ValueError(f"no known prompt field ({known}) among {has}; name yours")


def full_prompt(row, column, choices):
    """The prompt column's text with its context (behind an instruction, before a question), input
    and lettered choices."""
    prompt = field(row, column)
    if not isinstance(prompt, str):
        raise ValueError(f"field {column!r} is missing or not text; the row has {', '.join(row)}")
    context, more = text_or_number(row.get("context")), text_or_number(row.get("input"))
    if context and column == "instruction":
        prompt = f"{prompt}\n\n{context}"
    elif context and column != "context":
        prompt = f"{context}\n\n{prompt}"
    if more and column != "input":
        prompt = f"{prompt}\n{more}"
    for letter, text in choices:
        if not text.startswith((f"{letter})", f"{letter}.", f"{letter}:")):
            text = f"{letter}. {text}"
        prompt += f"\n{text}"
    return prompt


def find_choices(row):
    """[(letter, text), ...] of a row's choices: a list (MMLU), a dict of texts and labels (ARC), or
    of letters (MedQA)."""
    value, pairs = row.get("choices") or row.get("options"), []
    if isinstance(value, list):
        pairs = zip(string.ascii_uppercase, value)
    elif isinstance(value, dict) and are_texts(value.get("label")) and are_texts(value.get("text")):
        pairs = zip(value["label"], value["text"])
    elif isinstance(value, dict):
        pairs = [pair for pair in value.items() if pair[1] is not None]  # a letter that other rows of a table have
    choices = []
    for letter, text in pairs:
        if not isinstance(letter, str) or type(text) not in (str, int, float):
            return []
        choices.append((letter, str(text)))
    return choices


def find_answer(row, column, name, choices):
    """The answer to the prompt in a column, or the one in column `name`: text, a list of texts, a conversation as it
    is, or None where the row has none or a blank one. A number is written out; anything else is no text to learn."""
    if name is not None and field(row, name) is None:
        raise ValueError(f"field {name!r} is missing; the row has {', '.join(row)}")
    for option in (*FIELDS.get(column, ["answer"]), *LAST_ANSWERS):
        if name is None and not is_blank(row.get(option)):
            name = option
    value = field(row, name) if name else None
    if is_blank(value):
        return None
    if name == "answers" and isinstance(value, dict):
        value = value.get("text", value)  # SQuAD: {"text": [...], "answer_start": [...]}
    if name == "solutions" and isinstance(value, str) and value.lstrip().startswith("["):
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(value)  # APPS writes its list of programs as JSON text
    if name in ("answers", "solutions") and value == []:
        return None
    if choices:
        return chosen_letter(value, choices, name)
    if talks.are_turns(value):
        return value
    if are_texts(value):
        return list(filter(has_text, value)) or None
    if isinstance(value, str):
        return value
    if is_number(value):
        return written_out(value)
    raise ValueError(f"field {name!r} must be text, a number or a list of texts, found {value!r:.80}")


def is_number(value):
    return type(value) is int or (type(value) is float and math.isfinite(value))


def written_out(number):
    """A number as text, without an exponent: 0.00005, and not 5e-05."""
    return str(number) if type(number) is int else format(Decimal(repr(number)), "f")


def is_blank(value):
    """Whether a value is nothing, or a text or texts without a letter."""
    return value is None or ((isinstance(value, str) or are_texts(value)) and not any(map(has_text, value)))


def chosen_letter(value, choices, name):
    """The letter of an answer that is a number from 0, the letter or the text; one in words stays."""
    letters, texts = zip(*choices)
    if type(value) is int and 0 <= value < len(letters):
        return letters[value]
    if value in texts and value not in letters:
        return letters[texts.index(value)]
    if value in letters or (isinstance(value, str) and " " in value):
        return value
    raise ValueError(f"field {name!r} is {value!r:.80}: none of the {len(letters)} choices")


def passed_over(row, answer):
    """Lines about columns with another answer than that with which a conversation ends."""
    lines = []
    for name in ("answer", "solution", *LAST_ANSWERS):
        if not is_blank(row.get(name)) and row[name] != answer:
            why = f"the conversation ends with an answer, which is taken; --answer-field {name} takes the column's"
            lines.append(f"the column {name!r} is not used: {why}")
    return lines


def text_of(value):
    """A text, or a list of texts joined; "" for anything else."""
    text = "\n".join(value) if are_texts(value) else value
    return text if has_text(text) else ""


def text_or_number(value):
    """text_of(), with a number written out."""
    return written_out(value) if is_number(value) else text_of(value)


def unused(row, messages, answer, named=()):
    """Lines about columns that look like input and are in no message, and about a row whose answer may be in one of
    them. named: the columns that the user named."""
    said, choices = [turn["content"] for turn in messages], find_choices(row)
    used, lines, others = {name.split(".")[0] for name in named if name}.union(named), [], []
    if choices and choices[-1][1] in said[-1]:
        used |= {"choices", "options"}
    if isinstance(row.get("history"), list):
        used.add("history")
    for column, value in row.items():
        text = text_of(value)
        if column in NO_INPUTS or column in used or value == answer or any(text and text in one for one in said):
            continue
        # A few words in a row are something to read; one word is a label.
        words = text != "" and text == value and (len(text.split()) > 2 or column in FIELDS)
        holds = isinstance(value, (str, list, dict)) and value not in ("", [], {}, "[]", "{}")
        if words or (column in INPUTS and holds):
            lines.append(f"the column {column!r} looks like input, and is not used")
        if column not in INPUTS and value != "" and type(value) in (str, int, float):
            others.append(column)
    if answer is None and others:
        lines.append(f"no answer column is known among {', '.join(others)}; name yours")
    return lines
