"""Is a response right, and does a model decode from easy to hard: the graders of GSM8K, MATH500, HumanEval and MBPP, a
plain check for other datasets, the TDS of the TABOM paper and what else tells how a model decodes.

    evaluate.gsm8k(record, response)                        # {"correct": True, "reason": "18 = 18", "extracted": "18"}
    evaluate.math500(record, response)                      # needs math-verify
    evaluate.humaneval(record, response, execute.run)       # family "dream" or "llada": they mark code differently
    evaluate.mbpp(record, response, execute.run)
    evaluate.check("number", response, reference_answer)    # True, False, or None where nothing can be checked
    evaluate.tds(m, batch, eos_id)                          # {"tds": 0.21, "per_step": [...], "rows": [...]}
    evaluate.inversions(evaluate.replay(m, batch).diagonal(dim1=1, dim2=2))     # how often hard came before easy
    evaluate.loss_at(m, batch, mask_ratio, generators)      # cross-entropy at a mask ratio, [B]

record: a row of the benchmark's own file. response: the text a model wrote, without the prompt. `m` and batch are those
of objectives.py: a callable m(ids, attention_mask=None, positions=None) -> logits, and a dict of prompt_ids and
prompt_mask [B, P], response_ids and order [B, N], length [B].

Sources: lm-evaluation-harness (gsm8k.yaml and gsm8k-cot.yaml, both its filters); math-verify; for code, Dream's fork of
lm-evaluation-harness (its sanitize) and OpenCompass (humaneval_postprocess_v2, MBPPEvaluator), which evaluated LLaDA.
"""

import ast
import functools
import importlib.util
import json
import os
import re
import select
import subprocess
import sys
import threading
import warnings
from decimal import Decimal, InvalidOperation

import torch

# ------------------------------------------------------------------------------------------------ answers in general

CHECKS = ("none", "number", "exact")
NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?|-?\$?\.\d+")


def check(kind, response, answer):
    """Whether a response agrees with the reference answer, or with one of a list of them: True, False, or None where
    that cannot be told.

    "number": the final number of the response against that of the answer (see final_number); None for an answer that
    ends in anything but one number. "exact": the same text, but for space around it. "none": None.
    Raises ValueError for another kind."""
    if kind not in CHECKS:
        raise ValueError(f"check {kind!r} is none of {', '.join(CHECKS)}")
    if kind == "none" or answer is None:
        return None
    if isinstance(answer, list):
        verdicts = [check(kind, response, one) for one in answer]
        return any(verdicts) if any(verdicts) or None not in verdicts else None
    if kind == "exact":
        return response.strip() == answer.strip()
    gold = final_number(answer, only=True)
    return None if gold is None else final_number(response) == gold


def final_number(text, only=False):
    """The number after the last ####, else in the last \\boxed{}, else the last number of the text: Decimal or None.
    only: the text, or what is marked, must be the number and nothing else (72 apples, 3/4 and 2x are none)."""
    if "####" in text:
        text = text.rsplit("####", 1)[1]
    elif "\\boxed{" in text:
        text = text.rsplit("\\boxed{", 1)[1].split("}")[0]
    found = NUMBER.findall(text)
    if not found or (only and found[-1] != text.strip().removesuffix(".")):
        return None
    try:
        return Decimal(found[-1].replace(",", "").replace("$", ""))
    except InvalidOperation:
        return None


def wilson(right, n, z=1.96):
    """The 95 % Wilson interval of a share, right of n: (low, high)."""
    if n == 0:
        return 0.0, 1.0
    p, d = right / n, 1 + z * z / n
    middle, half = (p + z * z / (2 * n)) / d, z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5 / d
    return max(0.0, middle - half), min(1.0, middle + half)


# -------------------------------------------------------------------------------------------------------------- GSM8K

FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")  # the first alternative takes "." and "," and "$" too
STRICT = (re.compile(r"#### (-?[0-9.,]+)"), re.compile(r"The answer is (-?[0-9.,]+)"))


def gsm8k(record, response, strict=False):
    """flexible-extract: the last number is the answer. strict: the first after ####, else after "The answer is"."""
    found = strict_number(response) if strict else flexible_number(response)
    gold = plain_number(record["answer"].rsplit("####", 1)[-1].strip())
    if found is None:
        return dict(correct=False, reason="no answer in the response", extracted=None)
    same = found == gold
    return dict(correct=same, reason=f"{found} {'=' if same else 'is not'} {gold}", extracted=found)


def flexible_number(text):
    """The last number of a text, as plain_number() writes it, or None."""
    found = [a or b for a, b in FLEXIBLE.findall(text)]
    return plain_number(found[-1]) if found else None


def strict_number(text):
    for pattern in STRICT:
        if found := pattern.search(text):
            return plain_number(found[1])
    return None


def plain_number(text):
    """Without commas, dollar signs and one last point; equality of what is left is equality of strings."""
    return text.replace(",", "").replace("$", "").removesuffix(".")


# ------------------------------------------------------------------------------------------------------------ MATH500

# math-verify stops itself by SIGALRM, which only a process's main thread may use and which big integers do not heed.
# So it runs in a process of its own: one that is killed works in any thread, and on any answer.
MATH_WORKER = """
import json, logging, resource, sys
from math_verify import parse, verify
logging.disable(logging.CRITICAL)
resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30,) * 2)
out, sys.stdout = sys.stdout, sys.stderr
print("ready", file=out, flush=True)
for line in sys.stdin:
    gold, *texts = json.loads(line)
    answer = next(filter(None, map(parse, texts)), [])
    print(json.dumps([bool(verify(parse(gold), answer)), str(answer[0]) if answer else None]), file=out, flush=True)
"""


class MathJudge:
    """math-verify in a process of its own, which starts with the first question and again after a time limit."""

    def __init__(self):
        self.process, self.lock = None, threading.Lock()

    def __call__(self, gold, texts, timeout):
        """Whether the first of the texts that holds an answer holds gold -> (verdict, the answer).

        Raises TimeoutError after `timeout` seconds, ChildProcessError where math-verify ended (out of memory)."""
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
        self.process = subprocess.Popen([sys.executable, "-c", MATH_WORKER], env=environment, **pipes)
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


def math500(record, response, timeout=20.0):
    """math-verify's verdict on the last boxed answer, or on the whole response where none is boxed or it is empty.

    Its own limits, 5 s for each parse and comparison, count as no answer; so does `timeout`, which nothing escapes."""
    boxed = last_boxed(response)
    texts = [boxed, response] if boxed else [response]
    try:
        correct, extracted = math_judge(os.getpid())("$" + record["answer"] + "$", texts, timeout)
    except (TimeoutError, ChildProcessError, BrokenPipeError) as e:
        return dict(correct=False, reason=str(e), extracted=boxed)
    if extracted is None:
        return dict(correct=False, reason="no answer in the response", extracted=None)
    reason = f"{extracted:.100} {'=' if correct else 'is not'} {record['answer']}"
    return dict(correct=correct, reason=reason, extracted=extracted)


def last_boxed(text):
    r"""The last \boxed{...} whose braces close, with any that it is joined to by a comma, "and" or "or"; or None."""
    spans = []
    for start in re.finditer(r"\\boxed\s*\{", text):
        depth = 0
        for brace in re.finditer(r"(?<!\\)[{}]", text[start.start() :]):
            depth += 1 if brace[0] == "{" else -1
            if depth == 0:
                spans.append((start.start(), start.start() + brace.end()))
                break
    if not spans:
        return None
    first, end = spans[-1]
    for before in reversed(spans[:-1]):
        if re.fullmatch(r"[\s$]*(,|,?\s*and|,?\s*or)[\s$]*", text[before[1] : first]):
            first = before[0]
    return text[first:end]


# ------------------------------------------------------------------------------------------------- HumanEval and MBPP

MAX_LINES = 100  # of a program that sanitize() looks at, as in the official code


def humaneval(record, response, run, family="dream"):
    return graded(run, *humaneval_job(record, response, family))


def mbpp(record, response, run, family="dream"):
    return graded(run, *mbpp_job(record, response, family))


def graded(run, program, tests, names):
    """run: execute.run, or anything with run(program, tests, names) -> dict(passed, reason)."""
    result = run(program, tests, names)
    return dict(correct=result["passed"], reason=result["reason"], extracted=program)


def humaneval_job(record, response, family="dream"):
    """(program, tests, names) of a HumanEval response: what execute.run takes."""
    prompt, entry = record["prompt"], record["entry_point"]
    if check_family(family) == "dream":
        program = sanitize(prompt + "\n" + python_block(response), {entry} | names_in(record["test"]))
    else:
        blocks = re.findall(r"```\w*\n(.*?)```", response, re.DOTALL)
        code = blocks[0] if blocks else response
        # A released version keeps the indentation of the first line, a later one does not: what parses is taken.
        program = prompt + code if parses(prompt + code) else prompt + code.lstrip()
    return program, f"{record['test']}\ncheck({entry})\n", [entry]


def mbpp_job(record, response, family="dream"):
    """(program, tests, names) of an MBPP response: what execute.run takes."""
    program = python_block(response) if check_family(family) == "dream" else llada_mbpp_code(response)
    tests = [*record.get("test_imports", []), record.get("test_setup_code") or "", *record["test_list"]]
    return program, "\n".join(tests).replace("\r\n", "\n"), sorted(defined_names(record.get("code", "")))


def check_family(family):
    if family not in ("dream", "llada"):
        raise ValueError(f"family {family!r} is neither 'dream' nor 'llada'")
    return family


def python_block(text):
    """What follows the first ```python, if there is one, up to the next ```."""
    return text.split("```python\n", 1)[-1].split("```")[0]


def llada_mbpp_code(text):
    """What stands between [BEGIN] and [DONE], the marks of the earlier turns; else the first fenced block; else all.

    Quotes around marked code, which the earlier turns have, are no part of it."""
    marked = re.search(r"BEGIN\]?(.*?)\[?DONE", text, re.DOTALL)
    inner = marked[1] if marked else text
    fenced = re.search(r"```(?:\w*\n)?(.*?)(?:```|$)", inner, re.DOTALL)
    code = fenced[1] if fenced else re.split(r"\[?BEGIN\]?", inner, maxsplit=1)[-1]
    code = re.split(r"'?\s*\[?DONE\]?", code)[0].replace("\\_", "_").strip()
    if not parses(code):
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


def parses(code):
    return parsed(code) is not None


def defined_names(code):
    """Functions and classes that a program defines at its top."""
    tree = parsed(code) or ast.Module([])
    return {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def names_in(code):
    return {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}


def sanitize(text, roots):
    """The longest span of lines that parses, reduced to its imports and to what the roots need, which are names.

    As the official code: a function without a return statement is dropped, of a.b only b counts as needed, and of two
    definitions of a name the later one is kept, at the place of the first. Unlike it, the roots are more than the entry
    point: the tests of HumanEval/50 call a function of the prompt, and no answer passes where that was dropped."""
    lines = text.replace("\t", "    ").replace("\r\n", "\n").replace("\r", "\n").strip().splitlines()[:MAX_LINES]
    imports, definitions = [], {}
    for node in parsed(longest_parsable(lines)).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            imports.append(node)
        elif isinstance(node, ast.ClassDef) or isinstance(node, ast.FunctionDef) and has_return(node):
            definitions[node.name] = node
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            definitions[node.targets[0].id] = node

    needed, queue = set(), list(roots)
    while queue:
        name = queue.pop()
        if name not in needed:
            needed.add(name)
            queue += names_used(definitions[name]) if name in definitions else []
    kept = [node for name, node in definitions.items() if name in needed]
    return "\n".join(ast.unparse(node) for node in imports + kept)


def longest_parsable(lines):
    """The span with the most lines that are not blank, among those that parse; of equals the first that starts."""
    filled = [0]
    for line in lines:
        filled.append(filled[-1] + bool(line.strip()))
    places = range(len(filled))
    spans = [(i, j) for i in places for j in places if filled[i] < filled[j]]
    spans.sort(key=lambda s: (filled[s[0]] - filled[s[1]], s))
    return next((code for i, j in spans if parses(code := "\n".join(lines[i:j]))), "")


def has_return(node):
    return any(isinstance(n, ast.Return) for n in ast.walk(node))


def names_used(node):
    """Names and attributes below a node; what an attribute belongs to is not looked at."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Name):
            yield child.id
        elif isinstance(child, ast.Attribute):
            yield child.attr
        else:
            yield from names_used(child)


# -------------------------------------------------------------------------------------------- how a model decodes


def log_probs(m, batch, visible, positions, mask_id=None):
    """log p(. | U) at response positions [B, K], where of the response only visible [B, N] is seen: [B, K, V]."""
    mask_id = m.config.mask_id if mask_id is None else mask_id
    ids = torch.cat((batch["prompt_ids"], batch["response_ids"].masked_fill(~visible, mask_id)), dim=1)
    attention_mask = torch.cat((batch["prompt_mask"].bool(), real(batch)), dim=1)
    logits = m(ids, attention_mask=attention_mask, positions=batch["prompt_ids"].shape[1] + positions)
    return logits.float().log_softmax(-1)


def real(batch):
    """True at the tokens of each response, False at its padding: bool [B, N]."""
    N = batch["response_ids"].shape[1]
    return torch.arange(N, device=batch["length"].device) < batch["length"][:, None]


def before_eos(batch, eos_id):
    """True at the tokens of each response before its first EOS: bool [B, N]."""
    return real(batch) & ((batch["response_ids"] == eos_id).cumsum(1) == 0)


def leftmost(chosen):
    """Positions [B, K] of the True entries of chosen [B, N] from left to right, and which of them are no filler."""
    count = chosen.sum(1, keepdim=True)  # [B, 1]
    K = int(count.max())
    index = chosen.int().argsort(dim=1, descending=True, stable=True)[:, :K]
    return index, torch.arange(K, device=chosen.device) < count


@torch.no_grad()
def replay(m, batch, asked=None, mask_id=None):
    """The entropies that a model has at every step of a trajectory: h [B, N, N] in nats. h[b, t, k] belongs to the
    token decoded k-th (from 0), given the t tokens decoded before step t; NaN for k < t.

    asked [B, N]: the positions to look at, NaN for all others; without it every real token. One forward pass a step, as
    long as an asked token is masked. A trajectory that decoded several tokens a step is replayed one by one."""
    order, asked = batch["order"], real(batch) if asked is None else asked
    B, N = order.shape
    h = torch.full((B, N, N), float("nan"), device=order.device)
    for t in range(N):
        masked = asked & (order >= t)
        if not masked.any():
            break
        positions, kept = leftmost(masked)  # [B, K]
        logp = log_probs(m, batch, real(batch) & (order < t), positions, mask_id)
        entropy = torch.special.entr(logp.exp()).sum(-1)  # [B, K]
        h[:, t].scatter_(1, order.gather(1, positions), entropy.masked_fill(~kept, float("nan")))
    return h


def tds(m, batch, eos_id, mask_id=None):
    """Trajectory decoding separability (Eq. 10, 11): the variance, over the positions before the first EOS that are
    still masked, of the entropies in nats at each decoding step; averaged over the steps, then over the trajectories.

    -> dict(tds: float, rows: one value for each trajectory, per_step: one for each step, over the trajectories that
    still have such a position). One forward pass a step: see replay."""
    variance = separability(replay(m, batch, before_eos(batch, eos_id), mask_id))  # [B, N]
    rows, per_step = variance.nanmean(1), variance.nanmean(0)
    return dict(tds=rows.nanmean().item(), rows=rows.tolist(), per_step=per_step[~per_step.isnan()].tolist())


def separability(h):
    """Eq. 10: the variance of the entropies at each step of a replay [..., K] -> [...], NaN where nothing was asked."""
    return (h - h.nanmean(-1, keepdim=True)).square().nanmean(-1)


def by_window(h, window, length):
    """A replay [B, N, N] as the windows that TABOM ranks: [B, N, W], [b, t, i] = h of the token decoded i-th after step
    t given U_t. NaN where t is no start of a window (0..length - W, or 0 alone in a shorter response)."""
    B, N, _ = h.shape
    W = min(window, N)
    start = torch.arange(N, device=h.device)
    rank = start[:, None] + torch.arange(W, device=h.device)  # [N, W]
    found = h.gather(-1, rank.clamp(max=N - 1).expand(B, N, W))
    outside = (start > (length[:, None] - W).clamp(min=0))[..., None] | (rank >= N)  # [B, N, W]
    return found.masked_fill(outside, float("nan"))


def inversions(h):
    """How often an earlier token is less certain than a later one. h [..., K]: entropies in decode order, NaN takes no
    part, such as the diagonal of a replay (each token's own step) or its windows.

    -> dict(inverted, pairs), int64 tensors [K - 1]: of the pairs at distance 1, 2, ... in decode order, how many have
    h(earlier) > h(later), and how many there are."""
    gaps = [h[..., :-d] - h[..., d:] for d in range(1, h.shape[-1])]
    count = [((gap > 0).sum(), (~gap.isnan()).sum()) for gap in gaps]
    inverted, pairs = torch.tensor(count, dtype=torch.int64).reshape(-1, 2).T
    return dict(inverted=inverted, pairs=pairs)


@torch.no_grad()
def loss_at(m, batch, mask_ratio, generators, mask_id=None):
    """Cross-entropy at a mask ratio (Figure 3): the mean of -log p(x0) in nats over a random share mask_ratio of each
    response's tokens, rounded and at least one, given the rest: [B].

    generators: one CPU torch.Generator for each row."""
    mask = torch.zeros_like(real(batch))
    for row, n, g in zip(mask, batch["length"].tolist(), generators):
        row[torch.randperm(n, generator=g)[: max(1, round(mask_ratio * n))].to(row.device)] = True
    positions, kept = leftmost(mask)  # [B, K]
    logp = log_probs(m, batch, real(batch) & ~mask, positions, mask_id)
    nll = -logp.gather(-1, batch["response_ids"].gather(1, positions)[..., None])[..., 0]
    return torch.where(kept, nll, 0.0).sum(1) / kept.sum(1)
