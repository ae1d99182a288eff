"""How a model decodes, in numbers and pictures: the paper's Figures 2 and 3, TDS, training curves.

    python tabom.py diagnose --model tiny --checkpoints out/R/epoch-2 --data out/T --out out/D \
        --ground-truth train.jsonl --runs out/R

Every model, the base and each checkpoint, replays the same stored trajectories; with --fresh it
decodes its own. The table on stdout has the Trajectory Discrimination Score (TDS) of each model, as
Table 6 does. The folder --out gets JSON Lines, and a picture of each:

    trajectories.jsonl      a line for each model and trajectory: TDS, its value at each step, the
                            entropy of each token at its own step, the ranking loss
    tds.jsonl, .png         TDS at each decoding step over 64 trajectories, by model (Figure 2)
    inversions.jsonl, .png  the share of pairs decoded hard before easy, by distance in decode order
    loss.jsonl, .png        cross-entropy over the mask ratio, by model and dataset (Figure 3)
    training.png            the metrics.jsonl of --runs
    trajectory.png          one response, its tokens in place and coloured by decode order
    meta.json               which models, which trajectories, and the summary of each model

A pair of tokens is compared in two contexts (plots.CONTEXTS): "step" takes the entropy of each at
its own step (Eq. 5), "window" takes both at the start of a window (Eq. 9).

Dimensions: B batch, N response, W window, V vocabulary.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch

import baselines
import data
import distill
import objectives
import tokenizer
from experiments import pictures, plots, stats
from runs import disk, loading, torchrun
from runs.options import field_names, flag, name_list, opt

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
TABLES = ("trajectories", "tds", "inversions", "loss")  # the JSON Lines in --out
BATCH = 16  # trajectories that own_order replays together


@dataclass
class DiagnoseOptions(loading.ModelOptions, loading.DecodeOptions, loading.DatasetOptions):
    """what is measured"""

    model: str | None = opt(None, "base model; only the curves of --runs need none")
    checkpoints: tuple = opt((), "checkpoints of it, each one more curve, comma-separated", parse=name_list)
    data: str | None = opt(None, "trajectories to replay; or prompts, which each model decodes itself")
    fresh: bool = opt(False, "decode the prompts of stored trajectories anew with each model")
    ground_truth: str | None = opt(None, "dataset with answers, for the loss over the mask ratio")
    runs: tuple = opt((), "training runs whose metrics are drawn, comma-separated", parse=name_list)
    out: str = opt(None, "folder for the numbers and pictures, which must not be there yet", required=True)
    limit: int | None = opt(64, "use only the first LIMIT trajectories and answers", low=1)
    batch_size: int = opt(16, "trajectories replayed together on each process", low=1)
    window: int = opt(32, "W: compare entropies inside windows of this many decode steps", low=2)
    tds_eos: str = opt(
        "so-far",
        "TDS counts positions left of the EOS that stands so far, or of the final one",
        choices=("so-far", "final"),
    )
    methods: tuple | None = opt(None, "of the authors' files: rows of these decoding methods", parse=name_list)
    margin: float = opt(0.2, "gamma of the ranking loss that trajectories.jsonl reports, nats", low=0)


def diagnose(c, processes=None):
    """Measure how each model decodes, write the numbers and draw them -> the summary of each model.

    c: DiagnoseOptions. Raises ValueError for options that do not fit together, and FileExistsError
    for an --out that is there already, before a model is loaded."""
    if c.model is None and (c.data or c.checkpoints or not c.runs):
        raise ValueError("--model is missing (only the curves of --runs need none)")
    if c.model is not None and c.data is None:
        raise ValueError("--data is missing: trajectories, or prompts to decode")
    disk.must_be_free(c.out)
    check_inputs(c)
    metrics = {}
    for folder in c.runs:
        metrics[str(folder)] = read_metrics(folder)
    processes = processes or torchrun.Processes(c.device)
    found = []  # one dict for each model, the base first
    if c.model is not None:
        for checkpoint in (None, *c.checkpoints):
            found.append(measure_model(c, processes, checkpoint))
    if not processes.first:
        return None
    summary = [one["summary"] for one in found]
    with disk.atomic_folder(c.out) as beside:
        write_results(beside, found, metrics)
        if found:
            meta = dict(about(c, found), models=summary)
            (beside / "meta.json").write_text(json.dumps(meta, indent=2, default=str) + "\n", encoding="utf-8")
    if summary:
        print(summary_table(summary, c.window))
    return dict(out=str(c.out), models=summary)


def check_inputs(c):
    """Raises FileNotFoundError or ValueError for what is read only after the base model is measured."""
    for folder in map(Path, c.checkpoints):
        if not (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
            what = "no adapter_config.json and no config.json in there"
            raise FileNotFoundError(f"--checkpoints {folder}: {what}; of a run give a checkpoint, such as RUN/epoch-5")
    for folder in c.runs:
        if not Path(folder).exists():
            raise FileNotFoundError(f"--runs {folder}: there is no such run")
    if c.ground_truth is not None:
        data.read_examples(c.ground_truth, c.prompt_field, c.answer_field, c.limit, lambda line: None)


def about(c, found):
    """What was measured, for meta.json: the options, the models by their content, and whose the trajectories are."""
    made_by = data.read_json(Path(c.data) / "meta.json", missing={})
    hashes = [one["sha256"] for one in found]  # of the base, then of each checkpoint
    known = dict(model_sha256=hashes[0], checkpoint_sha256=hashes[1:], data_sha256=disk.data_fingerprint(c.data))
    return dict(command="diagnose", options=vars(c), shape=found[0]["shape"], **known, made_by=made_by)


def write_results(folder, found, metrics):
    """The JSON Lines and pictures. found: what measure_model gave for each model; metrics: {run:
    lines}."""
    tables = {}
    for name in TABLES:
        tables[name] = []
        for one in found:
            tables[name] += one[name]
        if tables[name]:
            with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as f:
                for row in tables[name]:
                    f.write(json.dumps(row) + "\n")
    if found:
        plots.save(plots.draw_tds(tables["tds"]), folder / "tds.png")
        plots.save(plots.draw_inversions(tables["inversions"]), folder / "inversions.png")
        plots.save(plots.draw_loss(tables["loss"]), folder / "loss.png")
        plots.save(pictures.draw_trajectory(*found[0]["picture"]), folder / "trajectory.png")
    if metrics:
        plots.save(plots.draw_training(metrics), folder / "training.png")


# ---------------------------------------------------------------------------------------- one model


def measure_model(c, processes, checkpoint):
    """Everything about one model, gathered from all processes: rows for each of TABLES, the summary
    and the picture. None on all processes but the first. checkpoint: None is the base model."""
    name = "base" if checkpoint is None else str(checkpoint)
    loaded = loading.load_checkpoint(c, processes, checkpoint)
    records = records_of(c, processes, loaded)
    replayed = []
    for i in range(0, len(records), c.batch_size):
        replayed += replay_rows(loaded, processes, records[i : i + c.batch_size], c.window, c.margin, c.tds_eos)
    sources = {f"{c.data} (decoded)": [data.cut_at_eos(r, loaded.tok.stop_ids) for r in records]}
    if c.ground_truth is not None:
        answers = data.read_examples(c.ground_truth, c.prompt_field, c.answer_field, c.limit)
        tokenizer.encode_examples(loaded.tok, answers, c.raw, answers=True)
        sources[str(c.ground_truth)] = answers[processes.index :: processes.count]
    losses = []
    for source, rows in sources.items():
        for i in range(0, len(rows), c.batch_size):
            for row in loss_rows(loaded, processes, rows[i : i + c.batch_size], c.seed):
                losses.append(dict(data=source, **row))

    replayed = sorted(processes.gather(replayed), key=data.by_id)
    losses = processes.gather(losses)
    if not processes.first:
        return None
    counts = [r.pop("inversions") for r in replayed]
    rows = dict(trajectories=replayed, tds=tds_by_step(replayed))
    rows.update(inversions=inversions_by_distance(counts), loss=mean_losses(losses, sources))
    summary = dict(model=name, trajectories=len(replayed))
    summary.update(stats.mean_and_error("tds", [r["tds"] for r in replayed]))
    summary["tds_of"] = sum(r["tds"] is not None for r in replayed)  # one that begins with EOS may have none
    summary.update(inversion_rates(rows["inversions"]))
    result = dict(summary=summary, picture=(loaded.tok, records[0]), shape=loading.shape(loaded.m.config))
    result["sha256"] = disk.fingerprint(loaded.folder if checkpoint is None else checkpoint)
    for table, lines in rows.items():
        result[table] = [dict(model=name, **line) for line in lines]
    return result


def own_order(loaded, processes, trajectories, limit, window, margin):
    """How a model orders the first of its own trajectories -> a dict of means, None where no
    trajectory has a value:

    tds, per_step       TDS, and its value at each decoding step (Eq. 10, 11), nats^2
    tds_final           TDS up to the final EOS (--tds-eos final)
    ranking             the ranking loss (Eq. 8) of all windows that hold no EOS, nats
    ranking_least       the least that the same entropies have in any order
    inversions_step, inversions_window      share of the pairs less than a window apart that were
                        decoded hard before easy, in both contexts

    trajectories: a folder or file of them, made by this model. window, margin: W and gamma of the
    run (nats)."""
    records = data.read_trajectories(trajectories, loaded.m.config.vocab_size)[:limit]
    rows = []
    for i in range(0, len(records), BATCH):
        rows += replay_rows(loaded, processes, records[i : i + BATCH], window, margin)
    found = {}
    for name in ("tds", "tds_final", "ranking", "ranking_least"):
        found[name] = stats.mean_and_error(name, [r[name] for r in rows])[name]
    near = []
    for row in inversions_by_distance([r["inversions"] for r in rows]):
        if row["distance"] < window:
            near.append(row)
    per_step = [step["tds"] for step in tds_by_step(rows)]
    return dict(**found, **inversion_rates(near), per_step=per_step)


def records_of(c, processes, loaded):
    """This process's share of the trajectories: the stored ones, or decoded by the model where
    --data has prompts."""
    stored = data.holds_trajectories(c.data)
    given = []
    for name in field_names(loading.DecodeOptions):
        if getattr(c, name) is not None and getattr(c, name) is not False:
            given.append(flag(name))
    if stored and not c.fresh and given:
        raise ValueError(f"{', '.join(given)} would decode anew: add --fresh, or leave them out")
    if stored:
        how = dict(tok=loaded.tok, methods=c.methods, mask_id=loaded.m.config.mask_id, raw=c.raw)
        records = data.read_trajectories(c.data, loaded.m.config.vocab_size, **how)[: c.limit]
    else:
        records = data.read_examples(c.data, c.prompt_field, c.answer_field, c.limit)
        for e in records:
            e["prompt_ids"] = tokenizer.encode_prompt(loaded.tok, e["messages"], c.raw)
    if not records:
        raise ValueError(f"{c.data}: no trajectories")
    mine = records[processes.index :: processes.count]
    if stored and not c.fresh:
        return mine
    settings, decoded = loading.decoder_settings(c, loaded), []
    for i in range(0, len(mine), c.batch_size):
        batch = mine[i : i + c.batch_size]
        decoded += distill.answer_batch(loaded, batch, settings, c.seed, processes.device)
    return decoded


# ------------------------------------------------------- measurements: all calls into objectives.py


def replay_rows(loaded, processes, records, window, margin, tds_eos="so-far"):
    """How the model sees a few trajectories, step by step -> a dict for each:

    id, tds, per_step       TDS of the trajectory and its value at each step; tds is None without any
    tds_final               TDS up to the final EOS, whatever tds_eos says
    entropy                 of each token at its own step, in decode order, nats
    ranking, ranking_least  mean ranking loss of its windows, as decoded, and sorted; None without one
    inversions              {context: [(inverted, pairs) at distance 1, 2, ...]}
    """
    # The TDS as the authors' code has it knows exactly one id: EOS, not the end of a turn.
    batch, eos_id = loading.batch_of(records, loaded, processes), loaded.m.config.eos_id
    before_eos = objectives.counted_until(batch, eos_id, "final")  # [B, N], -1 behind the response's first EOS
    looked_at = torch.maximum(before_eos, objectives.counted_until(batch, eos_id, "so-far"))
    h = objectives.replay(loaded.m, batch, looked_at)  # [B, S, N]
    tds = objectives.tds(loaded.m, batch, eos_id, tds_eos, h=h)
    tds_final = numbers_or_none(objectives.tds(loaded.m, batch, eos_id, "final", h=h)["rows"])
    said = objectives.in_decode_order(before_eos, batch) >= 0  # [B, N]; what follows the answer is not ranked
    h = h.masked_fill(~said[:, None], torch.nan)
    own_step = baselines.entropies_when_decoded(h, batch).cpu()  # [B, N], in decode order
    windows = baselines.windows_of_replay(h, batch, window).cpu()  # [B, S, W], a window for each start
    rows = []
    for b, record in enumerate(records):
        row = dict(id=record["id"], tds=None, tds_final=tds_final[b], per_step=tds["curves"][b])
        row["entropy"] = numbers(own_step[b])
        if not math.isnan(tds["rows"][b]):
            row["tds"] = tds["rows"][b]
        row.update(ranking=None, ranking_least=None)
        whole = windows[b][~windows[b].isnan().any(-1)]  # [starts, W], those without an EOS
        if whole.numel():
            row["ranking"] = objectives.ranking_loss(whole, margin).item()
            row["ranking_least"] = objectives.ranking_loss(whole.sort(-1).values, margin).item()
        row["inversions"] = {}
        for context, entropies in zip(plots.CONTEXTS, (own_step[b], windows[b])):
            counts = baselines.inversions(entropies)
            pairs = zip(counts["inverted"].tolist(), counts["pairs"].tolist())
            row["inversions"][context] = list(pairs)
        rows.append(row)
    return rows


def loss_rows(loaded, processes, records, seed):
    """The cross-entropy of each response at each of RATIOS, in nats: a row for each of both."""
    batch = loading.batch_of(records, loaded, processes)
    rows = []
    for ratio in RATIOS:
        generators = [data.generator(seed, "mask", ratio, r["id"]) for r in records]
        for loss in baselines.masked_loss(loaded.m, batch, ratio, generators).tolist():
            rows.append(dict(mask_ratio=ratio, loss=loss))
    return rows


def numbers_or_none(values):
    """A list with None for what is NaN."""
    return [None if math.isnan(x) else x for x in values]


def numbers(x):
    """The values of a tensor that are numbers (no NaN), as a list."""
    return x[~x.isnan()].tolist()


# ----------------------------------------------------------------------------------- sums and means


def tds_by_step(replayed):
    """TDS at each decoding step, over the trajectories that still have something masked before
    their first EOS."""
    values = []  # for each step
    for row in replayed:
        for step, variance in enumerate(row["per_step"]):
            if step == len(values):
                values.append([])
            values[step].append(variance)
    rows = []
    for step, found in enumerate(values):
        rows.append(dict(step=step, trajectories=len(found), **stats.mean_and_error("tds", found)))
    return rows


def inversions_by_distance(counts):
    """Inversions by context and distance, summed over the trajectories. counts: row["inversions"]
    of each."""
    rows = []
    for context in plots.CONTEXTS:
        total = {}  # distance -> [inverted, pairs]
        for one in counts:
            for distance, (inverted, pairs) in enumerate(one[context], 1):
                sums = total.setdefault(distance, [0, 0])
                sums[0] += inverted
                sums[1] += pairs
        for distance, (inverted, pairs) in sorted(total.items()):
            if pairs:
                rate = inverted / pairs
                row = dict(context=context, distance=distance, rate=rate)
                rows.append(dict(**row, inverted=inverted, pairs=pairs))
    return rows


def inversion_rates(rows):
    """The share of pairs that were decoded hard before easy, for each context; None without any."""
    rates = {}
    for context in plots.CONTEXTS:
        inverted = pairs = 0
        for row in rows:
            if row["context"] == context:
                inverted += row["inverted"]
                pairs += row["pairs"]
        rates[f"inversions_{context}"] = inverted / pairs if pairs else None
    return rates


def mean_losses(losses, sources):
    """The mean loss for each source and mask ratio."""
    values = {}
    for row in losses:
        values.setdefault((row["data"], row["mask_ratio"]), []).append(row["loss"])
    rows = []
    for source in sources:
        for ratio in RATIOS:
            found = values.get((source, ratio), [])
            mean = stats.mean_and_error("loss", found)
            rows.append(dict(data=source, mask_ratio=ratio, responses=len(found), **mean))
    return rows


# ------------------------------------------------------------------------------ reading and showing


def read_metrics(folder):
    """The metrics of a training run, from its folder or the file itself. Raises ValueError for
    anything else."""
    file = Path(folder)
    if file.is_dir():
        file = file / "metrics.jsonl"
    metrics = []
    for where, row in data.read_rows(file):
        numbers = (
            isinstance(row, dict) and type(row.get("step")) is int and type(row.get("loss")) in (int, float, type(None))
        )
        if not numbers:
            raise ValueError(f"{where}: not the metrics of a training run")
        metrics.append(row)
    if not metrics:
        raise ValueError(f"{file}: not the metrics of a training run")
    return metrics


def summary_table(summary, window):
    """TDS of each model, its standard error over the trajectories, and inversions in both contexts."""
    columns = f"hard before easy, own step % | within windows of {window} %"
    lines = [f"| model | trajectories | TDS | {columns} |", "| --- | --- | --- | --- | --- |"]
    for s in summary:
        cells = [s["model"], str(s["trajectories"]), "-"]
        if s["tds"] is not None:
            cells[-1] = f"{s['tds']:.4f}"
            if s["tds_se"] is not None:
                cells[-1] += f" ± {s['tds_se']:.4f}"
            if s["tds_of"] < s["trajectories"]:
                cells[-1] += f" (of {s['tds_of']})"
        for context in plots.CONTEXTS:
            rate = s[f"inversions_{context}"]
            cells.append("-" if rate is None else f"{100 * rate:.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
