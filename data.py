"""Tokenizers, chat templates, datasets, trajectory files and batches.

    tok = data.load_tokenizer("path/to/Dream-v0-Instruct-7B")
    ids = data.encode_prompt(tok, [{"role": "user", "content": "Hi"}])
    examples = data.read_examples("gsm8k.jsonl.gz")  # [{id, where, prompt, messages, answer}, ...]
    records = data.read_trajectories("out/T")        # of distillation, or the authors' own files
    batch = data.collate(records[:4], pad_id)        # the dict of tensors that objectives.py takes

Sources: Hugging Face tokenizers for byte-level BPE; Qwen2's split pattern for Dream, which ships no
tokenizer.json; the checkpoint's own chat_template, rendered in jinja2's sandbox with what
transformers gives to templates; the trajectory files of tonyckc/TABOM.

Dimensions: B batch, P prompt, N response.
"""

import contextlib
import datetime
import gzip
import hashlib
import itertools
import json
import math
import re
import string
import warnings
import zlib
from pathlib import Path

import torch

# ---------------------------------------------------------------------------------------- tokenizer

# How Qwen2, and so Dream, splits text: contractions, words, single digits, punctuation, space.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
END_OF_TURN = ("<|eot_id|>", "<|im_end|>")  # LLaDA's, and Qwen's; they end a response as EOS does
EMPTY_THOUGHT = "<think>\n\n</think>\n\n"  # Qwen3's template writes it before an answer without a thought
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")  # of an added token
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """A checkpoint's tokenizer and chat template.

    special: {"eos_token": "<|endoftext|>", ...}; template: a text, a dict of named texts, or None;
    eos_id, mask_id: of the model's config; model_type: what that calls the family; ends: more ids
    that end a response. size: the largest id + 1; a network has more rows (Dream 152,064 for
    151,667), which must not be generated (`unused_ids`). stop_ids: every id that ends a response:
    ends, the EOS of the config and of the tokenizer, the end-of-turn tokens, and the padding, which
    some models write behind their answer and never their EOS (DiffuCoder)."""

    def __init__(self, backend, special, template, eos_id=None, mask_id=None, model_type=None, ends=()):
        from tokenizers import AddedToken

        self.backend, self.special, self.template, self.compiled = backend, special, template, None
        self.ids = backend.get_vocab(with_added_tokens=True)  # token -> id
        self.size = max(self.ids.values(), default=-1) + 1
        self.eos_id = self.ids.get(special.get("eos_token"), eos_id)
        self.pad_id = self.ids.get(special.get("pad_token"))
        self.mask_id = self.ids.get(special.get("mask_token"), mask_id)
        turns, ends = set(map(self.ids.get, END_OF_TURN)), set(self.ids.values()).intersection(ends)
        self.stop_ids = {eos_id, self.eos_id, self.pad_id, *turns, *ends} - {None, mask_id, self.mask_id}
        # SDAR has learnt no EOS right behind the end of a turn, and A2D's EOS is the end of a turn.
        self.last_ids = {self.eos_id} | (turns if model_type in ("sdar", "a2d-qwen3") else set())
        self.variables = {"enable_thinking": False} if model_type == "a2d-qwen3" else {}  # of the template, as dllm

        # The library spells a special token as text only where it knows the token to be special, and
        # the files do not always say so of those that end a response.
        added = backend.get_added_tokens_decoder()  # id -> AddedToken, with the flags it was added with
        for token in {*special.values(), *END_OF_TURN} & self.ids.keys():
            added.setdefault(self.ids[token], AddedToken(token, special=True)).special = True
        self.special_tokens = {}  # id -> token
        for i, token in added.items():
            if token.content and (token.special or i in (eos_id, mask_id)):
                token.special = True
                backend.add_special_tokens([token])
                self.special_tokens[i] = token.content
        longest_first = sorted(self.special_tokens.values(), key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")  # (?!) matches nowhere

    def encode(self, text, quoted=()):
        """Token ids of a text; special tokens written in it become their ids, and none are added.

        quoted: (start, end) places of special tokens that the text only speaks about. They are
        spelled as text. Raises ValueError for a text that the vocabulary cannot spell."""
        found = self._encode(text)
        if not quoted:
            return found.ids
        ids, start = [], 0
        for token, (a, b) in zip(found.ids, found.offsets):
            if token in self.special_tokens and not any(a < y and x < b for x, y in quoted):
                ids += [*self.encode_text(text[start:a]), token]
                start = b
        return ids + self.encode_text(text[start:])

    def encode_text(self, text):
        """`encode` of a text in which special tokens are spelled like any other text."""
        if not self.pattern.search(text):
            return self._encode(text).ids
        self.backend.encode_special_tokens = True  # the library's name for: as text
        try:
            ids = self._encode(text).ids
        finally:
            self.backend.encode_special_tokens = False
        for token in map(self.special_tokens.get, ids):
            if token not in (None, self.special.get("unk_token")):
                raise ValueError(f"the vocabulary cannot spell the quoted {token} as text: {text!r:.80}")
        return ids

    def _encode(self, text):
        try:
            return self.backend.encode(text, add_special_tokens=False)
        except Exception as e:  # the library raises plain Exception
            raise ValueError(f"the tokenizer cannot encode {text!r:.80}: {e}") from e

    def decode(self, ids, skip_special=False):
        """Text of token ids. Raises ValueError for an id beyond the tokenizer's."""
        ids = list(map(int, ids))
        for i in ids:
            if not 0 <= i < self.size:
                raise ValueError(f"token id {i} is outside the tokenizer of {self.size} ids")
        return self.backend.decode(ids, skip_special_tokens=skip_special)

    def response_text(self, ids):
        """Text of a response up to the first token that ends it."""
        return self.decode(ids[: first_end(ids, self.stop_ids)])

    def pieces(self, ids, mask_id=None):
        """(text, places) of every token, in order: places are indexes into ids, several where only
        together they spell a character. A mask token is a piece whose text is None."""
        found, places = [], []
        for i, token in enumerate(ids):
            places.append(i)
            text = None
            if token != mask_id:
                text = self.decode(ids[places[0] : i + 1])
                goes_on = i + 1 < len(ids) and ids[i + 1] != mask_id
                if text.endswith("\ufffd") and goes_on and len(places) < 8:
                    continue
            found.append((text, places))
            places = []
        return found

    def unused_ids(self, vocab_size):
        """The ids below vocab_size that are no token: rows of a network that must not be generated."""
        return sorted(set(range(vocab_size)) - set(self.ids.values()))

    def chat(self, messages, add_generation_prompt=True, prefix=""):
        """Text of a conversation [{role, content}, ...] by the checkpoint's own chat template.

        prefix: the start of the answer, which the model continues, as the template shows it: Dream's
        keeps a last newline, LLaDA's trims it. Raises ValueError where the checkpoint has no template
        or the template refuses the messages."""
        return self.render(messages, add_generation_prompt, prefix)[0]

    def encode_chat(self, messages, add_generation_prompt=True, prefix=""):
        """Token ids of `chat`. A special token inside a message's content is spelled as text."""
        return self.encode(*self.render(messages, add_generation_prompt, prefix))

    def render(self, messages, add_generation_prompt=True, prefix=""):
        """Text of `chat`, and the (start, end) places of the special tokens that its messages quote."""
        if prefix.strip():
            _, text, quoted = self.render_answer(messages, prefix)
            end = len(text) - len(self.end_of_turn(messages))
            return text[:end], [place for place in quoted if place[1] <= end]
        # Marks around the special tokens in a content survive the template, and tell where they are.
        mark, marked = unused_character(messages), []
        for turn in messages:
            if isinstance(turn.get("content"), str):
                turn = {**turn, "content": self.pattern.sub(lambda found: mark + found[0] + mark, turn["content"])}
            marked.append(turn)
        known = dict(self.special, **self.variables, tools=None, documents=None, messages=marked)
        self.compiled = self.compiled or compile_template(self.template)
        try:
            rendered = self.compiled.render(known, add_generation_prompt=add_generation_prompt)
        except Exception as e:  # a template is foreign code: whatever it raises is its error
            raise ValueError(f"the chat template cannot render these messages: {type(e).__name__}: {e}") from e
        text, quoted = "", []
        for i, piece in enumerate(rendered.split(mark)):
            if i % 2:  # between two marks
                quoted.append((len(text), len(text) + len(piece)))
            text += piece
        return text + prefix, quoted

    def render_answer(self, messages, answer):
        """Text of the prompt for an answer, `render` of the conversation with it. An empty thought that only the
        latter has is left out: no SDAR model has learnt to write one; A2D's prompts end with it."""
        prompt, _ = self.render(messages)
        text, quoted = self.render([*messages, message("assistant", answer)], add_generation_prompt=False)
        start, length = len(prompt), len(EMPTY_THOUGHT)
        if text.startswith(prompt + EMPTY_THOUGHT) and not answer.lstrip().startswith("<think>"):
            text = prompt + text[start + length :]
            quoted = [(a - length, b - length) if a >= start else (a, b) for a, b in quoted]
        return prompt, text, quoted

    def end_of_turn(self, messages):
        """What the template writes behind an answer to these messages: Dream's "<|im_end|>\\n"."""
        answer = unused_character(messages)
        text, _ = self.render([*messages, message("assistant", answer)], add_generation_prompt=False)
        if answer not in text:
            raise ValueError("the chat template leaves out what the assistant says")
        return text.rpartition(answer)[2]


def message(role, content):
    return {"role": role, "content": content}


def unused_character(messages):
    """A character that no message holds."""
    said = "".join([str(turn.get("content")) for turn in messages])
    for character in map(chr, range(0xFDD0, 0xFDF0)):  # Unicode reserves them for use inside programs
        if character not in said:
            return character
    raise ValueError("the messages hold all of Unicode's noncharacters U+FDD0 to U+FDEF")


def first_end(ids, stop_ids):
    """The place of the first token that ends a response, or len(ids) where none does."""
    return next((i for i, token in enumerate(ids) if token in stop_ids), len(ids))


def load_tokenizer(folder, eos_id=None, mask_id=None):
    """Tokenizer from tokenizer.json, or from vocab.json and merges.txt; eos_id, mask_id: of the
    model's config. Special tokens and the chat template come from tokenizer_config.json;
    added_tokens.json, special_tokens_map.json and chat_template.json are read where that does not
    say, and chat_template.jinja wins over it. The family is config.json's model_type; a list of
    EOS ids in generation_config.json adds to those that end a response.

    Raises FileNotFoundError, or ValueError for a file that cannot be read, for added tokens that do
    not fit, and for a special token that is declared and not in the vocabulary."""
    folder = Path(folder)
    config = read_json(folder / "special_tokens_map.json", {}) | read_json(folder / "tokenizer_config.json", {})
    special, declared = {}, {}  # "eos_token" -> text; text -> the key that declares it
    for key, value in config.items():
        for one in value if isinstance(value, list) else [value]:
            text = one.get("content") if isinstance(one, dict) else one  # an AddedToken is a dict
            if not isinstance(text, str) or not text:
                continue
            if key.endswith("_token"):
                special[key] = text
            if key in (*NAMED, "additional_special_tokens"):
                declared[text] = key
    try:
        backend = load_backend(folder)
    except (FileNotFoundError, ValueError):
        raise
    except Exception as e:  # the library raises plain Exception for anything wrong with a file
        raise ValueError(f"{folder}: the tokenizer's files cannot be read ({e})") from e
    add_tokens(backend, folder, config, declared)
    for token, key in declared.items():
        # Of additional_special_tokens even Dream lists one that it lacks.
        if key in NAMED and backend.token_to_id(token) is None:
            raise ValueError(f"{folder}: {key} {token!r} is not in the tokenizer's vocabulary")

    template = config.get("chat_template") or read_json(folder / "chat_template.json", {}).get("chat_template")
    if isinstance(template, list):  # named templates: [{"name": "default", "template": ...}, ...]
        template = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
    if (folder / "chat_template.jinja").is_file():
        template = read_text(folder / "chat_template.jinja")
    model_type = read_json(folder / "config.json", {}).get("model_type")
    ends = read_json(folder / "generation_config.json", {}).get("eos_token_id")
    return Tokenizer(backend, special, template, eos_id, mask_id, model_type, ends if are_numbers(ends, 0) else ())


def load_backend(folder):
    """The library's tokenizer: of tokenizer.json, or Qwen2's of vocab.json and merges.txt."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    if (folder / "tokenizer.json").is_file():
        backend = Tokenizer.from_str(read_text(folder / "tokenizer.json"))
        backend.no_truncation()  # a file may ask for either, and both would change what is trained on
        backend.no_padding()
        return backend
    if not (folder / "vocab.json").is_file() or not (folder / "merges.txt").is_file():
        raise FileNotFoundError(f"no tokenizer.json and no vocab.json with merges.txt in {folder}")
    lines = filter(str.strip, read_text(folder / "merges.txt").split("\n"))
    pairs = [tuple(line.rstrip("\r").split(" ")) for line in lines if not line.startswith("#version")]
    backend = Tokenizer(models.BPE(read_json(folder / "vocab.json"), pairs))
    backend.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, letters])
    backend.decoder = decoders.ByteLevel()
    return backend


def add_tokens(backend, folder, config, declared):
    """Add the tokens of added_tokens.json and of added_tokens_decoder in tokenizer_config.json (the
    latter wins), each at its id."""
    from tokenizers import AddedToken

    said = []  # (id, token, file)
    for text, i in read_json(folder / "added_tokens.json", {}).items():
        said.append((str(i), dict(content=text, special=text in declared), "added_tokens.json"))
    decoder = config.get("added_tokens_decoder") or {}
    for i, token in decoder.items() if isinstance(decoder, dict) else [("", decoder)]:
        said.append((i, token, "tokenizer_config.json"))
    added = {}  # id -> (token, file)
    for i, token, file in said:
        content = token.get("content") if isinstance(token, dict) else None
        if not re.fullmatch("[0-9]{1,9}", i) or not isinstance(content, str):
            raise ValueError(f"{folder / file}: an added token needs an id and a text, found {i!r:.40}: {token!r:.80}")
        added[int(i)] = (token, file)

    for i, (token, file) in sorted(added.items(), key=lambda item: item[0]):
        text = token["content"]
        if backend.token_to_id(text) != i:
            backend.add_tokens([AddedToken(text, **{flag: bool(token.get(flag)) for flag in FLAGS})])
        if backend.token_to_id(text) != i:
            got = backend.token_to_id(text)
            raise ValueError(f"{folder / file}: {text} should have id {i}, the vocabulary puts it at {got}")


# -------------------------------------------------------------------------- templates, and encoding


def compile_template(template):
    """A chat template (of several named ones: "default") in jinja2's sandbox, with what transformers
    gives to templates: loop controls, generation tags, raise_exception, strftime_now, tojson."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    if isinstance(template, dict) and len(template) == 1:
        (template,) = template.values()
    elif isinstance(template, dict) and template:
        names = ", ".join(map(str, template))
        template = template.get("default")
        if template is None:
            raise ValueError(f"the tokenizer's chat templates are {names}; none of them is called default")
    if not isinstance(template, str):
        raise ValueError("the tokenizer has no chat_template: use an instruct checkpoint, or --raw")

    def raise_exception(message):
        raise TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    loops = ["jinja2.ext.loopcontrols"]
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=loops)
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    env.filters["tojson"] = tojson
    # A generation tag marks what the assistant writes; its text is that of the block.
    template = re.sub(r"(\{%[-+]?\s*(?:end)?)generation(\s*[-+]?%\})", r"\1with\2", template)
    try:
        return env.from_string(template)
    except Exception as e:  # foreign code again
        raise ValueError(f"the chat template cannot render: {type(e).__name__}: {e}") from e


def encode_prompt(tok, messages, raw=False, prefix="", max_tokens=None):
    """Token ids of a conversation, ready for a response. Special tokens that it quotes are text.

    raw: the last message's text without the chat template. prefix: the start of the answer (see
    Tokenizer.chat). max_tokens: the last message is cut on its right so that the prompt has at most
    so many. Raises ValueError for a prompt of no tokens, and for one that cannot be cut that far."""
    if raw:
        ids = tok.encode_text(messages[-1]["content"] + prefix)[:max_tokens]
    else:
        if max_tokens is not None:
            messages = cut_messages(tok, messages, max_tokens)
        ids = tok.encode_chat(messages, prefix=prefix)
    if not ids:
        raise ValueError("an empty prompt: the model needs at least one token to answer")
    return ids


def cut_messages(tok, messages, max_tokens):
    """The messages with the last one cut on its right, so that they render to at most max_tokens.

    The text keeps max_tokens - (tokens of the template around one token of text), as the release
    cuts: one less than would fit. Raises ValueError where the template alone is longer."""
    ids = tok.encode_text(messages[-1]["content"])
    around = len(tok.encode_chat(messages)) - len(ids)
    room = max_tokens - (around + 1)
    if len(ids) <= room:
        return messages
    for kept in range(room, 0, -1):
        text = tok.decode(ids[:kept])
        shorter = [*messages[:-1], {**messages[-1], "content": text}]
        # Half a character at the end is left out. What is kept may need more tokens than it had.
        if not text.endswith("\ufffd") and len(tok.encode_chat(shorter)) <= max_tokens:
            return shorter
    raise ValueError(f"the chat template takes {around} of at most {max_tokens} tokens: no room for text")


def encode_answer(tok, messages, answer, raw=False):
    """Token ids of a reference answer as the model would write it: its text, the template's end of
    turn, and EOS where the end of a turn is not enough.

    The answer is spelled as text, also where it quotes a special token. Raises ValueError where
    that is not possible, and where neither the tokenizer nor the config names an EOS token."""
    if tok.eos_id is None:
        raise ValueError("the tokenizer names no eos_token, and an answer must end")
    if raw:
        return [*tok.encode_text(answer), tok.eos_id]
    before, after, quoted = tok.render_answer(messages, answer)
    if after.startswith(before):
        start = len(before)
        ids = tok.encode(after[start:], [(a - start, b - start) for a, b in quoted if a >= start])
    else:  # a finished turn does not begin as the generation prompt does: with an empty thought, say
        end = tok.end_of_turn(messages)
        ids = tok.encode(answer + end, [found.span() for found in tok.pattern.finditer(answer)])
    ids = ids[: first_end(ids, tok.stop_ids) + 1]  # some templates go on behind the end of the turn
    if not tok.last_ids.intersection(ids[-1:]):
        ids.append(tok.eos_id)
    return ids


def encode_examples(tok, examples, raw=False, max_tokens=None, answers=False):
    """Give every example of `read_examples` its prompt_ids and, with answers, its response_ids: of
    the first answer where there are several. Raises ValueError with file and line for one that
    cannot be encoded."""
    for e in examples:
        try:
            e["prompt_ids"] = encode_prompt(tok, e["messages"], raw, max_tokens=max_tokens)
            if answers and e["answer"] is None:
                raise ValueError("the row has no answer to train on")
            if answers:
                first = e["answer"][0] if isinstance(e["answer"], list) else e["answer"]
                e["response_ids"] = encode_answer(tok, e["messages"], first, raw)
        except ValueError as problem:
            raise ValueError(f"{e['where']}: {problem}") from problem


# ----------------------------------------------------------------------------------------- datasets

MAX_LINE = 64 * 2**20  # bytes of one JSON line; more is not a dataset but an accident


def read_text(file):
    """A file's text; a byte order mark, as editors on Windows write it, is no part of it."""
    try:
        return Path(file).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise ValueError(f"{file}: not UTF-8 text ({e})") from e


def parse_json(content, where):
    """The value of JSON text, or of bytes with or without a byte order mark."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{where}: not valid JSON ({e})") from e


def read_json(file, missing=None):
    """The JSON object in a file, or `missing`, if given, where there is no file."""
    if missing is not None and not Path(file).is_file():
        return missing
    content = parse_json(read_text(file), file)
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a JSON object, found {type(content).__name__}")
    return content


def read_rows(path):
    """(where, row) for every row of a .jsonl, .jsonl.gz, .json or .parquet file; where = "file:line".

    A .json file holds one list, an object with the list under "data", or JSON Lines. Lines are read
    as they are asked for, no further. Raises FileNotFoundError or ValueError, which names the line."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no dataset file {path}")
    if path.suffix == ".parquet":
        rows = read_parquet(path)
    elif path.suffix == ".json" and not holds_json_lines(path):
        rows = read_json_list(path)
    elif path.suffix in (".json", ".jsonl") or path.name.endswith(".jsonl.gz"):
        yield from read_jsonl(path)
        return
    else:
        raise ValueError(f"{path}: unknown format {path.suffix!r}; use .jsonl, .jsonl.gz, .json or .parquet")
    for number, row in enumerate(rows, 1):
        yield f"{path}: row {number}", row


def holds_json_lines(path):
    """Whether the first line of a file is a whole JSON object and not the file's only line."""
    with open(path, "rb") as f, contextlib.suppress(ValueError, RecursionError):
        return isinstance(json.loads(f.readline(MAX_LINE)), dict) and any(map(bytes.strip, f))
    return False


def read_json_list(path):
    rows = parse_json(path.read_bytes(), path)
    if isinstance(rows, dict):
        rows = rows.get("data", [rows])  # an object without "data" is the only row
    if not isinstance(rows, list):
        raise ValueError(f"{path}: expected a list of rows, found {type(rows).__name__}")
    return rows


def read_jsonl(path):
    try:
        with {".gz": gzip.open}.get(path.suffix, open)(path, "rb") as f:
            for number, line in enumerate(iter(lambda: f.readline(MAX_LINE + 1), b""), 1):
                where = f"{path}:{number}"
                if len(line) > MAX_LINE:
                    raise ValueError(f"{where}: the line is longer than {MAX_LINE} bytes")
                if line.strip():
                    yield where, parse_json(line, where)
    except (gzip.BadGzipFile, EOFError, zlib.error) as e:
        raise ValueError(f"{path}: a damaged gzip file ({e})") from e


def read_parquet(path):
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as e:
        raise ValueError(f"{path}: reading parquet needs pyarrow: pip install pyarrow") from e
    try:
        with pyarrow.parquet.ParquetFile(path) as f:
            for batch in f.iter_batches():
                yield from batch.to_pylist()
    except pyarrow.ArrowException as e:
        raise ValueError(f"{path}: not a readable parquet file ({e})") from e


ROLES = {"system": "system", **dict.fromkeys(("user", "human", "prompter", "question"), "user")}
ROLES.update(dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt", "answer"), "assistant"))
NEEDS = f"a message needs a role ({', '.join(ROLES)}) and a text content"
CONVERSATIONS = ("messages", "conversations", "conversation")
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
}
LAST_ANSWERS = ("answerKey", "answer_idx", "expected_answer", "target")  # where there is no other
IDS = ("id", "task_id", "unique_id", "key")
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


def read_examples(path, prompt_field=None, answer_field=None, limit=None, warn=warnings.warn):
    """The prompts of a dataset: [{id, where, prompt, messages, answer}]. where: "file:line";
    messages: what the model is asked, earlier turns first; prompt: the last of them; answer: a text,
    a list of several right ones, or None.

    Recognises `messages` (or `conversations`) and the pairs in FIELDS; prompt_field and answer_field
    name other columns. system and history come before the prompt, context and input join it, choices
    are lettered below it. Reads no more than `limit` rows. The id is the row's own where all those
    read differ, else its number from 0. warn(line) is called once for every column that looks like
    input and is not used. Raises ValueError for an empty dataset, and with file and line for a row
    that fits nothing."""
    examples, own, told = [], [], set()
    for where, row in itertools.islice(read_rows(path), limit):
        try:
            example = to_example(row, prompt_field, answer_field)
        except ValueError as problem:
            raise ValueError(f"{where}: {problem}") from problem
        for what in unused(row, example, answer_field):
            if what not in told:
                told.add(what)
                warn(f"{where}: {what}")
        examples.append({"id": len(examples), "where": where, **example})
        own.append(own_id(row))
    if not examples:
        raise ValueError(f"{path}: the dataset is empty")
    number_or_own(examples, own)
    return examples


def own_id(row):
    """The id that a row brings along, or None."""
    return next((row[key] for key in IDS if type(row.get(key)) in (str, int)), None)


def number_or_own(records, own):
    """Give the records their own ids if each has one and all differ; else they keep their numbers."""
    if None not in own and len(set(map(str, own))) == len(own):
        for record, key in zip(records, own):
            record["id"] = key


def to_example(row, prompt_field=None, answer_field=None):
    """A row as {prompt, messages, answer}."""
    if not isinstance(row, dict):
        raise ValueError(f"expected an object with named fields, found {row!r:.40}")
    column, choices, answer = prompt_field or find_prompt(row), find_choices(row), None
    if isinstance(row.get(column), list) or (column in CONVERSATIONS and prompt_field is None):
        messages = to_messages(row[column])
        if messages and messages[-1]["role"] == "assistant":
            answer = messages.pop()["content"]
    else:
        messages = [message("user", full_prompt(row, column, choices))]
    if answer is None or answer_field is not None:
        answer = find_answer(row, column, answer_field, choices)
    if not messages or messages[-1]["role"] != "user":
        raise ValueError("the conversation has no user turn to answer")
    system, history = text_of(row.get("system")) or text_of(row.get("system_prompt")), row.get("history")
    if isinstance(history, list):
        messages = to_messages(history, "history must hold pairs [user, assistant] or messages") + messages
    if system and messages[0]["role"] != "system":
        messages.insert(0, message("system", system))
    return {"prompt": messages[-1]["content"], "messages": messages, "answer": answer}


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
    prompt = row.get(column)
    if not isinstance(prompt, str):
        raise ValueError(f"field {column!r} is missing or not text; the row has {', '.join(row)}")
    context, more = text_of(row.get("context")), text_of(row.get("input"))
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
        pairs = value.items()
    choices = []
    for letter, text in pairs:
        if not isinstance(letter, str) or type(text) not in (str, int, float):
            return []
        choices.append((letter, str(text)))
    return choices


def find_answer(row, column, name, choices):
    """The answer to the prompt in a column, or the one in column `name`: text, a list of texts, or
    None where the row has none. A number is written out; anything else is no text to learn."""
    if name is not None and row.get(name) is None:
        raise ValueError(f"field {name!r} is missing; the row has {', '.join(row)}")
    for option in (*FIELDS.get(column, ["answer"]), *LAST_ANSWERS):
        if name is None and row.get(option) not in (None, ""):
            name = option
    if name is None:
        return None
    value = row[name]
    if name == "answers" and isinstance(value, dict):
        value = value.get("text", value)  # SQuAD: {"text": [...], "answer_start": [...]}
    if name == "solutions" and isinstance(value, str) and value.lstrip().startswith("["):
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(value)  # APPS writes its list of programs as JSON text
    if name in ("answers", "solutions") and value == []:
        return None
    if choices:
        return chosen_letter(value, choices, name)
    if isinstance(value, str) or are_texts(value):
        return value
    if type(value) is int or (type(value) is float and math.isfinite(value)):
        return str(value)
    raise ValueError(f"field {name!r} must be text, a number or a list of texts, found {value!r:.80}")


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


def has_text(value):
    return isinstance(value, str) and bool(value.strip())


def are_texts(value):
    """Whether a value is a list of texts, and not empty."""
    return isinstance(value, list) and bool(value) and all(isinstance(one, str) for one in value)


def text_of(value):
    """A text, or a list of texts joined; "" for anything else."""
    text = "\n".join(value) if are_texts(value) else value
    return text if has_text(text) else ""


def to_messages(talk, needs=NEEDS):
    """[{role, content}, ...] of a list of messages, with any of the usual names, or of pairs [user,
    assistant]. A content may come in parts, [{"type": "text", "text": ...}]."""
    messages = []
    for turn in talk if isinstance(talk, list) else [talk]:
        if are_texts(turn) and len(turn) == 2:
            messages += [message("user", turn[0]), message("assistant", turn[1])]
            continue
        role = content = None
        if isinstance(turn, dict):
            role = ROLES.get(str(turn.get("role", turn.get("from"))).lower())
            content = turn.get("content", turn.get("value"))
        if isinstance(content, list):
            parts = [part.get("text") if isinstance(part, dict) else None for part in content]
            content = "".join(parts) if are_texts(parts) else None
        if role is None or not isinstance(content, str):
            raise ValueError(f"{needs}, found {turn!r:.120}")
        messages.append(message(role, content))
    return messages


def unused(row, example, answer_field=None):
    """Lines about columns that look like input and are in no message, and about a row whose answer
    may be in one of them."""
    said, choices = [turn["content"] for turn in example["messages"]], find_choices(row)
    used, lines, others = {answer_field}, [], []
    if choices and choices[-1][1] in said[-1]:
        used |= {"choices", "options"}
    if isinstance(row.get("history"), list):
        used.add("history")
    for column, value in row.items():
        text = text_of(value)
        if column in NO_INPUTS or column in used or any(text and text in one for one in said):
            continue
        # A few words in a row are something to read; one word is a label.
        words = text != "" and text == value and (len(text.split()) > 2 or column in FIELDS)
        holds = isinstance(value, (str, list, dict)) and value not in ("", [], {}, "[]", "{}")
        if words or (column in INPUTS and holds):
            lines.append(f"the column {column!r} looks like input, and is not used")
        if column not in INPUTS and value != "" and type(value) in (str, int, float):
            others.append(column)
    if example["answer"] is None and others:
        lines.append(f"no answer column is known among {', '.join(others)}; name yours")
    return lines


# ------------------------------------------------------------------------------------- trajectories

PER_TOKEN = ("response_ids", "order", "step", "entropy", "confidence")  # one entry a response token
MAX_STEP = 2**31 - 1


def trajectory_files(path):
    """The files of a trajectory folder (or the one file given), in the order of their names."""
    path = Path(path)
    return sorted(path.glob("trajectories*.jsonl")) if path.is_dir() else [path]


def read_trajectories(
    path, vocab_size=None, tok=None, methods=None, mask_id=None, max_prompt_tokens=None, warn=warnings.warn
):
    """The records of a trajectory folder or file, checked and sorted by id: dicts with id,
    prompt_ids, response_ids and order as lists. order[r] is the decode rank of position r, or its
    decode step: equal numbers were decoded together, -1 never was.

    Records of the authors' files also have prompt, text, non_ltr (a list of positions, or None),
    method and data_source. They need tok, whose template renders the prompt (cut to
    max_prompt_tokens); methods: only rows of these; warn(line) is called for every row of theirs that
    cannot be used. Raises FileNotFoundError, or ValueError with file and line: a broken line, a
    missing field, lists of different lengths, an id that is there twice, ids beyond vocab_size
    (trajectories of another model), a mask token (mask_id) that counts as decoded."""
    files = trajectory_files(path)
    if not files or not files[0].is_file():
        raise FileNotFoundError(f"no trajectories at {path}: give a folder of distill, or a file of it")
    records, released, own, first, theirs = [], [], [], {}, False
    for where, row in itertools.chain.from_iterable(map(read_rows, files)):
        theirs = theirs or whose(row) == "theirs"  # their rows need not all look like theirs
        try:
            if not theirs or whose(row) == "ours":
                records.append(check_record(row, vocab_size, mask_id))
                key = row["id"]
                if key in first:
                    raise ValueError(f"id {key!r} appears twice, first at {first[key]}")
                first[key] = where
                continue
            record, why = read_release(row, tok, methods, max_prompt_tokens)
            if record is not None:
                released.append(check_record({"id": len(released), **record}, vocab_size, mask_id))
                own.append(own_id(row))
            elif why:
                warn(f"{where}: not used, {why}")
        except ValueError as problem:
            raise ValueError(f"{where}: {problem}") from problem
    number_or_own(released, own)
    return sorted(records + released, key=by_id)


def by_id(record):
    """Sorts records by their id, numbers before texts."""
    return isinstance(record["id"], str), record["id"]


def whose(row):
    """Whose trajectory a row is: "ours", "theirs" (the authors'), or None for anything else."""
    if not isinstance(row, dict):
        return None
    if "response_ids" in row or "prompt_ids" in row:
        return "ours"
    if RELEASE_KEYS & row.keys() or row.get("method") in RELEASE_METHODS:
        return "theirs"
    return None


def holds_trajectories(path):
    """Whether a path is a trajectory folder, or a file whose first row is a trajectory."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no trajectories and no dataset at {path}")
    return path.is_dir() or whose(next(read_rows(path), (None, None))[1]) is not None


def check_record(record, vocab_size=None, mask_id=None):
    """The record as it is. Raises ValueError for one that cannot be trained on."""
    if not isinstance(record, dict):
        raise ValueError(f"expected a trajectory record, found {type(record).__name__}")
    missing = [key for key in ("prompt_ids", "response_ids", "order") if not isinstance(record.get(key), list)]
    if type(record.get("id")) not in (str, int):
        missing.append("id")
    if missing:
        raise ValueError(f"not a trajectory: {', '.join(missing)} missing; has {', '.join(record) or 'nothing'}")
    prompt, response, order = record["prompt_ids"], record["response_ids"], record["order"]
    N = len(response)
    if not prompt or not response or not are_numbers(prompt + response, 0):
        raise ValueError("prompt_ids and response_ids must be lists of ids, and not empty")
    if len(order) != N or not are_numbers(order, -1) or max(order) < 0:
        what = f"order must give each of the {N} response tokens its decode rank or step"
        raise ValueError(f"{what}, from 0, or -1 for one that was never decoded")
    for key in PER_TOKEN:
        values = record.get(key)
        fits = values is None or (are_numbers(values, -MAX_STEP, kinds=(int, float)) and len(values) == N)
        if not fits:
            raise ValueError(f"{key} must be a list of {N} numbers, one a response token")
    places = record.get("non_ltr")
    if places is not None and not are_numbers(places, 0, N - 1):
        raise ValueError(f"non-left-to-right positions must be among 0 to {N - 1}")
    for key in ("finished", "correct"):
        if type(record.get(key)) not in (bool, type(None)):
            raise ValueError(f"{key} must be true, false or null, found {record[key]!r:.40}")
    top = max(*prompt, *response)
    if vocab_size is not None and top >= vocab_size:
        raise ValueError(f"token id {top}, but the model has {vocab_size}: trajectories of another model")
    for i, token in enumerate(response):
        if token == mask_id and order[i] >= 0:
            what = f"response token {i} is the mask token {mask_id}"
            raise ValueError(f"{what}, and yet decoded: its order is {order[i]}")
    return record


def are_numbers(values, low, high=MAX_STEP, kinds=(int,)):
    """Whether a value is a list of finite numbers from low to high."""
    return isinstance(values, list) and all(type(x) in kinds and low <= x <= high for x in values)


def usable(record, keep="correct"):
    """Whether a trajectory is trained on. keep: "correct" = finished, and correct where that could
    be checked; "finished" = a token that ends it came within the budget; "all"."""
    if keep == "all":
        return True
    return bool(record.get("finished")) and (keep == "finished" or record.get("correct") is not False)


def cut_at_eos(record, stop_ids):
    """The record without the tokens after the first that ends it. The order of the rest is numbered
    anew: 0, 1, ... in the old order, equal numbers stay equal, -1 stays -1."""
    n = first_end(record["response_ids"], stop_ids) + 1
    if n >= len(record["response_ids"]):
        return record
    shorter = {**record, **{key: record[key][:n] for key in PER_TOKEN if record.get(key) is not None}}
    if record.get("non_ltr") is not None:
        shorter["non_ltr"] = [r for r in record["non_ltr"] if r < n]
    if record.get("order") is not None:
        new = {-1: -1, **dict(zip(sorted(set(shorter["order"]) - {-1}), itertools.count()))}
        shorter["order"] = [new[old] for old in shorter["order"]]
    return shorter


def non_ltr_positions(order):
    """The positions of a response that were decoded, and not right after their left neighbour."""
    found, next_step = [], 0
    for r, step in enumerate(order):
        if step >= 0 and step != next_step:
            found.append(r)
        next_step = step + 1 if step >= 0 else None
    return found


# The authors' files: fields that only they have, methods, {prompt: responses by preference}.
RELEASE_KEYS = {"response_token_ids", "decoding_order", "non_ltr_positions", "gen_text"}
RELEASE_METHODS = ("entropy", "default", "credit", "topk_margin")
RELEASE_FIELDS = {
    "prompt": ("response", "output", "gen_text", "answer"),
    "instruction": ("output", "response", "gen_text", "answer"),
    "question": ("gen_text", "answer", "response", "output"),
}
RELEASE_LENGTH = 256  # tokens of a response in the authors' files


def read_release(row, tok, methods=None, max_prompt_tokens=None):
    """A row of the authors' files -> (record without id, None), (None, why it cannot be used), or
    (None, None) where it is of another method. A row without response_token_ids gets those of its
    text; one without a decoding_order for every token counts as decoded from left to right."""
    if tok is None:
        raise ValueError("the authors' files need the model's tokenizer for their prompts")
    if not isinstance(row, dict):
        raise ValueError(f"expected a trajectory, found {type(row).__name__}")
    if methods is not None and row.get("method") not in list(methods):
        return None, None
    prompt, text = release_texts(row)
    response, order, source = row.get("response_token_ids"), row.get("decoding_order"), row.get("data_source")
    if prompt is None or (text is None and not response):
        lacks = "prompt" if prompt is None else "response"
        return None, f"it has no {lacks}; the row has {', '.join(row) or 'nothing'}"
    messages = [message("user", prompt)]
    prompt_ids = encode_prompt(tok, messages, max_tokens=max_prompt_tokens)
    if not response:
        response = encode_answer(tok, messages, text)
    if not are_numbers(response, 0):
        raise ValueError(f"response_token_ids must be a list of ids, found {response!r:.80}")
    if not isinstance(order, list) or len(order) < len(response):
        order = range(len(response))
    order = list(order[: len(response)])
    if order.count(-1) == len(order):
        return None, "none of its tokens was ever decoded"
    record = dict(prompt=prompt, prompt_ids=prompt_ids, response_ids=response, order=order, text=text, correct=None)
    record.update(non_ltr=row.get("non_ltr_positions"), method=row.get("method"))
    record["data_source"] = source.strip() if has_text(source) else None
    record["finished"] = first_end(response, tok.stop_ids) < len(response)
    return record, None


def release_texts(row):
    """The prompt and the response of a row of the authors' files, each a text or None."""
    for column, responses in RELEASE_FIELDS.items():
        if has_text(row.get(column)):
            return row[column], next(filter(has_text, map(row.get, responses)), None)
    said, messages = {}, row.get("messages")
    for turn in messages if isinstance(messages, list) else []:
        if isinstance(turn, dict) and has_text(turn.get("content")):
            said.setdefault(str(turn.get("role")), turn["content"])  # the first that each says
    return said.get("user"), said.get("assistant")


def to_release_format(record, pad_id, method="entropy"):
    """A record of ours as a row that the authors' trainer takes: its last user turn (earlier turns
    have no place there), the response padded to 256 tokens, the decode step of every position."""
    missing = max(0, RELEASE_LENGTH - len(record["response_ids"]))
    steps = record.get("step") or record["order"]
    row = dict(id=record["id"], prompt=record["prompt"], response=record.get("text", ""))
    row.update(response_token_ids=record["response_ids"] + [pad_id] * missing, decoding_order=steps + [-1] * missing)
    row.update(non_ltr_positions=non_ltr_positions(steps), method=method)
    return dict(row, data_source=record.get("data_source") or "")


# ------------------------------------------------------------------------------------------ batches


def generator(*keys, device="cpu"):
    """A torch.Generator whose seed depends on all keys, such as (seed, epoch, example), alone."""
    digest = hashlib.sha256(repr(keys).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def epoch_order(n, seed, epoch):
    """The order in which an epoch visits n examples: the same for any number of processes."""
    return torch.randperm(n, generator=generator(seed, epoch, "order")).tolist()


def pad_left(rows, pad_id):
    """Token id lists -> ids and mask, two int64 tensors [B, P]."""
    P = max(map(len, rows))
    ids = torch.full((len(rows), P), pad_id)  # [B, P]
    mask = torch.zeros_like(ids)  # [B, P]
    for b, row in enumerate(rows):
        ids[b, P - len(row) :] = torch.tensor(row)
        mask[b, P - len(row) :] = 1
    return ids, mask


def collate(records, pad_id):
    """Records -> the batch of objectives.py on the CPU, prompts padded on the left and responses on
    the right: prompt_ids, prompt_mask [B, P], response_ids, order [B, N], length [B], all int64.
    Padding has the order -1; a record without an order (a reference answer) counts as decoded from
    left to right. Where a record has non_ltr, non_ltr is a bool tensor [B, N] (a record without has
    its own computed); where all have entropies, entropy is float32 [B, N] with 0 for padding."""
    prompt_ids, prompt_mask = pad_left([r["prompt_ids"] for r in records], pad_id)
    length = torch.tensor([len(r["response_ids"]) for r in records])  # [B]
    response = torch.full((len(records), int(length.max())), pad_id)  # [B, N]
    order = torch.full_like(response, -1)  # [B, N]
    batch = dict(prompt_ids=prompt_ids, prompt_mask=prompt_mask, response_ids=response, order=order, length=length)
    if any(r.get("non_ltr") is not None for r in records):
        batch["non_ltr"] = torch.zeros_like(response, dtype=torch.bool)  # [B, N]
    if all(r.get("entropy") is not None for r in records):
        batch["entropy"] = torch.zeros(response.shape)  # [B, N]
    for b, record in enumerate(records):
        n = len(record["response_ids"])
        steps = record.get("order") or list(range(n))
        response[b, :n] = torch.tensor(record["response_ids"])
        order[b, :n] = torch.tensor(steps)
        if "non_ltr" in batch:
            places = record.get("non_ltr")
            batch["non_ltr"][b, non_ltr_positions(steps) if places is None else places] = True
        if "entropy" in batch:
            batch["entropy"][b, :n] = torch.tensor(record["entropy"])
    return batch
