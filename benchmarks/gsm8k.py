"""GSM8K: grade-school mathematics, 1,319 questions whose answer is one number.

    text, start = gsm8k.ask(record, "dream")    # the user's turn; what the assistant's starts with
    gsm8k.settings("llada")                     # arguments of the decoder: Table 8 of the paper
    gsm8k.grade(record, response)               # {"correct": True, "reason": "18 = 18", ...}

record: a row of the benchmark's own file. response: the text a model wrote, without the prompt.

Sources: lm-evaluation-harness (gsm8k.yaml and gsm8k-cot.yaml, both its filters), of which Dream's
evaluation is a fork; OpenCompass, which evaluated LLaDA. Protocols: "paper" asks both families as
the harness does, zero-shot; "release" has the lengths of the paper's published code; "official" is
each model's own evaluation: for SDAR its settings (greedy, up to 4,096 tokens) with T3D's prompts.
A2D's prompts are the harness's, in every protocol.
"""

import re
from decimal import Decimal

NAME = "gsm8k"
FILE = "gsm8k_test.jsonl.gz"
HUB = ("openai/gsm8k", "main/test-00000-of-00001.parquet")
FIELDS = dict(answer=str)  # what a record needs to be graded
ASKED = dict(question=str)  # what it needs besides to be asked
PROMPT_TOKENS = 1024  # longer prompts are cut on the left
PROTOCOLS = ("paper", "release", "official")


def ask(record, family, protocol="paper"):
    """(user's turn, start of the answer) of a question."""
    if family == "llada" and protocol == "official":
        return f"Question: {record['question']}\nLet's think step by step\nAnswer:", ""
    if family == "sdar" and protocol == "official":
        return f"{record['question']}\nPlease reason step by step, and put your final answer within \\boxed{{}}.", ""
    return f"Q: {record['question']}\nA:", ""


def settings(family, protocol="paper"):
    """Arguments of decode.generate. Raises ValueError for an unknown protocol."""
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol {protocol!r}: known are {', '.join(PROTOCOLS)}")
    if family == "a2d":  # dllm's, of its MDLM models; where attention is block-causal, its blocks are the decoder's
        return dict(max_new_tokens=256, steps=256, block_length=256, temperature=0.0)
    if family == "sdar" and protocol == "official":
        return dict(max_new_tokens=4096, steps=4096, temperature=0.0)
    if family == "llada":
        tokens = 256 if protocol == "release" else 512
        return dict(max_new_tokens=tokens, steps=tokens, block_length=8, temperature=0.0)
    found = dict(max_new_tokens=256, steps=256)
    if family == "dream":
        found.update(block_length=None, temperature=0.1, top_p=0.9, greedy=protocol != "official")
    return found


def stops(family, protocol="paper"):
    """A response ends before the first of these texts. OpenCompass and T3D take it whole."""
    if family in ("llada", "sdar") and protocol == "official":
        return ()
    return ("Q:", "</s>", "<|im_end|>")


def trim(response, family="dream", protocol="paper"):
    """The response up to its first stop."""
    for stop in stops(family, protocol):
        response = response.split(stop, 1)[0]
    return response


# -------------------------------------------------------------------------------------- the grader

FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")  # the first alternative takes "." and "," and "$" too
STRICT = (re.compile(r"#### (-?[0-9.,]+)"), re.compile(r"The answer is (-?[0-9.,]+)"))


def grade(record, response, family="dream", protocol="paper", strict=False):
    """dict(correct, reason, extracted): the last number of the response is its answer (the
    harness's flexible-extract), compared as text.

    strict: the first number after ####, else after "The answer is". In T3D's way (SDAR, official) only
    the last \\boxed{} counts, by its value."""
    gold = plain_number(record["answer"].rsplit("####", 1)[-1].strip())
    if family == "sdar" and protocol == "official":
        return grade_box(response, gold)
    return verdict(strict_number(response) if strict else flexible_number(response), gold)


def verdict(found, gold):
    if found is None:
        return dict(correct=False, reason="no answer in the response", extracted=None)
    relation = "=" if found == gold else "is not"
    return dict(correct=found == gold, reason=f"{found} {relation} {gold}", extracted=str(found))


def flexible_number(text):
    """The last number of a text, as plain_number() writes it, or None."""
    found = list(FLEXIBLE.finditer(text))
    return plain_number(found[-1][0]) if found else None


def grade_box(text, gold):
    """The verdict on the last \\boxed{}, whose braces may be nested and must close: by the value of its number, which
    may have a name and a unit, or else by math-verify."""
    from benchmarks import answers, math500  # which the other ways do not need

    start = answers.last_box(text)
    end = len(text) if start is None else answers.box_end(text, start)
    if text[end : end + 1] != "}":
        return verdict(None, gold)
    number = answers.marked_number(text[start:end])
    if number is None:
        return math500.grade(dict(answer=gold), f"\\boxed{{{text[start:end]}}}")
    return verdict(number, Decimal(gold))


def strict_number(text):
    """The first number after a mark, as plain_number() writes it, or None."""
    for pattern in STRICT:
        if found := pattern.search(text):
            return plain_number(found[1])
    return None


def plain_number(text):
    """Without commas, dollar signs and one last point; equality of what is left is equality of
    strings."""
    return text.replace(",", "").replace("$", "").removesuffix(".")
