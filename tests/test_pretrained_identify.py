"""Files and folders of other models are named for what they are, in one line and without reading their weights."""

import json
import pickle

import numpy as np
import pytest
from published_folders import write_folder
from safetensors.numpy import save_file
from test_torch_files import as_stream, as_zip, dumps, tensor

from diffusion.pretrained.clip import load_clip
from diffusion.pretrained.identify import identify
from diffusion.pretrained.unet import load_unet


@pytest.mark.parametrize(
    "file, content, what",
    [
        ("model_index.json", {"_class_name": "StableDiffusionPipeline"}, "a Stable Diffusion pipeline"),
        ("model_index.json", {"_class_name": "StableDiffusion3Pipeline"}, "a Stable Diffusion 3 pipeline"),
        ("model_index.json", {"_class_name": "DiTPipeline"}, "a DiT pipeline (DiTPipeline)"),
        ("model_index.json", {"_class_name": "FluxPipeline"}, "a FLUX.1 pipeline"),
        ("model_index.json", {"_class_name": "Flux2KleinPipeline"}, "a FLUX.2 [klein] pipeline"),
        ("model_index.json", {"_class_name": "SomethingNewPipeline"}, "another kind of model (SomethingNewPipeline)"),
        ("model_index.json", {}, "a folder whose settings do not name their class"),
        ("config.json", {"_class_name": "DiTTransformer2DModel"}, "the transformer of DiT"),
        ("config.json", {"_class_name": "SD3Transformer2DModel"}, "the transformer of Stable Diffusion 3"),
        ("config.json", {"_class_name": "AutoencoderKL"}, "an autoencoder"),
        ("config.json", {"architectures": ["CLIPModel"]}, "a CLIP of transformers (CLIPModel)"),
        ("config.json", {"architectures": ["T5EncoderModel"]}, "a T5 of transformers"),
        ("adapter_config.json", {}, "a LoRA"),
        ("open_clip_config.json", {}, "a model of open_clip"),
        ("notes.json", {}, "a folder without config.json (notes.json)"),
        ("model_index.json", [], "not readable"),
    ],
)
def test_folders(tmp_path, file, content, what):
    (tmp_path / file).write_text(json.dumps(content))
    assert identify(tmp_path).startswith(what)
    with pytest.raises(ValueError) as error:
        load_unet(tmp_path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000


NAMES = [
    (["down.0.lora_A.weight"], "a LoRA"),
    (["double_blocks.0.img_mod.lin.weight"], "FLUX's transformer"),
    (["model.diffusion_model.joint_blocks.0.x"], "Stable Diffusion 3's transformer"),
    (["model.diffusion_model.input_blocks.0.0.weight"], "a Stable Diffusion checkpoint in one file"),
    (["input_blocks.0.0.weight", "output_blocks.0.0.x", "time_embed.0.weight"], "a U-Net of OpenAI's guided-diffusion"),
    (["input_blocks.0.0.weight", "out.2.weight", "time_embed.0.weight"], "a classifier of OpenAI's guided-diffusion"),
    (["visual.proj", "positional_embedding", "logit_scale"], "a CLIP in the names of OpenAI and open_clip"),
    (["vision_model.x", "text_model.x"], "the weights of a CLIPModel"),
    (["Mixed_5b.branch1x1.conv.weight"], "FID's Inception-v3"),
    (["x_embedder.proj.weight", "blocks.0.adaLN_modulation.1.bias"], "a DiT in its authors' names"),
    (["down_blocks.0.x", "time_embedding.linear_1.weight", "x.attn2.to_q"], "the weights of a UNet2DConditionModel"),
    (["down_blocks.0.x", "time_embedding.linear_1.weight"], "the weights of a UNet2DModel"),
    (["b", "a" * 5000, "c", "d"], "a file of 4 arrays of a model that is not known here (aaaa"),
]


@pytest.mark.parametrize("names, what", NAMES)
def test_files(tmp_path, names, what):
    save_file({name: np.zeros(1, np.float32) for name in names}, tmp_path / "model.safetensors")
    assert identify(tmp_path / "model.safetensors").startswith(what)
    # The storages are left out: nothing but names is read.
    state = dumps({name: tensor() for name in names})
    for content in (as_zip(state), as_stream(state)):
        (tmp_path / "model.pt").write_bytes(content)
        assert identify(tmp_path / "model.pt").startswith(what) and len(identify(tmp_path / "model.pt")) < 300
    (tmp_path / "model.pt").unlink()
    assert identify(tmp_path).startswith(f"a folder without settings, whose model.safetensors is {what}")


def test_files_that_hold_no_weights(tmp_path):
    script = as_zip(b"", others={"ViT-B-32/code/__torch__/model.py": b""})
    for name, content, what in [
        ("ViT-B-32.pt", script, "a TorchScript program, as OpenAI's files of CLIP are"),
        ("model.safetensors", b"text", "a file that is neither safetensors nor PyTorch's"),
        ("model.ckpt", pickle.dumps({"epoch": 3}), "not readable"),
        ("notes.txt", b"", "a file that is neither safetensors nor PyTorch's"),
    ]:
        (tmp_path / name).write_bytes(content)
        assert identify(tmp_path / name).startswith(what)
    assert identify(tmp_path / "nowhere") == "no file or folder"


def test_a_u_net_is_no_clip_and_a_clip_no_u_net(tmp_path):
    folder = write_folder(tmp_path / "theirs")
    with pytest.raises(ValueError, match=r"is a DDPM pipeline .*; needed is the folder of a CLIPModel"):
        load_clip(folder)
    (tmp_path / "ViT-B-32.pt").write_bytes(as_zip(b"", others={"ViT-B-32/code/__torch__/model.py": b""}))
    for load, needed in ((load_clip, "a CLIPModel"), (load_unet, "a DDPMPipeline")):
        with pytest.raises(ValueError, match=f"is a TorchScript program, .*; needed is the folder of {needed}"):
            load(tmp_path / "ViT-B-32.pt")
