"""One answer, a chat, or an answer to every prompt of a file; with --watch the response unmasks before one's eyes.

python tabom.py generate --model GSAI-ML/LLaDA-8B-Instruct --adapter out/R/epoch-5 --prompt "2 + 2 =" --watch
"""

import contextlib
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import data
import decode
import distill
import tokenizer
from runs import loading, torchrun
from runs.options import opt


@dataclass
class GenerateOptions(loading.ModelOptions, loading.DecodeOptions):
    """the prompt"""

    adapter: str | None = opt(None, "adapter folder")
    prompt: str | None = opt(None, "the user's turn; without it a chat is read from stdin, one turn a line")
    system: str | None = opt(None, "a system turn before it")
    prompts: str | None = opt(None, "answer every prompt of a file: a dataset, or .txt with one a line")
    raw: bool = opt(False, "the prompt as it is, without the chat template")
    watch: bool = opt(False, "redraw the response on stderr while it unmasks, coloured by entropy")
    delay: float = opt(0.0, "seconds between two pictures of --watch", low=0)


def generate(c):
    """Answer one prompt, those of a file, or chat -> the last answer and its speed."""
    if c.raw and (c.system or (c.prompt is None and c.prompts is None)):
        raise ValueError("--raw takes one --prompt as it is, or --prompts: no --system and no chat")
    if c.prompt is not None and c.prompts is not None:
        raise ValueError("--prompt and --prompts: give one of them")
    asked = None if c.prompts is None else read_prompts(c.prompts)
    processes = torchrun.Processes(c.device, alone=True)
    loaded = loading.load_model(c, processes, c.adapter)
    settings = loading.decoder_settings(c, loaded)
    chats = c.prompt is None and asked is None
    if asked is None:
        asked = chat_turns() if chats else [said(c.prompt)]
    start = [tokenizer.message("system", c.system)] if c.system else []
    talk, result, failed = list(start), {}, 0
    for turn, messages in enumerate(asked):
        own = messages[0]["role"] == "system"  # a row's own system turn stands in place of --system
        if not chats:
            talk = [] if own else start
        talk = talk + messages
        try:
            result = answer_turn(c, processes, loaded, settings, talk, turn)
        except ValueError as e:
            if not chats and c.prompts is None:
                raise
            where = "" if chats else f"prompt {turn + 1} of {c.prompts}: "
            print(f"error: {where}{e}", file=sys.stderr)  # the turn is taken back, and the others go on
            talk, failed = talk[:-1], failed + 1
            continue
        talk.append({"role": "assistant", "content": result["text"]})
        result = dict(prompt=messages[-1]["content"], **result)
        # Of many answers each is a line of JSON: a text may have several lines.
        print(result["text"] if c.prompts is None else json.dumps(result, ensure_ascii=False), flush=True)
    if failed and not chats:
        raise ValueError(f"{failed} of {len(asked)} prompts of {c.prompts} were not answered: see above")
    return dict(**result, decoder=settings)


def said(prompt):
    """A prompt as a conversation of one turn."""
    return [tokenizer.message("user", prompt)]


def read_prompts(path):
    """The conversations to answer: of a dataset's rows, with their earlier turns, or of the lines of a text file.

    Raises ValueError for a file without any."""
    if Path(path).suffix != ".txt":
        return [example["messages"] for example in data.read_examples(path, warn=say)]
    found = [said(line.strip()) for line in data.read_text(path).split("\n") if line.strip()]
    if not found:
        raise ValueError(f"{path}: no prompts")
    return found


def say(line):
    print(f"warning: {line}", file=sys.stderr)


def answer_turn(c, processes, loaded, settings, talk, turn):
    """The answer to a conversation -> dict(text, tokens, seconds, tokens_per_second)."""
    ids = tokenizer.encode_prompt(loaded.tok, talk, c.raw)
    distill.check_context([dict(prompt_ids=ids)], settings, loaded.m.config, torchrun.warner(processes))
    ids = torch.tensor([ids], device=processes.device)  # [1, P]
    watch = Watch(loaded, talk, c.delay) if c.watch else None
    own = dict(generator=data.generator(c.seed, "generate", turn, device=ids.device), on_step=watch)
    begun = time.perf_counter()
    t = decode.generate(loaded.m, ids, **own, **loading.with_eos_rules(settings, loaded))
    tokens = int((t.response != loaded.m.config.mask_id).sum())  # what was decoded: masks behind the end are not
    speed = torchrun.per_second(tokens, begun + (watch.waited if watch else 0.0))  # --delay is not speed
    text = loaded.tok.response_text(t.response[0].tolist())
    return dict(text=text, tokens=tokens, seconds=round(tokens / speed, 2), tokens_per_second=round(speed, 1))


def chat_turns():
    """The turns that a user types, one a line, with line editing where the system has it."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401, input() uses it; Windows has none
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if line.strip():
            yield said(line.strip())


class Watch:
    """Redraws a response on stderr while it unmasks, under the turns before it: masks are dots, tokens green where
    certain, red from 3 nats. Where stderr is no terminal it writes a plain line for each step."""

    COLOURS = (46, 82, 118, 154, 190, 226, 220, 214, 208, 202, 196)  # of the 256-colour terminal palette

    def __init__(self, loaded, talk, delay=0.0):
        self.tok, self.mask_id, self.delay = loaded.tok, loaded.m.config.mask_id, delay
        self.terminal, self.waited = sys.stderr.isatty(), 0.0  # seconds between pictures
        self.above = "".join(f"{turn['role']}: {turn['content']}\n" for turn in talk)

    def __call__(self, step, response, entropy):
        cells, ids = [], response[0].tolist()
        for text, places in self.tok.pieces(ids, self.mask_id):
            if text is None:
                cells.append(self.shown("\u00b7", 2))
            elif ids[places[0]] not in self.tok.stop_ids:
                nats = float(entropy[0, places[0]])
                cells.append(self.shown(text, 38, 5, self.COLOURS[min(int(nats / 3 * 10), 10)]))
        if self.terminal:
            print(f"\x1b[H\x1b[2J{self.above}step {step}\n{''.join(cells)}", file=sys.stderr, flush=True)
        else:
            print(f"step {step}: {''.join(cells)}", file=sys.stderr, flush=True)
        time.sleep(self.delay)
        self.waited += self.delay

    def shown(self, text, *codes):
        """The text in a colour of the terminal; as it is in a file."""
        return f"\x1b[{';'.join(map(str, codes))}m{text}\x1b[0m" if self.terminal else text
