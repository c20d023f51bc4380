"""Flax Linen modules that know nothing of diffusion."""
