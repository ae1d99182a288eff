"""The tiny models of the experiments: LLaDA's layout, a token per character, two kinds.

    WHOLE      372,960 parameters, 6x6 puzzles: the model in tiny/, of the examples and tests
    SHORT      167,232 parameters, 5x5 puzzles: the base models of claims.py, and the model in tiny5/, of the demo

    python -m experiments.tiny out/tiny [--seed 0]    # to out/tiny/tiny: 21 minutes on one core
    python -m experiments.tiny out/tiny5 --demo       # to out/tiny5/tiny: 80 seconds
    python -m experiments.tiny out/random --tokenizer FOLDER    # random weights under a real vocabulary: to try
                                                      # commands on real prompts without a large model
    tiny.write_start(folder, seed)                    # the model before training, and its tokenizer
    tiny.retrain(folder, seed)                        # trained on easy puzzles by train.py

The folders tiny/ and tiny5/ beside the code were made by the first two commands. The base model of the demo is stopped
half-way, after DEMO_EPOCHS of its 14 epochs: finished it solves nearly all, and no method has anything to gain.
"""

import argparse
import itertools
import json
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import data
import model
import tokenizer
import train
from experiments import puzzles
from experiments.puzzles import BLANK, TASKS
from runs import card, disk, resume

TINY = Path(__file__).parent.parent / "tiny"  # the trained models that come with the code
TINY5 = Path(__file__).parent.parent / "tiny5"

MASK, EOS, PAD = "<|mask|>", "<|endoftext|>", "<|pad|>"


@dataclass(frozen=True)
class Kind:
    """A kind of tiny model: what it is trained on, and its size."""

    tasks: tuple  # of its training puzzles, in turn
    answer: int  # tokens of a response; an answer is followed by EOS to there
    count: int  # easy puzzles
    epochs: int
    foreign: float  # share of the answers in foreign style
    width: int
    hidden: int


WHOLE = Kind(("latin", "shear"), 37, 64_000, 3, 0.0, 96, 192)
SHORT = Kind(("short-latin", "short-shear", "short-far"), 31, 6_400, 14, 0.1, 64, 128)
DEMO_EPOCHS = 7  # of SHORT, after which the model in tiny5/ was stopped


def vocabulary(kind=WHOLE):
    """Every token, by id: the special ones, BLANK, the tags and the symbols of all tasks."""
    tags, own, foreign = [], "", ""
    for task in dict.fromkeys(map(TASKS.get, kind.tasks)):
        tags.append(task.tag)
        own += task.symbols
        foreign += task.foreign
    symbols = dict.fromkeys(own + foreign)  # tasks may share some
    return [MASK, EOS, PAD, BLANK, *tags, *symbols]


def config(kind=WHOLE):
    """A tiny model's config.json."""
    size = len(vocabulary(kind))
    return dict(
        model_type="llada",
        architectures=["LLaDAModelLM"],
        activation_type="silu",
        block_type="llama",
        layer_norm_type="rms",
        rms_norm_eps=1e-5,
        d_model=kind.width,
        n_layers=4,
        n_heads=4,
        n_kv_heads=4,
        mlp_hidden_size=kind.hidden,
        vocab_size=size,
        embedding_size=size,
        max_sequence_length=128,
        rope=True,
        rope_full_precision=True,
        rope_theta=0.5,
        include_bias=False,
        include_qkv_bias=False,
        weight_tying=False,
        init_std=0.06,
        mask_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )


def write_start(folder, seed, kind=WHOLE):
    """A tiny model before training: random weights, and a tokenizer of one token a character.

    A folder that holds the same files stays as it is. Raises FileExistsError for other files."""
    folder = Path(folder)
    if not folder.is_dir() or not any(folder.iterdir()):
        with disk.atomic_folder(folder) as beside:
            build_start(beside, seed, kind)
        return
    with tempfile.TemporaryDirectory() as again:
        build_start(Path(again), seed, kind)
        for file in Path(again).iterdir():
            there = folder / file.name
            if not there.is_file() or there.read_bytes() != file.read_bytes():
                raise FileExistsError(f"{folder} is not empty and holds another {file.name}: choose another folder")


def build_start(folder, seed, kind):
    """Write the files of the untrained model into an empty folder."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers  # slow to import, and only for this

    model.save(model.create(config(kind), data.generator(seed, "start")), folder)
    ids = dict(zip(vocabulary(kind), itertools.count()))
    backend = Tokenizer(models.WordLevel(ids))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([MASK, EOS, PAD])
    backend.save(str(folder / "tokenizer.json"))
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    special = dict(mask_token=MASK, eos_token=EOS, pad_token=PAD, chat_template=template)
    (folder / "tokenizer_config.json").write_text(json.dumps(special, indent=2) + "\n")
    own = dict(max_new_tokens=kind.answer, block_length=kind.answer, strategy="entropy")
    (folder / "generation_config.json").write_text(json.dumps(dict(tabom=own), indent=2) + "\n")


def retrain(folder, seed=0, kind=WHOLE, enough=None, processes=None, compile=False):
    """Train a tiny model on easy puzzles of its tasks, through the training loop of every other
    model, into folder/tiny -> the last metrics.

    enough: a function of a checkpoint's folder and its epoch; the first epoch for which it is true is the
    last, with the learning rate still on its way down. Continues where it was stopped. Raises
    FileExistsError for a folder with anything else in it."""
    folder = Path(folder)
    disk.must_be_free(folder / "tiny")
    write_start(folder / "start", seed, kind)
    lines = puzzles.dataset("pretrain", kind.tasks, kind.count, False, seed, kind.foreign)
    tok = tokenizer.load(folder / "start")
    write_answers(folder / "pretrain.jsonl", tok, map(json.loads, lines.splitlines()), kind.answer)
    options = dict(objective="nelbo", lora_rank=0, global_batch=64, batch_size=64, lr=3e-3, warmup=50)
    options.update(weight_decay=0.0, seed=seed, compile=compile, epochs=kind.epochs)
    places = dict(model=str(folder / "start"), data=str(folder / "pretrain.jsonl"), out=str(folder / "run"))
    for epoch in range(1 if enough else kind.epochs, kind.epochs + 1):
        last = folder / "run" / f"epoch-{epoch}"
        result = train.train(train.TrainOptions(**places, **options, stop_after=epoch), processes)
        if enough and enough(last, epoch):
            break
    with disk.atomic_folder(folder / "tiny") as beside:
        for file in last.iterdir():
            if file.name not in (*resume.TRAINER, card.FILE):
                shutil.copyfile(file, beside / file.name)
    return {**result, "tiny": str(folder / "tiny")}


def retrain_for_demo(folder, seed=0):
    """Train a base model of the demo into folder/tiny -> the last metrics."""
    return retrain(folder, seed, SHORT, lambda _, epoch: epoch == DEMO_EPOCHS)


def write_answers(file, tok, rows, budget):
    """Write answers to train on, each followed by EOS to the budget, as real models' data are; for that
    they are trajectories, as if written from left to right.

    rows: dicts of id, prompt and answer. Raises FileExistsError for a file with other content."""
    lines = []
    for row in rows:
        ids = tok.encode(row["answer"])
        ids += [tok.eos_id] * (budget - len(ids))
        told = dict(prompt_ids=tok.encode(row["prompt"]), response_ids=ids, order=list(range(budget)))
        lines.append(json.dumps(dict(id=row["id"], **told, finished=True)) + "\n")
    puzzles.write_new({file: "".join(lines)})


def write_random(folder, source, seed=0):
    """A model of Dream's layout with random weights and the tokenizer of another folder: it answers nonsense, and runs
    every command on real prompts -> what it is. Raises ValueError for a tokenizer without a mask or an EOS token."""
    source, folder = Path(source), Path(folder)
    disk.must_be_free(folder)
    tok = tokenizer.load(source)
    if tok.mask_id is None or tok.eos_id is None:
        raise ValueError(f"{source}: the tokenizer names no mask_token or no eos_token, which a masked model needs")
    raw = dict(model_type="Dream", architectures=["DreamModel"], hidden_act="silu", rope_theta=1e6, rms_norm_eps=1e-6)
    raw.update(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=128)
    raw.update(vocab_size=-(-tok.size // 64) * 64, max_position_embeddings=4096, tie_word_embeddings=False)
    pad_id = tok.eos_id if tok.pad_id is None else tok.pad_id
    raw.update(mask_token_id=tok.mask_id, eos_token_id=tok.eos_id, pad_token_id=pad_id, initializer_range=0.3)
    with disk.atomic_folder(folder) as beside:
        m = model.create(raw, data.generator(seed, "random"))
        model.save(m, beside)
        resume.copy_extras(source, beside)
    return dict(model=str(folder), parameters=sum(p.numel() for p in m.parameters()), vocabulary=tok.size)


def main(argv=None):
    """The command line -> exit status."""
    parser = argparse.ArgumentParser(prog="python -m experiments.tiny", description=__doc__.split("\n")[0])
    parser.add_argument("out", help="folder; the trained model is in its subfolder tiny")
    parser.add_argument("--seed", type=int, default=0)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--demo", action="store_true", help="the base model of the demo: 5x5 puzzles, stopped half-way")
    what.add_argument("--tokenizer", help="train nothing: random weights under the tokenizer of this model folder")
    c = parser.parse_args(argv)
    try:
        if c.tokenizer:
            result = write_random(c.out, c.tokenizer, c.seed)
        elif c.demo:
            result = retrain_for_demo(c.out, c.seed)
        else:
            result = retrain(c.out, c.seed)
    except (ValueError, OSError, ImportError, RuntimeError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        return 130
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
