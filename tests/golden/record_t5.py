"""Records t5_tiny.npz, outputs of transformers' T5EncoderModel with random weights, and t5_text.npz, its token ids.

Run with PyTorch, transformers, sentencepiece and protobuf installed: `python tests/golden/record_t5.py`. The weights
are not stored: `weight_of` makes each from its name. The tokenizer is a SentencePiece model of 400 pieces that is
trained here, with T5's settings.
"""

import io
import json
import pathlib
import random
import sys
import tempfile

import numpy as np
import sentencepiece
import torch
import transformers
from transformers import T5Config, T5EncoderModel, T5TokenizerFast
from transformers.models.t5.modeling_t5 import T5Attention

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from clip_weights import weight_of

HERE = pathlib.Path(__file__).parent
TINY = dict(
    vocab_size=600,
    d_model=24,
    d_kv=8,
    d_ff=40,
    num_layers=3,
    num_heads=4,  # 32 wide together: not d_model
    feed_forward_proj="gated-gelu",
    layer_norm_epsilon=1e-6,
    tie_word_embeddings=False,
)
CORPUS = """a photo of an astronaut riding a horse on the moon, highly detailed; the quick brown fox jumps over the dog
three red cubes to the left of a blue sphere. an oil painting of a cat, in the style of the old masters! "what is it?"
ein Bild von zwei Hunden im Schnee, die Straße ist leer; une photo d'un élève à l'école, où l'été commence: très beau
двадцать красных шаров на зелёной траве; 日本語の看板 and 한국어 간판 with 中文 letters — 3.14 and 1,000 of 2024's best
naïve café, résumé; isn't, we'll, they're, I'd, don't: contractions (and brackets) [square] {curly} #tags @names"""
BITS = """a the photo astronaut horse riding isn't we'll don’t ﬁ İstanbul straße ÉCOLE é 日本語 한국어 العربية हिन्दी
😀 🇩🇪 👩‍👩‍👧 123 3.14 ½ ² Ⅷ !!! ?! ... — “q” </s> <pad> <unk> <extra_id_0> <extra_id_99> <extra_id_100> <x|> &amp; ▁ __
a/b C++ #tag 𝔘𝔫𝔦 ﷺ ǅ ß ſ Σς ﬀ '' " \\ Ω Å ñ Ａ １ zzzzzzzzzz supercalifragilistic 000000000000 ~ ～ ‘ ’ … ㎏ ｶﾞ"""
BITS = [
    *BITS.split(),
    "e\u0301",
    "n\u0303",
    "\u212b",
    " ",
    "  ",
    "\t",
    "\n",
    "\r\n",
    "\u00a0",
    "\u3000",
    "\u200b",
    "\u200d",
]
BITS += ["\x7f", "\ufffd", "\ue000", "\ufeff", "\u00ad"]


def train_model() -> bytes:
    """A unigram model as T5's: pad 0, end 1, unknown 2, no start, NFKC with single spaces."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.splitlines() + (HERE.parents[1] / "LICENSE").read_text().splitlines()),
        model_writer=model,
        model_type="unigram",
        vocab_size=400,
        character_coverage=1.0,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        normalization_rule_name="nmt_nfkc",
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def odd_text(rng: random.Random) -> str:
    ranges = [(32, 127), (160, 0x3000), (0x1F300, 0x1F700)]
    words = CORPUS.split()
    parts = [
        rng.choice(words)
        if draw < 0.4
        else rng.choice(BITS)
        if draw < 0.93
        else chr(rng.randrange(*rng.choice(ranges)))
        for draw in (rng.random() for _ in range(rng.randrange(9)))
    ]
    return rng.choice(["", " ", " "]).join(parts)


def record_text() -> None:
    model = train_model()
    with tempfile.TemporaryDirectory() as folder:
        (pathlib.Path(folder) / "spiece.model").write_bytes(model)
        (pathlib.Path(folder) / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
        theirs = T5TokenizerFast.from_pretrained(folder)
        rng = random.Random(0)
        texts = [odd_text(rng) for _ in range(1000)]
        ids = [theirs(text)["input_ids"] for text in texts]
        padded = theirs(texts[:50], padding="max_length", max_length=9, truncation=True)["input_ids"]
    own = sentencepiece.SentencePieceProcessor(model_proto=model)
    plain = [i for i, text in enumerate(texts) if "<" not in text]  # special tokens are transformers' own idea
    agree = [[*own.encode(texts[i]), 1] == ids[i] for i in plain]
    print(f"{len(model)} bytes; ids of SentencePiece itself are the same for {sum(agree)} of {len(agree)} texts")
    np.savez_compressed(
        HERE / "t5_text.npz",
        model=np.frombuffer(model, np.uint8),
        texts=json.dumps(texts),
        ids=json.dumps(ids),
        padded=np.array(padded),
        same_as_sentencepiece=np.array([i for i, same in zip(plain, agree, strict=True) if same]),
        versions=f"transformers {transformers.__version__}, sentencepiece {sentencepiece.__version__}",
    )


def record_tiny() -> None:
    peer = T5EncoderModel(T5Config(**TINY)).eval()
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            parameter.copy_(torch.from_numpy(weight_of(name, tuple(parameter.shape))))
    rng = np.random.RandomState(0)
    ids = rng.randint(2, TINY["vocab_size"], (3, 200))  # farther apart than the largest distance of a bucket
    for row, length in enumerate((200, 7, 1)):
        ids[row, length - 1] = 1
        ids[row, length:] = 0
    with torch.no_grad():
        output = peer(torch.from_numpy(ids))[0].numpy()
        short = peer(torch.from_numpy(ids[:, :16]))[0].numpy()
    place = torch.arange(300)
    buckets = {
        f"buckets/{number}/{distance}": T5Attention._relative_position_bucket(place - 150, True, number, distance)
        for number, distance in ((32, 128), (8, 20), (16, 1000))
    }
    print("std", output.std(), "of padding", output[2, 1:].std(), np.abs(output[:, :16] - short).max())
    np.savez_compressed(
        HERE / "t5_tiny.npz",
        config=json.dumps(peer.config.to_diff_dict()),
        names=json.dumps({name: list(x.shape) for name, x in peer.named_parameters()}),
        ids=ids,
        output=output[:, ::5],
        places=np.arange(200)[::5],
        short=short,
        **{name: x.numpy() for name, x in buckets.items()},
        versions=f"transformers {transformers.__version__}, torch {torch.__version__}",
    )


if __name__ == "__main__":
    record_tiny()
    record_text()
