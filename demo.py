"""The whole method on puzzles and a tiny model: distill, train, and an evaluation before and after.

    python tabom.py demo                          # run() below; under 5 minutes on 2 CPU cores
    python tabom.py demo --data-only out/puzzles  # only the datasets
    python tabom.py demo --retrain out/tiny       # make the folder tiny/ again, from random weights
    python tabom.py demo --full                   # the paper's claims, with intervals: experiment.py; hours

The tasks are 6x6 squares of six symbols with blank cells to fill, because there the order of decoding decides: a cell
whose symbol follows from its row and column is easy, one that needs its neighbours first is not.

    latin (in-domain)      digits; every row and every column holds each of the six symbols once
    shear (out-of-domain)  letters; every row and every broken diagonal does: a latin square, row r turned by r cells

The prompt is a tag and the 36 cells row by row, the answer all 36 cells; a character is a token. The alphabet of the
other task is an answer's foreign style. Another task is a line in TASKS, and a function if it needs one.

An easy puzzle has 16 to 26 random blanks and possibly several solutions; its answer is the square that it was made
from. A hard puzzle has 24 blanks and exactly one solution, and filling in cells that have a single candidate, over and
over, gets stuck. The base model in tiny/ has seen easy puzzles of both kinds; the demo is about hard ones.
"""

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import data
import diagnose
import model
import options
import runs
import tabom

TINY = Path(__file__).parent / "tiny"

# ---------------------------------------------------------------------------------------------------------- puzzles

N = 6
BLANK = "."
EASY_BLANKS = (16, 26)  # of the 36 cells, both included
HARD_BLANKS = 24
FULL = 2**N - 1  # a cell is one bit, or 0 where it is blank; a set of symbols is the union of their bits


@dataclass(frozen=True)
class Task:
    """A kind of puzzle: its tag, the six symbols of its prompts and answers, the six of an answer in foreign style, and
    puzzle(rng, hard) -> the cells of the puzzle and of its solution."""

    tag: str
    symbols: str
    foreign: str
    puzzle: Callable


def latin(rng, hard):
    return hard_puzzle(rng) if hard else easy_puzzle(rng)


def sheared(rng, hard):
    puzzle, square = latin(rng, hard)
    return shear(puzzle), shear(square)


TASKS = {
    "latin": Task("L", "123456", "abcdef", latin),
    "shear": Task("S", "abcdef", "123456", sheared),
}
IN_DOMAIN, OUT_OF_DOMAIN = "latin", "shear"


def make(task, rng, hard, foreign=0.0):
    """(prompt, answer) of one puzzle; rng is a random.Random, foreign the probability of an answer in foreign style."""
    puzzle, square = task.puzzle(rng, hard)
    symbols = task.foreign if foreign and rng.random() < foreign else task.symbols
    return task.tag + text(puzzle, task.symbols), text(square, symbols)


def text(cells, symbols):
    return "".join(symbols[c.bit_length() - 1] if c else BLANK for c in cells)


def shear(cells):
    """Row r turned right by r cells: columns become broken diagonals."""
    return [cells[i - i % N + (i % N - i // N) % N] for i in range(N * N)]


def easy_puzzle(rng):
    square = random_square(rng)
    blanks = set(rng.sample(range(N * N), rng.randint(*EASY_BLANKS)))
    return [0 if i in blanks else c for i, c in enumerate(square)], square


def hard_puzzle(rng):
    """Blank the cells of a random square in random order, as long as the solution stays unique."""
    while True:
        square = random_square(rng)
        puzzle, blanks = list(square), 0
        for i in rng.sample(range(N * N), N * N):
            puzzle[i] = 0
            if forced(puzzle, i, square[i]):
                blanks += 1
            else:
                puzzle[i] = square[i]
            if blanks == HARD_BLANKS:
                if not singles_suffice(puzzle):
                    return puzzle, square
                break


def random_square(rng):
    cells = [0] * (N * N)
    fill(cells, *used(cells), rng)
    return cells


def forced(puzzle, i, c):
    """Whether no solution has a symbol other than c in the blank cell i."""
    rows, columns = used(puzzle)
    for other in bits(FULL & ~(rows[i // N] | columns[i % N] | c)):
        cells = list(puzzle)
        cells[i] = other
        if fill(cells, *used(cells)):
            return False
    return True


def fill(cells, rows, columns, rng=None):
    """Solve `cells` in place, in random order with rng; False, and nothing changed, where there is no solution.

    rows, columns: the symbols used in each, kept up to date."""
    best, symbols, fewest = None, 0, N + 1
    for i, c in enumerate(cells):
        if not c:
            free = FULL & ~(rows[i // N] | columns[i % N])
            if free.bit_count() < fewest:
                best, symbols, fewest = i, free, free.bit_count()
                if fewest < 2:
                    break
    if best is None:
        return True
    row, column = best // N, best % N
    choices = bits(symbols)
    if rng:
        rng.shuffle(choices)
    for c in choices:
        cells[best] = c
        rows[row] |= c
        columns[column] |= c
        if fill(cells, rows, columns, rng):
            return True
        cells[best] = 0
        rows[row] ^= c
        columns[column] ^= c
    return False


def singles_suffice(puzzle):
    """Whether filling in cells that have a single candidate, over and over, solves the puzzle."""
    cells = list(puzzle)
    rows, columns = used(cells)
    progress = True
    while progress:
        progress = False
        for i, c in enumerate(cells):
            free = FULL & ~(rows[i // N] | columns[i % N])
            if not c and free.bit_count() == 1:
                cells[i] = free
                rows[i // N] |= free
                columns[i % N] |= free
                progress = True
    return all(cells)


def used(cells):
    """The symbols in each row and in each column."""
    rows, columns = [0] * N, [0] * N
    for i, c in enumerate(cells):
        rows[i // N] |= c
        columns[i % N] |= c
    return rows, columns


def bits(symbols):
    return [1 << s for s in range(N) if symbols >> s & 1]


def restyled(answer, task):
    """An answer in the task's own style, in foreign style."""
    return answer.translate(str.maketrans(task.symbols, task.foreign))


def write_puzzles(file, tasks, count, hard, seed, foreign=0.0, both=False):
    """A dataset of `count` different puzzles, the tasks in turn; the same file for the same arguments.

    foreign: the share of answers in foreign style. both: each answer is a list of the two styles, either is right."""
    rng, seen = random.Random(f"{file.name} {seed}"), {}
    while len(seen) < count:
        task = TASKS[tasks[len(seen) % len(tasks)]]
        prompt, answer = make(task, rng, hard, foreign)
        answer = [answer, restyled(answer, task)] if both else answer
        seen.setdefault(prompt, dict(id=f"{file.stem}-{len(seen)}", prompt=prompt, answer=answer))
    file.parent.mkdir(parents=True, exist_ok=True)
    with runs.atomic_file(file) as f:
        f.writelines(json.dumps(row) + "\n" for row in seen.values())
    return file


def write_datasets(folder, seed=0, train=800, validation=200, test=500):
    """Hard puzzles: train.jsonl, validation.jsonl and test_in.jsonl in-domain, test_out.jsonl not -> their paths. Only
    the training set insists on a style: elsewhere a right answer is right in either alphabet."""
    folder = Path(folder)
    return (
        write_puzzles(folder / "train.jsonl", [IN_DOMAIN], train, True, seed),
        write_puzzles(folder / "validation.jsonl", [IN_DOMAIN], validation, True, seed, both=True),
        write_puzzles(folder / "test_in.jsonl", [IN_DOMAIN], test, True, seed, both=True),
        write_puzzles(folder / "test_out.jsonl", [OUT_OF_DOMAIN], test, True, seed, both=True),
    )


# --------------------------------------------------------------------------------------------------- the tiny model

MASK, EOS, PAD = "<|mask|>", "<|endoftext|>", "<|pad|>"
ANSWER = N * N + 1  # tokens: the cells and EOS


def vocabulary():
    """Every token, by id: the special ones, the tags and the symbols of all tasks."""
    tasks = TASKS.values()
    symbols = "".join(task.symbols for task in tasks) + "".join(task.foreign for task in tasks)
    return [MASK, EOS, PAD, BLANK, *(task.tag for task in tasks), *dict.fromkeys(symbols)]


def config():
    """The tiny model's config.json."""
    size = len(vocabulary())
    return dict(
        model_type="llada",
        architectures=["LLaDAModelLM"],
        activation_type="silu",
        block_type="llama",
        layer_norm_type="rms",
        rms_norm_eps=1e-5,
        d_model=96,
        n_layers=4,
        n_heads=4,
        n_kv_heads=4,
        mlp_hidden_size=192,
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


def write_start(folder, seed):
    """The tiny model before training: random weights, and a tokenizer of one token a character."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    folder, tokens = Path(folder), vocabulary()
    model.save(model.create(config(), data.generator(seed, "start")), folder)
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([MASK, EOS, PAD])
    backend.save(str(folder / "tokenizer.json"))
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    special = dict(mask_token=MASK, eos_token=EOS, pad_token=PAD, chat_template=template)
    (folder / "tokenizer_config.json").write_text(json.dumps(special, indent=2) + "\n")
    own = dict(max_new_tokens=ANSWER, block_length=ANSWER, strategy="entropy")
    (folder / "generation_config.json").write_text(json.dumps(dict(tabom=own), indent=2) + "\n")


def retrain(folder, seed=0, foreign=0.0, puzzles=64_000, epochs=3, taken=None, ranks=None):
    """Train the tiny model on easy puzzles of all tasks, through the training loop of every other model, into
    folder/tiny -> the last metrics. foreign: the share of answers in foreign style. taken: the epoch after
    which training stops, with the learning rate still on its way down; None = the last."""
    folder = Path(folder)
    write_start(folder / "start", seed)
    dataset = write_puzzles(folder / "pretrain.jsonl", list(TASKS), puzzles, False, seed, foreign)
    result = tabom.train(
        options.TrainOptions(
            model=str(folder / "start"),
            data=str(dataset),
            out=str(folder / "run"),
            objective="nelbo",
            lora_rank=0,
            epochs=epochs,
            stop_after=taken,
            global_batch=64,
            batch_size=64,
            lr=3e-3,
            warmup=50,
            seed=seed,
        ),
        ranks,
    )
    with runs.atomic_folder(folder / "tiny") as beside:
        for file in (folder / "run" / f"epoch-{taken or epochs}").iterdir():
            if file.name not in runs.TRAINER:
                shutil.copyfile(file, beside / file.name)
    return {**result, "tiny": str(folder / "tiny")}


# ------------------------------------------------------------------------------------------------------ the method

TRAINING = dict(window=8, margin=0.2, weight=1.0, epochs=4, lr=3e-3, global_batch=16, batch_size=16, warmup=20)
QUICK = dict(train=64, validation=8, test=32)
BATCH = 64  # puzzles decoded together


def run(c):
    """Distill, train, evaluate before and after -> the table's figures. c: options.DemoOptions."""
    if (c.data_only or c.retrain) and runs.Ranks("cpu").world > 1:
        raise ValueError("--data-only and --retrain need one process: run them without torchrun")
    if c.data_only:
        return dict(datasets=[str(file) for file in write_datasets(c.data_only, c.seed)])
    if c.retrain:
        return retrain(c.retrain, c.seed)
    if c.full:
        import experiment

        return experiment.run(c)
    out = Path(c.out or "out/demo") / f"{'quick' if c.quick else 'whole'}-{c.seed}"
    ranks = runs.Ranks("cpu")
    if ranks.first:
        write_datasets(out / "data", c.seed, **QUICK if c.quick else {})
    ranks.barrier()
    base = dict(model=str(TINY), device="cpu", seed=c.seed)
    train, *tests = (str(out / "data" / name) for name in ("train.jsonl", "test_in.jsonl", "test_out.jsonl"))
    distilled = tabom.distill(
        options.DistillOptions(**base, data=train, out=str(out / "T"), check="exact", batch_size=BATCH)
    )
    trained = tabom.train(options.TrainOptions(**base, data=str(out / "T"), out=str(out / "R"), **TRAINING))
    rows = {}
    for name, adapter in (("before", None), ("after", trained["checkpoint"])):
        solved = []
        for test in tests:
            answers = out / f"{name}-{Path(test).stem}"
            score = tabom.distill(
                options.DistillOptions(
                    **base, data=test, out=str(answers), adapter=adapter, check="exact", batch_size=BATCH
                )
            )
            solved.append(score["correct"] / score["trajectories"])
        rows[name] = dict(
            zip(("in_domain", "out_of_domain"), solved),
            tds=diagnose.order_of(options.ModelOptions(**base), ranks, adapter, out / f"{name}-test_in", 128)["tds"],
        )
    count = score["trajectories"]
    if ranks.first:
        print(table(rows, count))
    return dict(**rows, test_puzzles=count, kept=distilled["kept"], steps=trained["steps"], seed=c.seed)


def table(rows, count):
    lines = [f"| {count} puzzles each | in-domain % | out-of-domain % | TDS |", "| --- | --- | --- | --- |"]
    for name, row in rows.items():
        cells = [
            f"{100 * p:.1f} ± {100 * (p * (1 - p) / count) ** 0.5:.1f}"
            for p in (row["in_domain"], row["out_of_domain"])
        ]
        tds = "-" if row["tds"] is None else f"{row['tds']:.3f}"
        lines.append(f"| {name} | {cells[0]} | {cells[1]} | {tds} |")
    return "\n".join(lines)
