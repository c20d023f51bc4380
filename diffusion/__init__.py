"""Diffusion models that read like the papers: the modules beside this file; the machinery has a room each."""
