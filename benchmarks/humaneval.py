"""HumanEval: 164 Python functions to complete, judged by running their checks (pass@1).

    text, start = humaneval.ask(record, "dream")    # the user's turn; what the assistant's starts with
    humaneval.settings("llada")                     # arguments of the decoder: Table 8 of the paper
    program, tests, names = humaneval.program(record, humaneval.trim(response))
    execute.run(program, tests, names)              # or whatever runs a program against its checks

record: a row of the benchmark's own file. response: the text a model wrote, without the prompt.

Sources: Dream's fork of lm-evaluation-harness (its sanitize, which is EvalPlus's); OpenCompass,
which evaluated LLaDA (humaneval_postprocess_v2). Protocols: "paper" and "release" ask both families
as the fork does, zero-shot; "official" is each model's own evaluation: for SDAR its settings
(greedy, up to 4,096 tokens) with T3D's prompts, whose answers begin with the function's head: here,
HumanEval's prompt. A2D's prompts are the fork's, in every protocol.
"""

import ast
import itertools
import re
import warnings

NAME = "humaneval"
FILE = "HumanEval.jsonl.gz"
HUB = ("openai/openai_humaneval", "openai_humaneval/test-00000-of-00001.parquet")
FIELDS = dict(prompt=str, entry_point=str, test=str)  # what a record needs to be graded
ASKED = {}  # what it needs besides to be asked
PROMPT_TOKENS = 1024  # longer prompts are cut on the left
PROTOCOLS = ("paper", "release", "official")


QUESTION_OF_T3D = "This is the problem:\n{}\nPlace your code within a single Python code block ```python ```. "
QUESTION_OF_T3D += "Do not include more than one code block. "


def ask(record, family, protocol="paper"):
    """(user's turn, start of the answer) of a problem. LLaDA's chat template trims the start at its
    end."""
    prompt = record["prompt"]
    if family == "llada" and protocol == "official":
        return f"Complete the following python code:\n{prompt}", ""
    if family == "sdar" and protocol == "official":
        return QUESTION_OF_T3D.format(prompt), f"```python\n{prompt}"
    text = "Write a solution to the following problem and make sure that it passes the tests:\n```"
    return text + prompt, f"Here is the completed function:\n```python\n{prompt}\n"


def settings(family, protocol="paper"):
    """Arguments of decode.generate; and suppress_eos: whether EOS is never chosen, as LLaDA's
    evaluation has it.

    Raises ValueError for an unknown protocol."""
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol {protocol!r}: known are {', '.join(PROTOCOLS)}")
    if family == "a2d":  # dllm's, of its MDLM models; where attention is block-causal, its blocks are the decoder's
        return dict(max_new_tokens=256, steps=256, block_length=256, temperature=0.0)
    if family == "sdar" and protocol == "official":
        return dict(max_new_tokens=4096, steps=4096, temperature=0.0)
    if family == "llada":
        # Exactly the EOS: an end of turn may be chosen (LLaDA's logits_eos_inf)
        return dict(max_new_tokens=512, steps=512, block_length=512, temperature=0.0, suppress_eos="eos")
    found = dict(max_new_tokens=768, steps=768)
    if family == "dream":
        found.update(block_length=None, temperature=0.1, top_p=0.9, greedy=protocol != "official")
    return found


def stops(family, protocol="paper"):
    """A response ends before the first of these texts. OpenCompass and T3D take it whole."""
    if family in ("llada", "sdar") and protocol == "official":
        return ()
    return ("\nclass", "\ndef", "\n#", "\nif", "\nprint")


def trim(response, family="dream", protocol="paper"):
    """The response up to its first stop."""
    for stop in stops(family, protocol):
        response = response.split(stop, 1)[0]
    return response


# ------------------------------------------------------------------------------------- the program

MAX_LINES = 100  # of a program that sanitize() looks at, as in the official code


def program(record, response, family="dream", protocol="paper", whole=False):
    """(program, tests, names): a program, the checks that it must pass, and the names that these
    take from it.

    whole: the response is a program with the asked function, not a text that continues the prompt;
    it is run as it is, behind what the prompt defines besides. The checks start with what the prompt
    defines besides the asked function: three records' checks call such a helper, which a program
    could otherwise define anew as it likes. Raises ValueError for a record without a check."""
    prompt, entry = record["prompt"], record["entry_point"]
    if "def check(" not in record["test"]:
        raise ValueError("its test defines no check()")
    tests = f"{helpers(prompt, entry, record['test'])}{record['test']}\ncheck({entry})\n"
    if whole:
        return with_prompt(prompt, entry, response), tests, [entry]
    if family == "llada" and protocol == "official":
        return prompt_and_block(prompt, response), tests, [entry]
    if family == "sdar" and protocol == "official":
        return last_block(f"```python\n{prompt}{response}"), tests, [entry]
    return sanitize(prompt + "\n" + python_block(response), entry), tests, [entry]


def continues(response):
    """Whether a response goes on with the body of the function: its first line is indented. One space is what some
    tokenizers put before a word."""
    line = response.lstrip("\r\n").split("\n", 1)[0]
    return line.startswith(("  ", "\t")) and not line.lstrip().startswith(("```", "~~~"))


def defines(record, code):
    """Whether code is Python with the asked function at its top."""
    tree = parsed(code) or ast.Module([])
    names = {getattr(node, "name", None) for node in tree.body}
    for node in tree.body:
        if isinstance(node, ast.Assign):  # add = lambda a, b: a + b
            names.update(getattr(target, "id", None) for target in node.targets)
    return record["entry_point"] in names


def with_prompt(prompt, entry, code):
    """A whole program behind what the prompt defines besides the asked function: its imports too."""
    before = [text for _, text in besides(prompt, entry)]
    if "from __future__" in code:  # which must come first
        return "\n".join([code, *before])
    return "\n".join([*before, code])


def helpers(prompt, entry, test):
    """The source of a prompt without the function that is asked for, where the test calls another
    of it; else ""."""
    found, called = besides(prompt, entry), False
    for name, _ in found:
        called = called or name is not None and f"{name}(" in test
    return "\n".join([*(text for _, text in found), ""]) if called else ""


def besides(prompt, entry):
    """What a prompt defines besides the asked function: a list of (name or None, source)."""
    code = prompt if parsed(prompt) else prompt + "\n    pass\n"
    found = []
    for node in (parsed(code) or ast.Module([])).body:
        name = getattr(node, "name", None)
        if name != entry:
            found.append((name, source(code, node)))
    return found


def prompt_and_block(prompt, response):
    """The prompt and the first fenced block, or all where none is fenced."""
    blocks = re.findall(r"```\w*\n(.*?)```", response, re.DOTALL)
    code = (blocks or [response])[0]
    # A released version keeps the indentation of the first line, a later one does not: what parses
    # is taken.
    if parsed(prompt + code) is None:
        code = code.lstrip()
    return prompt + code


def python_block(text):
    """What follows the first ```python, if there is one, up to the next ```."""
    return text.split("```python\n", 1)[-1].split("```")[0]


def last_block(text):
    """What follows the last ```python, up to the next ```: T3D's."""
    return text.rsplit("```python\n", 1)[-1].split("```")[0]


def parsed(code):
    """The syntax tree, or None for what is not Python."""
    with warnings.catch_warnings():  # of a program's "\\W" we need not hear
        warnings.simplefilter("ignore")
        try:
            return ast.parse(code)
        except (SyntaxError, ValueError, MemoryError, RecursionError):  # ValueError: a null byte
            return None


def sanitize(text, entry):
    """The longest span of lines that parses, reduced to its imports and to what the entry point
    needs.

    As the official code: a function without a return statement is dropped, of a.b only b counts as
    needed, and of two definitions of a name the later one is kept, at the place of the first."""
    lines = text.replace("\t", "    ").replace("\r\n", "\n").replace("\r", "\n").strip().splitlines()[:MAX_LINES]
    code = longest_parsable(lines)
    imports, definitions = [], {}
    for node in parsed(code).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            imports.append(node)
        elif isinstance(node, ast.ClassDef) or isinstance(node, ast.FunctionDef) and has_return(node):
            definitions[node.name] = node
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            definitions[node.targets[0].id] = node

    needed, queue = set(), [entry]
    while queue:
        name = queue.pop()
        if name not in needed:
            needed.add(name)
            queue += names_used(definitions[name]) if name in definitions else []
    kept = [node for name, node in definitions.items() if name in needed]
    return "\n".join(source(code, node) for node in imports + kept)


def source(code, node):
    """The text of a node, decorators included. Not ast.unparse: 330 terms of a sum are too deep for
    it."""
    text = ast.get_source_segment(code, node)
    for decorator in reversed(getattr(node, "decorator_list", [])):
        text = "@" + ast.get_source_segment(code, decorator) + "\n" + text
    return text


def longest_parsable(lines):
    """The span with the most lines that are not blank, among those that parse; of equals the first
    that starts."""
    filled = [0]
    for line in lines:
        filled.append(filled[-1] + bool(line.strip()))
    spans = []
    for i, j in itertools.combinations(range(len(filled)), 2):
        if filled[i] < filled[j]:
            spans.append((filled[i] - filled[j], i, j))
    for _, i, j in sorted(spans):
        code = "\n".join(lines[i:j])
        if parsed(code) is not None:
            return code
    return ""


def has_return(node):
    return any(isinstance(n, ast.Return) for n in ast.walk(node))


def names_used(node):
    """Names and attributes below a node; what an attribute belongs to is not looked at."""
    found, queue = [], [node]
    while queue:  # no recursion: a chain of 163 calls is deep
        for child in ast.iter_child_nodes(queue.pop()):
            if isinstance(child, ast.Name):
                found.append(child.id)
            elif isinstance(child, ast.Attribute):
                found.append(child.attr)
            else:
                queue.append(child)
    return found
