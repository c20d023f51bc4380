"""A trained run, opened: its config, model and averaged weights, and what Python can do with them.

run = diffusion.open_run("runs/digits")
images = run.sample(16, seed=0)
"""

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from diffusion import training
from diffusion.data.images import check_uint8_images
from diffusion.model import formats
from diffusion.model.condition import rows_away, rows_of
from diffusion.model.config import Config, from_plain, make_settings, plain
from diffusion.model.experiment import check_references, make_learner, make_model
from diffusion.model.fields import change
from diffusion.model.likelihood import Likelihood, bits_per_dim
from diffusion.model.model import Model, from_noise, guided
from diffusion.model.sampling import make_sampling
from diffusion.model.warnings import warnings_of
from diffusion.runs import published
from diffusion.runs.draw import Painter, Programs, draw
from diffusion.runs.pictures import fit_reference
from diffusion.training import RunError, averaged, check_finite, check_seed, digest, make_mesh, snapshots
from diffusion.training.checkpoints import open_existing
from diffusion.training.workdir import FREE_AFTERWARDS, differences

FAR = 0.1  # an average whose profile misses by more is another one


class Run(NamedTuple):
    """A model with trained weights, and where they are from.

    Attributes:
      experiment: its name.
      workdir: the folder of the run.
      config: of the run; `sampling` is followed when it draws.
      mesh: the devices it works on.
      model: see `diffusion.model.model.Model`.
      params: averaged weights.
      step: updates after which they were stored.
      average: of the weights: a decay, or "power SIGMA_REL".
      programs: what was compiled for sampling.
      known_digest: of a published model's files; None: that of `params`.
      stored: its description, by which it draws pictures of other sizes.
    """

    experiment: str
    workdir: Path
    config: Config
    mesh: Mesh
    model: Model
    params: Any
    step: int
    average: float | str | None
    programs: Programs
    known_digest: str | None = None
    stored: Mapping[str, Any] = {}

    @property
    def digest(self) -> str:
        """What identifies its weights."""
        return self.known_digest or digest(self.params)

    @property
    def painter(self) -> Painter:
        """What draws its pictures."""
        return Painter(self.model, self.params, self.config, self.mesh, self.programs)

    def change(self, changes: Mapping[str, Any]) -> "Run":
        """Returns the run with fields of its config changed, as {"sampling.num_steps": 10}.

        Raises:
          RunError: another field than those of sampling and evaluation, or one that does not exist.
        """
        config = change(self.config, changes)
        check_changes(self.workdir, self.config, config)
        resized = tuple(config.sampling.get("size", ())) != tuple(self.config.sampling.get("size", ()))
        return self._replace(config=config, model=model_of(config, self.stored) if resized else self.model)

    def sample(
        self,
        num_samples: int | None = None,
        *,
        prompts: Sequence[str] | None = None,
        labels: Sequence[int] | np.ndarray | None = None,
        negative_prompt: str | None = None,
        references: Sequence[np.ndarray] = (),
        seed: int = 0,
        trajectory: bool = False,
        **sampling: Any,
    ) -> np.ndarray:
        """Returns samples, uint8[N, H, W, C].

        Image number i is a pure function of the run, the seed, i and its prompt or label.

        Args:
          num_samples: N; by default as many as there are prompts or labels, else 16. Prompts and labels are repeated.
          prompts: what to draw, of a run that reads prompts.
          labels: classes, of a run that reads them; by default all in turn.
          negative_prompt: what guidance leads away from.
          references: pictures to edit, uint8[h, w, 3], of a run whose network is told of them (FLUX.2).
          seed: of the noise.
          trajectory: returns uint8[N, num_steps + 1, H, W, C] instead: x_0_hat at every step, then the sample.
          **sampling: fields of config.sampling for this call, as num_steps=10 or guidance=2.0.

        Raises:
          ValueError: prompts or labels that the run cannot read, or samples that are not finite.
          RunError: a field that does not exist.

        Example:
          run.sample(prompts=["a red three above a blue seven"], num_samples=4, guidance=3.0)
        """
        run = self.change({f"sampling.{field}": value for field, value in sampling.items()}) if sampling else self
        requests = run.requests(num_samples, prompts, labels)
        if negative_prompt is not None and self.model.condition.kind != "prompts":
            raise ValueError(f"{self.workdir} reads no prompts: leave negative_prompt out")
        if references:
            check_references(self.config)
        cell = self.model.space.image_shape[0] // self.model.space.shape[0]
        return draw(
            run.painter,
            requests,
            np.arange(len(requests)),
            check_seed(seed),
            references=[fit_reference(picture, cell) for picture in references],
            negative=negative_prompt,
            use=show_trajectory if trajectory else from_noise,
        )

    def requests(
        self,
        num_samples: int | None = None,
        prompts: Sequence[str] | None = None,
        labels: Sequence[int] | np.ndarray | None = None,
    ) -> list[Any]:
        """Returns what each of `num_samples` pictures shows: prompts or labels in turn, each class in turn, or None.

        Raises:
          ValueError: prompts or labels for a run that does not read them, or none for one that reads prompts.
        """
        condition = self.model.condition
        for given, kind in ((prompts, "prompts"), (labels, "classes")):
            if given is not None and condition.kind != kind:
                reads = "unconditional" if condition.kind == "nothing" else f"a model of {condition.kind}"
                raise ValueError(f"{self.workdir} is {reads}: it cannot draw from {kind}")
        if isinstance(prompts, str):
            raise ValueError("prompts are a list: give [prompt], even for one")
        asked = as_list(prompts if labels is None else labels)
        if asked is None and condition.kind == "prompts":
            raise ValueError(f"{self.workdir} draws from prompts: give at least one")
        if asked is None:
            asked = list(range(condition.num_classes)) if condition.num_classes else [None]
            num_samples = 16 if num_samples is None else num_samples
        count = len(asked) if num_samples is None else num_samples
        if count < 1 or not asked:
            raise ValueError(f"{count} samples of {len(asked)} requests: at least one of each is needed")
        return [asked[i % len(asked)] for i in range(count)]

    def denoise(self, x_t: Array, time: Any, *, prompts: Any = None, labels: Any = None) -> Any:
        """Returns x_0_hat [B, H, W, C] at x_t, guided and thresholded as the run samples.

        Args:
          x_t: noisy images [B, H, W, C].
          time: what the network is given: t - 1 for DDPM's chain, t in [0, 1] for a flow, ln(sigma) / 4 for EDM.
          prompts: of the images, in turn; None: no condition.
          labels: of the images, in turn; None: no condition.
        """
        model = self.model
        requests = [None] * len(x_t) if prompts is labels is None else self.requests(len(x_t), prompts, labels)
        rows = rows_of(model.condition, requests)
        away = rows_away(model.condition, rows)
        sampling = make_sampling(self.config, model.process)
        return jax.jit(lambda params, x, t: guided(model, sampling, params, rows, away)(x, t))(self.params, x_t, time)

    def likelihood(
        self,
        images: np.ndarray,
        *,
        prompts: Sequence[str] | None = None,
        labels: Sequence[int] | np.ndarray | None = None,
        num_steps: int = 100,
        num_terms: int = 0,
    ) -> Likelihood:
        """Returns bits/dim of images uint8[N, H, W, C], by the ODE and, for a chain, by the variational bound.

        Args:
          images: of the run's shape.
          prompts: of the images, of a run that reads them.
          labels: of the images; None: no class.
          num_steps: of the ODE.
          num_terms: of the bound's steps, for each image others; 0: all.

        Raises:
          ValueError: images that are not uint8 or of another shape, or not a prompt or label for each.
        """
        images = np.asarray(images)
        check_uint8_images(images)
        if images.shape[1:] != self.model.space.image_shape:
            raise ValueError(f"images are of shape {images.shape[1:]}, and the run of {self.model.space.image_shape}")
        given = as_list(prompts if labels is None else labels)
        if given is not None and len(given) != len(images):
            raise ValueError(f"{len(images)} images and {len(given)} prompts or labels: one for each is needed")
        requests = [None] * len(images) if given is None else self.requests(len(images), prompts, labels)
        return bits_per_dim(self.model, self.params, self.config, images, requests, num_terms, num_steps)


def as_list(given: Any) -> list[Any] | None:
    """Returns prompts, or labels of any integer type, as a list; None for None."""
    return None if given is None else [one if isinstance(one, str) else int(one) for one in given]


def show_trajectory(sampler: Any, denoise: Any, grid: Any, keys: Array, eps: Array) -> Array:
    """Returns x_0_hat at every step, then the sample [B, N + 1, ...]: a `Use`."""
    x_0, x_0_hats = sampler(denoise, grid.noise[0] * eps, grid, keys, trajectory=True)
    return jnp.moveaxis(jnp.concatenate([x_0_hats, x_0[None]]), 0, 1)


def open_run(
    workdir: str | Path,
    *,
    step: int | None = None,
    ema_length: float | None = None,
    changes: Mapping[str, Any] | None = None,
    num_devices: int | None = None,
) -> Run:
    """Returns the run in a work folder, with its averaged weights.

    Args:
      workdir: folder of a training, or of an imported model.
      step: of the checkpoint; None: the newest.
      ema_length: relative length of a power-function average that is made of those stored; None: the run's own.
      changes: fields of sampling and evaluation, and training.mesh, as {"sampling.num_steps": 10}.
      num_devices: how many devices it works on; None: all.

    Raises:
      RunError: there is no checkpoint, it cannot be read, or no such average can be made.

    Example:
      diffusion.open_run("runs/digits", ema_length=0.1).sample(16)
    """
    workdir = Path(workdir).expanduser()
    stored = read_description(workdir, step)
    old = from_plain(stored["config"])
    config = change(old, changes or {})
    check_changes(workdir, old, config)
    return load(workdir, stored, config, make_mesh(num_devices, config.training.mesh), step, ema_length)


def read_description(workdir: Path, step: int | None = None) -> dict[str, Any]:
    """Returns what is stored beside the weights of a run, in today's format."""
    if published.is_published(workdir):
        if step is not None:
            raise RunError(f"{workdir} is a published model, without checkpoints: leave --checkpoint out")
        return published.read_about(workdir)
    with open_existing(workdir, step) as checkpoints:
        return formats.current(checkpoints.description())


def check_changes(workdir: Path, old: Config, new: Config) -> None:
    """Raises RunError, with the differences, where a trained run is given other fields than it may be."""
    if changed := differences(plain(old), plain(new), FREE_AFTERWARDS):
        raise RunError(f"{workdir} was trained with another config (there -> asked): {'; '.join(changed)}")


def model_of(config: Config, stored: Mapping[str, Any]) -> Model:
    """Returns the model of a stored description with this config."""
    shape = tuple(stored["image_shape"])
    if size := config.sampling.get("size"):
        if len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size):
            raise ValueError(f"sampling.size is {tuple(size)}: give height and width, as (512, 768), or ()")
        shape = (*size, shape[-1])
    return make_model(config, shape, stored["num_classes"], stored)


def load(
    workdir: Path,
    stored: Mapping[str, Any],
    config: Config,
    mesh: Mesh,
    step: int | None = None,
    ema_length: float | None = None,
    *,
    raw: bool = False,
) -> Run:
    """Returns the run in `workdir`, whatever devices it was saved from.

    Args:
      workdir: its folder.
      stored: its description, of `read_description`.
      config: its config, `sampling` and `evaluation` perhaps changed.
      mesh: the devices.
      step: of the checkpoint; None: the newest.
      ema_length: of the average that is made of the stored ones, at the last stored step; None: the run's own.
      raw: the weights as the optimizer left them, not their average.

    Raises:
      RunError: there are no weights, they are not finite, or no such average can be made of what is stored.
    """
    if "image_shape" not in stored:
        raise RunError(f"{workdir} holds experiment {stored['experiment']}, which draws no pictures")
    model = model_of(config, stored)
    for line in warnings_of(config, model):
        logging.warning(line)
    if "pipeline" in stored:
        if ema_length is not None:
            raise RunError(f"{workdir} is a published model, without averages: leave --ema_length out")
        params = published.load_params(workdir, stored, config, model, mesh)
        own = published.digest_of(stored)
        at, average = stored.get("step", 0), stored.get("average")  # which artefacts of ours have
        return Run(stored["experiment"], workdir, config, mesh, model, params, at, average, {}, own, stored)
    settings = make_settings(config)
    learner = make_learner(config, model)
    abstract = training.abstract_weights(learner, settings, mesh)
    make = partial(Run, stored["experiment"], workdir, config, mesh, model, programs={}, stored=stored)
    if ema_length is None:
        with open_existing(workdir, step) as checkpoints:
            state = checkpoints.restore(abstract)
        params = state.params if raw else averaged(state.params, state.ema, model.frozen)
        check_finite(params, f"the {'raw' if raw else 'averaged'} weights in {workdir}")
        return make(params=params, step=int(state.step), average=None if raw else settings.ema_decay)
    if step is not None:
        raise RunError("averages of other lengths are made at the last stored step: leave --checkpoint out")
    average = snapshots.reconstruct(workdir, ema_length, abstract.ema)
    if average.error > FAR:
        raise RunError(
            f"an average of length {ema_length:g} cannot be made of those stored in {workdir}: its profile would be "
            f"off by {average.error:.0%}; lengths near {', '.join(map(str, settings.ema_profiles))} can"
        )
    params = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), average.params, abstract.ema)
    check_finite(params, f"the averages in {workdir}")
    if model.frozen:
        with open_existing(workdir) as checkpoints:
            params = averaged(checkpoints.restore(abstract).params, params, model.frozen)
    return make(params=params, step=max(snapshots.stored_steps(workdir)), average=f"power {ema_length:g}")
