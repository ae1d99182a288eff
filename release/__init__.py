"""What the authors published (tonyckc/TABOM, May 2026): trajectory files, recipes, the paper's tables."""
