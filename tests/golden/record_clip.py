"""Records clip_tiny.npz, outputs of transformers' CLIP models with random weights, and clip_text.npz, its token ids.

Run with PyTorch, transformers, JAX and Flax installed:

    python tests/golden/record_clip.py bpe_simple_vocab_16e6.txt.gz

The file of merges is OpenAI's, as open_clip_torch ships it. Weights are not stored: `weight_of` makes each from its
name. It also prints how far our network is from transformers' in the shape of ViT-B/32.
"""

import gzip
import itertools
import json
import pathlib
import random
import sys

import jax
import numpy as np
import torch
import transformers
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
from clip_weights import weight_of

from diffusion.data import text as ours
from diffusion.networks.clip import unit
from diffusion.pretrained.clip import load_clip

HERE = pathlib.Path(__file__).parent
LAYERS = dict(num_hidden_layers=2, num_attention_heads=2, hidden_act="quick_gelu")
TINY = dict(
    projection_dim=12,
    text_config=dict(
        **LAYERS, hidden_size=16, intermediate_size=32, vocab_size=50, max_position_embeddings=9, eos_token_id=49
    ),
    vision_config=dict(**LAYERS, hidden_size=24, intermediate_size=40, image_size=12, patch_size=4),
)


def make_peer(kind, config):
    peer = kind(config).eval()
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            parameter.copy_(torch.from_numpy(weight_of(name, tuple(parameter.shape))))
    return peer


def outputs(peer, image, ids):
    with torch.no_grad():
        found = peer(
            pixel_values=torch.from_numpy(image.transpose(0, 3, 1, 2)),
            input_ids=torch.from_numpy(ids),
            output_hidden_states=True,
        )
    arrays = dict(
        image_embedding=found.image_embeds,
        text_embedding=found.text_embeds,
        logits=found.logits_per_image,
        image_features=found.vision_model_output.pooler_output,  # projected, not of length 1
        text_tokens=found.text_model_output.last_hidden_state,
    )
    arrays |= {f"image_hidden_{i}": x for i, x in enumerate(found.vision_model_output.hidden_states)}
    arrays |= {f"text_hidden_{i}": x for i, x in enumerate(found.text_model_output.hidden_states)}
    return {name: array.numpy() for name, array in arrays.items()}


def text_ids(rng, config, count):
    """Texts of several lengths, padded with the end."""
    text = config["text_config"]
    ids = rng.randint(1, text["vocab_size"] - 1, (count, text["max_position_embeddings"]))
    for row in range(count):
        ids[row, rng.randint(1, ids.shape[1]) :] = text["eos_token_id"]
    return ids


def record_tiny():
    rng = np.random.RandomState(0)
    config = CLIPConfig(**TINY)
    peer = make_peer(CLIPModel, config)
    image = rng.randn(3, 12, 12, 3).astype(np.float32)
    ids = text_ids(rng, TINY, 4)
    with torch.no_grad():
        # The towers alone, of other configs: the exact GELU of OpenCLIP's, and the old form of config, whose end is 2.
        text_config, vision_config = peer.config.text_config, peer.config.vision_config
        text_config.hidden_act = vision_config.hidden_act = "gelu"
        text_config.projection_dim, vision_config.projection_dim = 12, 12
        text_config.eos_token_id = 2
        text = make_peer(CLIPTextModelWithProjection, text_config)
        text = text(torch.from_numpy(ids), output_hidden_states=True)
        vision = make_peer(CLIPVisionModelWithProjection, vision_config)
        vision = vision(torch.from_numpy(image.transpose(0, 3, 1, 2)), output_hidden_states=True)
    np.savez_compressed(
        HERE / "clip_tiny.npz",
        config=json.dumps(TINY),
        names=json.dumps({name: list(x.shape) for name, x in peer.state_dict().items()}),
        text_names=json.dumps(
            {n: list(x.shape) for n, x in make_peer(CLIPTextModelWithProjection, text_config).state_dict().items()}
        ),
        image=image,
        ids=ids,
        **outputs(peer, image, ids),
        gelu_text_embedding=text.text_embeds.numpy(),
        gelu_text_hidden=np.stack([x.numpy() for x in text.hidden_states]),
        gelu_image_embedding=vision.image_embeds.numpy(),
        gelu_image_hidden=np.stack([x.numpy() for x in vision.hidden_states]),
        versions=f"transformers {transformers.__version__}, torch {torch.__version__}",
    )


def compare_base(folder):
    """ViT-B/32 as transformers writes and we read it."""
    rng = np.random.RandomState(1)
    config = CLIPConfig()
    peer = make_peer(CLIPModel, config)
    peer.save_pretrained(folder)
    image = rng.randn(2, 224, 224, 3).astype(np.float32)
    ids = text_ids(rng, dict(text_config=dict(vocab_size=49408, max_position_embeddings=77, eos_token_id=49407)), 3)
    theirs = outputs(peer, image, ids)
    clip, params = load_clip(folder)
    see, read = clip.apply(params, image, method="see"), clip.apply(params, ids, method="read")
    mine = dict(image_embedding=unit(see.embedding), text_embedding=unit(read.embedding), text_tokens=read.tokens)
    mine["logits"] = np.exp(params["params"]["logit_scale"]) * mine["image_embedding"] @ mine["text_embedding"].T
    mine |= {f"image_hidden_{i}": x for i, x in enumerate(see.hidden)}
    mine |= {f"text_hidden_{i}": x for i, x in enumerate(read.hidden)}
    worst = {name: float(np.max(np.abs(theirs[name] - x))) for name, x in mine.items()}
    sizes = {name: float(np.std(theirs[name])) for name in worst}
    name = max(worst, key=worst.get)
    print(f"ViT-B/32: {sum(x.size for x in jax.tree.leaves(params)):,} parameters; embeddings and logits differ by")
    print({n: f"{worst[n]:.1e}" for n in ("image_embedding", "text_embedding", "logits")}, "at most, hidden states by")
    print(f"{worst[name]:.1e} ({name}, of size {sizes[name]:.2f})")


BITS = """a the dog Photo isn't we'll they'RE I'd don’t ﬁ İstanbul straße ÉCOLE é 日本語 한국어 العربية हिन्दी 😀 🇩🇪 🙃🙃
👩‍👩‍👧‍👦 123 3.14 ½ ² Ⅷ !!! ?! ... — “q” <|endoftext|> <|startoftext|> <|x|> &amp; &lt; __ ## a/b http://x.y/z?q=1 C++
#tag @me 𝔘𝔫𝔦 ﷺ ǅ ß ſ Σς ﬀ ’s 'S '' " \\ Ω Å ñ Ａ １ zzzzzzzzzz supercalifragilisticexpialidocious 000000000000"""
BITS = [*BITS.split(), "e\u0301", "n\u0303", "\u212b"]  # in parts, or by another name
BITS += [" ", "  ", "\t", "\n", "\u00a0", "\u3000", "\u200b", "\u200d", "\x00", "\x7f", "\ufffd", "\ue000"]


def odd_text(rng):
    ranges = [(32, 127), (160, 0x3000), (0x1F300, 0x1F700)]
    parts = [
        rng.choice(BITS) if rng.random() < 0.9 else chr(rng.randrange(*rng.choice(ranges)))
        for _ in range(rng.randrange(9))
    ]
    return rng.choice(["", "", " "]).join(parts)


def applied_merges(symbols, rank):
    """The merges that byte-pair encoding makes in a word: lowest rank first."""
    made = []
    while pairs := [pair for pair in itertools.pairwise(symbols) if pair in rank]:
        pair = min(pairs, key=rank.get)
        made.append(pair)
        joined, i = [], 0
        while i < len(symbols):
            whole = tuple(symbols[i : i + 2]) == pair
            joined.append("".join(pair) if whole else symbols[i])
            i += 1 + whole
        symbols = joined
    return made


def record_text(path):
    tokenizer = ours.clip_tokenizer(path)
    lines = gzip.decompress(pathlib.Path(path).read_bytes()).decode().split("\n")[1 : ours.NUM_MERGES + 1]
    merges = [tuple(line.split()) for line in lines]
    vocabulary = tokenizer.get_vocab()
    theirs = CLIPTokenizer(vocab=vocabulary, merges=merges)
    rng = random.Random(0)
    texts = [odd_text(rng) for _ in range(1000)]
    ids = [theirs(text, add_special_tokens=False)["input_ids"] for text in texts]
    mine = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    print("texts whose ids differ:", sum(one != other for one, other in zip(ids, mine, strict=True)))
    # The test has no need of the other merges, and the file is not ours to give away.
    rank = {merge: number for number, merge in enumerate(merges)}
    normal, split = tokenizer.normalizer, tokenizer.pre_tokenizer
    words = {word for text in texts for word, _ in split.pre_tokenize_str(normal.normalize_str(text))}
    used = {merge for word in words for merge in applied_merges([*word[:-1], word[-1] + "</w>"], rank)}
    kept = sorted(used, key=rank.get)
    small = {word: number for word, number in vocabulary.items() if number < 512 or number >= 49406}
    small |= {"".join(merge): vocabulary["".join(merge)] for merge in kept}
    (HERE / "clip_text.npz").unlink(missing_ok=True)
    np.savez_compressed(
        HERE / "clip_text.npz",
        texts=json.dumps(texts),
        ids=json.dumps(ids),
        merges=json.dumps(kept),
        vocabulary=json.dumps(small),
        versions=f"transformers {transformers.__version__}",
    )


if __name__ == "__main__":
    record_tiny()
    record_text(sys.argv[1])
    if len(sys.argv) > 2:
        compare_base(sys.argv[2])
