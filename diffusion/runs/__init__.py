"""What can be done with a run: one file a mode, for every kind of run alike."""

from diffusion.extras import need

need("runs")
