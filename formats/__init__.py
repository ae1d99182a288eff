"""What users bring beyond the core's plain forms, read when a row or a text needs it:

    formats.columns   datasets whose columns have other names or more to say -> the plain row that data.py reads
    formats.talks     conversations in other shapes -> [{role, content}, ...]
    formats.quoted    special tokens that a text only quotes, spelled as text for tokenizer.py

data.py and tokenizer.py import them on first use.
"""
