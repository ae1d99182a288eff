"""SDAR and A2D: models whose attention is causal from block to block of tokens, and sees all of a block.

    import blocks            # model.load does so where config.json names one of these families

Importing this folder registers what its files have: their network in model.FAMILIES.
"""

from blocks import network  # noqa: F401
