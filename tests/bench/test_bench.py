"""What the measurements count and draw, on data small enough to count by hand."""

import csv
import io
import pathlib
import subprocess
import sys

import numpy as np
import pytest

BENCH = pathlib.Path(__file__).resolve().parents[2] / "bench"
sys.path[:0] = [str(BENCH), str(BENCH / "peers")]

import accuracy  # noqa: E402
import job  # noqa: E402
import measures  # noqa: E402
import original  # noqa: E402
import painting  # noqa: E402


def write_case(path, labels, boxes, image_shape=None, **more):
    image = np.random.default_rng(1).integers(0, 256, image_shape or labels.shape, np.uint8)
    np.savez(path, imgs=image, gts=labels, boxes=np.array(boxes), **more)


def test_agreement_counts_pixels_and_objects():
    one = np.array([[1, 1, 1, 0], [2, 0, 0, 0]], np.uint8)
    other = np.array([[1, 1, 0, 0], [0, 0, 3, 0]], np.uint16)
    differ, dice = measures.agreement(one, other, 4)
    assert differ == 3 / 8
    np.testing.assert_allclose(dice, [4 / 5, 0, 0, 1])  # neither has object 4


def test_means_are_over_cases_of_means_over_objects():
    rows = [dict(case="a", dice=0.5), dict(case="a", dice=0.7), dict(case="b", dice=1.0)]
    assert measures.mean(rows) == pytest.approx(0.8)


def test_accuracy_of_cases_and_in_total(tmp_path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for folder in (ours, theirs):
        folder.mkdir()
    masks = {"a.npz": ([[1, 2]], [[1, 0]]), "b.npz": ([[0, 0, 1, 1]], [[0, 0, 1, 1]])}
    for name, (one, other) in masks.items():
        np.savez(ours / name, segs=np.array(one, np.uint16))
        np.savez(theirs / name, segs=np.array(other, np.uint8))
    rows = [dict(case=case, dice=dice, nsd=0.5) for case, dice in (("a.npz", 1), ("a.npz", 0), ("b.npz", 1))]
    found = accuracy.compare([pathlib.Path(name) for name in masks], ours, theirs, rows)
    assert found[0] == dict(case="a.npz", objects=2, dice=0.5, nsd=0.5, pixels=2, differ=0.5, same=0.5, least=0)
    total = accuracy.total(found)
    assert total == dict(objects=3, dice=0.75, nsd=0.5, same=0.75, least=0, differ=pytest.approx(1 / 6))


def test_accuracy_refuses_masks_of_another_shape(tmp_path):
    np.savez(tmp_path / "a.npz", segs=np.zeros((1, 2), np.uint8))
    (tmp_path / "others").mkdir()
    np.savez(tmp_path / "others" / "a.npz", segs=np.zeros((2, 1), np.uint8))
    rows = [dict(case="a.npz", dice=1, nsd=1)]
    with pytest.raises(SystemExit, match=r"others/a.npz: segs has shape \(2, 1\), expected \(1, 2\)"):
        accuracy.compare([pathlib.Path("a.npz")], tmp_path, tmp_path / "others", rows)


def test_accuracy_of_the_program_in_8_bits(tmp_path, program, tiny_model):
    labels = np.zeros((40, 50), np.uint8)
    labels[10:30, 5:20] = 1
    (tmp_path / "cases").mkdir()
    write_case(tmp_path / "cases" / "square.npz", labels, [[4, 9, 22, 31]], (40, 50, 3))
    answer = subprocess.run(
        [sys.executable, BENCH / "accuracy.py", "--program", program, "-m", tiny_model, "--cases",
         tmp_path / "cases", "--calibrate", tmp_path / "cases", "--scheme", "full", "--bf16"],
        check=True, capture_output=True, text=True,
    )
    tables = answer.stdout.split("### All 1 cases")
    rows = list(csv.reader(io.StringIO(tables[1].replace(" ", "")), delimiter="|"))[4:]
    assert [row[1] for row in rows] == ["tiny.safetensors", "bf16", "full"]
    assert rows[0][2:6] == ["1", "0.0000", "1.00000", "1.00000"]
    assert all(0 <= float(row[6]) <= 1 for row in rows)
    assert tables[0].count("| square.npz | 1 |") == 3


def test_cases_are_images_unless_volumes_are_asked_for(tmp_path):
    cases = tmp_path / "cases"
    cases.mkdir()
    write_case(cases / "volume.npz", np.zeros((3, 8, 8), np.uint8), [[0, 0, 0, 8, 8, 3]])
    with pytest.raises(SystemExit, match="cases: no case in this folder"):
        measures.link_cases(cases, tmp_path / "none")
    write_case(cases / "image.npz", np.zeros((8, 8), np.uint8), [[0, 0, 8, 8]])
    np.savez(cases / "masks.npz", segs=np.zeros((8, 8), np.uint8))
    assert [p.name for p in measures.link_cases(cases, tmp_path / "images")] == ["image.npz"]
    both = measures.link_cases(cases, tmp_path / "all", volumes=True)
    assert [p.name for p in both] == ["image.npz", "volume.npz"]
    assert job.steps(both[0]) == (1, 1)


def test_the_next_box_depends_on_the_objects_number():
    mask = np.zeros((512, 512), np.uint8)
    mask[200:220, 200:240] = 1
    mask[100, 50] = 1  # a quarter of a pixel of the model's input
    whole = np.array([1, 2, 3, 4])
    for number, expected in (
        (1, [97, 97, 122, 112]),  # a quarter of 1 rounds to nothing
        (3, [22, 47, 122, 112]),
        (255, [22, 47, 122, 112]),
        (256, whole),  # drawn as 0
        (257, [97, 97, 122, 112]),
    ):
        np.testing.assert_array_equal(original.next_box(mask, number, whole), expected)
    np.testing.assert_array_equal(original.next_box(0 * mask, 1, whole), whole)
    np.testing.assert_array_equal(original.next_box(0 * mask + 1, 1, whole), [0, 0, 256, 256])


def test_painted_volumes_have_the_labels_they_are_painted_over(tmp_path):
    labels = np.zeros((8, 48, 64), np.uint8)
    labels[1:6, 10:20, 10:20] = 3
    labels[2:7, 25:40, 30:50] = 7
    labels[0, 5, 5] = 9  # not among the slices that are taken
    np.savez(tmp_path / "labels.npz", gts=labels, spacing=np.array([0.8, 0.8, 5]))
    painting.write_cases(tmp_path / "labels.npz", tmp_path, count=2, slices=6)
    cases = [np.load(path) for path in sorted(tmp_path.glob("3D_painted_*.npz"))]
    assert len(cases) == 2
    for case in cases:
        np.testing.assert_array_equal(case["gts"], np.select([labels == 3, labels == 7], [1, 2])[1:7])
        np.testing.assert_array_equal(case["spacing"], [0.8, 0.8, 5])
        assert case["imgs"].dtype == np.uint8 and case["imgs"].shape == (6, 48, 64)
        (x0, y0, z0, x1, y1, z1), (*_, first, _, _, last) = case["boxes"]
        assert 4 < x0 <= 10 and 4 < y0 <= 10 and 20 <= x1 < 26 and 20 <= y1 < 26
        assert (z0, z1, first, last) == (0, 4, 1, 5)
        assert job.steps(tmp_path / "3D_painted_00.npz") == (2, 10)
    assert (cases[0]["imgs"] != cases[1]["imgs"]).mean() > 0.5
    organs = [cases[0]["imgs"][case == 1].mean() for case in (cases[0]["gts"], cases[0]["gts"] - 1)]
    assert abs(organs[0] - organs[1]) > 20


def test_labels_without_a_volume_are_refused(tmp_path):
    np.savez(tmp_path / "flat.npz", gts=np.zeros((8, 8), np.uint8))
    with pytest.raises(SystemExit, match="flat.npz: expected gts, labels"):
        painting.write_cases(tmp_path / "flat.npz", tmp_path, count=1)
