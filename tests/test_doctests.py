"""The examples in the papers' docstrings: every public function has one, and it prints what it shows.

In the examples jax, jnp and np are imported, and the module's names and what its own docstring defines are there too.
"""

import doctest
import importlib
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

MODULES = [
    "autoencoding", "averages", "chains", "consistency", "contrastive", "distillation", "editing", "flow", "flow_map",
    "gaussian", "grids", "guidance", "likelihood", "losses", "metrics", "multistep", "policies", "predictions",
    "randomness", "samplers", "schedules", "types", "weightings",
]  # fmt: skip


def examples(module):
    """Name -> doctests of each public function and class that the module defines."""
    names = {**vars(module), "jax": jax, "jnp": jnp, "np": np}
    for example in doctest.DocTestParser().get_examples(module.__doc__):
        exec(example.source, names)
    finder = doctest.DocTestFinder()
    for name, value in vars(module).items():
        public = not name.startswith("_") and inspect.getmodule(value) is module
        if public and (inspect.isroutine(value) or inspect.isclass(value)):
            # Under pytest a function is wrapped to check its shapes: the one inside has the lines.
            yield name, value, finder.find(inspect.unwrap(value), name, module=False, globs=names.copy())


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    module = importlib.import_module(f"diffusion.{name}")
    without = []
    for name, value, tests in examples(module):
        if inspect.isroutine(value) and not name.startswith("check_") and not any(test.examples for test in tests):
            without.append(name)
        for test in tests:
            output = []
            failures, _ = doctest.DocTestRunner(verbose=False).run(test, out=output.append)
            assert not failures, "".join(output)
    assert not without, f"no example in {', '.join(without)}"
