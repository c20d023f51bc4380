"""Where the parts meet: from names in a config to a process, a network, a condition and a space. The only such room."""

from diffusion.extras import need

need("runs")
