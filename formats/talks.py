"""Conversations in the shapes that users bring -> [{role, content}, ...].

    messages = talks.to_messages([{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}])
    answer = talks.pop_answer(messages, talk)  # what the assistant says last, which is taken from messages

A turn is {role, content} with any of the usual names, a pair [user, assistant], or {"human": text, "assistant": text}.
Its content is a text, or comes in parts: [{"type": "text", "text": ...}, ...].

Dimensions: none.
"""

ROLES = {"system": "system", **dict.fromkeys(("user", "human", "prompter", "question"), "user")}
ROLES.update(dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt", "answer"), "assistant"), developer="system")
NEEDS = f"a message needs a role ({', '.join(ROLES)}) and a text content"
CONVERSATIONS = ("messages", "conversations", "conversation")
# Parts of a message that say something to or of the model, and that no prompt or answer of ours has.
UNUSED = "tool_calls function_call tool_call_id reasoning_content reasoning thinking refusal audio images".split()


def are_texts(value):
    """Whether a value is a list of texts, and not empty."""
    return isinstance(value, list) and bool(value) and all(isinstance(one, str) for one in value)


def are_turns(value):
    """Whether a value is a list of objects, and not empty."""
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value)


def to_messages(talk, needs=NEEDS, say=lambda line: None):
    """[{role, content}, ...] of a conversation. say(line) is called for what of a message is not used. Raises
    ValueError, which begins with needs, for a turn without a known role or a text, and for an assistant that says
    nothing."""
    messages = []
    for turn in talk if isinstance(talk, list) else [talk]:
        for role, content in turns_of(turn):
            if role == "assistant" and (content is None or content == "" or str(content).isspace()):
                raise ValueError(f"a turn of the assistant has no content: {turn!r:.120}")
            if role is None or not isinstance(content, str):
                raise ValueError(f"{needs}, found {turn!r:.120}")
            messages.append(dict(role=role, content=content))
        for part in UNUSED:
            if isinstance(turn, dict) and turn.get(part):
                say(f"{part} of a message is not used")
    return messages


def turns_of(turn):
    """[(role, content), ...] of a turn: one, or two of a pair. None stands for what is missing."""
    if are_texts(turn) and len(turn) == 2:
        return [("user", turn[0]), ("assistant", turn[1])]
    if not isinstance(turn, dict):
        return [(None, None)]
    if turn and all(name.lower() in ROLES for name in turn):  # {"human": ..., "assistant": ...}
        return [(ROLES[name.lower()], content) for name, content in turn.items()]
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else None for part in content]
        content = "".join(parts) if are_texts(parts) else None
    return [(ROLES.get(str(turn.get("role", turn.get("from"))).lower()), content)]


def pop_answer(messages, talk, say=lambda line: None):
    """Take what the assistant says last from the messages of a conversation -> its text. None where the user is last,
    and where the turn's weight is 0: it asks not to be trained on."""
    if not messages or messages[-1]["role"] != "assistant":
        return None
    answer, last = messages.pop()["content"], talk[-1] if isinstance(talk, list) else talk
    if isinstance(last, dict) and last.get("weight") == 0:
        say("an answer of weight 0 is not trained on, and is no answer")
        return None
    return answer


def answer_of(talk, messages, say=lambda line: None):
    """The text of an answer that is a conversation itself: one turn of the assistant, behind the prompt's messages or
    without them."""
    said = to_messages(talk, say=say)
    if said[: len(messages)] == messages:
        said = said[len(messages) :]
    if len(said) != 1 or said[0]["role"] != "assistant":
        raise ValueError(f"an answer must be one turn of the assistant, found {talk!r:.120}")
    return pop_answer(said, talk, say)
