"""What a training step costs on machines that are not there: memory, bytes, kernels, by the programs XLA compiles.

    python -m benchmarks.ahead --case=cifar10 --out=benchmarks/results/ahead_cifar10_h100.json
    python -m benchmarks.ahead --case=sd3_medium --target=h100:8 --mesh=fsdp:8 --set data.batch_size=32

Nothing runs but the compiler: the extra `aot`, best in an environment of its own. Counts are exact; times are the
roofline's, of data sheets, not measured. Neither data nor weights are needed: Stable Diffusion 3's text encoders and
autoencoder are described, T5 left out, and their features made before training.
"""

import argparse
import ast
import sys
from pathlib import Path
from typing import Any

import diffusion
from benchmarks.common import make_parser, write_results
from benchmarks.sd3_medium import TOWERS
from diffusion.data import text
from diffusion.model.autoencoders import describe
from diffusion.model.config import Config, make_settings
from diffusion.model.experiment import make_learner, make_model
from diffusion.model.model import Model
from diffusion.model.sd3_text import make_text_encoder
from diffusion.networks.vae import Autoencoder
from diffusion.pretrained.sd3_text import Tower
from diffusion.runs.target import report, to_json, training_batch
from diffusion.training.ahead import compile_step, target_mesh
from diffusion.training.chips import parse_target
from diffusion.training.sharding import describe_mesh
from experiments.scenes import VOCABULARY

CONFIGS = Path("experiments/configs")
# Stable Diffusion 3 medium's network (its config.json); blocks of one kind compiled once, and computed again backward.
MEDIUM = dict(width=1536, depth=24, num_heads=24, table_size=192, base_size=64, qk_norm=False, remat=True, scan=True)
LARGE = MEDIUM | dict(width=2432, depth=38, num_heads=38, qk_norm=True)  # 3.5-large


def cifar10(config: Config) -> Model:
    return make_model(config, (32, 32, 3))


def scenes(config: Config) -> Model:
    return make_model(config, (config.data.image_size, config.data.image_size, 3), vocabulary=VOCABULARY)


def sd3(config: Config) -> Model:
    tokenizer = text.train_tokenizer(["a"], 512)
    names = dict(zip(("clip_l", "clip_g"), TOWERS.values(), strict=True))
    towers = {name: Tower(tower, None, tokenizer, 0) for name, tower in names.items()}
    encoder = make_text_encoder(towers, weights_dtype="bfloat16")
    stored = {"condition": encoder.description, "space": describe(Autoencoder(), 1).description}
    side = config.data.image_size
    return make_model(config, (side, side, 3), stored=stored)


# Of each case: its config, changes of it, and what makes the model.
CASES: dict[str, tuple[str, dict[str, Any], Any]] = {
    "cifar10": ("cifar10", {"data.batch_size": 512}, cifar10),
    "scenes": ("scenes", {"data.batch_size": 512, "network.dtype": "bfloat16"}, scenes),
    "sd3_medium": ("sd3", {"data.batch_size": 4, **{f"network.{k}": v for k, v in MEDIUM.items()}}, sd3),
    "sd3_5_large": ("sd3", {"data.batch_size": 8, **{f"network.{k}": v for k, v in LARGE.items()}}, sd3),
}


def parse(argv: list[str]) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--case", choices=CASES, default="cifar10")
    parser.add_argument("--target", default="h100")
    parser.add_argument("--mesh", default="", help="as training.mesh")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="changes of the config")
    parser.add_argument("--out", type=Path, help="write the result here")
    return parser.parse_args(argv)


def value_of(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def main() -> None:
    arguments = parse(sys.argv[1:])
    target = parse_target(arguments.target)
    mesh = target_mesh(target, arguments.mesh)
    name, changes, make = CASES[arguments.case]
    changes = changes | {field: value_of(value) for field, _, value in (item.partition("=") for item in arguments.set)}
    config = diffusion.load_config(name, changes, folder=CONFIGS)
    model = make(config)
    learner = make_learner(config, model)
    found = compile_step(learner, make_settings(config), target, mesh, training_batch(config, model))
    print("\n".join(report(found, describe_mesh(mesh), learner.batch_size, [])))
    result = {"case": arguments.case, "changes": changes, "mesh": describe_mesh(mesh)}
    if arguments.out:
        write_results(arguments.out, {**result, **to_json(found, learner.batch_size)})


if __name__ == "__main__":
    main()
