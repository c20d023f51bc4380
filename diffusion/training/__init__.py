"""The trainer: it knows an `Experiment` (init, loss, optimizer, batches), and nothing of diffusion."""

from diffusion.training import processes
from diffusion.training.checkpoints import Checkpoints
from diffusion.training.errors import RunError
from diffusion.training.experiment import Experiment, Loss, Mean, TrainState, check_seed, init_state, run_key
from diffusion.training.loop import abstract_train_state, train
from diffusion.training.settings import Settings
from diffusion.training.sharding import fully_sharded, make_mesh, place_batch, replicated, state_shardings
from diffusion.training.step import make_train_step
from diffusion.training.weights import check_finite, digest

__all__ = [
    "Checkpoints",
    "Experiment",
    "Loss",
    "Mean",
    "RunError",
    "Settings",
    "TrainState",
    "abstract_train_state",
    "check_finite",
    "check_seed",
    "digest",
    "fully_sharded",
    "init_state",
    "make_mesh",
    "make_train_step",
    "place_batch",
    "processes",
    "replicated",
    "run_key",
    "state_shardings",
    "train",
]
