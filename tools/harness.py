"""Our decoding as a model of lm-evaluation-harness (pip install lm_eval): its tasks and its scores.

    python -m tools.harness run --model tabom --model_args pretrained=M,adapter=A,max_new_tokens=256,greedy=True \\
        --tasks gsm8k --apply_chat_template --batch_size 16

--model_args are the fields of HarnessOptions, named like the flags of tabom.py, with pretrained
instead of model. What they leave open is the model family's own (loading.DECODERS). Of a task's
generation_kwargs, `until` cuts the text, and max_gen_toks is its length where max_new_tokens is not
given; the others have no part in it. Under torchrun the questions are shared over the processes.
Source: lm_eval.api.model.LM, version 0.4.13.
"""

import dataclasses
import json
import sys
from collections import Counter
from pathlib import Path

import torch
from tqdm import tqdm

import distill
from runs import loading, streams, torchrun
from runs.options import check_values, kind, opt, parse_value


@dataclasses.dataclass
class HarnessOptions(loading.ModelOptions, loading.DecodeOptions):
    """--model_args, and the harness's own --batch_size and --device"""

    adapter: str | None = opt(None, "adapter folder")
    batch_size: int = opt(1, "prompts decoded together on each process", low=1)
    prompt_tokens: int = opt(1024, "longer prompts are cut on the left to this many tokens", low=1)


def cut(text, stops):
    """The text up to the first of the stop strings."""
    found = [text.find(stop) for stop in stops if stop and stop in text]
    return text[: min(found, default=len(text))]


def read_options(given):
    """{"pretrained": M, "greedy": True, ...} -> HarnessOptions.

    Raises ValueError for a name that it does not know, and for a value of another type."""
    fields, found = {f.name: f for f in dataclasses.fields(HarnessOptions)}, {}
    fields["pretrained"] = fields.pop("model")
    for name, value in given.items():
        if name not in fields:
            raise ValueError(f"--model_args {name}: known are {', '.join(fields)}")
        if value is None:
            continue
        f = fields[name]
        if kind(f) is not bool:
            value = parse_value(f, str(value))
        elif value not in (True, False):
            raise ValueError(f"--model_args {name}={value}: must be True or False")
        found[f.name] = value
    if "model" not in found:
        raise ValueError("--model_args needs pretrained=M, a model folder or a Hub repo id")
    c = HarnessOptions(**found)
    check_values(c)
    return c


class Answers:
    """What the harness asks of a model. `main` adds its base class LM, so that this file imports without it."""

    # Two flags of the harness mean nothing here: no code of a checkpoint is ever run, and batches
    # have one size. Without --device the harness says "cuda:0", to every process, also where there
    # is no GPU: that is our "auto".
    def __init__(self, device=None, trust_remote_code=None, max_batch_size=None, **model_args):
        super().__init__()
        if device not in (None, "cuda:0"):
            model_args["device"] = device
        self.c = read_options(model_args)
        self.processes = torchrun.Processes(self.c.device)
        self.loaded = loading.load_model(self.c, self.processes, self.c.adapter)
        self.warn = torchrun.warner(self.processes)
        self._rank, self._world_size = self.processes.index, self.processes.count
        self._device = self.processes.device

    @classmethod
    def create_from_arg_obj(cls, model_args, others=None):
        """--model_args, and what the harness sets beside them: where both say something, the former."""
        return cls(**{**(others or {}), **model_args})

    def generate_until(self, requests):
        """The text of an answer to every request (prompt, generation_kwargs), cut at its `until` strings."""
        groups, copies, texts = {}, Counter(), [None] * len(requests)
        for place, request in enumerate(requests):
            prompt, kwargs = request.args
            # A question's number is the seed of its answer, as in evaluate.py; asked again, it has
            # another one.
            number, question = request.doc_id, (request.task_name, request.doc_id, request.idx)
            if copies[question]:
                number = (number, copies[question])
            copies[question] += 1
            key = json.dumps(kwargs, sort_keys=True)
            if key not in groups:  # its settings are checked before anything is decoded
                groups[key] = (*self.settings(**kwargs), [])
            groups[key][-1].append(dict(id=number, place=place, prompt_ids=self.prompt_ids(prompt)))
        bar = tqdm(total=len(requests), unit="prompt", disable=not self.processes.shows)
        for settings, stops, examples in groups.values():
            distill.cut_prompts(examples, self.c.prompt_tokens, self.warn, "the harness")
            distill.check_context(examples, settings["max_new_tokens"], self.loaded.m.config, self.warn)
            examples.sort(key=lambda e: -len(e["prompt_ids"]))  # little padding
            how = (self.c.seed, self._device, self.c.batch_size)
            for numbers, records in distill.answers(self.loaded, examples, settings, *how):
                for i, record in zip(numbers, records):
                    place = examples[i]["place"]
                    text = texts[place] = cut(record["text"], stops)
                    self.cache_hook.add_partial("generate_until", requests[place].args, text)  # for --use_cache
                bar.update(len(numbers))
        bar.close()
        return texts

    def settings(self, until=(), max_gen_toks=None, **others):
        """(arguments of decode.generate, stop strings) for a task's generation_kwargs."""
        preset = {}
        if max_gen_toks is not None:
            preset["max_new_tokens"] = max_gen_toks
        if isinstance(until, str):
            until = [until]
        return loading.decoder_settings(self.c, self.loaded, preset), until or ()

    def prompt_ids(self, prompt):
        """Token ids of a prompt."""
        ids = self.loaded.tok.encode(prompt)
        if not ids:
            raise ValueError("an empty prompt: the model needs at least one token to answer")
        return ids

    def loglikelihood(self, requests):
        why = "a masked diffusion model has no left-to-right likelihood"
        raise ValueError(f"{why}: choose tasks whose output_type is generate_until")

    loglikelihood_rolling = loglikelihood

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        """Text of a conversation; without a generation prompt, its last turn is to be continued."""
        if add_generation_prompt:
            return self.loaded.tok.chat(chat_history)
        return self.loaded.tok.chat(chat_history[:-1], prefix=chat_history[-1]["content"])

    def chat_template(self, chat_template=False):
        if isinstance(chat_template, str):
            raise ValueError(f"--apply_chat_template {chat_template}: takes no name, a checkpoint has one")
        return str(self.loaded.tok.template)

    @property
    def tokenizer_name(self):
        return str(self.loaded.folder).replace("/", "__")  # it becomes a part of a file's name

    def all_gather(self, tensor):
        return torch.tensor(self.processes.gather([tensor.item()]))

    def gather_object(self, obj, dst=0):
        return self.processes.gather([obj])

    def barrier(self):
        self.processes.barrier()


def import_lm_eval():
    """(the harness's command line, LM, register_model). Raises ImportError, which says what to install."""
    # The harness's tasks import Hugging Face's `evaluate`, and would find our evaluate.py. This file
    # has imported all that it needs, so ours gives up the name, and its folder goes to the end of
    # the path, where processes that the harness starts find the other modules.
    folder = Path(__file__).resolve().parent.parent
    for entry in list(sys.path):
        if Path(entry).resolve() == folder:
            sys.path.remove(entry)
    sys.path.append(str(folder))
    sys.modules.pop("evaluate", None)
    try:
        from lm_eval.__main__ import cli_evaluate
        from lm_eval.api.model import LM
        from lm_eval.api.registry import register_model
    except ImportError as e:
        raise ImportError(f"tools/harness.py needs lm-evaluation-harness: pip install lm_eval ({e})") from e
    return cli_evaluate, LM, register_model


def main():
    """The harness's command line with our model -> exit status. An error is one line on stderr."""
    try:
        cli_evaluate, LM, register_model = import_lm_eval()
        register_model("tabom")(type("TabomLM", (Answers, LM), {}))
        cli_evaluate()
        return 0
    except torchrun.ERRORS as e:
        return torchrun.tell(e)


if __name__ == "__main__":
    streams.guard()
    torchrun.leave(main())
