"""Seeds of runs, and the keys that are made of them."""

import jax
import numpy as np
import pytest

from diffusion.training import RunError, check_seed, run_key


def test_keys_differ_by_seed_purpose_and_index():
    draws = {
        float(jax.random.uniform(run_key(seed, purpose, index)))
        for seed in (0, 1)
        for purpose in ("init", "train")
        for index in (0, 1)
    }
    assert len(draws) == 8


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_that_would_be_another_seed_silently_are_refused(seed):
    line = f"seed is {seed}: it must be 0 to 4294967295"
    for call in (lambda: check_seed(seed), lambda: run_key(seed, "sample"), lambda: run_key(seed, "sample", 3)):
        with pytest.raises(RunError, match=f"^{line}$"):
            call()


def test_every_seed_in_range_is_a_key_of_its_own():
    seeds = [0, 1, 2**31 - 1, 2**31, 2**32 - 1]
    assert [check_seed(seed) for seed in seeds] == seeds
    assert len({tuple(np.ravel(jax.random.key_data(run_key(seed, "init"))).tolist()) for seed in seeds}) == 5
