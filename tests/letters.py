"""What the tests of texts share: small files, and a tokenizer of single bytes."""

import functools
import json
import operator
import os
import tempfile
from pathlib import Path

import pytest
import tokenizers

import data
import tokenizer

REAL = Path(os.environ.get("TABOM_DATA", "no-such-folder"))
needs_data = pytest.mark.skipif(not REAL.is_dir(), reason="TABOM_DATA names no folder")
VOCABULARY = REAL.parent / "golden" / "dream-tokenizer"


def write(path, *rows):
    """A file of lines: a text as it is, anything else as JSON."""
    with open(path, "w") as f:
        for row in rows:
            f.write((row if isinstance(row, str) else json.dumps(row)) + "\n")
    return path


def column(rows, key):
    return list(map(operator.itemgetter(key), rows))


def rows_of(path):
    return column(data.read_rows(path), 1)


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TRIMMED = (  # LLaDA's manner: every message is trimmed
    "{% for m in messages %}{{ bos_token if loop.first }}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
NAMES = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>", "<|pad|>"]  # ids 256 to 260
SPECIAL = dict(eos_token="<|endoftext|>", pad_token="<|endoftext|>", mask_token="<|mask|>")
HI = [dict(role="user", content="Hi")]


def write_bytes_tokenizer(folder, config=None, added=True, template=CHATML):
    """A byte-level BPE without merges, so that a text has as many tokens as bytes."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(dict(zip(alphabet, range(256))), []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    if added:
        backend.add_special_tokens(NAMES)
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    content = {**(SPECIAL if config is None else config), "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    return folder


def special_ids(ids):
    return list(filter(lambda i: i >= 256, ids))


@functools.cache
def LETTERS():
    with tempfile.TemporaryDirectory() as folder:
        return tokenizer.load(write_bytes_tokenizer(Path(folder) / "letters"))
