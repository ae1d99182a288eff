"""What the authors published (tonyckc/TABOM, May 2026): trajectory files, recipes, a decoder, the paper's tables.

Importing this folder adds their decoder to decode.SCHEDULES; decode.generate does so where it is asked for.
"""

from release import credit  # noqa: F401
