"""Samples are never written over others, and beside them is all that they depend on; --trajectory."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from diffusion.data.samples import load_samples, save_samples
from diffusion.runs import sample as drawing
from diffusion.runs.keep import names_of, place
from diffusion.runs.run import open_run

SAMPLE = "--mode=sample"


def arrays(path):
    """Returns the arrays of an .npz."""
    with np.load(path) as stored:
        return dict(stored)


def test_samples_made_otherwise_have_another_name_and_the_same_call_reads_them(kinds, copied, monkeypatch, capsys):
    folder, kind = copied("digits_classes"), kinds["digits_classes"]
    calls = [
        ("--num_samples=4",),
        ("--num_samples=4", "--config.sampling.guidance=3.0"),
        ("--num_samples=4", "--config.sampling.sampler.order=1"),
        ("--num_samples=4", "--label=3,3,7,7"),
        ("--num_samples=4", "--label=3,3,7,8"),
        ("--num_samples=4", "--checkpoint=4"),
    ]
    for number, flags in enumerate(calls, 1):
        before = {path: path.read_bytes() for path in folder.glob("samples/*")}
        kind.do(folder, SAMPLE, *flags)
        assert len(list(folder.glob("samples/*.npz"))) == number
        assert all(path.read_bytes() == content for path, content in before.items())
    names = [path.name for path in folder.glob("samples/*.npz")]
    assert all(re.fullmatch(r"step[46]_dpm_solver_pp3_seed0_n4_[0-9a-f]{8}\.npz", name) for name in names), names

    monkeypatch.setattr(drawing, "draw", lambda *_, **__: pytest.fail("drawn again"))
    capsys.readouterr()
    kind.do(folder, SAMPLE, *calls[3])
    assert capsys.readouterr().out.startswith("4 samples made before: ")


@pytest.mark.parametrize("mode", ["sample", "progressive", "img2img", "inpaint", "interpolate"])
def test_a_named_file_of_other_pictures_is_not_overwritten(kinds, copied, tmp_path, mode):
    folder, kind = copied("digits"), kinds["digits"]
    flags = (f"--mode={mode}", f"--out={tmp_path / 'mine.npz'}", "--num_samples=1")
    flags += ("--resample=1",) if mode == "inpaint" else ()
    kind.do(folder, *flags)
    before = {path: path.read_bytes() for path in tmp_path.glob("mine.*")}
    assert {path.suffix for path in before} == {".npz", ".png", ".json"}
    with pytest.raises(ValueError, match=r"mine\.npz holds other pictures, as its \.json says: name another --out"):
        kind.do(folder, *flags, "--seed=1")
    assert {path: path.read_bytes() for path in tmp_path.glob("mine.*")} == before
    kind.do(folder, *flags)  # the same may be made again
    (tmp_path / "mine.json").unlink()
    with pytest.raises(ValueError, match="holds other pictures"):
        kind.do(folder, *flags)


def test_the_json_holds_every_setting_and_request(kinds, copied, tmp_path):
    asked = ("--prompt=a red two", "--prompt=a blue four", "--num_samples=2", "--seed=5", "--negative_prompt=a one")
    call = kinds["scenes"].do(copied("scenes"), SAMPLE, *asked, f"--out={tmp_path / 'a.npz'}")
    note = json.loads((tmp_path / "a.json").read_text())
    assert note["requests"] == ["a red two"] * 2 + ["a blue four"] * 2
    assert (note["seed"], note["negative"], note["step"], note["average"]) == (5, "a one", 6, 0.999)
    for block in ("network", "condition", "space", "process", "loss", "sampling"):
        assert note[block] == json.loads(json.dumps(call.config[block].to_dict()))
    assert note["weights"] == call.open().digest


def test_labels_are_stored_where_the_run_has_classes(kinds, copied, tmp_path):
    kind, folder = kinds["digits_classes"], copied("digits_classes")
    for name, flags, expected in (
        ("asked", ("--label=3,3,7",), [3, 3, 7]),
        ("in_turn", ("--num_samples=12",), [*range(10), 0, 1]),
        ("one", ("--label=4", "--num_samples=1"), [4]),
    ):
        kind.do(folder, SAMPLE, *flags, f"--out={tmp_path / name}.npz")
        found = arrays(tmp_path / f"{name}.npz")
        assert found["arr_1"].dtype == np.int64 and found["arr_1"].tolist() == expected
        assert len(found["arr_0"]) == len(expected)
        np.testing.assert_array_equal(load_samples(tmp_path / f"{name}.npz"), found["arr_0"])
    kind.do(folder, "--mode=progressive", "--label=5,6", "--num_samples=2", f"--out={tmp_path / 'rows.npz'}")
    rows = arrays(tmp_path / "rows.npz")
    np.testing.assert_array_equal(rows["arr_1"], np.repeat([5, 6], len(rows["arr_0"]) // 2))
    kinds["digits"].do(copied("digits"), SAMPLE, "--num_samples=2", f"--out={tmp_path / 'none.npz'}")
    assert set(arrays(tmp_path / "none.npz")) == {"arr_0"}


def test_one_label_for_each_sample(tmp_path):
    image = np.zeros((3, 4, 4, 1), np.uint8)
    with pytest.raises(ValueError, match=r"3 samples and labels of shape \[2\]: one for each"):
        save_samples(tmp_path / "a.npz", image, np.arange(2))
    assert not list(tmp_path.iterdir())


def test_classes_are_named_where_their_names_are_known(trained):
    run = open_run(trained("digits_classes"), num_devices=1)
    assert names_of(run, [3, None, 0]) == ["3", "", "0"] and names_of(run, [None, None]) is None
    named = run._replace(stored={**run.stored, "data": {"class_names": ["cat", "dog", "fox", "owl"]}})
    assert names_of(named, [3, 1, 5]) == ["owl", "dog", "5"]


def test_the_digest_is_of_all_that_pictures_depend_on_and_of_nothing_else(trained, tmp_path):
    run = open_run(trained("digits"), num_devices=1)
    name = place(run, "a/b", {"seed": 0}).path.name
    assert name == place(run, "a/b", {"seed": 0}).path.name
    assert name == place(run.change({"evaluation.num_samples": 3}), "a/b", {"seed": 0}).path.name
    others = [run.change({"sampling.threshold.low": -0.9}), run._replace(known_digest="x"), run._replace(average=0.5)]
    names = {place(other, "a/b", {"seed": 0}).path.name for other in others} | {
        place(run, "a/b", {"seed": 1}).path.name
    }
    assert len(names | {name}) == 5
    with pytest.raises(ValueError, match=r"written to an \.npz file"):
        place(run, "a/b", {}, tmp_path / "a.png")


def test_a_film_ends_in_the_samples(kinds, copied, tmp_path):
    folder, kind = copied("digits"), kinds["digits"]
    out = tmp_path / "a.npz"
    kind.do(folder, SAMPLE, "--num_samples=4", "--trajectory", "--sampler=ancestral", "--steps=6", f"--out={out}")
    with Image.open(tmp_path / "a.gif") as film:
        count = getattr(film, "n_frames", 1)
        assert 2 < count <= 6 + 1  # x_0_hat at 6 steps, then the sample; frames that are alike are one
        film.seek(count - 1)
        last = np.asarray(film.convert("L")).astype(int)
    factor = -(-240 // 17)  # two images of 8 and a line, enlarged to at least 240 pixels
    assert last.shape == (17 * factor, 17 * factor)
    small, samples = last[::factor, ::factor], load_samples(out)[..., 0].astype(int)
    for sample, (row, column) in zip(samples, [(0, 0), (0, 9), (9, 0), (9, 9)], strict=True):
        # Another program may round another way, and a GIF has 256 colours.
        assert np.abs(small[row : row + 8, column : column + 8] - sample).max() <= 2
    with pytest.raises(ValueError, match="--trajectory is not read with --like"):
        kind.do(folder, SAMPLE, "--trajectory", "--like=a.png")
