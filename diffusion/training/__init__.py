"""The trainer: it knows an `Experiment` (init, loss, optimizer, batches), and nothing of diffusion."""

from diffusion.extras import need

need("runs")

from diffusion.training import processes
from diffusion.training.checkpoints import Checkpoints
from diffusion.training.errors import RunError
from diffusion.training.experiment import (
    Experiment,
    Loss,
    Mean,
    Rules,
    TrainState,
    averaged,
    check_seed,
    init_state,
    run_key,
)
from diffusion.training.kept import Kept, kept_program
from diffusion.training.loop import abstract_train_state, abstract_weights, train
from diffusion.training.settings import Settings
from diffusion.training.sharding import batch_sharding, make_mesh, on_mesh, place_batch, state_shardings
from diffusion.training.step import make_train_step
from diffusion.training.weights import check_finite, digest

__all__ = [
    "Checkpoints",
    "Experiment",
    "Kept",
    "Loss",
    "Mean",
    "Rules",
    "RunError",
    "Settings",
    "TrainState",
    "abstract_train_state",
    "abstract_weights",
    "averaged",
    "batch_sharding",
    "check_finite",
    "check_seed",
    "digest",
    "init_state",
    "kept_program",
    "make_mesh",
    "make_train_step",
    "on_mesh",
    "place_batch",
    "processes",
    "run_key",
    "state_shardings",
    "train",
]
