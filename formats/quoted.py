"""Special tokens that a text only speaks about, spelled as text: a message that asks what <|im_end|> does ends no turn.

    text, quoted = quoted.render(tok, messages)  # the chat template's text, and where its messages quote special tokens
    ids = quoted.encode(tok, text, quoted)       # the template's special tokens are ids, the quoted ones are letters

tokenizer.py calls this where a text holds a special token. tok is its Tokenizer: encoding, fill, pattern and
special_tokens are used.

Dimensions: none; token ids are lists of int, a span is (start, end) in a text.
"""

from tokenizer import unused_character


def render(tok, messages, add_generation_prompt=True):
    """Text of a conversation by the chat template, and the spans of the special tokens in its messages' contents."""
    # Marks around the special tokens in a content survive the template, and tell where they are.
    mark, marked = unused_character(messages), []
    for turn in messages:
        if isinstance(turn.get("content"), str):
            turn = {**turn, "content": tok.pattern.sub(lambda found: mark + found[0] + mark, turn["content"])}
        marked.append(turn)
    text, quoted = "", []
    for i, piece in enumerate(tok.fill(marked, add_generation_prompt).split(mark)):
        if i % 2:  # between two marks
            quoted.append((len(text), len(text) + len(piece)))
        text += piece
    return text, quoted


def encode(tok, text, quoted):
    """Token ids of a text whose special tokens at the spans quoted are spelled as text. Raises ValueError for what the
    vocabulary cannot spell."""
    ids, start, whole = [], 0, tok.encoding(text)
    for token, (a, b) in zip(whole.ids, whole.offsets):
        if token in tok.special_tokens and not any(a < y and x < b for x, y in quoted):
            ids += [*tok.encode_text(text[start:a]), token]
            start = b
    return ids + tok.encode_text(text[start:])


def encode_text(tok, text):
    """Token ids of a text in which no special token stands for its id. Raises ValueError for what the vocabulary cannot
    spell."""
    tok.backend.encode_special_tokens = True  # the library's name for: as text
    try:
        ids = tok.encoding(text).ids
    finally:
        tok.backend.encode_special_tokens = False
    for token in map(tok.special_tokens.get, ids):
        if token not in (None, tok.special.get("unk_token")):
            raise ValueError(f"the vocabulary cannot spell the quoted {token} as text: {text!r:.80}")
    return ids
