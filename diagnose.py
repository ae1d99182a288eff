"""How a model decodes, in numbers and pictures: the paper's Figures 2 and 3, and what else explains a result.

    python tabom.py diagnose --model tiny --checkpoints out/R/epoch-2 --data out/T --ground-truth train.jsonl \
        --runs out/R --out out/D                                                            # run() below

Every model, the base and each checkpoint, replays the same stored trajectories, or with --fresh decodes its own. The
folder --out gets JSON Lines, and a picture of each:

    trajectories.jsonl              a line for each model and trajectory: TDS, its value per step, own-step entropies
    tds.jsonl, tds.png              TDS at each decoding step, one curve per model (Eq. 10, Figure 2)
    inversions.jsonl, .png          the share of pairs decoded hard before easy, by their distance in decode order
    loss.jsonl, loss.png            cross-entropy over the mask ratio, one curve per model and dataset (Figure 3)
    training.png                    the metrics.jsonl of --runs
    trajectory.png                  one response, its tokens in place and coloured by decode order
"""

import dataclasses
import json
import math
import unicodedata
import warnings
from pathlib import Path

import data
import evaluate
import objectives
import options
import runs
import tabom

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
CONTEXTS = ("step", "window")  # of the entropies compared: each token's own step, or one window's start for all
METRICS = ("loss", "ce", "rank", "in_order", "entropy", "grad_norm")  # drawn from metrics.jsonl where they are there


def run(c, ranks=None):
    """Measure, write and draw -> the summary of each model. c: options.DiagnoseOptions."""
    if c.model is None and (c.data or c.checkpoints or not c.runs):
        raise ValueError("--model is missing (only the curves of --runs need none)")
    if c.model is not None and c.data is None:
        raise ValueError("--data is missing: trajectories, or prompts to decode")
    runs.must_be_free(c.out)
    metrics = {str(folder): read_metrics(folder) for folder in c.runs}
    ranks = ranks or runs.Ranks(c.device)
    found = [measure(c, ranks, checkpoint) for checkpoint in (None, *c.checkpoints)] if c.model is not None else []
    if not ranks.first:
        return None
    tables = {k: [row for one in found for row in one[k]] for k in ("trajectories", "tds", "inversions", "loss")}
    summary = [one["summary"] for one in found]
    with runs.atomic_folder(c.out) as beside:
        for name, rows in tables.items():
            if rows:
                with open(beside / f"{name}.jsonl", "w", encoding="utf-8") as f:
                    f.writelines(json.dumps(row) + "\n" for row in rows)
        if found:
            save(draw_tds(tables["tds"]), beside / "tds.png")
            save(draw_inversions(tables["inversions"]), beside / "inversions.png")
            save(draw_loss(tables["loss"]), beside / "loss.png")
            save(draw_trajectory(*found[0]["picture"]), beside / "trajectory.png")
        if metrics:
            save(draw_training(metrics), beside / "training.png")
    if summary:
        print(markdown(summary, c.window))
    return dict(out=str(c.out), models=summary)


# ------------------------------------------------------------------------------------------------------ measurements


def measure(c, ranks, checkpoint):
    """Everything about one model, gathered from all processes: rows for each file, the summary and the picture."""
    name = "base" if checkpoint is None else str(checkpoint)
    m, tok, folder = load(c, ranks, checkpoint)
    m.eval()
    records = trajectories(c, ranks, m, tok, folder)
    replayed, losses = [], []
    for i in range(0, len(records), c.batch_size):
        replayed += replay(c, ranks, m, c.window, records[i : i + c.batch_size])
    sets = {f"{c.data} (decoded)": [data.cut_at_eos(r, m.config.eos_id) for r in records]}
    if c.ground_truth is not None:
        truth = tabom.reference_answers(c, c.ground_truth, tok)
        sets[str(c.ground_truth)] = truth[ranks.rank :: ranks.world]
    for source, rows in sets.items():
        for i in range(0, len(rows), c.batch_size):
            losses += [dict(data=source, **row) for row in loss_rows(c, ranks, m, rows[i : i + c.batch_size])]

    replayed = sorted(ranks.gather(replayed), key=data.by_id)
    losses = ranks.gather(losses)
    if not ranks.first:
        return None
    inverted = inversion_rows([r.pop("inversions") for r in replayed])
    summary = dict(model=name, trajectories=len(replayed), **mean_and_error("tds", [r["tds"] for r in replayed]))
    summary.update(inversion_rates(inverted))
    return dict(
        trajectories=[dict(model=name, **r) for r in replayed],
        tds=[dict(model=name, **r) for r in tds_rows(replayed)],
        inversions=[dict(model=name, **r) for r in inverted],
        loss=[dict(model=name, **r) for r in loss_means(losses, sets)],
        summary=summary,
        picture=(tok, records[0]),
    )


def order_of(c, ranks, checkpoint, trajectories, limit, window=8, margin=0.2):
    """How a model orders the first of its own trajectories: TDS and its value per step; the share of pairs less than a
    window apart that were decoded hard before easy, in both contexts; the ranking loss in nats over all windows without
    the EOS (rank), and the least that the same entropies have in any order (rank_least). c: options with a model, or
    more."""
    m, _, _ = load(c, ranks, checkpoint)
    records = data.read_trajectories(trajectories, m.config.vocab_size)[:limit]
    rows = []
    for i in range(0, len(records), 16):
        rows += replay(c, ranks, m.eval(), window, records[i : i + 16], margin)
    means = {k: mean_and_error(k, [r[k] for r in rows])[k] for k in ("tds", "rank", "rank_least")}
    near = [r for r in inversion_rows([r["inversions"] for r in rows]) if r["distance"] < window]
    return dict(**means, **inversion_rates(near), per_step=[step["tds"] for step in tds_rows(rows)])


def load(c, ranks, checkpoint):
    """The base model, with the adapter of a checkpoint, or with the weights of one that was trained in full."""
    if checkpoint is None or (Path(checkpoint) / "adapter_config.json").is_file():
        return runs.load_model(c, ranks, adapter=checkpoint)
    return runs.load_model(c, ranks, weights=checkpoint)


def trajectories(c, ranks, m, tok, folder):
    """This process's share of the trajectories: the stored ones, or decoded by m where --data has only prompts."""
    stored = data.holds_trajectories(c.data)
    given = [f.name for f in dataclasses.fields(options.DecodeOptions) if getattr(c, f.name) is not None]
    if stored and not c.fresh and given:
        raise ValueError(f"{', '.join(map(options.flag, given))} would decode anew: add --fresh, or leave them out")
    if stored:
        records = data.read_trajectories(c.data, m.config.vocab_size)
    else:
        records = data.read_examples(c.data, c.prompt_field, c.answer_field)
        records = [dict(e, prompt_ids=data.encode_prompt(tok, e["messages"], c.raw)) for e in records[: c.limit]]
    records = records[: c.limit]
    if not records:
        raise ValueError(f"{c.data}: no trajectories")
    mine = records[ranks.rank :: ranks.world]
    if stored and not c.fresh:
        return mine
    settings, never = options.decoder(c, m.config.family, folder), tabom.never_chosen(m, tok)
    mine = [dict(dict.fromkeys(("prompt", "answer")), **r) for r in mine]
    batches = [mine[i : i + c.batch_size] for i in range(0, len(mine), c.batch_size)]
    return [r for batch in batches for r in tabom.decode_batch(m, tok, batch, settings, never, c.seed, ranks.device)]


def replay(c, ranks, m, window, records, margin=0.2):
    """One dict for each trajectory: id, tds, per_step and entropy by step, the counts of inversions by context, and the
    mean ranking loss of its windows, as decoded (rank) and sorted, which is the least (rank_least)."""
    batch = {k: v.to(ranks.device) for k, v in data.collate(records, m.config.pad_id).items()}
    h = evaluate.replay(m, batch, evaluate.before_eos(batch, m.config.eos_id)).cpu()  # [B, N, N]
    own, windows = h.diagonal(dim1=1, dim2=2), evaluate.by_window(h, window, batch["length"].cpu())
    variance = evaluate.separability(h)
    rows = []
    for b, record in enumerate(records):
        counts = {k: evaluate.inversions(x[b]) for k, x in zip(CONTEXTS, (own, windows))}
        per_step, entropy = (x[b][~x[b].isnan()].tolist() for x in (variance, own))
        mean = sum(per_step) / len(per_step) if per_step else None
        whole = windows[b][~windows[b].isnan().any(-1)]  # [starts, W]; none where the response is shorter, or all EOS
        rank = dict.fromkeys(("rank", "rank_least"))
        if whole.numel() and window > 1:
            orders = dict(rank=whole, rank_least=whole.sort(-1).values)
            rank = {k: objectives.ranking_loss(x, margin).item() for k, x in orders.items()}
        rows.append(dict(id=record["id"], tds=mean, per_step=per_step, entropy=entropy, inversions=counts, **rank))
    return rows


def tds_rows(replayed):
    """TDS at each decoding step, over the trajectories that still have something masked before their first EOS."""
    longest = max(len(r["per_step"]) for r in replayed)
    steps = ([r["per_step"][t] for r in replayed if len(r["per_step"]) > t] for t in range(longest))
    return [dict(step=t, trajectories=len(values), **mean_and_error("tds", values)) for t, values in enumerate(steps)]


def inversion_rows(counts):
    """Inversions by context and distance, summed over the trajectories."""
    rows = []
    for context in CONTEXTS:
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
    for context in CONTEXTS:
        inverted, pairs = (sum(r[k] for r in rows if r["context"] == context) for k in ("inverted", "pairs"))
        rates[f"inversions_{context}"] = inverted / pairs if pairs else None
    return rates


def loss_rows(c, ranks, m, records):
    batch = {k: v.to(ranks.device) for k, v in data.collate(records, m.config.pad_id).items()}
    rows = []
    for ratio in RATIOS:
        generators = [data.generator(c.seed, "mask", ratio, r["id"]) for r in records]
        rows += [dict(mask_ratio=ratio, loss=x) for x in evaluate.loss_at(m, batch, ratio, generators).tolist()]
    return rows


def loss_means(losses, sources):
    rows = []
    for source in sources:
        for ratio in RATIOS:
            values = [r["loss"] for r in losses if r["data"] == source and r["mask_ratio"] == ratio]
            rows.append(dict(data=source, mask_ratio=ratio, responses=len(values), **mean_and_error("loss", values)))
    return rows


def mean_and_error(name, values):
    """The mean of the values that are there and its standard error, under name and name_se; None without any, and no
    error of a single one."""
    values = [x for x in values if x is not None]
    if not values:
        return {name: None, f"{name}_se": None}
    mean = sum(values) / len(values)
    if len(values) == 1:
        return {name: mean, f"{name}_se": None}
    variance = sum((x - mean) ** 2 for x in values) / (len(values) - 1)
    return {name: mean, f"{name}_se": math.sqrt(variance / len(values))}


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


def markdown(summary, window):
    lines = [
        f"| model | TDS | hard before easy, own step % | within windows of {window} % |",
        "| --- | --- | --- | --- |",
    ]
    for s in summary:
        tds = "-" if s["tds"] is None else f"{s['tds']:.4f} ± {s['tds_se']:.4f}"
        rates = ["-" if s[k] is None else f"{100 * s[k]:.1f}" for k in ("inversions_step", "inversions_window")]
        lines.append(f"| {s['model']} | {tds} | {rates[0]} | {rates[1]} |")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------- pictures


def figure(columns=1, rows=1, width=6.0, height=4.0):
    """An empty figure and its axes as a flat list; no window, no global state."""
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ImportError("pictures need matplotlib: pip install matplotlib") from e
    drawing = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return drawing, list(drawing.subplots(rows, columns, squeeze=False).flat)


def save(drawing, file):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a character that the font lacks is drawn as a box
        drawing.savefig(file, dpi=150)


def labels(names):
    """A short label for each name of a curve: its path without the folders that all paths share."""
    parts = {name: Path(name).parts for name in names}
    paths = [p[:-1] for p in parts.values() if len(p) > 1]
    shared = 0
    while len(paths) > 1 and all(len(p) > shared and p[shared] == paths[0][shared] for p in paths):
        shared += 1
    return {name: "/".join(p[shared:] if len(p) > 1 else p) for name, p in parts.items()}


def curves(axes, rows, keys, x, y, error=None):
    """One line for each value of the row's keys, with a band of a standard error."""

    def key(row):
        return tuple(row[k] for k in keys)

    short = [labels(dict.fromkeys(row[k] for row in rows)) for k in keys]
    for k in dict.fromkeys(map(key, rows)):
        line = [r for r in rows if key(r) == k and r[y] is not None]
        xs, ys = [r[x] for r in line], [r[y] for r in line]
        label = " on ".join(names[name] for names, name in zip(short, k))
        colour = axes.plot(xs, ys, label=label)[0].get_color()
        if error is not None:
            low, high = ([r[y] + sign * (r[error] or 0) for r in line] for sign in (-1, 1))
            axes.fill_between(xs, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.legend(fontsize="small")


def draw_tds(rows):
    """Figure 2 of the paper: TDS over decoding steps."""
    drawing, (axes,) = figure()
    curves(axes, rows, ["model"], "step", "tds", "tds_se")
    axes.set(xlabel="decoding step", ylabel="TDS (variance of entropies, nats²)")
    return drawing


def draw_loss(rows):
    """Figure 3 of the paper: cross-entropy over the mask ratio."""
    drawing, (axes,) = figure()
    curves(axes, rows, ["model", "data"], "mask_ratio", "loss", "loss_se")
    axes.set(xlabel="mask ratio", ylabel="cross-entropy (nats)", ylim=(0, None))
    return drawing


def draw_inversions(rows):
    drawing, panels = figure(columns=2)
    for axes, context in zip(panels, CONTEXTS):
        curves(axes, [r for r in rows if r["context"] == context], ["model"], "distance", "rate")
        what = "each token's own step" if context == "step" else "the window's start"
        axes.set(
            xlabel="distance in decode order", ylabel="hard before easy", title=f"entropies at {what}", ylim=(0, 1)
        )
    return drawing


def draw_training(metrics):
    """Training curves: one panel for each metric, one line for each run."""
    shown = [k for k in METRICS if any(k in row for rows in metrics.values() for row in rows)]
    columns = min(3, len(shown))
    drawing, panels = figure(columns, math.ceil(len(shown) / columns), width=4.5, height=3.0)
    for axes, k in zip(panels, shown):
        rows = [dict(row, run=name) for name, lines in metrics.items() for row in lines if k in row]
        curves(axes, rows, ["run"], "step", k)
        axes.set(xlabel="step", ylabel=k)
    for axes in panels[len(shown) :]:
        axes.set_axis_off()
    return drawing


def draw_trajectory(tok, record, columns=100):
    """A response up to its first EOS: every token in its place, coloured by the rank at which it was decoded."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.patches import Rectangle

    shown = data.cut_at_eos(record, tok.eos_id)
    ids, order = shown["response_ids"], shown["order"]
    cells, x, y = [], 0, 0  # (column, line, width, text, rank)
    for text, places in tok.pieces(ids):
        seen = text.replace("\n", "↵").replace("\t", "→")
        seen = "".join(ch if ch.isprintable() else "·" for ch in seen)
        width = max(1, sum(2 if unicodedata.east_asian_width(ch) in "WF" else 1 for ch in seen))
        if x + width > columns and x:
            x, y = 0, y + 1
        cells.append((x, y, width, seen, sum(order[i] for i in places) / len(places)))
        x, y = (0, y + 1) if "\n" in text else (x + width, y)
    wide, lines = max(c[0] + c[2] for c in cells), max(c[1] for c in cells) + 1
    drawing, (axes,) = figure(width=max(4.0, 0.09 * wide + 0.5), height=0.22 * lines + 1.2)
    scale = ScalarMappable(Normalize(0, max(len(ids) - 1, 1)), colormaps["viridis"])
    for x, y, width, text, rank in cells:
        axes.add_patch(Rectangle((x, y), width, 1, facecolor=scale.to_rgba(rank), edgecolor="white", linewidth=0.3))
        colour = "white" if rank < 0.6 * len(ids) else "black"
        style = dict(family="monospace", fontsize=8, color=colour, ha="center", va="center", parse_math=False)
        axes.text(x + width / 2, y + 0.5, text, **style)
    axes.set(xlim=(0, wide), ylim=(lines, 0))
    axes.set_axis_off()
    drawing.colorbar(scale, ax=axes, orientation="horizontal", label="rank in the decode order", aspect=50)
    return drawing
