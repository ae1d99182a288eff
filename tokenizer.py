"""Tokenizers and chat templates: texts and conversations <-> token ids.

    tok = tokenizer.load("path/to/Dream-v0-Instruct-7B")
    ids = tokenizer.encode_prompt(tok, [{"role": "user", "content": "Hi"}])  # ready for a response
    answer = tokenizer.encode_answer(tok, [{"role": "user", "content": "Hi"}], "Hello")
    text = tok.response_text(answer)  # up to the first token that ends it

Sources: Hugging Face tokenizers for byte-level BPE; Qwen2's split pattern for Dream, which ships no tokenizer.json; the
checkpoint's chat_template, rendered in jinja2's sandbox with what transformers gives to templates.

Dimensions: none; token ids are lists of int.
"""

import datetime
import importlib
import json
import re
from pathlib import Path

# How Qwen2, and so Dream, splits text: contractions, words, single digits, punctuation, space.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
END_OF_TURN = ("<|eot_id|>", "<|im_end|>")  # LLaDA's, and Qwen's; they end a response as EOS does
# Model types whose answers end with the end of a turn, without EOS behind it -> variables that their templates take.
TURN_IS_LAST = {"sdar": {}, "a2d-qwen2": {}, "a2d-qwen3": {"enable_thinking": False}}
EMPTY_THOUGHT = "<think>\n\n</think>\n\n"  # Qwen3's template writes it before an answer without a thought
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")  # of an added token
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """A checkpoint's tokenizer and chat template.

    special: {"eos_token": "<|endoftext|>", ...}; template: a text, a dict of named texts, or None; eos_id, mask_id: of
    the model's config; model_type: what that calls the family; ends: more ids that end a response. size: the largest id
    + 1; a network has more rows (Dream 152,064 for 151,667), which must not be generated (`unused_ids`). stop_ids:
    every id that ends a response: ends, the EOS of the config and of the tokenizer, the end-of-turn tokens, and the
    padding, which some models write behind their answer and never their EOS (DiffuCoder). last_ids: the ids that a
    reference answer may end with."""

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
        self.last_ids = {self.eos_id} | (turns if model_type in TURN_IS_LAST else set())
        self.variables = TURN_IS_LAST.get(model_type, {})  # of the template

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

        quoted: (start, end) of special tokens that the text only speaks about. They are spelled as text. Raises
        ValueError for a text that the vocabulary cannot spell."""
        if quoted:
            return quoting().encode(self, text, quoted)
        return self.encoding(text).ids

    def encode_text(self, text):
        """`encode` of a text in which special tokens are spelled like any other text."""
        if self.pattern.search(text):
            return quoting().encode_text(self, text)
        return self.encoding(text).ids

    def encoding(self, text):
        """The library's Encoding of a text: ids, and offsets, the (start, end) of each token in it."""
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
        """(text, positions) of every token, in order: positions are indexes into ids, several where only together they
        spell a character. A mask token is a piece whose text is None."""
        found, positions = [], []
        for i, token in enumerate(ids):
            positions.append(i)
            text = None if token == mask_id else self.decode(ids[positions[0] : i + 1])
            goes_on = i + 1 < len(ids) and ids[i + 1] != mask_id
            if text is not None and text.endswith("\ufffd") and goes_on and len(positions) < 8:
                continue
            found.append((text, positions))
            positions = []
        return found

    def unused_ids(self, vocab_size):
        """The ids below vocab_size that are no token: rows of a network that must not be generated."""
        return sorted(set(range(vocab_size)) - set(self.ids.values()))

    def chat(self, messages, add_generation_prompt=True, prefix=""):
        """Text of a conversation [{role, content}, ...] by the chat template in its folder.

        prefix: the start of the answer, which the model continues, as the template shows it: Dream's keeps a last
        newline, LLaDA's trims it. Raises ValueError where the checkpoint has no template or the template refuses the
        messages."""
        return self.render(messages, add_generation_prompt, prefix)[0]

    def encode_chat(self, messages, add_generation_prompt=True, prefix=""):
        """Token ids of `chat`. A special token inside a message's content is spelled as text."""
        return self.encode(*self.render(messages, add_generation_prompt, prefix))

    def render(self, messages, add_generation_prompt=True, prefix=""):
        """Text of `chat`, and the (start, end) of each special token that its messages quote."""
        if prefix.strip():
            _, text, quoted = self.render_answer(messages, prefix)
            end = len(text) - len(self.end_of_turn(messages))
            return text[:end], [span for span in quoted if span[1] <= end]
        if any(self.pattern.search(str(turn.get("content"))) for turn in messages):
            text, quoted = quoting().render(self, messages, add_generation_prompt)
        else:
            text, quoted = self.fill(messages, add_generation_prompt), []
        return text + prefix, quoted

    def fill(self, messages, add_generation_prompt=True):
        """The chat template, filled with messages."""
        known = dict(self.special, **self.variables, tools=None, documents=None, messages=messages)
        self.compiled = self.compiled or compile_template(self.template)
        try:
            return self.compiled.render(known, add_generation_prompt=add_generation_prompt)
        except Exception as e:  # a template is foreign code: whatever it raises is its error
            raise ValueError(f"the chat template cannot render these messages: {type(e).__name__}: {e}") from e

    def render_answer(self, messages, answer):
        """Text of the prompt for an answer, and `render` of the conversation with it. An empty thought that only the
        latter has is left out: a model whose prompts do not end with one has not learnt to write one."""
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
        text = self.fill([*messages, message("assistant", answer)], add_generation_prompt=False)
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
    """The position of the first token that ends a response, or len(ids) where none does."""
    return next((i for i, token in enumerate(ids) if token in stop_ids), len(ids))


def is_finished(response, order, stop_ids):
    """Whether a response holds a token that ends it and was decoded (order: -1 = never), with no mask before it."""
    return not stop_ids.isdisjoint(response) and -1 not in order[: first_end(response, stop_ids) + 1]


def quoting():
    """The module that spells a special token as text, imported where a text quotes one."""
    try:
        return importlib.import_module("formats.quoted")
    except ModuleNotFoundError as e:
        raise ValueError("a text quotes a special token: spelling it needs formats/ beside tokenizer.py") from e


# ------------------------------------------------------------------------------------------ prompts and answers


def encode_prompt(tok, messages, raw=False, prefix="", max_tokens=None):
    """Token ids of a conversation, ready for a response. Special tokens that it quotes are text.

    raw: the last message's text without the chat template. prefix: the start of the answer (see Tokenizer.chat).
    max_tokens: the last message is cut on its right so that the prompt has at most so many. Raises ValueError for a
    prompt of no tokens, for one that cannot be cut that far, and for a template that leaves out what the user says."""
    if raw:
        ids = tok.encode_text(messages[-1]["content"] + prefix)[:max_tokens]
    else:
        if max_tokens is not None:
            messages = cut_messages(tok, messages, max_tokens)
        text, quoted = tok.render(messages, prefix=prefix)
        check_asked(tok, messages, text)
        ids = tok.encode(text, quoted)
    if not ids:
        raise ValueError("an empty prompt: the model needs at least one token to answer")
    return ids


def check_asked(tok, messages, text):
    """Raises ValueError where the template's text of messages has nothing of what a user says."""
    for i, turn in enumerate(messages):
        if turn["role"] == "user" and turn["content"].strip() not in text:  # left out, or written in another way
            other = [*messages[:i], message("user", unused_character(messages)), *messages[i + 1 :]]
            if tok.fill(other) == tok.fill(messages):
                raise ValueError(f"the chat template leaves out what the user says: {turn['content']!r:.80}")


def cut_messages(tok, messages, max_tokens):
    """The messages with the last one cut on its right, so that they render to at most max_tokens.

    The text keeps max_tokens - (tokens of the template around one token of text), as the authors' trainer cuts: one
    less than would fit. Raises ValueError where the template alone is longer."""
    ids = tok.encode_text(messages[-1]["content"])
    around = len(tok.encode_chat(messages)) - len(ids)
    if len(ids) < max_tokens - around:
        return messages
    for kept in range(max_tokens - around - 1, 0, -1):
        text = tok.decode(ids[:kept])
        shorter = [*messages[:-1], {**messages[-1], "content": text}]
        # Half a character at the end is left out. What is kept may need more tokens than it had.
        if not text.endswith("\ufffd") and len(tok.encode_chat(shorter)) <= max_tokens:
            return shorter
    raise ValueError(f"the chat template takes {around} of at most {max_tokens} tokens: no room for text")


def encode_answer(tok, messages, answer, raw=False):
    """Token ids of a reference answer as the model would write it: its text, the template's end of turn, and EOS where
    the end of a turn is not enough.

    The answer is spelled as text, also where it quotes a special token. Raises ValueError where that is not possible,
    and where neither the tokenizer nor the config names an EOS token."""
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
    """Give every example of `data.read_examples` its prompt_ids and, with answers, its response_ids: those of the first
    answer where there are several. Raises ValueError with file and line for one that cannot be encoded."""
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


# -------------------------------------------------------------------------------------------- a checkpoint's files


def load(folder, eos_id=None, mask_id=None):
    """Tokenizer from tokenizer.json, or from vocab.json and merges.txt; eos_id, mask_id: of the
    model's config. Special tokens and the chat template come from tokenizer_config.json;
    added_tokens.json, special_tokens_map.json and chat_template.json are read where that does not
    say, and chat_template.jinja wins over it. The family is config.json's model_type; a list of
    EOS ids in generation_config.json adds to those that end a response.

    Raises FileNotFoundError, or ValueError for a file that cannot be read, for added tokens that do
    not fit, for two tokens at one id, and for a special token that is declared and not in the vocabulary."""
    folder = Path(folder)
    config = read_json(folder / "special_tokens_map.json") | read_json(folder / "tokenizer_config.json")
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

    template = config.get("chat_template") or read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(template, list):  # named templates: [{"name": "default", "template": ...}, ...]
        template = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
    if (folder / "chat_template.jinja").is_file():
        template = read_text(folder / "chat_template.jinja")
    model_type = str(read_json(folder / "config.json").get("model_type"))
    ends = read_json(folder / "generation_config.json").get("eos_token_id")
    ends = filter(lambda i: type(i) is int, ends if isinstance(ends, list) else ())
    tok = Tokenizer(backend, special, template, eos_id, mask_id, model_type, ends)
    first = {}
    for token, i in tok.ids.items():
        if first.setdefault(i, token) != token:
            raise ValueError(f"{folder}: {first[i]!r} and {token!r} have one id, {i}")
    return tok


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
    for text, i in read_json(folder / "added_tokens.json").items():
        said.append((str(i), dict(content=text, special=text in declared), "added_tokens.json"))
    decoder = config.get("added_tokens_decoder") or {}
    for i, token in decoder.items() if isinstance(decoder, dict) else [("", decoder)]:
        said.append((i, token, "tokenizer_config.json"))
    added = {}  # id -> (token, file)
    for i, token, file in said:
        content = token.get("content") if isinstance(token, dict) else None
        if not re.fullmatch("[0-9]{1,9}", i) or not isinstance(content, str):
            raise ValueError(f"{folder / file}: an added token needs an id and a text, found {i!r:.40}: {token!r:.80}")
        if added.get(int(i), (0, 0))[1] == file:
            raise ValueError(f"{folder / file}: {added[int(i)][0]['content']!r} and {content!r} have one id, {i}")
        added[int(i)] = (token, file)

    for i, (token, file) in sorted(added.items(), key=lambda item: item[0]):
        text = token["content"]
        if backend.token_to_id(text) != i:
            backend.add_tokens([AddedToken(text, **{flag: bool(token.get(flag)) for flag in FLAGS})])
        if backend.token_to_id(text) != i:
            got = backend.token_to_id(text)
            raise ValueError(f"{folder / file}: {text} should have id {i}, the vocabulary puts it at {got}")


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
        raise ValueError(
            "the tokenizer has no chat_template: take an instruct checkpoint, or prompts without one (raw)"
        )

    def raise_exception(message):
        raise TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    env.filters["tojson"] = tojson
    # A generation tag marks what the assistant writes; its text is that of the block.
    template = re.sub(r"(\{%[-+]?\s*(?:end)?)generation(\s*[-+]?%\})", r"\1with\2", template)
    try:
        return env.from_string(template)
    except Exception as e:  # foreign code again
        raise ValueError(f"the chat template cannot render: {type(e).__name__}: {e}") from e


def read_text(file):
    """A file's text; a byte order mark, as editors on Windows write it, is no part of it."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise ValueError(f"{file}: not UTF-8 text ({e})") from e


def read_json(file):
    """The JSON object in a file, {} where there is no file."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{file}: not valid JSON ({e})") from e
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a JSON object, found {type(content).__name__}")
    return content
