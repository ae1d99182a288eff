"""Records for a network whose attention goes from block to block.

record = data.whole_blocks(record, 4, "start", eos_id)
"""


def whole_blocks(record, block_length, grid, eos_id):
    """A record for block-causal attention, whose last block is whole. A dataset's answer is filled up with EOS, which
    are targets as in SDAR's and A2D's own training: decoding asks for the whole block. A trajectory loses the masks
    behind the last block in which something was decoded: nothing sees them."""
    order = record["order"]
    n = len(record["response_ids"])
    if order is not None:
        while n > 0 and order[n - 1] < 0:
            n -= 1
    begin = len(record["prompt_ids"]) if grid == "start" else 0
    filling = -(begin + n) % block_length
    if order is None:
        return {**record, "response_ids": record["response_ids"] + [eos_id] * filling}
    changed = dict(record)
    for name in ("response_ids", "order", "entropy"):
        if record.get(name) is not None:
            changed[name] = record[name][: n + filling]
    if record.get("non_ltr") is not None:
        changed["non_ltr"] = list(filter((n + filling).__gt__, record["non_ltr"]))
    return changed
