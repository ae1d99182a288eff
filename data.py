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

# How Qwen2, and so Dream, splits text before byte-level BPE: contractions, words, single digits,
# punctuation, space.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
END_OF_TURN = ("<|eot_id|>", "<|im_end|>")  # LLaDA's and Dream's; they end a response as EOS does
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")  # of an added token
NOTHING = "(?!)"  # a regular expression that matches nowhere
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """A checkpoint's tokenizer and chat template.

    special: {"eos_token": "<|endoftext|>", ...}; template: a text, a dict of named texts, or None.
    eos_id, mask_id: those of the model's config, which need not be the tokenizer's (see
    `disagreements`).

    size: one more than the largest id. Networks have more rows than that (Dream 152,064 for
    151,667); those ids have no text: decode() refuses them, and generation must not choose them
    (`unused_ids`). stop_ids: every id that ends a response: the EOS of the config and of the
    tokenizer, the end-of-turn tokens, and the tokenizer's padding, which some models write behind
    their answer and never their EOS (DiffuCoder)."""

    def __init__(self, backend, special, template, eos_id=None, mask_id=None):
        self.backend, self.special, self.template, self.compiled = backend, special, template, None
        self.ids = backend.get_vocab(with_added_tokens=True)  # token -> id
        self.size = max(self.ids.values(), default=-1) + 1
        self.eos_id = self.ids.get(special.get("eos_token"), eos_id)
        self.pad_id = self.ids.get(special.get("pad_token"))
        self.mask_id = self.ids.get(special.get("mask_token"), mask_id)
        ends = [self.ids.get(token) for token in END_OF_TURN]
        self.stop_ids = {eos_id, self.eos_id, self.pad_id, *ends} - {None, mask_id, self.mask_id}

        named = {*special.values(), *END_OF_TURN} & self.ids.keys()
        self.special_tokens = {}  # id -> token
        for token in make_special(backend, named, (eos_id, mask_id)):
            self.special_tokens[self.ids[token]] = token
        longest_first = sorted(self.special_tokens.values(), key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest_first)) or NOTHING)

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
        """Token ids of a text in which special tokens are spelled like any other text.

        Raises ValueError for a text that the vocabulary cannot spell."""
        if not self.pattern.search(text):
            return self._encode(text).ids
        self.backend.encode_special_tokens = True  # the library's name for: as text
        try:
            ids = self._encode(text).ids
        finally:
            self.backend.encode_special_tokens = False
        for i in ids:
            if i in self.special_tokens and self.special_tokens[i] != self.special.get("unk_token"):
                token = self.special_tokens[i]
                raise ValueError(f"the vocabulary cannot spell the quoted {token} as text: {text!r:.80}")
        return ids

    def _encode(self, text):
        try:
            return self.backend.encode(text, add_special_tokens=False)
        except Exception as e:  # the library raises plain Exception
            raise ValueError(f"the tokenizer cannot encode {text!r:.80}: {e}") from e

    def decode(self, ids, skip_special=False):
        """Text of token ids. Raises ValueError for an id that the tokenizer does not have."""
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
        """The ids below vocab_size that are no token: rows of a network that must not be
        generated."""
        return sorted(set(range(vocab_size)) - set(self.ids.values()))

    def chat(self, messages, add_generation_prompt=True, prefix=""):
        """Text of a conversation [{role, content}, ...] by the checkpoint's own chat template.

        prefix: the start of the assistant's answer, which the model continues. It is shown as the
        template shows an assistant's turn: Dream's keeps a last newline, LLaDA's trims it. Raises
        ValueError where the checkpoint has no template or the template refuses the messages."""
        return self.render(messages, add_generation_prompt, prefix)[0]

    def encode_chat(self, messages, add_generation_prompt=True, prefix=""):
        """Token ids of `chat`. A special token inside a message's content is spelled as text."""
        return self.encode(*self.render(messages, add_generation_prompt, prefix))

    def render(self, messages, add_generation_prompt=True, prefix=""):
        """Text of a conversation, and the (start, end) places of the special tokens that its
        messages quote."""
        if not prefix.strip():
            text, quoted = self.fill_template(messages, add_generation_prompt)
            return text + prefix, quoted
        turn = message("assistant", prefix)
        text, quoted = self.fill_template([*messages, turn], add_generation_prompt=False)
        end = len(text) - len(self.end_of_turn(messages))
        kept = [place for place in quoted if place[1] <= end]
        return text[:end], kept

    def end_of_turn(self, messages):
        """What the template writes behind the assistant's answer to these messages: Dream's
        "<|im_end|>\\n"."""
        answer = unused_character(messages)
        turn = message("assistant", answer)
        text, _ = self.fill_template([*messages, turn], add_generation_prompt=False)
        if answer not in text:
            raise ValueError("the chat template leaves out what the assistant says")
        return text.rpartition(answer)[2]

    def fill_template(self, messages, add_generation_prompt):
        """`render` without a prefix."""
        if self.compiled is None:
            self.compiled = compile_template(choose_template(self.template))
        # Marks around the special tokens in a content survive the template, and tell where they are.
        mark = unused_character(messages)
        marked = []
        for turn in messages:
            if isinstance(turn.get("content"), str):
                content = self.pattern.sub(lambda found: mark + found[0] + mark, turn["content"])
                turn = {**turn, "content": content}
            marked.append(turn)
        known = dict(self.special, tools=None, documents=None)
        known.update(messages=marked, add_generation_prompt=add_generation_prompt)
        try:
            rendered = self.compiled.render(known)
        except Exception as e:  # a template is foreign code: whatever it raises is its error
            why = f"{type(e).__name__}: {e}"
            raise ValueError(f"the chat template cannot render these messages: {why}") from e
        text, quoted = "", []
        for i, piece in enumerate(rendered.split(mark)):
            if i % 2:  # between two marks
                quoted.append((len(text), len(text) + len(piece)))
            text += piece
        return text, quoted


def make_special(backend, names, ids):
    """Tell the library that the tokens of these names and ids are special -> all special tokens.

    It spells a special token as text only where it knows the token to be special, and the files do
    not always say so of those that end a response."""
    special = set(names)
    for i, token in backend.get_added_tokens_decoder().items():
        if token.content and (token.special or token.content in names or i in ids):
            token.special = True
            backend.add_special_tokens([token])  # with the other flags that it was added with
            special.add(token.content)
            names = names - {token.content}
    backend.add_special_tokens(sorted(names))  # these were plain words of the vocabulary
    return special


def message(role, content):
    return {"role": role, "content": content}


def unused_character(messages):
    """A character that no message holds: one of the 32 that Unicode reserves for use inside
    programs."""
    said = "".join(str(turn.get("content")) for turn in messages)
    for code in range(0xFDD0, 0xFDF0):
        if chr(code) not in said:
            return chr(code)
    raise ValueError("the messages hold all of Unicode's noncharacters U+FDD0 to U+FDEF")


def first_end(ids, stop_ids):
    """The place of the first token that ends a response, or len(ids) where none does."""
    for i, token in enumerate(ids):
        if token in stop_ids:
            return i
    return len(ids)


def cut(text, stops):
    """The text up to the first of the stop strings."""
    end = len(text)
    for stop in stops:
        found = text.find(stop)
        if stop and 0 <= found < end:
            end = found
    return text[:end]


def disagreements(tok, config):
    """Lines about the ids on which a model's config and its tokenizer disagree: EOS, padding, mask.

    config: anything with eos_id, pad_id and mask_id."""
    lines = []
    for name in ("eos", "pad", "mask"):
        token = tok.special.get(f"{name}_token")
        ours, theirs = getattr(config, f"{name}_id", None), tok.ids.get(token)
        if None not in (ours, theirs) and ours != theirs:
            lines.append(f"{name}_token_id is {ours} in config.json, the tokenizer has {theirs} ({token})")
    return lines


# ---------------------------------------------------------------------- reading a tokenizer's files


def load_tokenizer(folder, eos_id=None, mask_id=None):
    """Tokenizer from tokenizer.json, or from vocab.json and merges.txt. Special tokens and the chat
    template come from tokenizer_config.json; added_tokens.json, special_tokens_map.json and
    chat_template.json are read where that does not say, and chat_template.jinja wins over it.
    eos_id, mask_id: the ids of the model's config.

    Raises FileNotFoundError, or ValueError for a file that cannot be read, for added tokens that do
    not fit, and for a special token that is declared and not in the vocabulary."""
    folder = Path(folder)
    config = read_json_if_any(folder / "tokenizer_config.json")
    config = {**read_json_if_any(folder / "special_tokens_map.json"), **config}
    special, declared = special_tokens(config)
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

    processor = read_json_if_any(folder / "chat_template.json")
    template = config.get("chat_template") or processor.get("chat_template")
    if isinstance(template, list):  # named templates: [{"name": "default", "template": ...}, ...]
        template = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
    if (folder / "chat_template.jinja").is_file():
        template = read_text(folder / "chat_template.jinja")
    return Tokenizer(backend, special, template, eos_id, mask_id)


def load_backend(folder):
    import tokenizers

    if (folder / "tokenizer.json").is_file():
        backend = tokenizers.Tokenizer.from_str(read_text(folder / "tokenizer.json"))
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        backend = qwen2_backend(folder / "vocab.json", folder / "merges.txt")
    else:
        raise FileNotFoundError(f"no tokenizer.json and no vocab.json with merges.txt in {folder}")
    backend.no_truncation()  # a file may ask for either, and both would change what is trained on
    backend.no_padding()
    return backend


def qwen2_backend(vocab, merges):
    """Qwen2's tokenizer from its two files: NFC, the split pattern, byte-level BPE."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pairs = []
    for line in read_text(merges).split("\n"):
        if line.strip() and not line.startswith("#version"):
            pairs.append(tuple(line.rstrip("\r").split(" ")))
    backend = Tokenizer(models.BPE(read_json(vocab), pairs))
    backend.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    backend.decoder = decoders.ByteLevel()
    return backend


def special_tokens(config):
    """{"eos_token": text, ...} for the templates, and {text: the key that declares it} of what must
    be in the vocabulary. A token is a text, or an AddedToken written as a dict."""
    special, declared = {}, {}
    for key, value in config.items():
        for one in value if isinstance(value, list) else [value]:
            text = one.get("content") if isinstance(one, dict) else one
            if not isinstance(text, str) or not text:
                continue
            if key.endswith("_token"):
                special[key] = text
            if key in NAMED or key == "additional_special_tokens":
                declared[text] = key
    return special, declared


def add_tokens(backend, folder, config, declared):
    """Add the tokens of added_tokens_decoder (tokenizer_config.json) and of added_tokens.json, each
    at its id."""
    import tokenizers

    added, file = {}, folder / "added_tokens.json"
    for token, i in read_json_if_any(file).items():
        if type(i) is not int:
            raise ValueError(f"{file}: {token!r} has the id {i!r:.40}, which is no whole number")
        added[i] = (dict(content=token, special=token in declared), file)
    file = folder / "tokenizer_config.json"
    decoder = config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise ValueError(f"{file}: added_tokens_decoder must map ids to tokens, found {decoder!r:.40}")
    for i, token in decoder.items():
        content = token.get("content") if isinstance(token, dict) else None
        if not re.fullmatch("[0-9]{1,9}", i) or not isinstance(content, str):
            raise ValueError(f"{file}: added_tokens_decoder must map ids to tokens, found {i!r:.40}")
        added[int(i)] = (token, file)

    for i, (token, file) in sorted(added.items(), key=lambda item: item[0]):
        text = token["content"]
        if backend.token_to_id(text) != i:
            flags = {flag: bool(token.get(flag)) for flag in FLAGS}
            backend.add_tokens([tokenizers.AddedToken(text, **flags)])
        if backend.token_to_id(text) != i:
            got = backend.token_to_id(text)
            raise ValueError(f"{file}: {text} should have id {i}, the vocabulary puts it at {got}")


# -------------------------------------------------------------------------- templates, and encoding


def choose_template(template):
    """The template to render: the one there is, or of several named ones "default"."""
    if isinstance(template, dict):
        only = template if len(template) == 1 else {}
        names = ", ".join(map(str, template))
        template = template.get("default", *only.values())
        if template is None and names:
            raise ValueError(f"the tokenizer's chat templates are {names}; none of them is called default")
    if not isinstance(template, str):
        raise ValueError("the tokenizer has no chat_template: use an instruct checkpoint, or --raw")
    return template


def compile_template(template):
    """A chat template in jinja2's sandbox, with what transformers gives to templates: loop
    controls, generation tags, raise_exception, strftime_now and its own tojson."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %}...{% endgeneration %} marks what the assistant writes; its text is that
        of the block."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def raise_exception(message):
        raise TemplateError(message)

    def strftime_now(form):
        return datetime.datetime.now().strftime(form)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        options = dict(ensure_ascii=ensure_ascii, indent=indent)
        return json.dumps(x, separators=separators, sort_keys=sort_keys, **options)

    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    env.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
    env.filters["tojson"] = tojson
    try:
        return env.from_string(template)
    except Exception as e:  # foreign code again
        raise ValueError(f"the chat template cannot render: {type(e).__name__}: {e}") from e


def encode_prompt(tok, messages, raw=False, prefix="", max_tokens=None):
    """Token ids of a conversation, ready for a response.

    raw: the last message's text without the chat template. prefix: the start of the answer (see
    Tokenizer.chat). max_tokens: the last message is cut on its right so that the prompt has at most
    so many tokens. What the messages say is spelled as text, also where it quotes a special token.
    Raises ValueError for a prompt of no tokens, and for one that cannot be cut that far."""
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
    """The messages with the last one cut on its right, so that the rendered prompt has at most
    max_tokens tokens.

    The text keeps max_tokens - (tokens of the template around one token of text), as the release
    cuts: one less than would fit. Raises ValueError where the template alone is longer."""
    ids = tok.encode_text(messages[-1]["content"])
    around = len(tok.encode_chat(messages)) - len(ids)
    room = max_tokens - (around + 1)
    if len(ids) <= room:
        return messages
    while room > 0:
        text = tok.decode(ids[:room])
        shorter = [*messages[:-1], {**messages[-1], "content": text}]
        # Half a character at the end is left out. What is kept may need more tokens than it had.
        if not text.endswith("\ufffd") and len(tok.encode_chat(shorter)) <= max_tokens:
            return shorter
        room -= 1
    raise ValueError(f"the chat template takes {around} of at most {max_tokens} tokens: no room for text")


def encode_answer(tok, messages, answer, raw=False):
    """Token ids of a reference answer as the model would write it: its text, the template's end of
    turn, EOS.

    The answer is spelled as text, also where it quotes a special token. Raises ValueError where
    that is not possible, and where neither the tokenizer nor the config names an EOS token."""
    if tok.eos_id is None:
        raise ValueError("the tokenizer names no eos_token, and an answer must end")
    if raw:
        return [*tok.encode_text(answer), tok.eos_id]
    before, _ = tok.render(messages)
    after, quoted = tok.render([*messages, message("assistant", answer)], False)
    if after.startswith(before):
        start = len(before)
        ids = tok.encode(after[start:], [(a - start, b - start) for a, b in quoted if a >= start])
    else:  # a finished turn does not begin as the generation prompt does: with an empty thought, say
        end = tok.end_of_turn(messages)
        ids = tok.encode(answer + end, [found.span() for found in tok.pattern.finditer(answer)])
    ids = ids[: first_end(ids, tok.stop_ids) + 1]  # some templates go on behind the end of the turn
    if ids[-1:] != [tok.eos_id]:
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


def read_text(file):
    """A file's text; a byte order mark, as editors on Windows write it, is no part of it."""
    try:
        return Path(file).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise ValueError(f"{file}: not UTF-8 text ({e})") from e


def read_json(file):
    """The JSON object in a file. Raises ValueError for anything else."""
    try:
        content = json.loads(read_text(file))
    except (json.JSONDecodeError, RecursionError) as e:
        raise ValueError(f"{file}: not valid JSON ({e})") from e
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a JSON object, found {type(content).__name__}")
    return content


def read_json_if_any(file):
    return read_json(file) if Path(file).is_file() else {}


# -------------------------------------------------------------------------------- files of any rows

MAX_LINE = 64 * 2**20  # bytes of one JSON line; more is not a dataset but an accident


def read_rows(path):
    """(where, row) for every row of a .jsonl, .jsonl.gz, .json or .parquet file; where =
    "file:line".

    A .json file holds one list, an object with the list under "data", or JSON Lines. Lines are read
    as they are asked for, no further.

    Raises FileNotFoundError or ValueError, which names the line."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no dataset file {path}")
    if path.suffix == ".parquet":
        yield from read_parquet(path)
    elif path.suffix == ".jsonl" or path.name.endswith(".jsonl.gz"):
        yield from read_jsonl(path)
    elif path.suffix == ".json":
        yield from read_jsonl(path) if holds_json_lines(path) else read_json_list(path)
    else:
        known = ".jsonl, .jsonl.gz, .json or .parquet"
        raise ValueError(f"{path}: unknown format {path.suffix!r}; use {known}")


def holds_json_lines(path):
    """Whether the first line of a file is a whole JSON object and not the file's only line."""
    with open(path, "rb") as f:
        first = f.readline(MAX_LINE).removeprefix(b"\xef\xbb\xbf")
        try:
            return isinstance(json.loads(first), dict) and any(line.strip() for line in f)
        except (ValueError, RecursionError):
            return False


def read_json_list(path):
    try:
        rows = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path}: not valid JSON ({e})") from e
    if isinstance(rows, dict):
        rows = rows.get("data", [rows])  # an object without "data" is the only row
    if not isinstance(rows, list):
        raise ValueError(f"{path}: expected a list of rows, found {type(rows).__name__}")
    for number, row in enumerate(rows, 1):
        yield f"{path}: row {number}", row


def read_jsonl(path):
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rb") as f:
            for number, line in enumerate(iter(lambda: f.readline(MAX_LINE + 1), b""), 1):
                if len(line) > MAX_LINE:
                    raise ValueError(f"{path}:{number}: the line is longer than {MAX_LINE} bytes")
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")  # a byte order mark
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as e:
                    raise ValueError(f"{path}:{number}: not valid JSON ({e})") from e
                yield f"{path}:{number}", row
    except (gzip.BadGzipFile, EOFError, zlib.error) as e:
        raise ValueError(f"{path}: a damaged gzip file ({e})") from e


def read_parquet(path):
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as e:
        raise ValueError(f"{path}: reading parquet needs pyarrow: pip install pyarrow") from e
    try:
        number = 0
        with pyarrow.parquet.ParquetFile(path) as f:
            for batch in f.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", row
    except pyarrow.ArrowException as e:
        raise ValueError(f"{path}: not a readable parquet file ({e})") from e


# ----------------------------------------------------------------------------------------- datasets

ROLES = {
    **dict.fromkeys(("user", "human", "prompter", "question"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt", "answer"), "assistant"),
    "system": "system",
}
CONVERSATIONS = ("messages", "conversations", "conversation")
# (prompt, answers in order of preference): the first pair whose prompt a row has is taken.
FIELDS = (
    ("question", "answer response solution generated_solution output solutions answers".split()),
    ("problem", "solution generated_solution answer response output".split()),
    ("prompt", "response completion answer canonical_solution output code solution chosen".split()),
    ("instruction", "output response answer completion".split()),
    ("query", "response answer output".split()),
    ("text", ["code"]),
    ("input", "output target answer response".split()),
    ("inputs", "targets outputs".split()),
)
LAST_ANSWERS = ("answerKey", "answer_idx", "expected_answer", "target")  # where there is no other
IDS = ("id", "task_id", "unique_id", "key")
SYSTEM = ("system", "system_prompt")
CHOICES = ("choices", "options")
# Columns that look like something the model should see, whatever they hold; and those that never do.
INPUTS = {*SYSTEM, *CHOICES, "context", "input", "history", "tools", "passage", "document", "article"}
INPUTS |= {"story", "background", "premise", "hypothesis", "schema", "starter_code"}
NOT_INPUTS = set(
    "test tests test_list test_setup_code test_imports challenge_test_list input_output entry_point "
    "rationale explanation reasoning thought cot rejected source dataset category subject topic level "
    "type split url license title method data_source metadata meta".split()
)


def read_examples(path, prompt_field=None, answer_field=None, limit=None, warn=warnings.warn):
    """The prompts of a dataset: [{id, where, prompt, messages, answer}]. where: "file:line";
    messages: what the model is asked, earlier turns first; prompt: the last of them; answer: a
    text, a list of several right ones, or None.

    Recognises `messages` (or `conversations`) with the usual role names, and the pairs in FIELDS;
    prompt_field and answer_field name other columns. system and history come before the prompt,
    context and input join it, choices are lettered below it. Reads no more than `limit` rows. The
    id is the row's own where all those read differ, else its number from 0. warn(line) is called
    once for every column that looks like input and is not used. Raises ValueError for an empty
    dataset, and with file and line for a row that fits nothing."""
    examples, own, told = [], [], set()
    for where, row in itertools.islice(read_rows(path), limit):
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected an object with named fields, found {row!r:.40}")
        example = to_example(row, where, prompt_field, answer_field)
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
    for key in IDS:
        if isinstance(row.get(key), (str, int)):
            return row[key]
    return None


def number_or_own(records, own):
    """Give the records their own ids, if each has one and all differ; otherwise they keep their
    numbers."""
    if None not in own and len(set(map(str, own))) == len(own):
        for record, key in zip(records, own):
            record["id"] = key


def to_example(row, where, prompt_field=None, answer_field=None):
    talk = None
    for column in CONVERSATIONS:
        talk = talk or row.get(column)
    if talk and prompt_field is None:
        messages = to_messages(talk, where)
        answer = None
        if messages[-1]["role"] == "assistant":
            answer = messages.pop()["content"]
        if answer_field is not None:
            answer = find_answer(row, where, None, answer_field)
    else:
        column = prompt_field or find_prompt(row, where)
        if prompt_field is None and isinstance(row[column], list):
            messages = to_messages(row[column], where)
        else:
            messages = [message("user", full_prompt(row, where, column))]
        answer = find_answer(row, where, column, answer_field)
    if not messages or messages[-1]["role"] != "user":
        raise ValueError(f"{where}: the conversation has no user turn to answer")
    messages = earlier_turns(row, where, messages) + messages
    return {"prompt": messages[-1]["content"], "messages": messages, "answer": answer}


def find_prompt(row, where):
    for column, _ in FIELDS:
        value = row.get(column)
        if isinstance(value, str) or (column == "prompt" and value and isinstance(value, list)):
            return column
    known = ", ".join([CONVERSATIONS[0], *dict(FIELDS)])
    has = ", ".join(row) or "no fields"
    raise ValueError(f"{where}: no known prompt field ({known}) among {has}; name yours")


def full_prompt(row, where, column):
    """The prompt column's text with what belongs to it: an instruction's input and context stand
    behind it, a question's context before it; choices are lettered."""
    prompt = row.get(column)
    if not isinstance(prompt, str):
        has = ", ".join(row)
        raise ValueError(f"{where}: field {column!r} is missing or not text; the row has {has}")
    context, more = extra_text(row, "context"), extra_text(row, "input")
    if column == "context":
        context = ""
    if context and column == "instruction":
        prompt = f"{prompt}\n\n{context}"
    elif context:
        prompt = f"{context}\n\n{prompt}"
    if more and column != "input":
        prompt = f"{prompt}\n{more}"
    for letter, text in find_choices(row):
        if not text.startswith((f"{letter})", f"{letter}.", f"{letter}:")):
            text = f"{letter}. {text}"
        prompt += f"\n{text}"
    return prompt


def extra_text(row, column):
    """The text of a column, or of its list of texts joined; "" where there is none."""
    value = row.get(column)
    if are_texts(value):
        value = "\n".join(value)
    return value if has_text(value) else ""


def find_choices(row):
    """[(letter, text), ...] of a multiple-choice row: a list (MMLU), a dict of texts and labels
    (ARC), or a dict of letters (MedQA)."""
    value = row.get("choices") or row.get("options")
    if isinstance(value, dict) and are_texts(value.get("label")) and are_texts(value.get("text")):
        pairs = list(zip(value["label"], value["text"]))
    elif isinstance(value, dict):
        pairs = list(value.items())
    elif isinstance(value, list):
        pairs = list(zip(string.ascii_uppercase, value))
    else:
        return []
    choices = []
    for letter, text in pairs:
        if not isinstance(letter, str) or type(text) not in (str, int, float):
            return []
        choices.append((letter, str(text)))
    return choices


def find_answer(row, where, column, answer_field=None):
    """The answer to the prompt in a column: text, a list of texts, or None where the row has
    none."""
    name = answer_field
    if name is None:
        for option in (*dict(FIELDS).get(column, ("answer",)), *LAST_ANSWERS):
            if row.get(option) not in (None, ""):
                name = option
                break
        else:
            return None
    elif row.get(name) is None:
        raise ValueError(f"{where}: field {name!r} is missing; the row has {', '.join(row)}")
    value, choices = row[name], find_choices(row)
    if choices:
        return chosen_letter(value, choices, where, name)
    if name == "solutions" and isinstance(value, str) and value.lstrip().startswith("["):
        value = json_list(value)  # APPS writes its list of programs as JSON text
        if not value:
            return None
    if name == "answers" and isinstance(value, dict):
        value = value.get("text")  # SQuAD: {"text": [...], "answer_start": [...]}
    return answer_text(value, where, name)


def json_list(text):
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def chosen_letter(value, choices, where, name):
    """The letter of a multiple-choice answer, which may be given as a number from 0, as the letter
    or as the text."""
    letters, texts = list(zip(*choices))
    if type(value) is int and 0 <= value < len(letters):
        return letters[value]
    if value in letters:
        return value
    if value in texts:
        return letters[texts.index(value)]
    if isinstance(value, str) and " " in value:  # the answer in words
        return value
    raise ValueError(f"{where}: field {name!r} is {value!r:.80}: none of the {len(letters)} choices")


def answer_text(value, where, name):
    """An answer as text or as a list of texts; a number is written out. Anything else is not what a
    model should learn to say."""
    if isinstance(value, str):
        return value
    if type(value) is int or (type(value) is float and math.isfinite(value)):
        return str(value)
    if are_texts(value):
        return value
    must = "must be text, a number or a list of texts"
    raise ValueError(f"{where}: field {name!r} {must}, found {value!r:.80}")


def has_text(value):
    return isinstance(value, str) and bool(value.strip())


def are_texts(value):
    """Whether a value is a list of texts, and not empty."""
    return isinstance(value, list) and bool(value) and all(isinstance(one, str) for one in value)


def to_messages(talk, where):
    messages = []
    for turn in talk if isinstance(talk, list) else [talk]:
        role = content = None
        if isinstance(turn, dict):
            role = ROLES.get(str(turn.get("role", turn.get("from"))).lower())
            content = turn.get("content", turn.get("value"))
        if isinstance(content, list):
            content = joined_parts(content)
        if role is None or not isinstance(content, str):
            needs = f"a role ({', '.join(ROLES)}) and a text content"
            raise ValueError(f"{where}: a message needs {needs}, found {turn!r:.120}")
        messages.append(message(role, content))
    return messages


def joined_parts(parts):
    """The text of a content given in parts, [{"type": "text", "text": ...}], or None where one is
    not text."""
    text = ""
    for part in parts:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            return None
        text += part["text"]
    return text


def earlier_turns(row, where, messages):
    """The turns that other columns put before a conversation: system or system_prompt, then
    history, a list of [user, assistant] pairs or of messages."""
    turns = []
    for name in SYSTEM:
        if not turns and messages[0]["role"] != "system" and has_text(row.get(name)):
            turns.append(message("system", row[name]))
    history = row.get("history")
    for pair in history if isinstance(history, list) else []:
        if isinstance(pair, dict):
            turns += to_messages(pair, where)
        elif are_texts(pair) and len(pair) == 2:
            turns += [message("user", pair[0]), message("assistant", pair[1])]
        else:
            raise ValueError(f"{where}: history must hold pairs [user, assistant], found {pair!r:.80}")
    return turns


def unused(row, example, answer_field=None):
    """What a row holds and nobody will see: lines about columns that look like input and are in no
    message, and about a row whose answer may be in one of them."""
    said = [turn["content"] for turn in example["messages"]]
    known = {*CONVERSATIONS, *IDS, *LAST_ANSWERS, *NOT_INPUTS, answer_field}
    for _, answers in FIELDS:
        known |= set(answers)
    prompts = dict(FIELDS).keys()
    known -= INPUTS | prompts
    choices = find_choices(row)
    if choices and choices[-1][1] in said[-1]:
        known |= {*CHOICES}
    if isinstance(row.get("history"), list):
        known.add("history")

    lines, others = [], []
    for column, value in row.items():
        text = extra_text(row, column)
        holds = isinstance(value, (str, list, dict)) and value not in ("", [], {}, "[]", "{}")
        if column in known or any(text and text in one for one in said):
            continue
        # A few words in a row are something to read; one word is a label.
        words = text == value and (len(text.split()) > 2 or column in prompts)
        if words or (column in INPUTS and holds):
            lines.append(f"the column {column!r} looks like input, and is not used")
        if column not in INPUTS and value != "" and type(value) in (str, int, float):
            others.append(column)
    if example["answer"] is None and others:
        lines.append(f"no answer column is known among {', '.join(others)}; name yours")
    return lines


# ------------------------------------------------------------------------------------- trajectories

PER_TOKEN = ("response_ids", "order", "step", "entropy", "confidence")  # one entry a response token
# Fields that only the authors' files have.
RELEASE_KEYS = ("response_token_ids", "decoding_order", "non_ltr_positions", "gen_text")
RELEASE_METHODS = ("entropy", "default", "credit", "topk_margin")
RELEASE_FIELDS = (  # (prompt, responses in order of preference), the first prompt that a row has
    ("prompt", ("response", "output", "gen_text", "answer")),
    ("instruction", ("output", "response", "gen_text", "answer")),
    ("question", ("gen_text", "answer", "response", "output")),
)
RELEASE_LENGTH = 256  # tokens of a response in the authors' files
MAX_STEP = 2**31 - 1


def trajectory_files(path):
    """The files of a trajectory folder (or the one file given), in the order of their names."""
    path = Path(path)
    return sorted(path.glob("trajectories*.jsonl")) if path.is_dir() else [path]


def read_trajectories(
    path,
    vocab_size=None,
    tok=None,
    methods=None,
    mask_id=None,
    max_prompt_tokens=None,
    warn=warnings.warn,
):
    """The records of a trajectory folder or file, checked and sorted by id: dicts with id,
    prompt_ids, response_ids and order as lists. order[r] is the decode rank of position r, or its
    decode step: equal numbers were decoded together, -1 never was.

    The authors' files are read as they are: records of them also have prompt, text, non_ltr (a list
    of positions, or None), method and data_source. They need tok, whose template renders the prompt
    (cut to max_prompt_tokens); methods: only rows of these decoding methods. warn(line) is called
    for every row of theirs that cannot be used. Raises FileNotFoundError, or ValueError with file
    and line: a broken line, a missing field, lists of different lengths, an id that is there twice,
    ids beyond vocab_size (trajectories of another model), a mask token (mask_id) that counts as
    decoded."""
    files = trajectory_files(path)
    if not files or not files[0].is_file():
        raise FileNotFoundError(f"no trajectories at {path}: give a folder of distill, or a file of it")
    records, released, own, first, theirs = [], [], [], {}, False
    for file in files:
        for where, row in read_rows(file):
            theirs = theirs or is_release(row)  # their rows need not all look like theirs
            if theirs and not is_ours(row):
                record = read_release(row, where, tok, methods, max_prompt_tokens, warn)
                if record is None:
                    continue
                record["id"] = len(released)
                released.append(check_record(record, where, vocab_size, mask_id))
                own.append(own_id(row))
            else:
                records.append(check_record(row, where, vocab_size, mask_id))
                key = row["id"]
                if key in first:
                    raise ValueError(f"{where}: id {key!r} appears twice, first at {first[key]}")
                first[key] = where
    number_or_own(released, own)
    return sorted(records + released, key=by_id)


def by_id(record):
    """Sorts records by their id, numbers before texts."""
    return isinstance(record["id"], str), record["id"]


def is_ours(row):
    return isinstance(row, dict) and ("response_ids" in row or "prompt_ids" in row)


def is_release(row):
    """Whether a row is one of the authors' trajectory files."""
    if not isinstance(row, dict) or is_ours(row):
        return False
    return any(key in row for key in RELEASE_KEYS) or row.get("method") in RELEASE_METHODS


def holds_trajectories(path):
    """Whether a path is a trajectory folder, or a file whose first row is a trajectory rather than
    a prompt."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no trajectories and no dataset at {path}")
    if path.is_dir():
        return True
    first = next(read_rows(path), (None, None))[1]
    return is_release(first) or (isinstance(first, dict) and "response_ids" in first)


def check_record(record, where, vocab_size=None, mask_id=None):
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected a trajectory record, found {type(record).__name__}")
    missing = []
    for key in ("prompt_ids", "response_ids", "order"):
        if not isinstance(record.get(key), list):
            missing.append(key)
    if type(record.get("id")) not in (str, int):
        missing.append("id")
    if missing:
        has = ", ".join(record) or "nothing"
        raise ValueError(f"{where}: not a trajectory: {', '.join(missing)} missing; has {has}")
    prompt, response, order = record["prompt_ids"], record["response_ids"], record["order"]
    N = len(response)
    if not prompt or not response or not are_integers(prompt + response, 0):
        raise ValueError(f"{where}: prompt_ids and response_ids must be lists of ids, and not empty")
    if len(order) != N or not are_integers(order, -1) or max(order) < 0:
        what = f"order must give each of the {N} response tokens its decode rank or step"
        raise ValueError(f"{where}: {what}, from 0, or -1 for one that was never decoded")
    for key in PER_TOKEN:
        if record.get(key) is not None and not are_numbers(record[key], N):
            raise ValueError(f"{where}: {key} must be a list of {N} numbers, one a response token")
    places = record.get("non_ltr")
    if places is not None and not (isinstance(places, list) and are_integers(places, 0, N - 1)):
        raise ValueError(f"{where}: non-left-to-right positions must be among 0 to {N - 1}")
    for key in ("finished", "correct"):
        if type(record.get(key)) not in (bool, type(None)):
            raise ValueError(f"{where}: {key} must be true, false or null, found {record[key]!r:.40}")
    top = max(*prompt, *response)
    if vocab_size is not None and top >= vocab_size:
        whose = f"the model has {vocab_size}: trajectories of another model"
        raise ValueError(f"{where}: token id {top}, but {whose}")
    for i, token in enumerate(response):
        if token == mask_id and order[i] >= 0:
            what = f"response token {i} is the mask token {mask_id}"
            raise ValueError(f"{where}: {what}, and yet decoded: its order is {order[i]}")
    return record


def are_integers(values, low, high=MAX_STEP):
    return all(type(i) is int and low <= i <= high for i in values)


def are_numbers(values, n):
    """Whether a value is a list of n finite numbers."""
    if not isinstance(values, list) or len(values) != n:
        return False
    return all(type(x) in (int, float) and abs(x) <= MAX_STEP for x in values)


def usable(record, keep="correct"):
    """Whether a trajectory is trained on. keep: "correct" = finished, and correct where that could
    be checked; "finished" = a token that ends it came within the budget; "all"."""
    if keep == "all":
        return True
    right = keep == "finished" or record.get("correct") is not False
    return bool(record.get("finished")) and right


def cut_at_eos(record, stop_ids):
    """The record without the tokens after the first that ends it. The order of the rest is numbered
    anew: 0, 1, ... in the old order, equal numbers stay equal, -1 stays -1."""
    n = first_end(record["response_ids"], stop_ids) + 1
    if n >= len(record["response_ids"]):
        return record
    shorter = dict(record)
    for key in PER_TOKEN:
        if record.get(key) is not None:
            shorter[key] = record[key][:n]
    if shorter.get("non_ltr") is not None:
        shorter["non_ltr"] = [r for r in record["non_ltr"] if r < n]
    if shorter.get("order") is not None:
        new = {-1: -1}
        for old in sorted(set(shorter["order"]) - {-1}):
            new[old] = len(new) - 1
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


# ------------------------------------------------------------------------------- the authors' files


def read_release(row, where, tok, methods=None, max_prompt_tokens=None, warn=warnings.warn):
    """A row of the authors' trajectory files as a record without id, or None where it is not used:
    it is of another method, or warn(line) says what it lacks.

    A row without response_token_ids gets those of its text, as the model would write it. A row
    without a decoding_order for every token counts as decoded from left to right."""
    if tok is None:
        raise ValueError(f"{where}: the authors' files need the model's tokenizer for their prompts")
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a trajectory, found {type(row).__name__}")
    if methods is not None and row.get("method") not in list(methods):
        return None
    prompt, text = release_texts(row)
    response = row.get("response_token_ids")
    if prompt is None or (text is None and not response):
        lacks = "prompt" if prompt is None else "response"
        warn(f"{where}: not used, it has no {lacks}; the row has {', '.join(row) or 'nothing'}")
        return None
    messages = [message("user", prompt)]
    try:
        prompt_ids = encode_prompt(tok, messages, max_tokens=max_prompt_tokens)
        if not response:
            response = encode_answer(tok, messages, text)
    except ValueError as e:
        raise ValueError(f"{where}: {e}") from e
    if not isinstance(response, list) or not are_integers(response, 0):
        raise ValueError(f"{where}: response_token_ids must be a list of ids, found {response!r:.80}")
    order = row.get("decoding_order")
    if not isinstance(order, list) or len(order) < len(response):
        order = list(range(len(response)))
    if all(step == -1 for step in order[: len(response)]):
        warn(f"{where}: not used, none of its tokens was ever decoded")
        return None
    source = row.get("data_source")
    if not has_text(source):
        source = ""
    return dict(
        prompt=prompt,
        prompt_ids=prompt_ids,
        response_ids=response,
        order=order[: len(response)],
        non_ltr=row.get("non_ltr_positions"),
        text=text,
        method=row.get("method"),
        data_source=source.strip() or None,
        finished=first_end(response, tok.stop_ids) < len(response),
        correct=None,
    )


def release_texts(row):
    """The prompt and the response of a row of the authors' files, each a text or None."""
    for column, responses in RELEASE_FIELDS:
        if has_text(row.get(column)):
            texts = [row[name] for name in responses if has_text(row.get(name))]
            return row[column], texts[0] if texts else None
    said, messages = {}, row.get("messages")
    for turn in messages if isinstance(messages, list) else []:
        if isinstance(turn, dict) and has_text(turn.get("content")):
            said.setdefault(str(turn.get("role")), turn["content"])  # the first that each says
    return said.get("user"), said.get("assistant")


def release_methods(family, method=None):
    """The methods whose rows the release trains on, or None for all of them. method: its filter;
    None = its default. For LLaDA "entropy" stands for three."""
    if method == "all":
        return None
    if family == "llada" and method in (None, "entropy"):
        return {"entropy", "default", "credit"}
    return {method or "entropy"}


def to_release_format(record, pad_id, method="entropy"):
    """A record of ours as a row of the authors' trajectory files, whose trainer takes it: its last
    user turn (earlier turns have no place there), the response padded to 256 tokens, and the decode
    step of every position."""
    missing = max(0, RELEASE_LENGTH - len(record["response_ids"]))
    steps = record.get("step") or record["order"]
    return dict(
        id=record["id"],
        prompt=record["prompt"],
        response=record.get("text", ""),
        response_token_ids=record["response_ids"] + [pad_id] * missing,
        decoding_order=steps + [-1] * missing,
        non_ltr_positions=non_ltr_positions(steps),
        method=method,
        data_source=record.get("data_source") or "",
    )


# ------------------------------------------------------------------------------------------ batches


def generator(*keys, device="cpu"):
    """A torch.Generator whose seed depends on all keys, such as (seed, epoch, example), and on
    nothing else."""
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
    the right: prompt_ids, prompt_mask [B, P], response_ids, order [B, N] and length [B], all int64.
    Padding has the order -1.

    Where a record has non_ltr, non_ltr is a bool tensor [B, N] (a record without has its own
    computed); where all have their entropies, entropy is a float32 tensor [B, N] with 0 for
    padding. A record without an order (a reference answer) counts as decoded from left to right."""
    prompt_ids, prompt_mask = pad_left([r["prompt_ids"] for r in records], pad_id)
    length = torch.tensor([len(r["response_ids"]) for r in records])  # [B]
    response = torch.full((len(records), int(length.max())), pad_id)  # [B, N]
    order = torch.full_like(response, -1)  # [B, N]
    batch = dict(prompt_ids=prompt_ids, prompt_mask=prompt_mask)
    batch.update(response_ids=response, order=order, length=length)
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
