"""The experiments: one runnable file each, and the configs of published results."""

import gc

# Imports and traces make many objects that live on: looking through them after every 700, Python's default, is a tenth
# of the time until the first step.
gc.set_threshold(20_000, 10, 10)
