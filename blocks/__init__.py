"""Block-causal models, SDAR and A2D. Importing this folder adds them to the tables of the core."""

from blocks import decoders  # noqa: F401, it registers the schedules
