"""TAEF2, the tiny autoencoder of FLUX.2's latents, as its author publishes it: 5.4 MB in two files."""

from pathlib import Path

from diffusion.pretrained.public import PublicFile, obtain

NAME = "taef2"
REVISION = "5cccb12dc72074a4be35680c3b108548a7c69978"
SHA256 = {
    "taef2_encoder.pth": "10a4e1021e89d7551eaf161352da8dbd0b1aa83872ae28b150c1df1ce2f147b6",
    "taef2_decoder.pth": "0a44a31e1ae59eb9dbf9359d24942fd3ef5928162c1800d97a28c61d51be0ab5",
}


def fetch_taef2() -> Path:
    """Returns the folder of both files in the cache, into which they are fetched once; `tiny_vae.load_tiny` reads it.

    Raises:
      ValueError: they cannot be fetched, or are not the public ones to the last bit.

    Source: Ollin Boer Bohan, madebyollin/taesd, MIT licence.
    """
    root = f"https://github.com/madebyollin/taesd/raw/{REVISION}"
    folder = f"weights/{NAME}"
    files = [obtain(PublicFile(name, f"{root}/{name}", sha256, folder)) for name, sha256 in SHA256.items()]
    return files[0].parent
