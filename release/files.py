"""The authors' trajectory files (tonyckc/TABOM), JSON Lines of texts: read as our records, and written from them.

    record, why = files.read_record(row, tok)          # for data.read_trajectories, where knows(row)
    row = files.to_release_format(record, tok.pad_id)  # for their trainer

A row has a prompt (or instruction, question, messages), response_token_ids (padded to 256), decoding_order (the decode
step of each position, -1 = never), non_ltr_positions, method and data_source.

Dimensions: N response; lists of int.
"""

from data import are_numbers, has_text, non_ltr_positions
from runs import disk
from tokenizer import encode_answer, encode_prompt, is_finished, message

# Fields that only they have, their methods, {prompt: responses by preference}.
KEYS = {"response_token_ids", "decoding_order", "non_ltr_positions", "gen_text"}
METHODS = ("entropy", "default", "credit", "topk_margin")
FIELDS = {
    "prompt": ("response", "output", "gen_text", "answer"),
    "instruction": ("output", "response", "gen_text", "answer"),
    "question": ("gen_text", "answer", "response", "output"),
}
LENGTH = 256  # tokens of a response
OURS = {"confidence": "default", "margin": "topk_margin"}  # our strategy -> what their method is called


def knows(row):
    """Whether a row is theirs."""
    return isinstance(row, dict) and (bool(KEYS & row.keys()) or row.get("method") in METHODS)


def read_record(row, tok, methods=None, max_prompt_tokens=None, raw=False):
    """A row of the authors' files -> (record without id, None), (None, why it cannot be used), or
    (None, None) where it is of another method. A row without response_token_ids gets those of its
    text, and EOS for what its decoding_order has beyond it; one without a decoding_order for every
    token counts as decoded from left to right, which `ordered` says."""
    if tok is None:
        raise ValueError("the authors' files need the model's tokenizer for their prompts")
    if not isinstance(row, dict):
        raise ValueError(f"expected a trajectory, found {type(row).__name__}")
    if methods is not None and row.get("method") not in list(methods):
        return None, None
    prompt, text = texts(row)
    response, order, source = row.get("response_token_ids"), row.get("decoding_order"), row.get("data_source")
    if prompt is None or (text is None and not response):
        lacks = "prompt" if prompt is None else "response"
        return None, f"it has no {lacks}; the row has {', '.join(row) or 'nothing'}"
    messages = [message("user", prompt)]
    prompt_ids = encode_prompt(tok, messages, raw, max_tokens=max_prompt_tokens)
    if not response:
        response = encode_answer(tok, messages, text, raw)
        if isinstance(order, list):  # of all positions that decoding had, of which the text lacks the EOS behind it
            response += [tok.eos_id] * (len(order) - len(response))
    if not are_numbers(response, 0):
        raise ValueError(f"response_token_ids must be a list of ids, found {response!r:.80}")
    ordered = isinstance(order, list) and len(order) >= len(response)
    if not ordered:
        order = range(len(response))
    steps, order = len(order), list(order[: len(response)])
    if order.count(-1) == len(order):
        return None, "none of its tokens was ever decoded"
    record = dict(prompt=prompt, prompt_ids=prompt_ids, response_ids=response, order=order, text=text, correct=None)
    record.update(non_ltr=row.get("non_ltr_positions"), method=row.get("method"), ordered=ordered)
    # Of the positions that have a step those without a token are left out.
    if are_numbers(record["non_ltr"], 0, steps - 1):
        record["non_ltr"] = list(filter(range(len(response)).__contains__, record["non_ltr"]))
    record["data_source"] = source.strip() if has_text(source) else None
    record["finished"] = is_finished(response, order, tok.stop_ids)  # padding ends nothing
    return record, None


def texts(row):
    """The prompt and the response of a row of the authors' files, each a text or None."""
    for column, responses in FIELDS.items():
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
    missing = max(0, LENGTH - len(record["response_ids"]))
    order = record["order"]
    steps = list(map(lambda step, rank: step if rank >= 0 else -1, record.get("step") or order, order))
    row = dict(id=record["id"], prompt=record["prompt"], response=record.get("text", ""))
    row.update(response_token_ids=record["response_ids"] + [pad_id] * missing, decoding_order=steps + [-1] * missing)
    row.update(non_ltr_positions=non_ltr_positions(steps), method=method)
    return dict(row, data_source=record.get("data_source") or "")


def write(out, records, settings, loaded):
    """Write records to out/release.jsonl, as the authors' trainer reads them. settings: of the decoder."""
    method = OURS.get(settings["strategy"], settings["strategy"])
    if settings["schedule"] == "credit":
        method = "credit" if method == "default" else f"credit, {method}"  # theirs is by confidence
    with disk.atomic_file(out / "release.jsonl") as f:
        for record in records:
            f.write(disk.json_line(to_release_format(record, loaded.m.config.pad_id, method)))
