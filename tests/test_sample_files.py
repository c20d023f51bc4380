"""Sample files: ADM's convention, whole or refused, and nothing in them is run."""

import pickle

import numpy as np
import pytest

from diffusion.data.samples import load_samples, save_samples

rng = np.random.RandomState(0)


def test_samples_are_the_convention_of_adm(tmp_path):
    image = rng.randint(0, 256, (5, 4, 3, 1), np.uint8)
    save_samples(tmp_path / "new" / "samples.npz", image)
    with np.load(tmp_path / "new" / "samples.npz") as arrays:
        assert arrays.files == ["arr_0"] and arrays["arr_0"].dtype == np.uint8 and (arrays["arr_0"] == image).all()
    assert (load_samples(tmp_path / "new" / "samples.npz") == image).all()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["samples.npz"]


def test_bad_samples_are_not_written(tmp_path):
    for image, name, line in [
        (np.zeros((5, 4, 4, 3), np.float32), "a.npz", r"float32 in \[0, 0\], not uint8"),
        (np.zeros((5, 4, 4), np.uint8), "a.npz", r"shape \[5, 4, 4\]"),
        (np.zeros((5, 4, 4, 1), np.uint8), "a.npy", r"\.npz file, not to .*a\.npy"),
    ]:
        with pytest.raises(ValueError, match=line):
            save_samples(tmp_path / name, image)
    assert not list(tmp_path.iterdir())


class Hostile:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return open, (str(self.trace), "w")


def test_bad_sample_files_get_one_line_and_run_nothing(tmp_path):
    trace = tmp_path / "trace"
    whole = tmp_path / "whole.npz"
    save_samples(whole, rng.randint(0, 256, (50, 8, 8, 3), np.uint8))
    content = whole.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 4
    for name, written in [
        ("truncated.npz", content[:-100]),
        ("flipped.npz", bytes(flipped)),
        ("empty.npz", b""),
        ("text.npz", b"these are not samples"),
        ("pickle.npz", pickle.dumps(Hostile(trace))),
    ]:
        (tmp_path / name).write_bytes(written)
    np.savez(tmp_path / "object.npz", arr_0=np.array([Hostile(trace)], object))
    np.savez(tmp_path / "other.npz", images=np.zeros(3))
    np.savez(tmp_path / "float.npz", arr_0=np.zeros((2, 4, 4, 3)))
    np.savez(tmp_path / "nan.npz", arr_0=np.full((2, 4, 4, 3), np.nan))
    np.savez(tmp_path / "flat.npz", arr_0=np.zeros((2, 48), np.uint8))
    np.save(tmp_path / "array.npy", np.zeros((2, 4, 4, 3), np.uint8))
    for name, line in [
        ("truncated.npz", "not a whole .npz"),
        ("flipped.npz", "not a whole .npz"),
        ("empty.npz", "not a whole .npz"),
        ("text.npz", "not a whole .npz"),
        ("pickle.npz", "not a whole .npz"),
        ("object.npz", "not a whole .npz"),
        ("missing.npz", "not a whole .npz.*No such file"),
        ("array.npy", "not a whole .npz"),
        ("other.npz", "no array arr_0"),
        ("float.npz", r"float64 in \[0, 0\], not uint8"),
        ("nan.npz", "nan at example 0"),
        ("flat.npz", r"shape \[2, 48\]"),
    ]:
        with pytest.raises(ValueError, match=line) as error:
            load_samples(tmp_path / name)
        assert "\n" not in str(error.value) and name in str(error.value)
    assert not trace.exists()
