"""Datasets, trajectory files and batches.

    examples = data.read_examples("questions.jsonl.gz")  # [{id, where, prompt, messages, answer}, ...]
    records = data.read_trajectories("out/T")            # of distillation: [{id, prompt_ids, response_ids, order}, ...]
    batch = data.collate(records[:4], pad_id)            # the dict of tensors that objectives.py takes

A row of a dataset is {"prompt": text, "answer": text} or {"messages": [{"role": ..., "content": text}, ...]}, with or
without "id" and "answer"; a trajectory is what distillation writes. Rows of other forms are read by the modules in
ELSEWHERE, which are imported when the first such row comes.

Dimensions: B batch, P prompt, N response.
"""

import contextlib
import gzip
import hashlib
import importlib
import itertools
import json
import warnings
import zlib
from pathlib import Path

import torch

ELSEWHERE = {"example": "formats.columns", "trajectory": "release.files"}  # readers of other forms


def elsewhere(kind):
    """The module that reads rows of another form, or None where this file was copied without its folder."""
    try:
        return importlib.import_module(ELSEWHERE[kind])
    except ModuleNotFoundError:
        return None


# ------------------------------------------------------------------------------------------------- files and their rows

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


def names_of(path):
    """The file or folder that a path names, or several, with commas between them. Raises ValueError for an empty name,
    which would be the current folder, and for one that is there twice."""
    names = list(map(str.strip, [str(path)] if Path(path).exists() else str(path).split(",")))
    if "" in names or len(set(names)) < len(names):
        raise ValueError(f"the files {str(path)!r}: a name is empty or there twice")
    return list(map(Path, names))


def files_of(path):
    """The files that a path names (see names_of), of a folder those in the order of their names: its trajectories, else
    its .jsonl, .jsonl.gz and .parquet files, else its .json files."""
    files = []
    for name in names_of(path):
        found = trajectory_files(name)
        if not found:
            inside = sorted(name.iterdir())
            found = [file for file in inside if file.name.endswith((".jsonl", ".jsonl.gz", ".parquet"))]
            found = found or [file for file in inside if file.suffix == ".json"]
        if not found:
            raise FileNotFoundError(f"no trajectories and no dataset in the folder {name}")
        files += found
    return files


def holds_json_lines(path):
    """Whether the first line of a file is a whole JSON object and not the file's only line."""
    with open(path, "rb") as f, contextlib.suppress(ValueError, RecursionError):
        first = next(filter(bytes.strip, iter(lambda: f.readline(MAX_LINE), b"")), b"")
        return isinstance(json.loads(first), dict) and any(map(bytes.strip, f))
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
                # A kill may have torn the last line of a trajectory file, which distill then makes anew.
                if line.strip() and (line.endswith((b"\n", b"}")) or not path.match("trajectories*.jsonl")):
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


# ------------------------------------------------------------------------------------------------------------ examples

COLUMNS = {"id", "prompt", "messages", "answer"}
ROLES = ("system", "user", "assistant")
IDS = ("id", "task_id", "unique_id", "key")


def read_examples(path, prompt_field=None, answer_field=None, limit=None, warn=warnings.warn):
    """The prompts of a dataset (files_of its path): [{id, where, prompt, messages, answer}]. where: "file:line";
    messages: what the model is asked, earlier turns first; prompt: the last of them; answer: a text, a list of several
    right ones, or None.

    prompt_field and answer_field name columns with unusual names. Reads no more than `limit` rows. The id is the row's
    where all those read differ, else its number from 0. warn(line) is called once for every column that looks like
    input and is not used. Raises ValueError for an empty dataset, and with file and line for a row that fits
    nothing."""
    examples, ids, told, files = [], [], set(), files_of(path)
    if Path(path).is_dir():
        warn(f"{path}: read as one dataset are {', '.join(file.name for file in files)}")
    for where, row in itertools.islice(itertools.chain.from_iterable(map(read_rows, files)), limit):
        try:
            plain, lines = row, []
            if prompt_field or answer_field or not is_plain(row):
                plain, lines = to_plain(row, prompt_field, answer_field)
            example = to_example(plain)
        except ValueError as problem:
            raise ValueError(f"{where}: {problem}") from problem
        for line in lines:
            if line not in told:
                told.add(line)
                warn(f"{where}: {line}")
        examples.append({"id": len(examples), "where": where, **example})
        ids.append(id_of(row))
    if not examples:
        raise ValueError(f"{path}: the dataset is empty")
    if None not in ids and (same := len(ids) - len(set(map(str, ids)))):
        warn(f"{path}: {same} of {len(ids)} rows have an id that another row has, so all rows are numbered instead")
    give_ids(examples, ids)
    return examples


def is_plain(row):
    """Whether a row is {prompt, answer} or {messages, answer} of texts, with one answer or none; an id may be there."""
    if not isinstance(row, dict) or not row.keys() <= COLUMNS or ("prompt" in row) == ("messages" in row):
        return False
    messages = row.get("messages", [{"role": "user", "content": row.get("prompt")}])
    talk = isinstance(messages, list) and messages != [] and all(map(is_turn, messages))
    return talk and (row.get("answer") is None or (has_text(row["answer"]) and messages[-1]["role"] != "assistant"))


def is_turn(turn):
    """Whether a message is {role, content}. An assistant that says nothing is none."""
    if not isinstance(turn, dict) or turn.keys() != {"role", "content"} or turn["role"] not in ROLES:
        return False
    return isinstance(turn["content"], str) and (turn["role"] != "assistant" or has_text(turn["content"]))


def to_plain(row, prompt_field=None, answer_field=None):
    """A row of another form -> (the same as a plain row, lines about what of it is not used)."""
    if not isinstance(row, dict):
        raise ValueError(f"expected an object with named fields, found {row!r:.40}")
    reader = elsewhere("example")
    if reader is None:
        raise ValueError(f"to read more than prompt and answer, or messages, data.py needs {ELSEWHERE['example']}")
    return reader.to_plain(row, prompt_field, answer_field)


def to_example(row):
    """A plain row as {prompt, messages, answer}. What an assistant says last is the answer."""
    messages, answer = row.get("messages") or [{"role": "user", "content": row["prompt"]}], row.get("answer")
    if messages[-1]["role"] == "assistant":
        messages, answer = messages[:-1], messages[-1]["content"]
    if not messages or messages[-1]["role"] != "user":
        raise ValueError("the conversation has no user turn to answer")
    return {"prompt": messages[-1]["content"], "messages": messages, "answer": answer}


def id_of(row):
    """The id that a row brings along, or None."""
    return next((row[key] for key in IDS if type(row.get(key)) in (str, int)), None)


def give_ids(records, ids, taken=()):
    """Give the records these ids if each has one, all differ and none is taken; else numbers, from one above those that
    are: what is drawn for a record depends on its id."""
    if None in ids or len({*map(str, ids), *map(str, taken)}) < len(ids) + len(taken):
        ids = itertools.count(1 + max([-1, *filter(lambda key: isinstance(key, int), taken)]))
    for record, key in zip(records, ids):
        record["id"] = key


def has_text(value):
    return isinstance(value, str) and bool(value.strip())


# -------------------------------------------------------------------------------------------------------- trajectories

PER_TOKEN = ("response_ids", "order", "step", "entropy", "confidence")  # one entry a response token
MAX_STEP = 2**31 - 1


def trajectory_files(path):
    """The files of a trajectory folder (or the one file given), in the order of their names."""
    path = Path(path)
    return sorted(path.glob("trajectories*.jsonl")) if path.is_dir() else [path]


def read_trajectories(
    path, vocab_size=None, tok=None, methods=None, mask_id=None, max_prompt_tokens=None, warn=warnings.warn, raw=False
):
    """The records of trajectories (files_of their path), checked and sorted by id: dicts with id, prompt_ids,
    response_ids and order as lists. order[r] is the decode rank of position r, or its decode step: equal numbers were
    decoded together, -1 never was. Tokens A B C D of the order 0 2 1 -1: first A was decoded, then C, then B; D never.

    A file of another form (ELSEWHERE) has texts, and its reader needs tok, whose template renders the prompt (cut to
    max_prompt_tokens), or not if raw; methods: only rows of these; warn(line) is called for every row that it cannot
    use. Raises FileNotFoundError, or ValueError with file and line: a broken line, a missing field, lists of different
    lengths, an id that is there twice, ids beyond vocab_size (trajectories of another model), a mask token (mask_id)
    that counts as decoded."""
    files = files_of(path)
    if not files[0].is_file():
        raise FileNotFoundError(f"no trajectories at {path}: give a folder of distill, or a file of it")
    records, first, others, ids, reader = [], {}, [], [], None  # others: of another form; not all need look like it
    for where, row in itertools.chain.from_iterable(map(read_rows, files)):
        ours = is_ours(row)
        reader = reader or (None if ours else reader_of(row))
        try:
            if ours or reader is None:
                records.append(check_record(row, vocab_size, mask_id))
                if row["id"] in first:
                    raise ValueError(f"id {row['id']!r} appears twice, first at {first[row['id']]}")
                first[row["id"]] = where
                continue
            record, why = reader.read_record(row, tok, methods, max_prompt_tokens, raw)
            if record is not None:
                others.append(check_record({"id": len(others), **record}, vocab_size, mask_id))
                ids.append(id_of(row))
            elif why:
                warn(f"{where}: not used, {why}")
        except ValueError as problem:
            raise ValueError(f"{where}: {problem}") from problem
    give_ids(others, ids, first)
    return sorted(records + others, key=by_id)


def by_id(record):
    """Sorts records by their id, numbers before texts."""
    return isinstance(record["id"], str), record["id"]


def is_ours(row):
    """Whether a row is a trajectory as distillation writes it."""
    return isinstance(row, dict) and ("response_ids" in row or "prompt_ids" in row)


def reader_of(row):
    """The module that reads the trajectories of a file in another form, of which this is a row, or None."""
    module = elsewhere("trajectory")
    return module if module is not None and module.knows(row) else None


def holds_trajectories(path):
    """Whether a path is a trajectory folder, or names files whose first row is a trajectory."""
    file = files_of(path)[0]
    if Path(path).is_dir() and trajectory_files(path):
        return True
    _, row = next(read_rows(file), (None, None))
    return is_ours(row) or reader_of(row) is not None


def check_record(record, vocab_size=None, mask_id=None):
    """The record as it is. Raises ValueError for one that cannot be trained on."""
    if not isinstance(record, dict):
        raise ValueError(f"expected a trajectory record, found {type(record).__name__}")
    missing = [key for key in ("prompt_ids", "response_ids", "order") if not isinstance(record.get(key), list)]
    if type(record.get("id")) not in (str, int):
        missing.append("id")
    if missing:
        more = "" if elsewhere("trajectory") else f"; other forms need {ELSEWHERE['trajectory']} beside data.py"
        has = ", ".join(record) or "nothing"
        raise ValueError(f"not a trajectory: {', '.join(missing)} missing; has {has}{more}")
    prompt, response, order = record["prompt_ids"], record["response_ids"], record["order"]
    N = len(response)
    if not prompt or not response or not are_numbers(prompt + response, 0):
        raise ValueError("prompt_ids and response_ids must be lists of ids, and not empty")
    if len(order) != N or not are_numbers(order, -1) or max(order) < 0:
        what = f"order must give each of the {N} response tokens its decode rank or step"
        raise ValueError(f"{what}, from 0, or -1 for one that was never decoded")
    for key in PER_TOKEN:
        values = record.get(key)
        if values is not None and not (are_numbers(values, -MAX_STEP, kinds=(int, float)) and len(values) == N):
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
            raise ValueError(f"response token {i} is the mask token {mask_id}, and yet its order is {order[i]}")
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
    response = record["response_ids"]
    n = next((r + 1 for r, token in enumerate(response) if token in stop_ids), len(response))
    if n == len(response):
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


# ------------------------------------------------------------------------------------------------------------- batches


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
    left to right. Where a record has non_ltr, non_ltr is a bool tensor [B, N] (for a record
    without one it is computed from its order); where all have entropies, entropy is float32 [B, N] with
    0 for padding."""
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
            marked = record.get("non_ltr")
            marked = non_ltr_positions(steps) if marked is None else marked
            batch["non_ltr"][b, marked] = True
        if "entropy" in batch:
            batch["entropy"][b, :n] = torch.tensor(record["entropy"])
    return batch
