"""The four recipes of the authors' code (tonyckc/TABOM): what each sets, named as the options of train.

    recipes.settings("llada-prm12k")["margin"]    # 0.2

All else is the same in the four, and train's default: W 32, LoRA of rank and alpha 16 on q_proj and v_proj, 5 epochs,
weight decay 0.01, clipping at 1, 50 steps of warm-up. docs/recipes.md has the commands.
"""

SHARED = dict(window=32, lora_rank=16, lora_alpha=16, epochs=5, weight_decay=0.01, clip=1.0, warmup=50)
SHARED |= dict(starts="uniform", max_prompt_tokens=256, keep="all", cut_eos=False, lora_targets=("q_proj", "v_proj"))
OF_TABOM = ("window", "margin", "weight", "starts")
ALL_METHODS_OF_LLADA = ("entropy", "default", "credit")
RECIPES = {
    "dream-prm12k": dict(methods=("entropy",), margin=0.1, weight=1.0, lr=2e-5, global_batch=32),
    "dream-ling-coder": dict(methods=("all",), margin=0.1, weight=2.0, lr=1e-4, global_batch=64, starts="non-ltr"),
    "llada-prm12k": dict(methods=ALL_METHODS_OF_LLADA, margin=0.2, weight=1.0, lr=2e-5, global_batch=32),
    "llada-ling-coder": dict(methods=("default",), margin=0.3, weight=1.0, lr=2e-5, global_batch=32),
}


def settings(name):
    """{option of train: value} of a recipe; empty for None. Raises ValueError for a recipe that there is not."""
    if name not in (None, *RECIPES):
        raise ValueError(f"--recipe {name}: must be one of {', '.join(RECIPES)}")
    return {} if name is None else SHARED | RECIPES[name]


def of(c):
    """What c, options of train, has from its recipe: without what is TABOM's for another objective, whose options may
    have the same names, and without the margin for another ranking."""
    found, left_out = settings(c.recipe), OF_TABOM
    if c.objective == "tabom":
        left_out = () if c.ranking in (None, "margin") else ("margin",)
    for name in left_out:
        found.pop(name, None)
    return found


def help():
    """A line about each recipe, for the help of the command line."""
    lines = []
    for name, r in RECIPES.items():
        lines.append(f"{name}: margin {r['margin']}, weight {r['weight']}, lr {r['lr']}, batch {r['global_batch']}")
    return "; ".join(lines)
