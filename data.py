"""Tokenizers, chat templates, datasets, trajectory files and batches.

    tok = data.load_tokenizer("path/to/Dream-v0-Instruct-7B")      # tokenizer.json, or vocab.json + merges.txt
    ids = tok.encode(tok.chat([{"role": "user", "content": "Hi"}]))
    examples = data.read_examples("gsm8k.jsonl.gz")                # [{id, prompt, messages, answer}, ...]
    rows = data.read_trajectories("out/T")                         # what distillation wrote
    batch = data.collate(rows[:4], pad_id)                         # the dict of tensors that objectives.py takes

Sources: Hugging Face tokenizers for byte-level BPE; Qwen2's split pattern for Dream, which ships no tokenizer.json;
the checkpoint's own chat_template for prompts, rendered in jinja2's sandbox.
"""

import gzip
import hashlib
import json
import zlib
from pathlib import Path

import torch

# -------------------------------------------------------------------------------------------------------- tokenizer

# How Qwen2, and so Dream, splits text before byte-level BPE: contractions, words, single digits, punctuation, space.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
END_OF_TURN = ("<|eot_id|>", "<|im_end|>")  # LLaDA's and Dream's; they end a response as the EOS token does


class Tokenizer:
    """A checkpoint's tokenizer and chat template.

    size: one more than the largest id. Networks have more rows than that (Dream 152,064 for 151,667); those ids have no
    text: decode() refuses them, and generation must not choose them (`unused_ids`).
    stop_ids: the EOS token and the end-of-turn tokens that the vocabulary has."""

    def __init__(self, backend, special, template):
        self.backend, self.special, self.template, self.compiled = backend, special, template, None
        self.ids = backend.get_vocab(with_added_tokens=True)  # token -> id
        self.size = max(self.ids.values(), default=-1) + 1
        self.eos_id = self.ids.get(special.get("eos_token"))
        self.stop_ids = {self.ids[t] for t in (special.get("eos_token"), *END_OF_TURN) if t in self.ids}

    def encode(self, text):
        """Token ids of a text; special tokens written in it become their ids, and none are added.

        Raises ValueError for a text that the vocabulary cannot spell."""
        try:
            return self.backend.encode(text, add_special_tokens=False).ids
        except Exception as e:  # the library raises plain Exception
            raise ValueError(f"the tokenizer cannot encode {text!r:.80}: {e}") from e

    def decode(self, ids, skip_special=False):
        """Text of token ids. Raises ValueError for an id that the tokenizer does not have."""
        ids = [int(i) for i in ids]
        unknown = [i for i in ids if not 0 <= i < self.size]
        if unknown:
            raise ValueError(f"token id {unknown[0]} is outside the tokenizer, which has {self.size} ids")
        return self.backend.decode(ids, skip_special_tokens=skip_special)

    def response_text(self, ids):
        """Text of a response up to its first EOS or end of turn."""
        end = next((i for i, token in enumerate(ids) if token in self.stop_ids), len(ids))
        return self.decode(ids[:end])

    def pieces(self, ids, mask_id=None):
        """(text, places) of every token, in order: places are indexes into ids, several where only together they spell
        a character. A mask token is a piece whose text is None."""
        found, places = [], []
        for i, token in enumerate(ids):
            places.append(i)
            if token == mask_id:
                text = None
            else:
                text = self.decode([ids[k] for k in places])
                goes_on = i + 1 < len(ids) and ids[i + 1] != mask_id
                if text.endswith("\ufffd") and goes_on and len(places) < 8:
                    continue
            found.append((text, places))
            places = []
        return found

    def unused_ids(self, vocab_size):
        """The ids below vocab_size that are no token: rows of a network that must not be generated."""
        return sorted(set(range(vocab_size)) - set(self.ids.values()))

    def chat(self, messages, add_generation_prompt=True):
        """Text of a conversation [{role, content}, ...] by the checkpoint's own chat template.

        Raises ValueError where the checkpoint has none or the template refuses the messages."""
        if self.template is None:
            raise ValueError(
                "the tokenizer has no chat_template: use an instruct checkpoint, or --raw for plain prompts"
            )
        known = dict(self.special, tools=None, documents=None, add_generation_prompt=add_generation_prompt)
        try:
            if self.compiled is None:
                self.compiled = compile_template(self.template)
            return self.compiled.render(messages=messages, **known)
        except Exception as e:  # a template is foreign code: whatever it raises is its error, not ours
            raise ValueError(f"the chat template cannot render these messages: {type(e).__name__}: {e}") from e


def compile_template(template):
    """A chat template in jinja2's sandbox, with what Hugging Face templates may call."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message):
        raise TemplateError(message)

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    env.globals["raise_exception"] = raise_exception
    env.filters["tojson"] = lambda x, **options: json.dumps(x, ensure_ascii=False, **options)
    return env.from_string(template)


def load_tokenizer(folder):
    """Tokenizer from tokenizer.json, or from vocab.json and merges.txt; special tokens and the chat template from
    tokenizer_config.json (or chat_template.jinja).

    Raises FileNotFoundError, or ValueError for a file that cannot be read or whose added tokens do not fit."""
    import tokenizers

    folder = Path(folder)
    config_file = folder / "tokenizer_config.json"
    config = read_json(config_file) if config_file.is_file() else {}
    try:
        if (folder / "tokenizer.json").is_file():
            backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            backend = qwen2_backend(folder / "vocab.json", folder / "merges.txt")
        else:
            raise FileNotFoundError(f"no tokenizer.json and no vocab.json with merges.txt in {folder}")
        backend.no_truncation()  # a file may ask for either, and both would change what is trained on
        backend.no_padding()
    except FileNotFoundError:
        raise
    except Exception as e:  # the library raises plain Exception for anything wrong with a file
        raise ValueError(f"{folder}: the tokenizer's files cannot be read ({e})") from e

    added = config.get("added_tokens_decoder") or {}
    if not isinstance(added, dict) or not all(
        i.isdigit() and isinstance(t, dict) and isinstance(t.get("content"), str) for i, t in added.items()
    ):
        raise ValueError(f"{config_file}: added_tokens_decoder must map ids to tokens with a content")
    for i, token in sorted(added.items(), key=lambda item: int(item[0])):
        if backend.token_to_id(token["content"]) != int(i):
            flags = {k: bool(token.get(k)) for k in ("single_word", "lstrip", "rstrip", "normalized", "special")}
            backend.add_tokens([tokenizers.AddedToken(token["content"], **flags)])
        if backend.token_to_id(token["content"]) != int(i):
            got = backend.token_to_id(token["content"])
            raise ValueError(f"{config_file}: {token['content']} should have id {i}, the vocabulary puts it at {got}")

    special = {}  # bos_token, eos_token, ...: a string, or an AddedToken written as a dict
    for key, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(text, str):
            special[key] = text
    template = config.get("chat_template")
    if isinstance(template, list):  # several named templates
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    if (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    return Tokenizer(backend, special, template)


def qwen2_backend(vocab, merges):
    """Qwen2's tokenizer from its two files: NFC, the split pattern, byte-level BPE."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    backend = Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    backend.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    backend.decoder = decoders.ByteLevel()
    return backend


def encode_prompt(tok, messages, raw=False):
    """Token ids of a conversation, ready for a response; raw = the last message's text without the chat template.

    Raises ValueError for a prompt of no tokens."""
    ids = tok.encode(messages[-1]["content"] if raw else tok.chat(messages))
    if not ids:
        raise ValueError("an empty prompt: the model needs at least one token to answer")
    return ids


def encode_answer(tok, messages, answer, raw=False):
    """Token ids of a reference answer as the model would write it: its text, the template's end of turn, EOS."""
    text = answer
    if not raw:
        before = tok.chat(messages)
        after = tok.chat([*messages, {"role": "assistant", "content": answer}], add_generation_prompt=False)
        text = after[len(before) :] if after.startswith(before) else answer
    if tok.eos_id is None:
        raise ValueError("the tokenizer has no eos_token in tokenizer_config.json, and an answer must end")
    ids = tok.encode(text)
    end = next((i + 1 for i, token in enumerate(ids) if token in tok.stop_ids), len(ids))  # some templates go on
    return ids[:end] if ids[end - 1 : end] == [tok.eos_id] else [*ids[:end], tok.eos_id]


# --------------------------------------------------------------------------------------------------------- datasets

MAX_LINE = 64 * 2**20  # bytes of one JSON line; more is not a dataset but an accident
ROLES = {
    **dict.fromkeys(("user", "human", "prompter", "question"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt", "answer"), "assistant"),
    "system": "system",
}
FIELDS = (  # (prompt, answers in order of preference): the first pair whose prompt a row has is taken
    ("question", ("answer", "response", "solution")),
    ("problem", ("solution", "answer")),
    ("prompt", ("response", "completion", "answer", "canonical_solution")),
    ("instruction", ("output", "response", "answer")),
    ("query", ("response", "answer")),
    ("text", ("code",)),
)
IDS = ("id", "task_id", "unique_id", "key")


def read_json(file):
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as e:
        raise ValueError(f"{file}: not valid JSON ({e})") from e
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a JSON object, found {type(content).__name__}")
    return content


def read_rows(path):
    """(where, row) for every row of a .jsonl, .jsonl.gz, .json or .parquet file; where = "file:line".

    Raises FileNotFoundError or ValueError, which names the line."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no dataset file {path}")
    if path.suffix == ".parquet":
        yield from read_parquet(path)
    elif path.suffix == ".json":
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as e:
            raise ValueError(f"{path}: not valid JSON ({e})") from e
        rows = rows.get("data", rows) if isinstance(rows, dict) else rows
        if not isinstance(rows, list):
            raise ValueError(f"{path}: expected a list of rows, found {type(rows).__name__}")
        yield from ((f"{path}: row {i}", row) for i, row in enumerate(rows, 1))
    elif path.suffix == ".jsonl" or path.name.endswith(".jsonl.gz"):
        yield from read_jsonl(path)
    else:
        raise ValueError(f"{path}: unknown format {path.suffix!r}; use .jsonl, .jsonl.gz, .json or .parquet")


def read_jsonl(path):
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as f:
            for number, line in enumerate(iter(lambda: f.readline(MAX_LINE + 1), b""), 1):
                if len(line) > MAX_LINE:
                    raise ValueError(f"{path}:{number}: the line is longer than {MAX_LINE} bytes")
                if line.strip():
                    try:
                        yield f"{path}:{number}", json.loads(line)
                    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as e:
                        raise ValueError(f"{path}:{number}: not valid JSON ({e})") from e
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


def read_examples(path, prompt_field=None, answer_field=None, limit=None):
    """The prompts of a dataset: [{id, prompt, messages, answer}], answer None where a row has none, a list where it
    has several right ones.

    Recognises `messages` (or `conversations`) with the usual role names, and the pairs in FIELDS; prompt_field and
    answer_field name other columns. The id is the row's own where all differ, else its number from 0.
    Raises ValueError for an empty dataset, and with file and line for a row that fits nothing."""
    examples, own = [], []
    for where, row in read_rows(path):
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected an object with named fields, found {type(row).__name__}")
        examples.append(to_example(row, where, prompt_field, answer_field))
        own.append(next((row[k] for k in IDS if isinstance(row.get(k), (str, int))), None))
    if not examples:
        raise ValueError(f"{path}: the dataset is empty")
    unique = None not in own and len({str(i) for i in own}) == len(own)
    return [{"id": own[i] if unique else i, **example} for i, example in enumerate(examples[:limit])]


def to_example(row, where, prompt_field=None, answer_field=None):
    talk = row.get("messages") or row.get("conversations") or row.get("conversation")
    if talk and prompt_field is None:
        return from_messages(talk, where)
    if prompt_field is None:
        prompt_field = next((p for p, _ in FIELDS if isinstance(row.get(p), str)), None)
        if prompt_field is None:
            known = ", ".join(["messages", *(p for p, _ in FIELDS)])
            raise ValueError(
                f"{where}: no known prompt field ({known}) among {', '.join(row) or 'no fields'}; name yours"
            )
    if not isinstance(row.get(prompt_field), str):
        raise ValueError(f"{where}: field {prompt_field!r} is missing or not text; the row has {', '.join(row)}")
    if answer_field is None:
        options = dict(FIELDS).get(prompt_field, ("answer",))
        answer_field = next((a for a in options if row.get(a) is not None), None)
    elif row.get(answer_field) is None:
        raise ValueError(f"{where}: field {answer_field!r} is missing; the row has {', '.join(row)}")
    prompt = row[prompt_field]
    if prompt_field == "instruction" and row.get("input"):
        prompt = f"{prompt}\n{row['input']}"
    answer = None if answer_field is None else row[answer_field]
    several = isinstance(answer, list) and answer and all(isinstance(one, str) for one in answer)
    answer = answer if answer is None or several else str(answer)
    return {"prompt": prompt, "messages": [{"role": "user", "content": prompt}], "answer": answer}


def from_messages(talk, where):
    messages = []
    for turn in talk if isinstance(talk, list) else [talk]:
        turn = turn if isinstance(turn, dict) else {}
        role = ROLES.get(str(turn.get("role", turn.get("from"))).lower())
        content = turn.get("content", turn.get("value"))
        if role is None or not isinstance(content, str):
            raise ValueError(
                f"{where}: a message needs a role ({', '.join(ROLES)}) and a text content, found {turn!r:.120}"
            )
        messages.append({"role": role, "content": content})
    answer = messages.pop()["content"] if messages[-1]["role"] == "assistant" else None
    if not messages or messages[-1]["role"] != "user":
        raise ValueError(f"{where}: the conversation has no user turn to answer")
    return {"prompt": messages[-1]["content"], "messages": messages, "answer": answer}


# ----------------------------------------------------------------------------------------------------- trajectories

PER_TOKEN = ("response_ids", "order", "step", "entropy", "confidence")  # lists of one length in a trajectory record


def trajectory_files(path):
    """The files of a trajectory folder (or the one file given), in the order of their names."""
    path = Path(path)
    return sorted(path.glob("trajectories*.jsonl")) if path.is_dir() else [path]


def read_trajectories(path, vocab_size=None):
    """The records of a trajectory folder or file, checked and sorted by id: dicts with prompt_ids, response_ids and
    order as lists.

    Raises FileNotFoundError, or ValueError with file and line: a broken line, a missing field, lists of different
    lengths, an order that is no permutation, or ids beyond vocab_size (trajectories of another model)."""
    files = trajectory_files(path)
    if not files or not files[0].is_file():
        raise FileNotFoundError(f"no trajectories at {path}: give a folder of distill, or one of its files")
    records = [check_record(record, where, vocab_size) for file in files for where, record in read_rows(file)]
    return sorted(records, key=by_id)


def by_id(record):
    """Sorts records by their id, numbers before texts."""
    return isinstance(record["id"], str), record["id"]


def check_record(record, where, vocab_size=None):
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected a trajectory record, found {type(record).__name__}")
    missing = [k for k in ("prompt_ids", "response_ids", "order") if not isinstance(record.get(k), list)]
    missing += ["id"] * (not isinstance(record.get("id"), (str, int)))
    if missing:
        raise ValueError(
            f"{where}: not a trajectory: {', '.join(missing)} missing; has {', '.join(record) or 'nothing'}"
        )
    prompt, response, order = (record[k] for k in ("prompt_ids", "response_ids", "order"))
    if not all(type(i) is int and i >= 0 for i in (*prompt, *response, *order)) or not prompt or not response:
        raise ValueError(f"{where}: prompt_ids, response_ids and order must be lists of token ids, and not empty")
    if len(response) != len(order) or sorted(order) != list(range(len(order))):
        raise ValueError(f"{where}: order must number the {len(response)} response tokens from 0, each once")
    uneven = [k for k in PER_TOKEN if record.get(k) is not None and not has_length(record[k], len(response))]
    if uneven:
        raise ValueError(f"{where}: {', '.join(uneven)} must be lists of {len(response)}, one entry a response token")
    top = max(*prompt, *response)
    if vocab_size is not None and top >= vocab_size:
        raise ValueError(f"{where}: token id {top}, but the model has {vocab_size}: trajectories of another model")
    return record


def has_length(value, n):
    return isinstance(value, list) and len(value) == n


def holds_trajectories(path):
    """Whether a path is a trajectory folder, or a file whose first row is a trajectory rather than a prompt."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no trajectories and no dataset at {path}")
    if path.is_dir():
        return True
    first = next(read_rows(path), (None, None))[1]
    return isinstance(first, dict) and "response_ids" in first


def usable(record, keep="correct"):
    """Whether a trajectory is trained on. keep: "correct" = finished, and correct where that could be checked;
    "finished" = its EOS came within the budget; "all"."""
    if keep == "all":
        return True
    return bool(record.get("finished")) and (keep == "finished" or record.get("correct") is not False)


def cut_at_eos(record, eos_id):
    """The record without the tokens after its first EOS, and with the order of the rest numbered anew from 0."""
    response = record["response_ids"]
    if eos_id not in response:
        return record
    n = response.index(eos_id) + 1
    rank = {r: i for i, r in enumerate(sorted(record["order"][:n]))}
    return {**record, "response_ids": response[:n], "order": [rank[r] for r in record["order"][:n]]}


# ---------------------------------------------------------------------------------------------------------- batches


def generator(*keys, device="cpu"):
    """A torch.Generator whose seed depends on all keys, such as (seed, epoch, example), and on nothing else."""
    digest = hashlib.sha256(repr(keys).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def epoch_order(n, seed, epoch):
    """The order in which an epoch visits n examples: the same for any number of processes."""
    return torch.randperm(n, generator=generator(seed, epoch, "order")).tolist()


def pad_left(rows, pad_id):
    """Token id lists -> ids and mask, two int64 tensors [B, P]."""
    P = max(map(len, rows))
    ids = [[pad_id] * (P - len(row)) + list(row) for row in rows]
    mask = [[0] * (P - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)


def collate(records, pad_id):
    """Records -> the batch of objectives.py: prompts padded on the left, responses on the right; int64 tensors on the
    CPU. A record without an order (a reference answer) counts as decoded from left to right."""
    prompt_ids, prompt_mask = pad_left([r["prompt_ids"] for r in records], pad_id)
    lengths = [len(r["response_ids"]) for r in records]
    N = max(lengths)
    response = [r["response_ids"] + [pad_id] * (N - n) for r, n in zip(records, lengths)]
    order = [list(r.get("order") or range(n)) + list(range(n, N)) for r, n in zip(records, lengths)]
    return dict(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        response_ids=torch.tensor(response),
        order=torch.tensor(order),
        length=torch.tensor(lengths),
    )
