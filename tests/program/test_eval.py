"""`microtome eval` against DeepMind's surface-distance, and what it says of odd input."""

import csv

import numpy as np
import pytest
import surface_distance
from scipy.ndimage import gaussian_filter


def smooth_noise(rng, shape, sigma):
    noise = gaussian_filter(rng.standard_normal(shape), sigma, mode="wrap")
    return (noise - noise.mean()) / noise.std()


def blobs(seed, shape, labels=3):
    """Two similar label maps with objects that touch the borders."""
    rng = np.random.default_rng(seed)
    field = smooth_noise(rng, shape, 1.0 if min(shape) < 4 else 2.5)
    other = field + 0.3 * smooth_noise(rng, shape, 0.8)
    edges = np.linspace(-0.8, 1.5, labels + 1)
    return [np.digitize(f, edges).astype(np.uint8) % (labels + 1) for f in (field, other)]


def expected_rows(truth, segs, spacing, tolerance):
    for label in np.unique(truth[truth > 0]):
        a, b = truth == label, segs == label
        dice = 2 * (a & b).sum() / (a.sum() + b.sum())
        distances = surface_distance.compute_surface_distances(a, b, spacing)
        yield label, dice, surface_distance.compute_surface_dice_at_tolerance(distances, tolerance)


def write(folder, name, truth, segs, **more):
    for part, key, value in (("gts", "gts", truth), ("segs", "segs", segs)):
        (folder / part).mkdir(exist_ok=True)
        if value is not None:
            np.savez_compressed(folder / part / name, **{key: value}, **(more if key == "gts" else {}))


def read_rows(path):
    with open(path) as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("seed, shape, spacing", [
    (1, (9, 20, 17), (1.0, 1.0, 1.0)),
    (2, (7, 31, 24), (5.0, 0.7, 0.9)),
    (3, (24, 13, 11), (0.4, 1.3, 2.2)),
    (4, (1, 30, 30), (3.0, 1.5, 1.0)),
    (5, (2, 3, 4), (1.0, 2.0, 3.0)),
])
@pytest.mark.parametrize("tolerance", [0.0, 1.0, 2.0])
def test_volumes(run, tmp_path, seed, shape, spacing, tolerance):
    truth, segs = blobs(seed, shape)
    write(tmp_path, "a.npz", truth, segs, spacing=np.array(spacing[::-1]))
    done = run("eval", "-s", tmp_path / "segs", "-g", tmp_path / "gts", "-o", tmp_path / "m.csv",
               "--tolerance", tolerance)
    assert done.returncode == 0, done.stderr
    rows = read_rows(tmp_path / "m.csv")
    if shape[0] == 1:  # one slice is measured along its contour, as an image is
        expected = list(expected_rows(truth[0], segs[0], spacing[1:], tolerance))
    else:
        expected = list(expected_rows(truth, segs, spacing, tolerance))
    assert len(rows) == len(expected)
    for row, (label, dice, nsd) in zip(rows, expected):
        assert int(row["label"]) == label
        assert float(row["dice"]) == pytest.approx(dice, abs=1e-6)
        assert float(row["nsd"]) == pytest.approx(nsd, abs=1e-5)


@pytest.mark.parametrize("spacing", [None, (0.5, 0.8)])
def test_images(run, tmp_path, spacing):
    truth, segs = blobs(6, (50, 41))
    more = {} if spacing is None else {"spacing": np.array(spacing)}
    write(tmp_path, "a.npz", truth, segs, **more)
    run("eval", "-s", tmp_path / "segs" / "a.npz", "-g", tmp_path / "gts" / "a.npz", "-o",
        tmp_path / "m.csv")
    expected = list(expected_rows(truth, segs, (spacing or (1, 1))[::-1], 2.0))
    for row, (_, dice, nsd) in zip(read_rows(tmp_path / "m.csv"), expected, strict=True):
        assert float(row["dice"]) == pytest.approx(dice, abs=1e-6)
        assert float(row["nsd"]) == pytest.approx(nsd, abs=1e-5)


def test_missing_and_extra_labels_and_the_mean_of_means(run, tmp_path):
    truth, segs = np.zeros((2, 3, 20, 20), np.uint8)
    truth[:, :5, :5] = 1
    truth[:, 10:15, 10:15] = 2
    segs[:, :5, :5] = 1
    segs[:, 16:, 16:] = 7
    write(tmp_path, "a.npz", truth, segs)
    write(tmp_path, "b.npz", truth, truth)
    write(tmp_path, "nothing.npz", np.zeros_like(truth), segs)
    done = run("eval", "-s", tmp_path / "segs", "-g", tmp_path / "gts", "-o", tmp_path / "m.csv")
    assert done.returncode == 0
    rows = [(r["case"], r["label"], float(r["dice"]), float(r["nsd"])) for r in read_rows(tmp_path / "m.csv")]
    assert rows == [("a.npz", "1", 1, 1), ("a.npz", "2", 0, 0), ("b.npz", "1", 1, 1), ("b.npz", "2", 1, 1)]
    assert "label 7" in done.stderr and "nothing.npz: gts holds no label" in done.stderr
    mean = done.stdout.splitlines()[-1].split()
    assert mean == ["mean", "4", "0.7500", "0.7500"]


def test_errors(run, tmp_path):
    truth, segs = blobs(7, (4, 9, 9))
    write(tmp_path, "good.npz", truth, segs)
    write(tmp_path, "missing.npz", truth, None)
    write(tmp_path, "shape.npz", truth, segs[:, :8])
    write(tmp_path, "spacing.npz", truth, segs, spacing=np.array([1.0, -1.0, 1.0]))
    write(tmp_path, "negative.npz", truth, segs.astype(np.int16) - 1)
    done = run("eval", "-s", tmp_path / "segs", "-g", tmp_path / "gts", "-o", tmp_path / "m.csv")
    assert done.returncode == 1
    for name, why in {"missing": "missing.npz", "shape": "(4, 8, 9)", "spacing": "'spacing'",
                      "negative": "'segs'"}.items():
        assert why in next(s for s in done.stderr.splitlines() if s.startswith(f"{name}.npz FAILED"))
    assert {r["case"] for r in read_rows(tmp_path / "m.csv")} == {"good.npz"}
    assert run("eval", "-s", "nowhere", "-g", tmp_path / "gts").returncode == 2
