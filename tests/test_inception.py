"""FID's Inception-v3 against pytorch-fid's and torch-fidelity's (recorded goldens), and the way to its weights."""

import hashlib
import io
import pathlib
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.record_inception import random_weights

from diffusion.files import cache_folder
from diffusion.networks import inception as network
from diffusion.networks.inception import Inception, resize_bilinear
from diffusion.pretrained import inception as pretrained
from diffusion.pretrained.inception import FILE, from_torch, load_inception

GOLDEN = np.load(pathlib.Path(__file__).parent / "golden" / "inception.npz")
SHAPES = {name: tuple(map(int, shape)) for name, *shape in map(str.split, GOLDEN["shapes"])}


@pytest.fixture(scope="module")
def weights():
    return random_weights(SHAPES)


@pytest.fixture(scope="module")
def params(weights):
    return from_torch(weights)


@pytest.mark.parametrize("resize, image", [("pytorch", "small"), ("pytorch", "wide"), ("tensorflow", "wide")])
def test_features_are_those_of_the_public_tools(params, resize, image):
    apply = jax.jit(lambda params, image: Inception(resize).apply({"params": params}, image))
    features = dict(zip(("pool3", "logits"), apply(params, GOLDEN[f"{image}/image"]), strict=True))
    for name, found in features.items():
        expected = GOLDEN[f"{image}/{resize}/{name}"]
        # float32 gives 5e-6 of their size through 94 layers. What must not pass gives more: the other resize 1.5e-2,
        # the usual epsilon of 1e-5 3e-2, counted padding in average pools 1e-1, no max pool in the last block 4e-1.
        error = np.max(np.abs(found - expected)) / np.sqrt(np.mean(expected**2))
        assert error < 1e-4, name


def test_the_network_has_the_public_number_of_parameters(params):
    # 23,885,392 numbers and 94 counters in the file; of the four vectors of a batch normalisation a bias is left.
    channels = sum(layer["bias"].size for name, layer in params.items() if name != "fc")
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 23_885_392 - 3 * channels
    assert len(params) == 95


@pytest.mark.parametrize("kind, corner", [("pytorch", 0.5), ("tensorflow", 0.0)])
@pytest.mark.parametrize("size", [(4, 9), (13, 5)])
def test_resize_keeps_a_ramp(kind, corner, size):
    """Bilinear is exact on a ramp, up to the border, where it goes on with the last pixel."""
    ramp = np.arange(7.0) * 3 + np.arange(6.0)[:, None] * 50
    place = [
        np.clip((np.arange(new) + corner) * old / new - corner, 0, old - 1)
        for old, new in zip(ramp.shape, size, strict=True)
    ]
    expected = place[1] * 3 + place[0][:, None] * 50
    found = resize_bilinear(jnp.asarray(ramp, jnp.float32)[None, :, :, None], size, kind)
    np.testing.assert_allclose(found[0, :, :, 0], expected, rtol=1e-6, atol=1e-4)


def test_resize_to_the_same_size_changes_nothing():
    image = jax.random.uniform(jax.random.key(0), (1, 5, 6, 3))
    for kind in ("pytorch", "tensorflow"):
        np.testing.assert_array_equal(resize_bilinear(image, (5, 6), kind), image)


def test_average_pools_do_not_count_the_padding_and_max_pools_do_not_see_it():
    x = -jnp.arange(1.0, 10.0).reshape(1, 3, 3, 1)
    average = network._POOLS["average"](x)[0, :, :, 0]
    assert average[0, 0] == -(1 + 2 + 4 + 5) / 4 and average[1, 1] == -5
    assert network._POOLS["max"](x)[0, 2, 2, 0] == -5


def test_weights_are_used_strictly(weights):
    def refused(message, **changes):
        changed = {**weights, **changes}
        with pytest.raises(ValueError, match=message):
            from_torch({name: weight for name, weight in changed.items() if weight is not None})

    refused(
        r"missing Mixed_6b\.branch_pool\.bn\.running_var, left over none",
        **{"Mixed_6b.branch_pool.bn.running_var": None},
    )
    refused(r"missing none, left over AuxLogits\.fc\.bias", **{"AuxLogits.fc.bias": np.zeros(1000)})
    refused(
        r"fc\.weight has shape \[1000, 2048\], but this Inception needs \[1008, 2048\]",
        **{"fc.weight": np.zeros((1000, 2048))},
    )
    refused(r"left over fc\.bn\.num_batches_tracked", **{"fc.bn.num_batches_tracked": np.array(0)})
    refused(r"num_batches_tracked has shape \[1\]", **{"Conv2d_1a_3x3.bn.num_batches_tracked": np.array([0])})
    # kernels of 7x1 and 1x7 have as many numbers
    turned = weights["Mixed_6b.branch7x7_2.conv.weight"].swapaxes(2, 3)
    refused(r"branch7x7_2\.conv\.weight has shape", **{"Mixed_6b.branch7x7_2.conv.weight": turned})


def test_counters_of_batches_may_be_absent(weights, params):
    without = from_torch({name: weight for name, weight in weights.items() if "num_batches" not in name})
    jax.tree.map(np.testing.assert_array_equal, without, params)


def weight_file(content: bytes = b"") -> bytes:
    """A torch file that holds no tensors (an empty dictionary)."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}." + content)
    return out.getvalue()


@pytest.fixture
def public(tmp_path, monkeypatch):
    """A small file in the place of the public one, at an address that needs no network."""
    file = tmp_path / "release" / FILE
    file.parent.mkdir()
    file.write_bytes(weight_file())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(pretrained, "ADDRESS", file.as_uri())
    monkeypatch.setattr(pretrained, "SHA256", hashlib.sha256(file.read_bytes()).hexdigest())
    monkeypatch.setattr(pretrained, "from_torch", dict)
    return file


def test_weights_are_fetched_once(public):
    assert load_inception() == {}
    public.unlink()
    assert load_inception() == {}
    assert [file.name for file in (cache_folder() / "weights").iterdir()] == [FILE]


def test_without_network_one_line_says_what_to_put_where(public):
    public.unlink()
    with pytest.raises(
        ValueError, match=rf"cannot fetch {FILE} .*: put file://\S+ at {cache_folder()}/weights/{FILE}$"
    ):
        load_inception()
    assert not list((cache_folder() / "weights").iterdir())


def test_what_was_fetched_wrong_is_not_kept(public):
    public.write_bytes(weight_file(b"other"))
    with pytest.raises(ValueError, match="its sha256 is"):
        load_inception()
    assert not list((cache_folder() / "weights").iterdir())


def test_weights_at_a_path(public, tmp_path):
    assert load_inception(public) == {}
    assert not cache_folder().exists()
    wrong = tmp_path / "wrong.pth"
    wrong.write_bytes(weight_file(b"other"))
    with pytest.raises(ValueError, match=rf"{wrong} is not {FILE}: its sha256 is"):
        load_inception(wrong)
    assert wrong.exists()
    with pytest.raises(ValueError, match=f"nothing.pth is not a file: give the path of {FILE}"):
        load_inception(tmp_path / "nothing.pth")


def test_the_file_name_carries_the_beginning_of_its_hash():
    assert f"pt_inception-2015-12-05-{pretrained.SHA256[:8]}.pth" == FILE and len(pretrained.SHA256) == 64
