"""Records vae_tiny.npz: what tiny autoencoders of diffusers, and of FLUX.2's and TAESD's authors, make of images.

Run with PyTorch, diffusers, einops, JAX and Flax installed, and two files of public repositories:

    python tests/golden/record_vae.py --flux2=FILE --taesd=FILE --taef2=FOLDER

--flux2 is src/flux2/autoencoder.py of black-forest-labs/flux2 (ab7cca6), --taesd is taesd.py of madebyollin/taesd
(5cccb12), --taef2 has the weights beside the latter. Weights are a function of their names and shapes (`seeded`), so
that only their shapes are stored; of TAEF2's real weights only what comes out.

For each case of CASES: config (JSON as diffusers writes it), names, shapes, mean, log_variance, decoded. The script
also opens what we write for each with diffusers, and asserts that weights and outputs are the same: opens_ours.
"""

import argparse
import importlib.util
import pathlib
import tempfile

import numpy as np
from record_mmdit import seeded_weights

HERE = pathlib.Path(__file__).parent
TWO_LEVELS = dict(
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    block_out_channels=(8, 16),
    norm_num_groups=4,
)
THREE_LEVELS = dict(
    down_block_types=("DownEncoderBlock2D",) * 3,
    up_block_types=("UpDecoderBlock2D",) * 3,
    block_out_channels=(4, 4, 8),
    norm_num_groups=2,
)
# diffusers' class and the arguments in which a case differs from its defaults.
CASES = {
    "sd1": ("AutoencoderKL", TWO_LEVELS),
    "sd3": (
        "AutoencoderKL",
        dict(
            THREE_LEVELS,
            layers_per_block=2,
            latent_channels=16,
            scaling_factor=1.5305,
            shift_factor=0.0609,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
    ),
    "no_attention": (
        "AutoencoderKL",
        dict(
            TWO_LEVELS,
            use_post_quant_conv=False,
            mid_block_add_attention=False,
            latents_mean=(0.5, -1.0, 2.0, 0.0),
            latents_std=(2.0, 4.0, 0.5, 1.0),
            scaling_factor=0.5,
        ),
    ),
    "flux2": ("AutoencoderKLFlux2", dict(TWO_LEVELS, layers_per_block=1, decoder_block_out_channels=(4, 12))),
    "tiny": (
        "AutoencoderTiny",
        dict(
            encoder_block_out_channels=(8, 8, 8),
            decoder_block_out_channels=(8, 8, 8),
            num_encoder_blocks=(1, 2, 1),
            num_decoder_blocks=(2, 1, 1),
            latent_channels=16,
        ),
    ),
}
FLUX2 = dict(resolution=16, ch=32, ch_mult=[1, 2], num_res_blocks=1, z_channels=4)  # FLUX.2's authors' own code


def seeded(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Weights by name; the statistics of a batch normalisation have a variance above 0 and a count.

    What some normalisations see is so small that their epsilon counts.
    """
    weights = seeded_weights({name: shape for name, shape in shapes.items() if not name.startswith("bn.")})
    weights |= {name: weights[name] * np.float32(2**-9) for name in weights if "conv_in." in name or "pool.0." in name}
    for name, shape in shapes.items():
        if name.startswith("bn."):
            random = np.random.RandomState(len(name)).randn(*shape)
            count = np.array(7, np.int64)
            weights[name] = count if not shape else (np.exp(random) if "var" in name else random).astype(np.float32)
    return weights


def images() -> np.ndarray:
    """Two images in [-1, 1] that are not square."""
    return np.random.RandomState(0).uniform(-1, 1, (2, 8, 12, 3)).astype(np.float32)


def latents(shape: tuple[int, ...]) -> np.ndarray:
    """Latents to decode, some beyond what tiny decoders let through."""
    return 2 * np.random.RandomState(1).randn(*shape).astype(np.float32)


def photograph() -> np.ndarray:
    """A piece of a photograph (of scikit-learn), in [-1, 1]."""
    from sklearn.datasets import load_sample_image

    return load_sample_image("china.jpg")[None, 150:214, 250:314].astype(np.float32) / np.float32(127.5) - 1


def to_torch(x: np.ndarray):
    import torch

    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def to_numpy(x) -> np.ndarray:
    return x.detach().numpy().transpose(0, 2, 3, 1)


def outputs(peer) -> dict[str, np.ndarray]:
    """Mean and log-variance of an autoencoder of diffusers for `images`, and what it decodes `latents` to."""
    found = peer.encode(to_torch(images()))
    if hasattr(found, "latents"):
        mean, arrays = found.latents, {}
    else:
        mean = found.latent_dist.mean
        arrays = {"log_variance": to_numpy(found.latent_dist.logvar)}
    arrays["mean"] = to_numpy(mean)
    return arrays | {"decoded": to_numpy(peer.decode(to_torch(latents(arrays["mean"].shape))).sample)}


def load_state(peer) -> dict[str, np.ndarray]:
    """Gives a module its seeded weights, and returns them."""
    import torch

    weights = seeded({name: tuple(tensor.shape) for name, tensor in peer.state_dict().items()})
    peer.load_state_dict({name: torch.from_numpy(np.array(weight)) for name, weight in weights.items()})
    return weights


def described(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Names and shapes, from which `seeded` makes the weights again."""
    shapes = [" ".join(map(str, weight.shape)) for weight in weights.values()]
    return {"names": np.array(list(weights)), "shapes": np.array(shapes)}


def imported(path: str):
    spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main():
    import diffusers
    import torch

    from diffusion.pretrained.autoencoders import load_autoencoder
    from diffusion.pretrained.tiny_vae import save_tiny
    from diffusion.pretrained.vae import save_vae

    parser = argparse.ArgumentParser()
    for name in ("flux2", "taesd", "taef2"):
        parser.add_argument(f"--{name}", required=True)
    flags = parser.parse_args()
    torch.set_grad_enabled(False)
    arrays = {"versions": np.array(f"diffusers {diffusers.__version__}, torch {torch.__version__}")}

    for case, (name, options) in CASES.items():
        kind = getattr(diffusers, name)
        peer = kind(**options).eval()
        found = described(load_state(peer)) | outputs(peer)
        with tempfile.TemporaryDirectory() as temporary:
            theirs, ours = pathlib.Path(temporary) / "theirs", pathlib.Path(temporary) / "ours"
            peer.save_pretrained(theirs)
            found["config"] = np.array((theirs / "config.json").read_text())
            (save_tiny if name == "AutoencoderTiny" else save_vae)(ours, load_autoencoder(theirs))
            again = kind.from_pretrained(ours).eval()
            state, before = again.state_dict(), peer.state_dict()
            assert state.keys() == before.keys() and all(torch.equal(state[name], before[name]) for name in state)
            for key, array in outputs(again).items():
                np.testing.assert_array_equal(array, found[key])
            settings = [
                {key: repr(value).replace("[", "(").replace("]", ")") for key, value in one.config.items()}
                for one in (peer, again)
            ]
            differ = sorted(key for key in settings[0] if settings[0][key] != settings[1].get(key) and key[0] != "_")
        print(case, {key: float(np.std(found[key])) for key in ("mean", "decoded")}, "settings that differ:", differ)
        arrays |= {f"{case}/{key}": array for key, array in found.items()} | {f"{case}/opens_ours": np.array(True)}

    reference = imported(flags.flux2)
    peer = reference.AutoEncoder(reference.AutoEncoderParams(**FLUX2)).eval()
    found = described(load_state(peer))
    x_0 = peer.encode(to_torch(images()))
    found |= {"x_0": to_numpy(x_0), "decoded": to_numpy(peer.decode(to_torch(latents(to_numpy(x_0).shape))))}
    arrays |= {f"flux2_original/{key}": array for key, array in found.items()}

    taesd = imported(flags.taesd)
    for case in ("taef2_seeded", "taef2"):
        real = case == "taef2"
        paths = [
            str(pathlib.Path(flags.taef2) / f"taef2_{part}.pth") if real else None for part in ("encoder", "decoder")
        ]
        peer = taesd.TAESD(*paths, latent_channels=32, arch_variant="flux_2").float().eval()
        x = photograph() if real else np.tile(images(), (1, 2, 2, 1))
        found = {} if real else described(load_state(peer))
        mean = to_numpy(peer.encoder(to_torch((x + 1) / 2)))
        z = mean if real else latents(mean.shape)
        found |= {"mean": mean, "decoded": to_numpy(2 * peer.decoder(to_torch(z)) - 1)}
        print(case, {key: float(np.std(found[key])) for key in ("mean", "decoded")})
        arrays |= {f"{case}/{key}": array for key, array in found.items()}
    np.savez_compressed(HERE / "vae_tiny.npz", **arrays)


if __name__ == "__main__":
    main()
