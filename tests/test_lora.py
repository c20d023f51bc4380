"""LoRA: adapters beside the kernels of a tiny published Stable Diffusion 3, trained, stored, exported and read back."""

import pathlib
import re
import shutil
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import do_call, make_call
from published_sd3 import noise, write_pipeline
from safetensors.numpy import load_file, save_file
from test_sd3 import draw, import_into

from diffusion.model import lora
from diffusion.model.lora import LoRA, make_lora
from diffusion.model.loss import make_loss
from diffusion.model.model import parts
from diffusion.networks.mmdit import MMDiT
from diffusion.pretrained.lora import FILE, load_lora, save_lora
from diffusion.pretrained.mmdit import shapes
from diffusion.runs import export
from diffusion.runs.adapters import with_lora
from diffusion.runs.run import open_run
from diffusion.training import RunError
from diffusion.training.checkpoints import open_existing
from experiments.sd3 import TASK

GOLDEN = np.load(pathlib.Path(__file__).parent / "golden" / "lora_tiny.npz")
RANK, ALPHA, STEPS = 4, 8.0, 50
FLAGS = (
    "--config.network.dtype=float32",
    "--config.data.image_size=16",
    "--config.data.batch_size=8",
    f"--config.lora.rank={RANK}",
    f"--config.lora.alpha={ALPHA}",
    "--config.optimizer.learning_rate=3e-3",
    "--config.optimizer.warmup_steps=1",
    f"--config.training.num_steps={STEPS}",
    "--config.training.checkpoint_every=40",
    "--config.training.log_every=10",
    "--config.training.ema_decay=0.9",
    "--config.training.num_previews=0",
)


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """The folder of a run with the files of a tiny pipeline."""
    return import_into(tmp_path_factory.mktemp("run") / "sd3", write_pipeline(tmp_path_factory.mktemp("published")))


@pytest.fixture(scope="module")
def base(imported):
    return open_run(imported, num_devices=1)


@pytest.fixture(scope="module")
def tuned(imported, pairs, tmp_path_factory):
    """The folder of a run whose adapters were trained for 50 steps, beside the imported network."""
    folder = tmp_path_factory.mktemp("tuned") / "mine"
    do_call(TASK, "sd3", folder, f"--init_from={imported}", f"--config.data.dir={pairs}", *FLAGS)
    return folder


@pytest.fixture(scope="module")
def run(tuned):
    return open_run(tuned, num_devices=1)


NETWORK = MMDiT(
    width=8, depth=2, num_heads=2, out_channels=2, context_width=6, pooled_width=5, dual_attention=1, table_size=4
)  # fmt: skip
TARGETS = ("image_qkv", "image_out", "text_qkv", "text_out", "dual_qkv", "image_mlp_1")


@pytest.fixture(scope="module")
def params():
    """Of that network, none of them zero, as gates are at first."""
    random = np.random.RandomState(0)
    return {"params": jax.tree.map(lambda x: random.randn(*x.shape).astype(np.float32) / 3, shapes(NETWORK))}


def drawn_pairs(params: dict[str, Any]) -> dict[str, Any]:
    """Returns random adapters of rank 2."""
    random = np.random.RandomState(1)
    pairs = jax.eval_shape(lambda key: lora.init(LoRA(2, 1.0, TARGETS), params, key), jax.random.key(0))
    return jax.tree.map(lambda x: random.randn(*x.shape).astype(np.float32), pairs)


def test_new_adapters_change_nothing_and_are_as_wide_as_said(params):
    pairs = jax.jit(lambda key: lora.init(LoRA(64, 1.0, TARGETS), params, key))(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, lora.merge(params, pairs, 3.0), params)
    drawn = np.concatenate([np.ravel(pair["A"]) for block in pairs.values() for pair in block.values()])
    assert drawn.size == 64 * (2 * (3 * 8 + 8 + 3 * 8 + 8) + 8 + 3 * 8)  # the last block gives no text out
    # The deviation of so many normal numbers is within 5 of its own, sigma / sqrt(2 N).
    np.testing.assert_allclose(drawn.std(), 1 / 64, rtol=5 / (2 * drawn.size) ** 0.5)


def test_merged_kernels_are_the_adapters_at_work(params):
    pairs = drawn_pairs(params)
    inputs = tuple(
        jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(2, 4, 4, 2), (2,), (2, 3, 6), (2, 5)])
    )

    def beside(call, args, kwargs, context):
        """A layer's own output, and beside it what its adapter makes of the same input."""
        block, module = (*context.module.path, "", "")[:2]
        pair = pairs.get(block, {}).get(module)
        if pair is None:
            return call(*args, **kwargs)
        x = args[0]
        if module.endswith("_qkv"):
            three = [jnp.einsum("blr,rhd->blhd", x @ pair["A"][:, i], pair["B"][i]) for i in range(3)]
            return call(x) + 0.5 * jnp.stack(three, axis=2)
        return call(x) + 0.5 * (x.reshape(*x.shape[:2], -1) @ pair["A"].reshape(-1, 2)) @ pair["B"]

    def at_work(params, *inputs):
        with nn.intercept_methods(beside):
            return NETWORK.apply(params, *inputs)

    expected = jax.jit(at_work)(params, *inputs)
    merged = jax.jit(NETWORK.apply)(lora.merge(params, pairs, 0.5), *inputs)
    np.testing.assert_allclose(merged, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (dict(rank=-1), "lora.rank is -1"),
        (dict(rank=2, alpha=-1.0), "lora.alpha -1: neither may be negative"),
    ],
)
def test_bad_settings_are_refused(block, message):
    with pytest.raises(ValueError, match=message):
        make_lora("mmdit", **block)


def test_what_cannot_be_adapted_is_refused(params):
    assert make_lora("unet") is None
    with pytest.raises(ValueError, match=re.escape("lora.rank=4 adapts mmdit or flux2, and network.name is unet")):
        make_lora("unet", rank=4)
    with pytest.raises(ValueError, match="no block has qkv: choose from dual_out, dual_qkv, image_mlp_1"):
        lora.init(LoRA(2, 1.0, ("qkv",)), params, jax.random.key(0))


def test_fifty_steps_lower_the_loss(run, pairs):
    source = TASK.read(run.config, "train")
    batch = source.read(np.arange(source.num_examples))
    batch["text"] = run.model.condition.read([source.captions[label] for label in batch["label"]])
    loss = make_loss(run.model)
    losses = jax.jit(lambda params, batch, key: loss(params, batch, key)[0])
    nothing = {**run.params, "lora": jax.tree.map(jnp.zeros_like, run.params["lora"])}
    before, after = (
        np.stack([losses(params, batch, jax.random.key(seed)) for seed in range(16)])
        for params in (nothing, run.params)
    )
    change = after - before  # of each picture, at the same times and noise
    assert change.mean() < -5 * change.std() / change.size**0.5


def test_only_the_adapters_change(run, base, tuned):
    assert run.model.frozen == ("network", "text", "space") and run.step == STEPS
    for group in run.model.frozen:
        jax.tree.map(np.testing.assert_array_equal, run.params[group], base.params[group])
    assert all(np.any(pair["B"]) for name, pair in run.params["lora"]["block_0"].items())
    with open_existing(tuned) as checkpoints:
        stored = checkpoints.description()
    assert stored["begun"] == {
        "folder": "sd3", "step": 0, "digest": base.digest, "weights": "published", "parts": ["network", "text", "space"]
    }  # fmt: skip
    assert stored["config"]["network"]["width"] == 16 and stored["config"]["sampling"]["grid"]["shift"] == 3.0


def test_a_run_resumes_bit_for_bit(tuned, run, imported, pairs, tmp_path):
    folder = tmp_path / "mine"
    shutil.copytree(tuned, folder)
    shutil.rmtree(folder / "checkpoints" / str(STEPS))
    do_call(TASK, "sd3", folder, f"--config.data.dir={pairs}", *FLAGS)  # without --init_from: the checkpoint is whole
    again = open_run(folder, num_devices=1)
    jax.tree.map(np.testing.assert_array_equal, again.params, run.params)
    with pytest.raises(RunError, match="began with sd3: leave --init_from=elsewhere out to resume it"):
        make_call(TASK, "sd3", folder, "--init_from=elsewhere", f"--config.data.dir={pairs}", *FLAGS)


def test_exported_adapters_are_read_back(tuned, run, base, tmp_path):
    call = make_call(TASK, "sd3", tuned, "--mode=export", f"--weights={tmp_path / 'out'}", num_devices=1)
    export.export_weights(call)
    again = with_lora(base, tmp_path / "out")
    one, other = (parts(x.model, x.params).network for x in (run, again))
    # The scale, 2, is in B: a product by a power of two rounds nothing.
    jax.tree.map(np.testing.assert_array_equal, one, other)
    names = load_file(tmp_path / "out" / FILE)
    assert names["transformer.transformer_blocks.1.attn.add_k_proj.lora_A.weight"].shape == (RANK, 16)
    assert len(names) == 2 * (3 * 8 - 1)  # the last block gives no text out
    assert again.digest != base.digest


def test_adapters_of_diffusers_draw_its_picture(base, tmp_path):
    file = tmp_path / "peer" / FILE
    file.parent.mkdir()
    file.write_bytes(GOLDEN["adapters"].tobytes())
    adapted = with_lora(base, file.parent)
    images = draw(adapted, noise(16, 16))
    np.testing.assert_allclose(images, GOLDEN["picture"], atol=1e-3)
    # For `record_lora.py FOLDER`, by which diffusers draws what we do with the file that we write.
    written = save_lora(tmp_path / "ours", base.model.network, adapted.params["lora"], 1.0)
    np.save(written.with_name("picture.npy"), images)


def test_files_that_do_not_fit_are_refused_in_one_line(base, tmp_path):
    network = base.model.network
    weights = {"A": np.zeros((2, 16), np.float32), "B": np.zeros((16, 2), np.float32)}
    query = "transformer.transformer_blocks.0.attn.to_q"

    def refused(names, message):
        save_file(names, tmp_path / "some.safetensors")
        with pytest.raises(ValueError, match=re.escape(message)) as error:
            load_lora(tmp_path / "some.safetensors", network)
        assert "\n" not in str(error.value)

    whole = {f"{query}.lora_A.weight": weights["A"], f"{query}.lora_B.weight": weights["B"]}
    refused({f"{query}.lora_A.weight": weights["A"]}, "a lora_A [rank, in] and a lora_B [out, rank] are needed")
    refused(whole | {f"{query}.lora_B.weight": weights["B"][:8]}, "lora_B (8, 2) do not fit a layer from 16 to 16")
    other = {name.replace("blocks.0", "blocks.7"): x for name, x in whole.items()}
    refused(other, "the network has no transformer_blocks.7.attn.to_q: these adapters are of another one")
    text = {name.replace("transformer.", "text_encoder.", 1): x for name, x in whole.items()}
    refused(whole | text, "adapters of text encoders and other forms are not read")
    with pytest.raises(ValueError, match=re.escape("read from a .safetensors file, or a folder")):
        load_lora(tmp_path / "some.bin", network)


def test_adapters_need_a_trained_network(pairs, tmp_path):
    flags = (*FLAGS, "--config.condition=words", "--config.space=pixels", f"--config.data.dir={pairs}")
    with pytest.raises(
        RunError, match=re.escape("lora.rank=4 adapts a trained network: name its run, --init_from=RUN")
    ):
        do_call(TASK, "sd3", tmp_path / "run", *flags)


def test_a_run_with_adapters_is_the_network_that_another_begins_with(run):
    from diffusion.runs.begin import groups

    network = groups(run.model, run.params, ("network",), run.model, jax.random.key(0))["network"]
    kernel = lambda params: params["params"]["block_0"]["image_out"]["kernel"]  # noqa: E731
    pair = run.params["lora"]["block_0"]["image_out"]
    expected = kernel(run.params["network"]) + 2 * np.einsum("hdr,ro->hdo", pair["A"], pair["B"])
    np.testing.assert_allclose(kernel(network), expected, rtol=1e-5, atol=1e-6)
