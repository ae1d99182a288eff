"""How a model decodes, in numbers and pictures: the paper's Figures 2 and 3, and what else explains a result.

    python tabom.py diagnose --model tiny --checkpoints out/R/epoch-2 --data out/T --ground-truth train.jsonl \
        --runs out/R --out out/D

Every model, the base and each checkpoint, replays the same stored trajectories, or with --fresh decodes its own. The
folder --out gets JSON Lines, and a picture of each:

    trajectories.jsonl              a line for each model and trajectory: TDS, its value per step, own-step entropies
    tds.jsonl, tds.png              TDS at each decoding step, one curve per model (Eq. 10, Figure 2)
    inversions.jsonl, .png          the share of pairs decoded hard before easy, by their distance in decode order
    loss.jsonl, loss.png            cross-entropy over the mask ratio, one curve per model and dataset (Figure 3)
    training.png                    the metrics.jsonl of --runs
    trajectory.png                  one response, its tokens in place and coloured by decode order
"""

import json
from dataclasses import dataclass
from pathlib import Path

import data
import evaluate
import objectives
import runs
import train
from experiments import plots, stats
from options import field_names, flag, name_list, opt

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@dataclass
class DiagnoseOptions(runs.ModelOptions, runs.DecodeOptions, runs.DatasetOptions):
    """what is measured"""

    model: str | None = opt(None, "base model; only the curves of --runs need none")
    checkpoints: tuple = opt((), "checkpoints of it, each one more curve, comma-separated", parse=name_list)
    data: str | None = opt(None, "trajectories to replay; or prompts, which each model decodes itself")
    fresh: bool = opt(False, "decode the prompts of stored trajectories anew with each model")
    ground_truth: str | None = opt(None, "dataset with answers, for the loss over the mask ratio")
    runs: tuple = opt((), "training runs whose metrics are drawn, comma-separated", parse=name_list)
    out: str = opt(None, "folder for the numbers and pictures, which must not be there yet", required=True)
    limit: int | None = opt(64, "only the first so many trajectories and answers", low=1)
    batch_size: int = opt(16, "trajectories replayed together on each process", low=1)
    window: int = opt(32, "W: compare entropies inside windows of so many tokens", low=2)


def diagnose(c, processes=None):
    """Measure, write and draw -> the summary of each model. c: DiagnoseOptions."""
    if c.model is None and (c.data or c.checkpoints or not c.runs):
        raise ValueError("--model is missing (only the curves of --runs need none)")
    if c.model is not None and c.data is None:
        raise ValueError("--data is missing: trajectories, or prompts to decode")
    runs.must_be_free(c.out)
    metrics = {str(folder): read_metrics(folder) for folder in c.runs}
    processes = processes or runs.Processes(c.device)
    found = [measure(c, processes, checkpoint) for checkpoint in (None, *c.checkpoints)] if c.model is not None else []
    if not processes.first:
        return None
    tables = {k: [row for one in found for row in one[k]] for k in ("trajectories", "tds", "inversions", "loss")}
    summary = [one["summary"] for one in found]
    with runs.atomic_folder(c.out) as beside:
        for name, rows in tables.items():
            if rows:
                with open(beside / f"{name}.jsonl", "w", encoding="utf-8") as f:
                    f.writelines(json.dumps(row) + "\n" for row in rows)
        if found:
            plots.save(plots.draw_tds(tables["tds"]), beside / "tds.png")
            plots.save(plots.draw_inversions(tables["inversions"]), beside / "inversions.png")
            plots.save(plots.draw_loss(tables["loss"]), beside / "loss.png")
            plots.save(plots.draw_trajectory(*found[0]["picture"]), beside / "trajectory.png")
        if metrics:
            plots.save(plots.draw_training(metrics), beside / "training.png")
    if summary:
        print(summary_table(summary, c.window))
    return dict(out=str(c.out), models=summary)


# ------------------------------------------------------------------------------------------------------ measurements


def measure(c, processes, checkpoint):
    """Everything about one model, gathered from all processes: rows for each file, the summary and the picture."""
    name = "base" if checkpoint is None else str(checkpoint)
    loaded = runs.load_checkpoint(c, processes, checkpoint)
    records = trajectories(c, processes, loaded)
    replayed, losses = [], []
    for i in range(0, len(records), c.batch_size):
        replayed += replay(loaded, processes, c.window, records[i : i + c.batch_size])
    sets = {f"{c.data} (decoded)": [data.cut_at_eos(r, loaded.m.config.eos_id) for r in records]}
    if c.ground_truth is not None:
        truth = train.reference_answers(c, c.ground_truth, loaded.tok)
        sets[str(c.ground_truth)] = truth[processes.index :: processes.count]
    for source, rows in sets.items():
        for i in range(0, len(rows), c.batch_size):
            losses += [dict(data=source, **row) for row in loss_rows(c, processes, loaded, rows[i : i + c.batch_size])]

    replayed = sorted(processes.gather(replayed), key=data.by_id)
    losses = processes.gather(losses)
    if not processes.first:
        return None
    inverted = inversion_rows([r.pop("inversions") for r in replayed])
    summary = dict(model=name, trajectories=len(replayed), **stats.mean_and_error("tds", [r["tds"] for r in replayed]))
    summary.update(inversion_rates(inverted))
    return dict(
        trajectories=[dict(model=name, **r) for r in replayed],
        tds=[dict(model=name, **r) for r in tds_rows(replayed)],
        inversions=[dict(model=name, **r) for r in inverted],
        loss=[dict(model=name, **r) for r in loss_means(losses, sets)],
        summary=summary,
        picture=(loaded.tok, records[0]),
    )


def order_of(c, processes, checkpoint, trajectories, limit, window=8, margin=0.2, loaded=None):
    """How a model orders the first of its own trajectories: TDS and its value per step; the share of pairs less than a
    window apart that were decoded hard before easy, in both contexts; the ranking loss in nats over all windows without
    the EOS (ranking), and the least that the same entropies have in any order (ranking_least). c: options with a model,
    or more. loaded: the checkpoint's model, where it is loaded already."""
    if loaded is None:
        loaded = runs.load_checkpoint(c, processes, checkpoint)
    records = data.read_trajectories(trajectories, loaded.m.config.vocab_size)[:limit]
    rows = []
    for i in range(0, len(records), 16):
        rows += replay(loaded, processes, window, records[i : i + 16], margin)
    means = {k: stats.mean_and_error(k, [r[k] for r in rows])[k] for k in ("tds", "ranking", "ranking_least")}
    near = [r for r in inversion_rows([r["inversions"] for r in rows]) if r["distance"] < window]
    return dict(**means, **inversion_rates(near), per_step=[step["tds"] for step in tds_rows(rows)])


def trajectories(c, processes, loaded):
    """This process's share of the trajectories: the stored ones, or decoded by the model where --data has prompts."""
    stored = data.holds_trajectories(c.data)
    given = [name for name in field_names(runs.DecodeOptions) if getattr(c, name) is not None]
    if stored and not c.fresh and given:
        raise ValueError(f"{', '.join(map(flag, given))} would decode anew: add --fresh, or leave them out")
    if stored:
        records = data.read_trajectories(c.data, loaded.m.config.vocab_size)[: c.limit]
    else:
        records = data.read_examples(c.data, c.prompt_field, c.answer_field, c.limit)
        for e in records:
            e["prompt_ids"] = data.encode_prompt(loaded.tok, e["messages"], c.raw)
    if not records:
        raise ValueError(f"{c.data}: no trajectories")
    mine = records[processes.index :: processes.count]
    if stored and not c.fresh:
        return mine
    settings, decoded = runs.decoder_settings(c, loaded), []
    for i in range(0, len(mine), c.batch_size):
        decoded += evaluate.answer_batch(loaded, mine[i : i + c.batch_size], settings, c.seed, processes.device)
    return decoded


def replay(loaded, processes, window, records, margin=0.2):
    """One dict for each trajectory: id, tds, per_step and entropy by step, the counts of inversions by context, and the
    mean ranking loss of its windows, as decoded (ranking) and sorted, which is the least (ranking_least)."""
    batch = runs.batch_of(records, loaded, processes)
    h = objectives.replay(loaded.m, batch, objectives.before_eos(batch, loaded.m.config.eos_id)).cpu()  # [B, N, N]
    own, windows = h.diagonal(dim1=1, dim2=2), objectives.by_window(h, window, batch["length"].cpu())
    variance = objectives.separability(h)
    rows = []
    for b, record in enumerate(records):
        counts = {k: objectives.inversions(x[b]) for k, x in zip(plots.CONTEXTS, (own, windows))}
        per_step, entropy = (x[b][~x[b].isnan()].tolist() for x in (variance, own))
        mean = sum(per_step) / len(per_step) if per_step else None
        whole = windows[b][~windows[b].isnan().any(-1)]  # [starts, W]; none where the response is shorter, or all EOS
        ranking = dict.fromkeys(("ranking", "ranking_least"))
        if whole.numel() and window > 1:
            orders = dict(ranking=whole, ranking_least=whole.sort(-1).values)
            ranking = {k: objectives.ranking_loss(x, margin).item() for k, x in orders.items()}
        rows.append(dict(id=record["id"], tds=mean, per_step=per_step, entropy=entropy, inversions=counts, **ranking))
    return rows


def tds_rows(replayed):
    """TDS at each decoding step, over the trajectories that still have something masked before their first EOS."""
    longest = max(len(r["per_step"]) for r in replayed)
    steps = ([r["per_step"][t] for r in replayed if len(r["per_step"]) > t] for t in range(longest))
    return [
        dict(step=t, trajectories=len(values), **stats.mean_and_error("tds", values)) for t, values in enumerate(steps)
    ]


def inversion_rows(counts):
    """Inversions by context and distance, summed over the trajectories."""
    rows = []
    for context in plots.CONTEXTS:
        total = {}
        for one in counts:
            for i, (inverted, pairs) in enumerate(zip(*(one[context][k].tolist() for k in ("inverted", "pairs")))):
                before = total.get(i + 1, (0, 0))
                total[i + 1] = (before[0] + inverted, before[1] + pairs)
        rows += [
            dict(context=context, distance=d, rate=inverted / pairs, inverted=inverted, pairs=pairs)
            for d, (inverted, pairs) in sorted(total.items())
            if pairs
        ]
    return rows


def inversion_rates(rows):
    """The share of all pairs that were decoded hard before easy, for each context; None without pairs."""
    rates = {}
    for context in plots.CONTEXTS:
        inverted, pairs = (sum(r[k] for r in rows if r["context"] == context) for k in ("inverted", "pairs"))
        rates[f"inversions_{context}"] = inverted / pairs if pairs else None
    return rates


def loss_rows(c, processes, loaded, records):
    batch = runs.batch_of(records, loaded, processes)
    rows = []
    for ratio in RATIOS:
        generators = [data.generator(c.seed, "mask", ratio, r["id"]) for r in records]
        rows += [
            dict(mask_ratio=ratio, loss=x) for x in objectives.loss_at(loaded.m, batch, ratio, generators).tolist()
        ]
    return rows


def loss_means(losses, sources):
    rows = []
    for source in sources:
        for ratio in RATIOS:
            values = [r["loss"] for r in losses if r["data"] == source and r["mask_ratio"] == ratio]
            rows.append(
                dict(data=source, mask_ratio=ratio, responses=len(values), **stats.mean_and_error("loss", values))
            )
    return rows


def read_metrics(folder):
    """The metrics of a training run, from its folder or the file itself."""
    file = Path(folder) / "metrics.jsonl" if Path(folder).is_dir() else Path(folder)
    rows = list(data.read_rows(file))
    bad = next(
        (where for where, row in rows if not isinstance(row, dict) or not isinstance(row.get("step"), int)), None
    )
    if bad or not rows:
        raise ValueError(f"{bad or file}: not the metrics of a training run")
    return [row for _, row in rows]


def summary_table(summary, window):
    lines = [
        f"| model | TDS | hard before easy, own step % | within windows of {window} % |",
        "| --- | --- | --- | --- |",
    ]
    for s in summary:
        tds = "-" if s["tds"] is None else f"{s['tds']:.4f} ± {s['tds_se']:.4f}"
        rates = ["-" if s[k] is None else f"{100 * s[k]:.1f}" for k in ("inversions_step", "inversions_window")]
        lines.append(f"| {s['model']} | {tds} | {rates[0]} | {rates[1]} |")
    return "\n".join(lines)
