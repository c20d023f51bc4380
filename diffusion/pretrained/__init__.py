"""Public weights <-> ours, strict: every key is used exactly once and every shape is equal."""

from diffusion.extras import need

need("runs")
