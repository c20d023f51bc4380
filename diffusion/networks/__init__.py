"""Flax Linen modules that know nothing of diffusion."""

from diffusion.extras import need

need("runs")
