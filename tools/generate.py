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
from tools.watch import Watch


@dataclass
class GenerateOptions(loading.ModelOptions, loading.DecodeOptions):
    """the prompt"""

    adapter: str | None = opt(None, "adapter folder")
    prompt: str | None = opt(None, "the user's turn; without it a chat is read from stdin, one turn a line")
    system: str | None = opt(None, "a system turn before it")
    prompts: str | None = opt(None, "answer every prompt of a file: a dataset, or .txt with one a line")
    raw: bool = opt(False, "the prompt as it is, without the chat template")
    watch: bool = opt(
        False, "redraw the response on stderr while it unmasks, coloured by entropy; a puzzle as its grid"
    )
    delay: float = opt(0.0, "seconds between two pictures of --watch", low=0, idle=dict(watch=False))
    save_frames: str | None = opt(None, "with --prompt: write an animation of the response, such as x.gif")


def generate(c):
    """Answer one prompt, those of a file, or chat -> the last answer and its speed; of a file, how many there are."""
    if c.raw and (c.system or (c.prompt is None and c.prompts is None)):
        raise ValueError("--raw takes one --prompt as it is, or --prompts: no --system and no chat")
    if c.prompt is not None and c.prompts is not None:
        raise ValueError("--prompt and --prompts: give one of them")
    check_frames(c)
    asked = None if c.prompts is None else read_prompts(c.prompts)
    processes = torchrun.Processes(c.device, alone=True)
    loaded = loading.load_model(c, processes, c.adapter)
    settings = loading.decoder_settings(c, loaded)
    chats = c.prompt is None and asked is None
    if asked is None:
        asked = chat_turns() if chats else [said(c.prompt)]
    start = [tokenizer.message("system", c.system)] if c.system else []
    talk, result, failed, tokens, seconds = list(start), {}, 0, 0, 0.0
    for turn, messages in enumerate(asked):
        has_system = messages[0]["role"] == "system"  # the row's system turn stands in place of --system
        if not chats:
            talk = [] if has_system else start
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
        tokens, seconds = tokens + result["tokens"], seconds + result["seconds"]
        # Of many answers each is a line of JSON: a text may have several lines.
        print(result["text"] if c.prompts is None else json.dumps(result, ensure_ascii=False), flush=True)
    if failed and not (chats and sys.stdin.isatty()):
        raise ValueError(f"{failed} of {turn + 1} prompts of {c.prompts or 'stdin'} were not answered: see above")
    if c.prompts is not None:  # each answer has its line already
        result = dict(prompts=len(asked), tokens=tokens, seconds=round(seconds, 2))
    return dict(**result, decoder=settings)


def check_frames(c):
    """Raises ValueError, FileExistsError or ImportError for a --save-frames that could not be written at the end."""
    if c.save_frames is None:
        return
    if c.prompt is None:
        raise ValueError("--save-frames is the animation of one answer: give --prompt")
    if Path(c.save_frames).suffix.lower() != ".gif":
        raise ValueError(f"--save-frames {c.save_frames}: must end in .gif")
    if Path(c.save_frames).exists():
        raise FileExistsError(f"--save-frames {c.save_frames} is there already: choose another file")
    try:
        import matplotlib.animation  # noqa: F401, comes with pillow, which writes the file
    except ImportError as e:
        raise ImportError("--save-frames needs matplotlib: pip install matplotlib") from e


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
    one, new = dict(prompt_ids=ids), settings["max_new_tokens"]
    distill.check_context([one], new, loaded.m.config, torchrun.warner(processes))
    ids = torch.tensor([ids], device=processes.device)  # [1, P]
    watch = None
    if c.watch:
        above = "".join(f"{turn['role']}: {turn['content']}\n" for turn in talk)
        watch = Watch(loaded.tok, loaded.m.config.mask_id, talk[-1]["content"], above, c.delay)
    how = dict(generator=data.generator(c.seed, "generate", turn, device=ids.device), on_step=watch)
    begun = time.perf_counter()
    t = decode.generate(loaded.m, ids, **how, **loading.with_eos_rules(settings, loaded))
    tokens = int((t.response != loaded.m.config.mask_id).sum())  # what was decoded: masks behind the end are not
    speed = torchrun.per_second(tokens, begun + (watch.waited if watch else 0.0))  # pictures are not speed
    if watch:
        watch.end()
    if c.save_frames:
        save_frames(c.save_frames, loaded, talk[-1]["content"], t)
    text = loaded.tok.response_text(t.response[0].tolist())
    return dict(text=text, tokens=tokens, seconds=round(tokens / speed, 2), tokens_per_second=round(speed, 1))


def save_frames(file, loaded, prompt, t):
    """Write the animation of a response. t: the decode.Trajectory of one row."""
    from experiments import pictures

    names = dict(response_ids=t.response, step=t.step, order=t.order, entropy=t.entropy)
    record = {name: x[0].tolist() for name, x in names.items()}
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    pictures.save_frames(loaded.tok, dict(record, prompt=prompt), file)


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
