"""SDAR and A2D: models whose attention is causal from block to block of tokens, and sees all of a block.

    import blocks            # model.load and decode.generate do so where one of these is asked for

Importing this folder adds what its files have to the tables of the core: networks to model.FAMILIES, schedules to
decode.SCHEDULES.
"""

from blocks import decoders, network  # noqa: F401
