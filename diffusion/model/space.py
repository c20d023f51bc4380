"""Where a process runs, between images as people see them and the x_0 of the papers: pixels, or latents."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.data.images import to_float, to_uint8
from diffusion.data.precomputed import precomputed
from diffusion.data.sources import Source, each_part
from diffusion.files import cache_folder
from diffusion.model.autoencoders import (
    Codec,
    Trained,
    decoder_of,
    open_autoencoder,
    params_of,
    restore,
    with_preview,
)
from diffusion.model.condition import Told
from diffusion.randomness import fold_in, normal_like
from diffusion.training import digest

Numbers = jax.Array | np.ndarray

REFERENCE = "reference_"  # begins the names of what is read of pictures to edit
MOMENTS_KEY = 4  # folded into the loss's key; its splits 0 to 3 are taken


class Space(NamedTuple):
    """The space of x_0.

    Attributes:
      image_shape: (height, width, channels) of images.
      shape: of one x_0.
      encode: (params, uint8 images [B, *image_shape], keys [B] or None) -> x_0 [B, *shape].
      decode: (params, x_0 [..., *shape]) -> uint8 images.
      of_batch: (params, batch, key of the loss) -> x_0 of training examples.
      mask: bool[height, width, 1] of an image -> the same of an x_0.
      init: key -> params, where it has parameters of its own; they are never trained. None where it has none.
      description: what makes it again beside the config and the parameters, plain JSON; None: nothing more.
      precomputed: (params, uint8 images) -> what `of_batch` reads in place of images, by name; None: images.
      fitted: whether its parameters depend on the training images; see `with_latents`.
      draft: a cheaper `decode`, for pictures that are looked at while others are made; None: there is none.
    """

    image_shape: tuple[int, int, int]
    shape: tuple[int, ...]
    encode: Callable[[Any, jax.Array, Any], jax.Array]
    decode: Callable[[Any, jax.Array], jax.Array]
    of_batch: Callable[[Any, Mapping[str, Any], jax.Array], jax.Array]
    mask: Callable[[np.ndarray], np.ndarray] = lambda known: known
    init: Callable[[jax.Array], Any] | None = None
    description: Mapping[str, Any] | None = None
    precomputed: Callable[[Any, jax.Array], dict[str, jax.Array]] | None = None
    fitted: bool = False
    draft: Callable[[Any, jax.Array], jax.Array] | None = None

    def preview(self, params: Any, x_0: jax.Array) -> jax.Array:
        """Returns uint8 images of x_0 [..., *shape], such as x_0_hat, as cheaply as the space can."""
        return (self.draft or self.decode)(params, x_0)


def pixels(image_shape: tuple[int, int, int], stored: Mapping[str, Any] | None) -> Space:
    """Returns the space of images scaled to [-1, 1], as in DDPM, section 3.3."""
    del stored
    return Space(
        image_shape,
        image_shape,
        lambda params, images, keys: to_float(images),
        lambda params, x_0: to_uint8(x_0),
        lambda params, batch, key: to_float(batch["image"]),
    )


def latents(
    image_shape: tuple[int, int, int],
    stored: Mapping[str, Any] | None,
    *,
    folder: str = "",
    sample: bool = False,
    precomputed: bool = True,
    fitted: bool = False,
    patch: int = 0,
    preview: str = "",
) -> Space:
    """Returns the space of an autoencoder's latents z: x_0 = (z - shift) * scale, per channel.

    Its parameters are {"autoencoder", "shift", "scale"}, none of them trained, and "preview": the same of a tiny
    autoencoder's decoder, where there is one.

    Args:
      image_shape: of images.
      stored: `Space.description` in the run's checkpoint; None where a run starts.
      folder: of a published autoencoder or pipeline, or work folder of experiments.autoencoder, from which a run that
        starts takes it.
      sample: z is drawn from the encoder's distribution, as in latent diffusion; else it is the mode.
      precomputed: latents of all images are made once, before training.
      fitted: shift and scale are mean and 1 / standard deviation over the training images, not the published ones;
        needs `precomputed`.
      patch: side of the patches of z that are folded into channels; 0: as the autoencoder was published.
      preview: folder of a tiny autoencoder of the same latents, as TAEF2 is FLUX.2's, that decodes previews.

    Raises:
      ValueError: no folder is named, images that the autoencoder's cells do not divide, or of other channels, or a
        preview's that are not these latents.

    Source: Rombach et al. (2022), section 3.1.
    """
    if fitted and not precomputed:
        raise ValueError("space.fitted needs the latents of all images: set space.precomputed=True")
    if fitted and preview:
        raise ValueError("space.preview decodes the published latents, which space.fitted changes: leave one out")
    found: Trained | None = None
    tiny: Trained | None = None
    if stored is None:
        if not folder:
            raise ValueError(
                "space.name=latents encodes with a trained autoencoder: name its folder, --config.space.folder=DIR"
            )
        found = open_autoencoder(folder, patch)
        tiny = open_autoencoder(preview) if preview else None
    codec = found.codec if found else restore(stored or {})
    description = with_preview(codec, tiny.codec) if tiny else codec.description
    cheap = restore(description["preview"]) if "preview" in description else None
    height, width, channels = image_shape
    cell = codec.cell
    if channels != 3 or height % cell or width % cell:
        raise ValueError(
            f"images of shape {height}x{width}x{channels} have no whole latents: the autoencoder takes RGB with sides "
            f"divisible by {cell}; set data.image_size"
        )
    shape = (height // cell, width // cell, codec.channels)

    def normal(params: Any, z: Numbers) -> jax.Array:
        return (z.astype(jnp.float32) - params["shift"]) * params["scale"]

    def encode(params: Any, images: Numbers, keys: Any) -> jax.Array:
        mean, std = codec.encode(params["autoencoder"], to_float(images))
        return normal(params, mean + std * normal_like(fold_in(keys, MOMENTS_KEY), mean) if sample else mean)

    def draft(params: Any, x_0: Numbers) -> jax.Array:
        assert cheap is not None
        return decoded(cheap, params["preview"], x_0)

    def moments(params: Any, images: Numbers) -> dict[str, jax.Array]:
        mean, std = codec.encode(params["autoencoder"], to_float(images))
        return {"latent": mean, "latent_std": std} if sample else {"latent": mean}

    def of_batch(params: Any, batch: Mapping[str, Numbers], key: jax.Array) -> jax.Array:
        z = batch if "latent" in batch else moments(params, batch["image"])
        if not sample:
            return normal(params, z["latent"])
        eps = jax.random.normal(jax.random.fold_in(key, MOMENTS_KEY), z["latent"].shape)
        return normal(params, z["latent"] + z["latent_std"] * eps)

    def mask(known: np.ndarray) -> np.ndarray:
        cells = known.reshape(height // cell, cell, width // cell, cell, -1)
        return np.asarray(cells.all(axis=(1, 3)))  # a cell of which a part is to be drawn is drawn

    def init(key: jax.Array) -> Any:
        params = params_of(found) if found else drawn_params(codec, key)
        if cheap is not None:
            params["preview"] = decoder_of(params_of(tiny) if tiny else drawn_params(cheap, key))
        return params

    return Space(
        image_shape,
        shape,
        encode,
        lambda params, x_0: decoded(codec, params, x_0),
        of_batch,
        mask,
        init,
        description,
        moments if precomputed else None,
        fitted,
        draft if cheap else None,
    )


def references_of(space: Space, params: Any, batch: Mapping[str, Any], key: jax.Array) -> Told:
    """Returns what a network is told of the pictures to edit in a batch, where it has some.

    They are read as images are, by the names that `Space.of_batch` reads after `REFERENCE`: [B, R, ...] for R of them.
    """
    found = {name.removeprefix(REFERENCE): rows for name, rows in batch.items() if name.startswith(REFERENCE)}
    count = next(iter(found.values())).shape[1] if found else 0
    references = (
        space.of_batch(params, {name: rows[:, i] for name, rows in found.items()}, jax.random.fold_in(key, i))
        for i in range(count)
    )
    return {"references": tuple(references)} if found else {}


def decoded(codec: Codec, params: Any, x_0: Numbers) -> jax.Array:
    """Returns uint8 images of x_0 [..., h, w, c] by the parameters {"autoencoder", "shift", "scale"}."""
    z = (x_0 / params["scale"] + params["shift"]).reshape(-1, *x_0.shape[-3:])
    image = to_uint8(codec.decode(params["autoencoder"], z).astype(jnp.float32))
    return image.reshape(*x_0.shape[:-3], *image.shape[-3:])


def drawn_params(codec: Codec, key: jax.Array) -> dict[str, Any]:
    """Returns parameters in the shapes of `params_of`, for a checkpoint to fill."""
    of_channel = jnp.zeros(codec.channels)
    return {"autoencoder": codec.init(key), "shift": of_channel, "scale": of_channel}


SPACES: dict[str, Callable[..., Space]] = {"pixels": pixels, "latents": latents}


def fit(space: Space, mean: np.ndarray, std: np.ndarray) -> Space:
    """Returns `space` with shift and scale of data whose latents have this mean and standard deviation per channel."""
    init = space.init
    assert init is not None
    if not np.all(std > 0):
        raise ValueError(
            f"space.fitted=True: {np.sum(~(std > 0))} of {len(std)} channels are the same number in every image, which "
            "cannot be scaled: use other images, or the published scale"
        )
    return space._replace(init=lambda key: {**init(key), "shift": jnp.asarray(mean), "scale": 1 / jnp.asarray(std)})


def with_latents(source: Source, space: Space, params: Any, batch_size: int = 64) -> tuple[Source, Space]:
    """Returns the same examples, read as latents in place of images, and the space fitted to them where it is to be.

    Computed once by all devices and kept in `cache_folder()/latents`, keyed by images, encoder and weights. An
    interrupted call resumes.

    Args:
      source: of images.
      space: of latents.
      params: of the space.
      batch_size: images per call of the encoder.

    Raises:
      ValueError: the disk is full.
    """
    moments = space.precomputed
    assert moments is not None
    encode = jax.jit(moments)
    names = sorted(jax.eval_shape(moments, params, jnp.zeros((1, *space.image_shape), jnp.uint8)))
    described = {name: value for name, value in (space.description or {}).items() if name != "preview"}
    codec = [described, digest(params["autoencoder"]), names]
    all_latents = []

    def encoded(part: Source) -> Source:
        key = json.dumps([part.fingerprint, part.image_shape, *codec])
        folder = cache_folder() / "latents" / hashlib.sha256(key.encode()).hexdigest()[:32]

        def compute(rows: np.ndarray) -> dict[str, np.ndarray]:
            batch = part.read(rows)
            seen = batch.get(f"{REFERENCE}image", np.empty((0, 0))).swapaxes(0, 1)
            others = [jax.device_get(encode(params, images)) for images in seen]
            beside = {REFERENCE + name: np.stack([one[name] for one in others], axis=1) for name in names if others}
            return {**jax.device_get(encode(params, batch["image"])), "label": batch["label"], **beside}

        found = precomputed(folder, part.num_examples, compute, batch_size, "encoding images")
        all_latents.append(found["latent"])
        return part._replace(read=lambda indices: {name: rows[indices] for name, rows in found.items()})

    source = each_part(source, encoded)
    return source, fit(space, *mean_and_std(all_latents)) if space.fitted else space


def mean_and_std(latents: Sequence[np.ndarray], rows: int = 1024) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean and standard deviation per channel of latents, arrays [N, h, w, c], float32, read part by part."""
    total, squares, count = 0.0, 0.0, 0
    for z in latents:
        for first in range(0, len(z), rows):
            part = z[first : first + rows].astype(np.float64)
            total += part.sum((0, 1, 2))
            squares += np.square(part).sum((0, 1, 2))
            count += part[..., 0].size
    mean = np.asarray(total) / count
    variance = np.maximum(np.asarray(squares) / count - np.square(mean), 0)
    return mean.astype(np.float32), np.sqrt(variance).astype(np.float32)
