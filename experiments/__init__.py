"""The experiments: one runnable file each, and the configs of published results."""
