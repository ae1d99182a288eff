"""TABOM: post-training of masked diffusion language models along the trajectories that they decode themselves.

    python tabom.py demo                                                     # the whole method on a CPU, from nothing
    torchrun --nproc_per_node 8 tabom.py distill --model GSAI-ML/LLaDA-8B-Instruct --data prompts.jsonl --out out/T
    torchrun --nproc_per_node 8 tabom.py train --model GSAI-ML/LLaDA-8B-Instruct --data out/T --out out/R
    torchrun --nproc_per_node 8 tabom.py evaluate --model GSAI-ML/LLaDA-8B-Instruct --tasks gsm8k --out out/E
    python tabom.py grade --task gsm8k --responses R.jsonl --out V.jsonl
    python tabom.py generate --model GSAI-ML/LLaDA-8B-Instruct --adapter out/R/epoch-5 --prompt "2 + 2 =" --watch
    python tabom.py merge --model GSAI-ML/LLaDA-8B-Instruct --adapter out/R/epoch-5 --out out/M
    python tabom.py sweep --model GSAI-ML/LLaDA-8B-Instruct --data prompts.jsonl --test gsm8k --metric last --out out/S
    python tabom.py diagnose --model GSAI-ML/LLaDA-8B-Instruct --checkpoints out/R/epoch-5 --data out/T --out out/D
    python tabom.py claims                                                   # the paper's claims on puzzles; hours

This file is the command line. A command is a file of its name (distill.py, train.py, evaluate.py, experiments/...); two
short ones, generate and merge, are here. Results go to stdout, ending in one line of JSON; progress and errors go to
stderr. TABOM_DEBUG=1 shows the traceback of an error.
"""

import json
import os
import sys
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from safetensors import SafetensorError

import data
import decode
import distill
import evaluate
import lora
import model
import runs
import train
from experiments import claims, demo, diagnose, sweep
from options import check_values, command_line, opt

# --------------------------------------------------------------------------------------------------------- generate


@dataclass
class GenerateOptions(runs.ModelOptions, runs.DecodeOptions):
    """the prompt"""

    adapter: str | None = opt(None, "adapter folder")
    prompt: str | None = opt(None, "the user's turn; without it a chat is read from stdin, one turn a line")
    system: str | None = opt(None, "a system turn before it")
    raw: bool = opt(False, "the prompt as it is, without the chat template")
    watch: bool = opt(False, "redraw the response on stderr while it unmasks, coloured by entropy")


def answer_prompts(c):
    """Answer one prompt, or chat -> the last answer and its speed."""
    if c.raw and (c.system or c.prompt is None):
        raise ValueError("--raw takes one --prompt as it is: no --system and no chat")
    processes = runs.Processes(c.device, alone=True)
    loaded = runs.load_model(c, processes, c.adapter)
    settings = runs.decoder_settings(c, loaded)
    say = runs.warner(processes)
    messages = [{"role": "system", "content": c.system}] if c.system else []
    result = {}
    for turn, prompt in enumerate([c.prompt] if c.prompt is not None else chat_turns()):
        messages.append({"role": "user", "content": prompt})
        ids = data.encode_prompt(loaded.tok, messages, c.raw)
        evaluate.check_context([dict(prompt_ids=ids)], settings, loaded.m.config, say)
        ids = torch.tensor([ids], device=processes.device)  # [1, P]
        result = answer_turn(c, loaded, ids, settings, turn)
        messages.append({"role": "assistant", "content": result["text"]})
        print(result["text"])
        result = dict(prompt=prompt, **result)
    return dict(**result, decoder=settings)


def answer_turn(c, loaded, ids, settings, turn):
    """The answer to prompt ids [1, P] -> dict(text, tokens, seconds, tokens_per_second)."""
    watch = Watch(loaded.tok, loaded.m.config.mask_id) if c.watch else None
    generator = data.generator(c.seed, "generate", turn, device=ids.device)
    start = time.time()
    t = decode.generate(loaded.m, ids, on_step=watch, generator=generator, **evaluate.with_eos_rules(settings, loaded))
    seconds, tokens = time.time() - start, t.response.numel()
    text = loaded.tok.response_text(t.response[0].tolist())
    return dict(text=text, tokens=tokens, seconds=round(seconds, 2), tokens_per_second=round(tokens / seconds, 1))


def chat_turns():
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


class Watch:
    """Redraws a response while it unmasks: masks are dots, tokens green where certain, red from 3 nats."""

    COLOURS = (46, 82, 118, 154, 190, 226, 220, 214, 208, 202, 196)  # of the 256-colour terminal palette

    def __init__(self, tok, mask_id):
        self.tok, self.mask_id = tok, mask_id

    def __call__(self, step, response, entropy):
        cells, ids = [], response[0].tolist()
        for text, places in self.tok.pieces(ids, self.mask_id):
            h = float(entropy[0, places[0]])
            if text is None:
                cells.append("\x1b[2m·\x1b[0m")
            elif ids[places[0]] not in self.tok.stop_ids:
                cells.append(f"\x1b[38;5;{self.COLOURS[min(int(h / 3 * 10), 10)]}m{text}\x1b[0m")
        home = "\x1b[H\x1b[2J"  # the top left of an empty screen
        print(f"{home}step {step}\n{''.join(cells)}", file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------------------ merge


@dataclass
class MergeOptions:
    """the adapter and its base"""

    model: str = opt(None, "base model", required=True)
    adapter: str = opt(None, "adapter folder", required=True)
    out: str = opt(None, "folder for the merged model", required=True)


def merge_adapter(c):
    """Fold an adapter into its base model and write a model folder in the base's own layout and dtype."""
    runs.must_be_free(c.out)
    folder = model.resolve(c.model)
    m = lora.load(model.load(folder, dtype=None), c.adapter)
    changed = len(lora.layers(m))
    with runs.atomic_folder(c.out) as beside:
        model.save(lora.merge(m), beside)
        runs.copy_extras(folder, beside)
    return dict(out=c.out, merged_layers=changed)


# ----------------------------------------------------------------------------------------------------- command line

COMMANDS = {
    "demo": (demo.demo, demo.DemoOptions),
    "distill": (distill.distill, distill.DistillOptions),
    "train": (train.train, train.TrainOptions),
    "evaluate": (evaluate.evaluate, evaluate.EvaluateOptions),
    "grade": (evaluate.grade, evaluate.GradeOptions),
    "generate": (answer_prompts, GenerateOptions),
    "merge": (merge_adapter, MergeOptions),
    "sweep": (sweep.sweep, sweep.SweepOptions),
    "diagnose": (diagnose.diagnose, diagnose.DiagnoseOptions),
    "claims": (claims.claims, claims.ClaimsOptions),
}
ALONE = ("generate", "grade", "merge")  # nothing to share: under torchrun the first process does them


def main(argv=None):
    """Run a command -> exit status. An error is one line on stderr."""
    given = vars(command_line(COMMANDS, __doc__.split("\n")[0]).parse_args(argv))
    command = given.pop("command")
    run, options_class = COMMANDS[command]
    first = int(os.environ.get("RANK", 0)) == 0
    if command in ALONE and not first:
        return 0
    try:
        c = options_class.preset(given) if hasattr(options_class, "preset") else options_class(**given)
        check_values(c)
        result = run(c)
        if first:
            print(json.dumps(result, ensure_ascii=False))
        return 0
    except KeyboardInterrupt:
        print("stopped" + ("" if command in ALONE else "; the same command continues"), file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError, SafetensorError, RuntimeError) as e:  # torch's are RuntimeErrors
        if os.environ.get("TABOM_DEBUG"):
            raise
        print(f"error: {' '.join(str(e).split()) or type(e).__name__}", file=sys.stderr)
        return 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
