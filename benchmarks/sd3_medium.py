"""What Stable Diffusion 3 medium costs on this machine, at its own shapes: seconds per stage and peak memory.

    python -m benchmarks.sd3_medium --folder=/tmp/sd3_medium

Its weights are random, in bfloat16, written once as a published folder without T5: 2,930,457,827 parameters. The folder
is imported with --mode=import, opened in a new process, and one picture is drawn of one prompt with guidance. The peak
is that of this process, its programs included. Writes benchmarks/results/sd3_medium_cpu.json.
"""

import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import pipelines
from benchmarks.common import peak_bytes
from diffusion.networks.clip import TextTower
from diffusion.networks.mmdit import MMDiT
from diffusion.networks.vae import Autoencoder
from diffusion.pretrained import clip, mmdit, vae
from diffusion.pretrained.folder import write_json
from diffusion.pretrained.sd3 import CLASS, SCALING_FACTOR, SCHEDULER, SHIFT, SHIFT_FACTOR

NAME = "benchmarks.sd3_medium"
PROMPT = "An astronaut riding a horse"
TOWERS = {
    "": TextTower(width=768, num_layers=12, num_heads=12, mlp_width=3072, activation="quick_gelu", projection=768),
    "_2": TextTower(width=1280, num_layers=32, num_heads=20, mlp_width=5120, activation="gelu", projection=1280),
}


def random_like(shapes: Any) -> Any:
    """Returns bfloat16 parameters of a size that keeps activations near 1."""
    noise = np.random.default_rng(0).standard_normal(1_000_003, np.float32)

    def make(path: Any, leaf: Any) -> np.ndarray:
        if path[-1].key == "scale":
            return np.ones(leaf.shape, jnp.bfloat16)
        fan_in = max(1, int(np.prod(leaf.shape[:-1]))) if path[-1].key == "kernel" else 2500
        return np.resize((noise * fan_in**-0.5).astype(jnp.bfloat16), leaf.shape)

    return jax.tree_util.tree_map_with_path(make, shapes)


def write_tokenizer(folder: Path) -> None:
    """Writes a CLIP tokenizer of single bytes, with as many ids as the published one has."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    symbols = [*map(chr, visible), *(chr(256 + i) for i in range(256 - len(visible)))]
    words = [*symbols, *(f"{symbol}</w>" for symbol in symbols)]
    words += [f"filler{i}</w>" for i in range(49406 - len(words))] + ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}), "utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n")
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "CLIPTokenizer", "pad_token": "<|endoftext|>"})


def write_folder(folder: Path) -> None:
    """Writes the published folder."""
    folder.mkdir(parents=True)
    index: dict[str, Any] = {"_class_name": CLASS, "text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    for suffix, tower in TOWERS.items():
        (folder / f"text_encoder{suffix}").mkdir()
        params = {"params": random_like(clip.text_shapes(tower)["text"])}
        clip.write_text_tower(folder / f"text_encoder{suffix}", tower, params)
        write_tokenizer(folder / f"tokenizer{suffix}")
        index[f"text_encoder{suffix}"] = ["transformers", "CLIPTextModelWithProjection"]
        index[f"tokenizer{suffix}"] = ["transformers", "CLIPTokenizer"]
    module = Autoencoder()
    number = np.ones(module.latent_channels, np.float32)
    params = {"params": random_like(vae.shapes(module))}
    published = vae.PublishedAutoencoder(module, params, SHIFT_FACTOR * number, SCALING_FACTOR * number, 1, True)
    vae.save_vae(folder / "vae", published)
    (folder / "scheduler").mkdir()
    write_json(folder / "scheduler" / "scheduler_config.json", {"_class_name": SCHEDULER, "shift": SHIFT})
    (folder / "transformer").mkdir()
    network = MMDiT()
    mmdit.write_mmdit(folder / "transformer", network, {"params": random_like(mmdit.shapes(network))})
    index |= {"transformer": ["diffusers", "SD3Transformer2DModel"], "vae": ["diffusers", "AutoencoderKL"]}
    write_json(folder / "model_index.json", {**index, "scheduler": ["diffusers", SCHEDULER]})


def draw(workdir: Path, side: int, num_steps: int, out: Path) -> None:
    """Draws one picture, twice, and writes what it took: the first time compiles."""
    begun = time.perf_counter()
    run = pipelines.open_sized(workdir, side, num_steps)
    jax.block_until_ready(run.params)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(run.params))
    opened, after = time.perf_counter() - begun, peak_bytes()
    seconds = []
    for seed in range(2):
        begun = time.perf_counter()
        image = run.sample(prompts=[PROMPT], num_samples=1, seed=seed)
        seconds.append(round(time.perf_counter() - begun, 1))
        pipelines.check_drawn(image, side)
    results = {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(run.params)),
        "parameters_gb": round(size / 1e9, 2),
        "side": side,
        "num_steps": num_steps,
        "network_evaluations": 2 * num_steps,
        "seconds_to_open": round(opened, 1),
        "peak_gb_after_opening": round(after / 1e9, 2),
        "peak_after_opening_over_parameters": round(after * 1e9 / size, 3),
        "seconds_first_picture": seconds[0],
        "seconds_second_picture": seconds[1],
        "peak_gb": round(peak_bytes() / 1e9, 2),
    }
    out.write_text(json.dumps(results))


def main() -> None:
    arguments = pipelines.parse(__doc__, 6, 2, "draw", "benchmarks/results/sd3_medium_cpu.json")
    if arguments.stage == "write":
        return write_folder(arguments.published)
    if arguments.stage == "draw":
        return draw(arguments.run, arguments.side, arguments.num_steps, arguments.found)
    imported = pipelines.import_anew(NAME, arguments, "experiments.sd3")
    pipelines.do_stage(NAME, arguments, "draw")
    pipelines.finish(arguments.out, {"seconds_to_import": imported, **json.loads(arguments.found.read_text())})


if __name__ == "__main__":
    main()
