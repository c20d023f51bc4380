"""Records sd3_text.npz: StableDiffusion3Pipeline.encode_prompt of diffusers with tiny encoders, and their files.

Run with PyTorch, diffusers, transformers, sentencepiece and protobuf installed, after record_t5.py, whose tokenizer it
takes: `python tests/golden/record_sd3_text.py`. The weights are not stored: `weight_of` makes each from its name.
With a folder as an argument it opens that with diffusers instead, and prints how far the features are from the
recorded ones: for a folder that `write_towers` made of the same encoders.
"""

import json
import pathlib
import sys
import tempfile

import diffusers
import numpy as np
import torch
import transformers
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from clip_weights import weight_of

HERE = pathlib.Path(__file__).parent
CLIP_LENGTH, T5_LENGTH = 9, 16
START, END = "<|startoftext|>", "<|endoftext|>"
MERGES = [("c", "a"), ("ca", "t</w>"), ("t", "h"), ("th", "e</w>"), ("o", "n</w>"), ("r", "e"), ("re", "d</w>")]
PROMPTS = ["a photo of the red cats", "an astronaut riding a horse on the moon, highly detailed, in the style of ÉCOLE"]
NEGATIVES = ["blurry", ""]
BLOCK = dict(intermediate_size=28, num_attention_heads=2, max_position_embeddings=CLIP_LENGTH, bos_token_id=0)
T5 = dict(vocab_size=512, d_model=40, d_kv=6, d_ff=48, num_layers=2, num_heads=3, feed_forward_proj="gated-gelu")


def vocabulary() -> dict[str, int]:
    """Bytes in CLIP's order, bytes that end words, the merges, start and end."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    symbols = [*map(chr, visible), *(chr(256 + i) for i in range(256 - len(visible)))]
    words = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *map("".join, MERGES), START, END]
    return {word: number for number, word in enumerate(words)}


def write_tokenizers(folder: pathlib.Path) -> None:
    """As published: CLIP-L pads with the end of text, bigG with "!", which is token 0."""
    for name, pad in (("tokenizer", END), ("tokenizer_2", "!")):
        (folder / name).mkdir()
        (folder / name / "vocab.json").write_text(json.dumps(vocabulary()), "utf-8")
        lines = ["#version: 0.2", *(" ".join(merge) for merge in MERGES)]
        (folder / name / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")
        tokens = dict(bos_token=START, eos_token=END, unk_token=END, pad_token=pad)
        config = dict(tokens, tokenizer_class="CLIPTokenizer", model_max_length=CLIP_LENGTH)
        (folder / name / "tokenizer_config.json").write_text(json.dumps(config))
        (folder / name / "special_tokens_map.json").write_text(json.dumps(tokens))
    (folder / "tokenizer_3").mkdir()
    with np.load(HERE / "t5_text.npz") as arrays:
        (folder / "tokenizer_3" / "spiece.model").write_bytes(arrays["model"].tobytes())
    config = dict(tokenizer_class="T5Tokenizer", pad_token="<pad>", eos_token="</s>", model_max_length=512)
    (folder / "tokenizer_3" / "tokenizer_config.json").write_text(json.dumps(config))


def make_peer(kind, config):
    peer = kind(config).eval()
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            parameter.copy_(torch.from_numpy(weight_of(name, tuple(parameter.shape))))
    return peer


def others() -> dict:
    """The parts of the pipeline that do not read texts; the transformer's widths are asked for where T5 is absent."""
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=T5["d_model"], caption_projection_dim=16, pooled_projection_dim=30, out_channels=4,
    )  # fmt: skip
    return dict(transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=None)


def make_pipeline(folder: pathlib.Path) -> StableDiffusion3Pipeline:
    size = len(vocabulary())
    clip_l = CLIPTextConfig(
        **BLOCK, vocab_size=size, hidden_size=12, num_hidden_layers=3, hidden_act="quick_gelu", projection_dim=12,
        eos_token_id=size - 1,
    )  # fmt: skip
    clip_g = CLIPTextConfig(
        **BLOCK, vocab_size=size, hidden_size=20, num_hidden_layers=4, hidden_act="gelu", projection_dim=18,
        eos_token_id=2,
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        **others(),
        text_encoder=make_peer(CLIPTextModelWithProjection, clip_l),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder_2=make_peer(CLIPTextModelWithProjection, clip_g),
        tokenizer_2=CLIPTokenizer.from_pretrained(folder / "tokenizer_2"),
        text_encoder_3=make_peer(T5EncoderModel, T5Config(**T5, tie_word_embeddings=False)),
        tokenizer_3=T5TokenizerFast.from_pretrained(folder / "tokenizer_3"),
    )  # fmt: skip


def features(pipeline: StableDiffusion3Pipeline) -> dict[str, np.ndarray]:
    """With and without T5, clip_skip None and 1; negative prompts are read without clip_skip, whatever it is."""
    arrays = {}
    t5 = pipeline.text_encoder_3
    for case, encoder in (("all", t5), ("without_t5", None)):
        pipeline.text_encoder_3 = encoder
        for skip in (None, 1):
            with torch.no_grad():
                context, negative, pooled, negative_pooled = pipeline.encode_prompt(
                    PROMPTS, None, None, negative_prompt=NEGATIVES, clip_skip=skip, max_sequence_length=T5_LENGTH
                )
            arrays |= {f"{case}/{skip or 0}/context": context.numpy(), f"{case}/{skip or 0}/pooled": pooled.numpy()}
            arrays |= {f"{case}/negative/context": negative.numpy()}
            arrays |= {f"{case}/negative/pooled": negative_pooled.numpy()}
    pipeline.text_encoder_3 = t5
    return arrays


def main() -> None:
    arrays = {}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name) / "tokenizers"
        folder.mkdir()
        write_tokenizers(folder)
        pipeline = make_pipeline(folder)
        saved = pathlib.Path(name) / "saved"
        pipeline.save_pretrained(saved)
        arrays = features(pipeline)
        texts = PROMPTS + NEGATIVES
        lengths = dict(tokenizer=CLIP_LENGTH, tokenizer_2=CLIP_LENGTH, tokenizer_3=T5_LENGTH)
        for part, length in lengths.items():
            read = getattr(pipeline, part)
            arrays[f"ids/{part}"] = np.array(
                read(texts, padding="max_length", max_length=length, truncation=True)["input_ids"]
            )
            print(part, arrays[f"ids/{part}"].tolist())
        files = [saved / "model_index.json", *(saved / f"text_encoder{n}" / "config.json" for n in ("", "_2", "_3"))]
        for path in files:
            arrays[f"files/{path.relative_to(saved)}"] = np.frombuffer(path.read_bytes(), np.uint8)
        for path in sorted(folder.rglob("*.*")):
            if path.name != "spiece.model":
                arrays[f"files/{path.relative_to(folder)}"] = np.frombuffer(path.read_bytes(), np.uint8)
    for part in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        found = {key: list(x.shape) for key, x in getattr(pipeline, part).named_parameters()}
        arrays[f"names/{part}"] = np.array(json.dumps(found))
    for key, value in arrays.items():
        if "/context" in key or "/pooled" in key:
            print(key, value.shape, value.std())
    versions = f"diffusers {diffusers.__version__}, transformers {transformers.__version__}, torch {torch.__version__}"
    texts = json.dumps({"prompts": PROMPTS, "negatives": NEGATIVES})
    np.savez_compressed(HERE / "sd3_text.npz", **arrays, texts=texts, versions=versions)


def compare(folder: str) -> None:
    """Opens a folder with diffusers, and prints the largest difference from the recorded features."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, **others(), local_files_only=True)
    with np.load(HERE / "sd3_text.npz") as golden:
        print({name: float(np.abs(golden[name] - x).max()) for name, x in features(pipeline).items()})


if __name__ == "__main__":
    compare(sys.argv[1]) if sys.argv[1:] else main()
