"""Records flux2_tiny.npz: outputs of tiny transformers of FLUX.2, as diffusers and as its authors have them.

Run with PyTorch, diffusers, einops, JAX and Flax installed, and a file of a public repository:

    python tests/golden/record_flux2.py --original=FILE

--original is src/flux2/model.py of black-forest-labs/flux2 (ab7cca6). Weights are a function of their names and shapes
(`seeded`), so that only their shapes are stored. For each case: config (JSON as diffusers writes it), names, shapes and
the output by number of references. "grids" has the sigmas of diffusers' pipeline by number of tokens and steps.

The script also opens what we write with diffusers, in shards, and asserts that weights and outputs are the same; and
that diffusers' conversion of what we write as the authors' file is what we write as diffusers' folder.
"""

import argparse
import importlib.util
import pathlib
import tempfile
import zlib

import numpy as np

HERE = pathlib.Path(__file__).parent
TINY = dict(
    in_channels=8,
    num_layers=2,
    num_single_layers=2,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=10,
    axes_dims_rope=(4, 2, 6, 4),
)
CASES = {
    "klein": dict(guidance_embeds=False),
    "dev": dict(guidance_embeds=True, mlp_ratio=2.0, rope_theta=300, timestep_guidance_channels=32),
}
ORIGINAL = dict(
    in_channels=8,
    context_in_dim=10,
    hidden_size=32,
    num_heads=2,
    depth=2,
    depth_single_blocks=2,
    axes_dim=[4, 4, 4, 4],
)
REFERENCES = 0, 1, 2
TOKENS_AND_STEPS = [(1024, 4), (4096, 4), (4096, 50), (4300, 4), (4301, 4), (8100, 28)]


def seeded(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Random weights that depend on name and shape alone: scales about 1, and layers that keep their inputs' size.

    But what some normalisations see is so small that their epsilon counts.
    """
    weights = {}
    for name, shape in shapes.items():
        random = np.random.RandomState(zlib.crc32(name.encode())).randn(*shape)
        weights[name] = (1 + random / 5 if len(shape) == 1 else random * shape[1] ** -0.5).astype(np.float32)
    small = ("x_embedder.", "img_in.", "add_q_proj.", "to_k.")
    return {
        name: weight * np.float32(1 / 4 if any(part in name for part in small) else 1)
        for name, weight in weights.items()
    }


def inputs() -> dict[str, np.ndarray]:
    """Latents that are not square, time and guidance near 0 and larger, prompts of five tokens, two references."""
    random = np.random.RandomState(0)
    return {
        "x_t": random.randn(3, 4, 6, 8).astype(np.float32),
        "time": np.array([0.001, 0.5123, 1.0], np.float32),
        "context": random.randn(3, 5, 10).astype(np.float32),
        "guidance": np.array([0.002, 1.0, 0.25], np.float32),
        "reference_0": random.randn(3, 2, 4, 8).astype(np.float32),
        "reference_1": random.randn(3, 6, 2, 8).astype(np.float32),
    }


def load_state(peer) -> dict[str, np.ndarray]:
    """Gives a module its seeded weights, and returns what describes them."""
    import torch

    weights = seeded({name: tuple(tensor.shape) for name, tensor in peer.state_dict().items()})
    peer.load_state_dict({name: torch.from_numpy(weight) for name, weight in weights.items()})
    shapes = [" ".join(map(str, weight.shape)) for weight in weights.values()]
    return {"names": np.array(list(weights)), "shapes": np.array(shapes)}


def tokens_and_ids(count: int):
    """Tokens of the latents and of `count` references, their coordinates and the text's, as the pipeline has them."""
    import torch
    from diffusers import Flux2KleinPipeline as Pipeline

    given = {name: torch.from_numpy(array) for name, array in inputs().items()}
    x_t, *references = (given[name].permute(0, 3, 1, 2) for name in ("x_t", *(f"reference_{i}" for i in range(count))))
    ids = [Pipeline._prepare_latent_ids(x_t)]
    if references:
        ids.append(Pipeline._prepare_image_ids([reference[:1] for reference in references]).repeat(len(x_t), 1, 1))
    tokens = [Pipeline._pack_latents(picture) for picture in (x_t, *references)]
    text_ids = Pipeline._prepare_text_ids(given["context"])
    return given, torch.cat(tokens, dim=1), torch.cat(ids, dim=1), text_ids


def cut(output) -> np.ndarray:
    """The latents' tokens as an image."""
    x_t = inputs()["x_t"]
    return output[:, : x_t.shape[1] * x_t.shape[2]].numpy().reshape(x_t.shape)


def output_of(peer, count: int) -> np.ndarray:
    """What a Flux2Transformer2DModel returns for `inputs` with `count` references."""
    given, tokens, ids, text_ids = tokens_and_ids(count)
    guidance = given["guidance"] if peer.config.guidance_embeds else None
    output = peer(
        hidden_states=tokens,
        encoder_hidden_states=given["context"],
        timestep=given["time"],
        img_ids=ids,
        txt_ids=text_ids,
        guidance=guidance,
        return_dict=False,
    )
    return cut(output[0])


def sigmas(num_tokens: int, num_steps: int) -> np.ndarray:
    """The sigmas of Flux2KleinPipeline."""
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="exponential")
    even = np.linspace(1.0, 1 / num_steps, num_steps)
    scheduler.set_timesteps(sigmas=even, mu=compute_empirical_mu(num_tokens, num_steps))
    return scheduler.sigmas.numpy()


def opens_ours(peer, state) -> None:
    """Asserts that diffusers reads what we write of `peer`."""
    import torch
    from diffusers import Flux2Transformer2DModel
    from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers

    from diffusion.pretrained.flux2 import load_flux2, save_flux2
    from diffusion.pretrained.flux2_original import to_original

    with tempfile.TemporaryDirectory() as temporary:
        theirs, ours = pathlib.Path(temporary) / "theirs", pathlib.Path(temporary) / "ours"
        peer.save_pretrained(theirs)
        network, params = load_flux2(theirs)
        save_flux2(ours, network, params, largest=30_000)
        assert len(list(ours.glob("*.safetensors"))) > 2
        again = Flux2Transformer2DModel.from_pretrained(ours).eval()
    before, after = (
        {key: tuple(value) if isinstance(value, list) else value for key, value in one.config.items() if key[0] != "_"}
        for one in (peer, again)
    )
    assert before == after, (before, after)
    for found in (again.state_dict(), convert_flux2_transformer_checkpoint_to_diffusers(
        {name: torch.from_numpy(np.array(weight)) for name, weight in to_original(params["params"]).items()}
    )):  # fmt: skip
        assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)
    for count in REFERENCES:
        np.testing.assert_array_equal(output_of(again, count), output_of(peer, count))


def main():
    import diffusers
    import torch

    parser = argparse.ArgumentParser()
    parser.add_argument("--original", required=True)
    flags = parser.parse_args()
    torch.set_grad_enabled(False)
    arrays = {"versions": np.array(f"diffusers {diffusers.__version__}, torch {torch.__version__}")}

    for case, options in CASES.items():
        peer = diffusers.Flux2Transformer2DModel(**{**TINY, **options}).eval()
        found = load_state(peer) | {"config": np.array(peer.to_json_string())}
        opens_ours(peer, peer.state_dict())
        found |= {f"output_{count}": output_of(peer, count) for count in REFERENCES}
        print(case, {name: float(np.std(array)) for name, array in found.items() if "output" in name})
        arrays |= {f"{case}/{name}": array for name, array in found.items()}

    spec = importlib.util.spec_from_file_location("flux2_original", flags.original)
    assert spec is not None and spec.loader is not None
    original = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(original)
    peer = original.Flux2(original.Flux2Params(**ORIGINAL)).eval()
    found = load_state(peer)
    given, tokens, ids, text_ids = tokens_and_ids(2)
    output = peer(tokens, ids.double(), given["time"], given["context"], text_ids.double(), given["guidance"])
    found |= {"output_2": cut(output)}
    print("original", float(np.std(found["output_2"])))
    arrays |= {f"original/{name}": array for name, array in found.items()}

    arrays |= {f"grids/{tokens}/{steps}": sigmas(tokens, steps) for tokens, steps in TOKENS_AND_STEPS}
    np.savez_compressed(HERE / "flux2_tiny.npz", **arrays)


if __name__ == "__main__":
    main()
