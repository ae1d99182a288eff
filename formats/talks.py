"""Conversations in the shapes that users bring -> [{role, content}, ...].

    messages = talks.to_messages([{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}])

Dimensions: none.
"""

ROLES = {"system": "system", **dict.fromkeys(("user", "human", "prompter", "question"), "user")}
ROLES.update(dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt", "answer"), "assistant"))
NEEDS = f"a message needs a role ({', '.join(ROLES)}) and a text content"
CONVERSATIONS = ("messages", "conversations", "conversation")


def are_texts(value):
    """Whether a value is a list of texts, and not empty."""
    return isinstance(value, list) and bool(value) and all(isinstance(one, str) for one in value)


def to_messages(talk, needs=NEEDS):
    """[{role, content}, ...] of a list of messages, with any of the usual names, or of pairs [user,
    assistant]. A content may come in parts, [{"type": "text", "text": ...}]."""
    messages = []
    for turn in talk if isinstance(talk, list) else [talk]:
        if are_texts(turn) and len(turn) == 2:
            messages += [dict(role="user", content=turn[0]), dict(role="assistant", content=turn[1])]
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
        messages.append(dict(role=role, content=content))
    return messages
