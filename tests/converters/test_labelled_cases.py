"""Labelled cases: which are taken, and that the model sees in training what it sees later."""

import cv2
import numpy as np
import pytest

import labelled_cases
from labelled_cases import Case, CaseError

SIDE = 52
RNG = np.random.default_rng(1)


def discs(shape, *centres, radius=9):
    """Labels (H, W) from 1 on, each a disc."""
    y, x = np.ogrid[: shape[0], : shape[1]]
    labels = np.zeros(shape, np.uint8)
    for i, (cx, cy) in enumerate(centres, 1):
        labels[(x - cx) ** 2 + (y - cy) ** 2 <= radius**2] = i
    return labels


def image_of(labels):
    """Grey (..., H, W): objects that are brighter than a noisy background."""
    noise = np.random.default_rng(2).normal(0, 12, labels.shape)
    return np.clip(60 + 120 * (labels > 0) + noise, 0, 255).astype(np.uint8)


def write(path, labels, image=None, **more):
    image = image_of(labels) if image is None else image
    if labels.ndim == 2 and image.ndim == 2:
        image = np.repeat(image[..., None], 3, -1)
    np.savez_compressed(path, imgs=image, gts=labels, **more)
    return path


LABELS = discs((70, 90), (30, 30), (65, 45))
RGB = np.repeat(image_of(LABELS)[..., None], 3, -1)


@pytest.mark.parametrize("arrays, message", [
    (dict(imgs=RGB), "has no gts"),
    (dict(gts=LABELS), "has no imgs"),
    (dict(imgs=RGB.astype(np.float32), gts=LABELS), "imgs are float32, expected uint8"),
    (dict(imgs=RGB, gts=LABELS / 2), "gts are float64, expected whole numbers"),
    (dict(imgs=RGB, gts=LABELS[:-1]), r"imgs \(70, 90, 3\) and gts \(69, 90\), expected"),
    (dict(imgs=RGB[..., 0], gts=LABELS), r"imgs \(70, 90\) and gts \(70, 90\), expected"),
    (dict(imgs=RGB[:0], gts=LABELS[:0]), r"imgs \(0, 90, 3\)"),
    (dict(imgs=RGB, gts=LABELS.astype(np.int8) - 1), "gts hold -1"),
    (dict(imgs=RGB, gts=LABELS * 0), "nothing is labelled"),
    (dict(imgs=np.array([{}]), gts=LABELS), "cannot be read as .npz"),
])
def test_what_is_no_labelled_case(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(CaseError, match=message):
        labelled_cases.read(tmp_path / "a.npz")


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 cut off"])
def test_files_that_are_no_archives(tmp_path, content):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(CaseError, match="cannot be read as .npz"):
        labelled_cases.read(tmp_path / "a.npz")


def test_an_array_is_no_archive(tmp_path):
    with open(tmp_path / "a.npz", "wb") as file:
        np.save(file, RGB)
    with pytest.raises(CaseError, match="one array, not an archive"):
        labelled_cases.read(tmp_path / "a.npz")


def test_files_and_folders(tmp_path):
    for name in ("b", "a"):
        write(tmp_path / f"{name}.npz", LABELS)
    (tmp_path / "notes.txt").touch()
    one = write(tmp_path.parent / "one.npz", LABELS)
    assert labelled_cases.find([tmp_path, one]) == [tmp_path / "a.npz", tmp_path / "b.npz", one]
    with pytest.raises(CaseError, match="nowhere does not exist"):
        labelled_cases.find([tmp_path / "nowhere"])


def test_a_volume_has_an_image_for_each_slice_that_shows_something(tmp_path):
    volume = np.zeros((6, 70, 90), np.int16)
    volume[2], volume[3] = LABELS, 300 * (LABELS == 2)
    volume[5, 10:13, 10:13] = 1  # too small
    case = labelled_cases.read(write(tmp_path / "v.npz", volume, boxes=[[1, 2, 0, 3, 4, 5]]))
    assert case.labelled().tolist() == [2, 3, 5] and case.boxes is None
    found = labelled_cases.slices(case, SIDE)
    assert [list(s.boxes) for s in found] == [[1, 2], [300]]
    assert found[1].boxes[300].tolist() == [56, 36, 75, 55] == case.prompts(3)[300].tolist()
    assert found[0].image.shape == found[0].labels.shape == (40, 52)
    volume[2:4] = 0
    with pytest.raises(CaseError, match="fewer than 6 pixels"):
        labelled_cases.slices(labelled_cases.read(write(tmp_path / "v.npz", volume)), SIDE)


def test_boxes_of_an_image(tmp_path):
    boxes = np.array([[18, 20, 42, 41], [50, 33, 76, 58]])
    case = labelled_cases.read(write(tmp_path / "a.npz", LABELS, boxes=boxes))
    assert {n: b.tolist() for n, b in case.prompts(0).items()} == {1: boxes[0].tolist(), 2: boxes[1].tolist()}
    case = labelled_cases.read(write(tmp_path / "a.npz", LABELS))
    assert case.prompts(0)[1].tolist() == [21, 21, 40, 40]
    for wrong in (boxes[:1], boxes[0], boxes[:, :3]):
        case = labelled_cases.read(write(tmp_path / "a.npz", LABELS, boxes=wrong))
        with pytest.raises(CaseError, match=r"expected \(2, 4\): one for each label"):
            case.prompts(0)


@pytest.mark.parametrize("shape", [(70, 90), (33, 20), (300, 101), (52, 52)])
def test_the_image_is_prepared_as_it_is_later(shape):
    image = RNG.integers(3, 200, (*shape, 3), np.uint8)
    scale = SIDE / max(shape)
    width, height = int(shape[1] * scale + 0.5), int(shape[0] * scale + 0.5)
    small = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA).astype(float)
    pixels = labelled_cases.padded(labelled_cases.normalised(labelled_cases.resized(image, SIDE)), SIDE)
    expected = (small - small.min()) / (small.max() - small.min())
    assert np.abs(pixels[:, :height, :width].transpose(1, 2, 0) - expected).max() < 1e-6
    assert not pixels[:, height:].any() and not pixels[:, :, width:].any()
    grey = labelled_cases.normalised(labelled_cases.resized(image[..., 0], SIDE))
    assert np.array_equal(grey, labelled_cases.normalised(labelled_cases.resized(image[..., [0] * 3], SIDE)))


@pytest.mark.parametrize("shape", [(260, 208), (104, 156), (23, 31)])
def test_labels_lie_where_the_image_does(shape):
    labels = discs(shape, (shape[1] * 0.6, shape[0] * 0.4), radius=0.3 * min(shape))
    small = labelled_cases.resized_labels(labels, SIDE)
    picture = labelled_cases.resized(255 * labels, SIDE)
    assert small.shape == picture.shape and ((small > 0) == (picture > 127)).mean() > 0.97
    centres = [np.mean(np.nonzero(m), 1) for m in (small, picture > 127)]
    assert np.abs(centres[0] - centres[1]).max() < 0.1


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("turns", range(4))
def test_boxes_turn_with_the_image(turns, flip):
    mask = np.zeros((30, 50), bool)
    mask[4:11, 17:40] = True
    after = np.rot90(mask, turns)
    after = after[:, ::-1] if flip else after
    box = labelled_cases.turned([17, 4, 40, 11], turns, flip, mask.shape)
    assert box.tolist() == labelled_cases.surrounding_box(after).tolist()


@pytest.mark.parametrize("shape", [(70, 90), (140, 31), (26, 26)])
def test_samples(shape):
    labels = discs(shape, (12, 12), (17, shape[0] - 14), radius=8)
    case = Case("x.npz", image_of(labels)[None], labels[None], None)
    (part,) = labelled_cases.slices(case, SIDE)
    scale = SIDE / max(shape)
    offsets, sizes = [], set()
    for seed in range(60):
        sample = labelled_cases.sample(part, SIDE, 3, np.random.default_rng(seed))
        again = labelled_cases.sample(part, SIDE, 3, np.random.default_rng(seed))
        assert all(np.array_equal(a, b) for a, b in zip(sample, again))
        pixels, masks, boxes, inside = sample
        assert pixels.shape == (3, SIDE, SIDE) and (pixels[:, inside].min(), pixels[:, inside].max()) == (0, 1)
        assert not pixels[:, ~inside].any() and not (masks & ~inside).any()
        assert all(pixels[0][m].mean() > pixels[0][inside].mean() for m in masks)  # objects are bright
        for mask, box in zip(masks, boxes):
            tight = labelled_cases.surrounding_box(mask)
            offsets.append((box - tight) * [-1, -1, 1, 1])
        sizes.add(labelled_cases.surrounding_box(inside)[2:].tobytes())
    offsets = np.array(offsets)
    assert len(sizes) == (1 if shape[0] == shape[1] else 2)
    farthest = 5 * max(1, scale)  # of the image's pixels where it is smaller, else of the input's
    assert offsets.min() > -2 and farthest - 1.5 < offsets.max() < farthest + 2
    both = labelled_cases.sample(part, SIDE, 2, np.random.default_rng(1))[1]
    assert both[0].any() and both[1].any() and not (both[0] & both[1]).any()


def test_a_flat_image():
    pixels = labelled_cases.varied(labelled_cases.normalised(np.full((8, 9), 7, np.uint8)), RNG)
    assert pixels.shape == (8, 9, 3) and np.isfinite(pixels).all()
