r"""MATH500: 500 problems of mathematics competitions whose answer is a LaTeX expression. Needs
math-verify.

    text, start = math500.ask(record, "dream")      # the user's turn; what the assistant's starts with
    math500.settings("llada")                       # arguments of the decoder: Table 8 of the paper
    math500.grade(record, r"so \boxed{\frac12}")    # {"correct": True, "reason": "1/2 = ...", ...}

record: a row of the benchmark's own file. response: the text a model wrote, without the prompt.

Sources: lm-evaluation-harness and Dream's fork of it; OpenCompass, which evaluated LLaDA;
math-verify for the verdict. Protocols: "paper" asks both families as the harness does, zero-shot;
"release" hands math-verify the gold answer without "$", as the paper's published code does;
"official" is each model's own evaluation: for SDAR its settings (greedy, up to 4,096 tokens) with
T3D's prompts. A2D's prompts are the harness's, in every protocol.
"""

import functools
import importlib.util
import json
import os
import re
import select
import subprocess
import sys
import threading

NAME = "math500"
FILE = "math500.jsonl.gz"
HUB = ("HuggingFaceH4/MATH-500", "test.jsonl")
FIELDS = dict(answer=str)  # what a record needs to be graded
ASKED = dict(problem=str)  # what it needs besides to be asked
PROMPT_TOKENS = 1024  # longer prompts are cut on the left
PROTOCOLS = ("paper", "release", "official")


def ask(record, family, protocol="paper"):
    """(user's turn, start of the answer) of a problem."""
    if family in ("llada", "sdar") and protocol == "official":
        return f"{record['problem']}\nPlease reason step by step, and put your final answer within \\boxed{{}}.", ""
    return f"Problem:\n{record['problem']}\n\nSolution:", ""


def settings(family, protocol="paper"):
    """Arguments of decode.generate. Raises ValueError for an unknown protocol."""
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol {protocol!r}: known are {', '.join(PROTOCOLS)}")
    if family == "a2d":  # dllm's, of its MDLM models; where attention is block-causal, its blocks are the decoder's
        return dict(max_new_tokens=256, steps=256, block_length=256, temperature=0.0)
    if family == "sdar" and protocol == "official":
        return dict(max_new_tokens=4096, steps=4096, temperature=0.0)
    found = dict(max_new_tokens=512, steps=512)
    if family == "llada":
        found.update(block_length=64, temperature=0.0)
    elif family == "dream":
        found.update(block_length=None, temperature=0.1, top_p=0.9, greedy=protocol != "official")
    return found


def stops(family, protocol="paper"):
    """A response ends before the first of these texts. OpenCompass and T3D take it whole."""
    if family in ("llada", "sdar") and protocol == "official":
        return ()
    return ("Problem:",)


def trim(response, family="dream", protocol="paper"):
    """The response up to its first stop."""
    for stop in stops(family, protocol):
        response = response.split(stop, 1)[0]
    return response


# -------------------------------------------------------------------------------------- the grader


def grade(record, response, family="dream", protocol="paper", gold=None, timeout=20.0):
    """dict(correct, reason, extracted): math-verify's verdict on the last boxed answer, or on the
    whole response where none is boxed or it is empty.

    gold: "latex" hands math-verify the gold answer between "$", "raw" as it is; None takes the
    protocol's way. math-verify's own limits, 5 s for each parse and comparison, count as no answer;
    so does `timeout` in seconds, which nothing escapes. correct is None where math-verify cannot read
    the reference answer; a raw one counts as wrong, as in the published code. Raises ImportError
    without math-verify, ValueError for another gold."""
    gold = gold or ("raw" if protocol == "release" else "latex")
    if gold not in ("latex", "raw"):
        raise ValueError(f"gold {gold!r} is neither 'latex' nor 'raw'")
    answer, boxed, texts = record["answer"], last_boxed(response), [response]
    if gold == "latex":
        answer = "$" + answer + "$"
    if boxed:
        texts.insert(0, boxed)
    try:
        correct, extracted = math_judge(os.getpid())(answer, texts, timeout)
    except (TimeoutError, ChildProcessError, BrokenPipeError) as e:
        return dict(correct=False, reason=str(e), extracted=printable(boxed or ""))
    if correct is None and gold == "latex":
        reason = f"not graded (math-verify cannot read the reference {record['answer']:.100})"
        return dict(correct=None, reason=reason, extracted=extracted and printable(extracted))
    correct = bool(correct)
    if extracted is None:
        return dict(correct=False, reason="no answer in the response", extracted=None)
    extracted, relation = printable(extracted), "=" if correct else "is not"
    reason = f"{extracted:.100} {relation} {record['answer']}"
    return dict(correct=correct, reason=reason, extracted=extracted)


BRACES = re.compile(r"(?P<boxed>\\boxed\s*)?(?<!\\)[{}]")
JOINT = 60  # characters between two boxed parts of one answer, at most


def last_boxed(text):
    r"""The last \boxed{...} whose braces close, with any that it is joined to by a comma, "and" or
    "or"; or None."""
    spans, opened = [], []  # opened: of each brace that is open, where its \boxed starts, or None
    for brace in BRACES.finditer(text):
        if brace[0].endswith("{"):
            opened.append(brace.start() if brace["boxed"] else None)
        elif opened:
            start = opened.pop()
            if start is not None:
                spans.append((start, brace.end()))
    if not spans:
        return None
    spans.sort()
    first, end = spans[-1]
    for start, stop in reversed(spans[:-1]):
        if first - stop <= JOINT:  # negative, and the text between empty, where one box is inside the other
            between = text[stop:first].strip("$ \t\n")
            if re.fullmatch(r",|,?\s*(and|or)", between):
                first = start
    return text[first:end]


def printable(text):
    r"""The text without lone surrogates, which no file takes: \ud800 is written out."""
    return text.encode("utf-8", "backslashreplace").decode()


# ---------------------------------------------------------------------- math-verify in its process

# math-verify stops itself by SIGALRM, which only a process's main thread may use and which big
# integers do not heed. So it runs in a process of its own: one that is killed works in any thread,
# and on any answer.
WORKER = """
import json, logging, resource, sys
from math_verify import parse, verify
logging.disable(logging.CRITICAL)
resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30,) * 2)
out, sys.stdout = sys.stdout, sys.stderr
print("ready", file=out, flush=True)
for line in sys.stdin:
    gold, *texts = json.loads(line)
    gold, answer = parse(gold), next(filter(None, map(parse, texts)), [])
    shown = str(answer[0]) if answer else None
    right = verify(gold, answer)
    read = not all(isinstance(one, str) for one in gold)  # what it cannot read it hands back as text
    print(json.dumps([bool(right) if right or read else None, shown]), file=out, flush=True)
"""


class MathJudge:
    """math-verify in a process of its own, which starts with the first question and again after a
    time limit."""

    def __init__(self):
        self.process, self.lock = None, threading.Lock()

    def __call__(self, gold, texts, timeout):
        """Whether the first of the texts that holds an answer holds gold -> (verdict, the answer). The verdict is None
        where math-verify cannot read gold.

        Raises TimeoutError after `timeout` seconds, ChildProcessError where math-verify ended (out
        of memory)."""
        with self.lock:
            try:
                if self.process is None:
                    self.start()
                self.process.stdin.write(json.dumps([gold, *texts]).encode() + b"\n")
                self.process.stdin.flush()
                return json.loads(self.line(timeout))
            except BaseException:  # an interrupt too: the next question must not read this one's answer
                self.close()
                raise

    def start(self):
        if importlib.util.find_spec("math_verify") is None:
            raise ImportError("grading MATH500 needs math-verify: pip install math-verify")
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        environment = dict(os.environ, PYTHONHASHSEED="0")  # sympy's order of terms, and so its verdicts, repeat
        self.process = subprocess.Popen([sys.executable, "-c", WORKER], env=environment, **pipes)
        self.line(120)  # sympy may come from a cold disk

    def line(self, timeout):
        if not select.select([self.process.stdout], [], [], timeout)[0]:
            raise TimeoutError(f"no answer in {timeout} s")
        line = self.process.stdout.readline()
        if not line:
            raise ChildProcessError("math-verify ended")
        return line

    def close(self):
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


@functools.lru_cache
def math_judge(process):
    """The judge of a process, by its id: a fork must not share its parent's."""
    return MathJudge()
