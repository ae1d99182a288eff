"""MBPP: 500 short Python tasks (its test split), judged by running their asserts (pass@1).

    text, start = mbpp.ask(record, "dream")     # the user's turn; what the assistant's turn starts with
    mbpp.settings("llada")                      # arguments of the decoder: Table 8 of the paper
    program, tests, names = mbpp.program(record, mbpp.trim(response))
    execute.run(program, tests, names)          # or whatever runs a program against its checks

record: a row of the benchmark's own file. response: the text a model wrote, without the prompt.

Sources: Dream's fork of lm-evaluation-harness; OpenCompass, which evaluated LLaDA (MBPPEvaluator).
Protocols: "paper" asks both families as the fork does, zero-shot; "release" has the lengths of the
paper's published code and checks the first three asserts without the record's set-up code;
"official" is each model's own evaluation: for SDAR its settings (greedy, up to 4,096 tokens) with
T3D's prompts, whose answers begin with the function's head: here, the line of the reference
solution. A2D's prompts are the fork's, in every protocol.
"""

import ast
import re
import warnings

NAME = "mbpp"
FILE = "mbpp.jsonl.gz"
HUB = ("google-research-datasets/mbpp", "full/test-00000-of-00001.parquet")
FIELDS = dict(test_list=[str])  # what a record needs to be graded
ASKED = dict(text=str, task_id=int)  # what it needs besides to be asked
PROMPT_TOKENS = 1024  # longer prompts are cut on the left
PROTOCOLS = ("paper", "release", "official")

QUESTION = "You are an expert Python programmer, and here is your task: {} Your code should pass these tests:\n\n"
QUESTION_OF_T3D = "This is the problem:\n{}\nPlace your code within a single Python code block ```python ```. "
QUESTION_OF_T3D += "Do not include more than one code block. "


def rows(records):
    """The test split: tasks 11 to 510."""
    return [record for record in records if 11 <= record["task_id"] <= 510]


def ask(record, family, protocol="paper"):
    """(user's turn, start of the answer) of a task. LLaDA's chat template trims the start at its
    end."""
    question, tests = QUESTION.format(record["text"]), record["test_list"]
    if family == "llada" and protocol == "official":
        return question + " " + "\n".join(tests) + "  \n", ""
    if family == "sdar" and protocol == "official":
        return QUESTION_OF_T3D.format(record["text"]), f"```python\n{function_head(record)}"
    return question + "\n".join(tests[:3]), "Here is the completed function:\n```python\n"


def function_head(record):
    """The line of the reference solution that defines what the first assert calls, or ""."""
    for line in (record.get("code") or "").splitlines():
        found = re.match(r"def (\w+) ?\(.*\) ?:", line)
        if found and re.search(rf"\b{found[1]}\b", record["test_list"][0]):
            return found[0] + "\n"
    return ""


def settings(family, protocol="paper"):
    """Arguments of decode.generate; and eos_last: whether EOS is scored last, as LLaDA's evaluation
    has it.

    Raises ValueError for an unknown protocol."""
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol {protocol!r}: known are {', '.join(PROTOCOLS)}")
    if family == "a2d":  # dllm's, of its MDLM models; where attention is block-causal, its blocks are the decoder's
        return dict(max_new_tokens=256, steps=256, block_length=256, temperature=0.0)
    if family == "sdar" and protocol == "official":
        return dict(max_new_tokens=4096, steps=4096, temperature=0.0)
    if family == "llada":
        # The authors score exactly the EOS last, LLaDA's own rule (confidence_eos_eot_inf) the end of a turn too
        last = True if protocol == "official" else "eos"
        return dict(max_new_tokens=256, steps=256, block_length=256, temperature=0.0, eos_last=last)
    tokens = 512 if protocol == "release" else 1024
    found = dict(max_new_tokens=tokens, steps=tokens)
    if family == "dream":
        found.update(block_length=None, temperature=0.1, top_p=0.9, greedy=protocol != "official")
    return found


def stops(family, protocol="paper"):
    """A response ends before the first of these texts. OpenCompass and T3D take it whole."""
    if family in ("llada", "sdar") and protocol == "official":
        return ()
    return ("```",)


def trim(response, family="dream", protocol="paper"):
    """The response up to its first stop."""
    for stop in stops(family, protocol):
        response = response.split(stop, 1)[0]
    return response


# ------------------------------------------------------------------------------------- the program


def program(record, response, family="dream", protocol="paper", whole=False):
    """(program, tests, names): a program, the checks that it must pass, and the names that these
    take from it. whole: the response is a program, and nothing is cut off it. Raises ValueError for a
    record without tests."""
    tests = record["test_list"]
    if not any(map(str.strip, tests)):
        raise ValueError("it has no tests")
    if protocol == "release":
        tests = tests[:3]
    else:
        tests = [*(record.get("test_imports") or []), record.get("test_setup_code") or "", *tests]
    code = python_block(response)
    if family == "llada" and protocol == "official":
        code = marked_code(response)
    if family == "sdar" and protocol == "official":  # the last ```python block
        code = f"```python\n{function_head(record)}{response}".rsplit("```python\n", 1)[-1].split("```")[0]
    if whole:
        code = response
    names = sorted(defined_names(record.get("code") or ""))
    return code, "\n".join(tests).replace("\r\n", "\n"), names


CODE = re.compile(r"(?:\s|#.*\n)*(?:def |class |import |from [\w.]+ import |@\w|\w+ *= )")


def continues(response):
    """Whether a response goes on behind "```python", with which the prompt ends: it begins with code, and a function
    comes before any fence."""
    before = response.split("```", 1)[0]
    return bool(CODE.match(before)) and bool(re.search(r"\b(?:def|lambda)\b", before))


def defines(record, code):
    """Whether code is Python with a function at its top that the asserts call, of those of the reference solution if
    there is one."""
    names = defined_names(code)
    for node in (parsed(code) or ast.Module([])).body:
        if isinstance(node, ast.Assign):  # add = lambda a, b: a + b
            names.update(target.id for target in node.targets if isinstance(target, ast.Name))
    if record.get("code"):
        names &= defined_names(record["code"])
    tests = "\n".join(record["test_list"])
    return any(re.search(rf"\b{name}\s*\(", tests) for name in names)


def python_block(text):
    """What follows the first ```python, if there is one, up to the next ```."""
    return text.split("```python\n", 1)[-1].split("```")[0]


def marked_code(text):
    """What stands between [BEGIN] and [DONE], the marks of the earlier turns; else the first fenced
    block; else all.

    Quotes around marked code, which the earlier turns have, are no part of it. Takes time linear in
    the text."""
    code, after = text, text.partition("BEGIN")[2]
    if "DONE" in after:
        code = after.split("DONE", 1)[0].removeprefix("]").removesuffix("[")
    fenced = re.search(r"```(?:\w*\n)?(.*?)(?:```|$)", code, re.DOTALL)
    if fenced:
        code = fenced[1]
    elif "BEGIN" in code:
        code = code.split("BEGIN", 1)[1].removeprefix("]")
    if "DONE" in code:
        code = code.split("DONE", 1)[0].removesuffix("[").rstrip().removesuffix("'")
    code = code.replace("\\_", "_").strip()
    if parsed(code) is None:
        code = code.removeprefix("'").removesuffix("'")
    return code


def parsed(code):
    """The syntax tree, or None for what is not Python."""
    with warnings.catch_warnings():  # of a program's "\\W" we need not hear
        warnings.simplefilter("ignore")
        try:
            return ast.parse(code)
        except (SyntaxError, ValueError, MemoryError, RecursionError):  # ValueError: a null byte
            return None


def defined_names(code):
    """Functions and classes that a program defines at its top."""
    tree = parsed(code) or ast.Module([])
    return {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
