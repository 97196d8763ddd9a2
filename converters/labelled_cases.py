"""Labelled cases, and what LiteMedSAM sees of them.

A case is an .npz file with `imgs`, uint8, (H, W, 3), or (D, H, W) for a volume, and `gts`, whole numbers
of the same height, width and depth: 0 is background, each other number an object. Every slice of a volume
that shows an object is an image of its own.
"""

import dataclasses
import pathlib
import zipfile
import zlib

import cv2
import numpy as np

# About what MedSAM's own preparation leaves out: objects of fewer than 100 pixels at 1024 x 1024.
LEAST_PIXELS = 6
# How far outside of an object's outline a box may be, in pixels of the model's input, as in LiteMedSAM's
# training, so that the 3 that a mask is widened by for a volume's next slice are nothing new; of images that
# are smaller than the input, in their own, as boxes are drawn.
JITTER = 5


class CaseError(Exception):
    """The file is no labelled case. The message says why."""


@dataclasses.dataclass(frozen=True)
class Case:
    path: pathlib.Path
    images: np.ndarray  # (D, H, W, 3), or (D, H, W) in grey
    labels: np.ndarray  # (D, H, W)
    boxes: np.ndarray | None  # (N, 4) of an image, in the order of the labels from 1

    def labelled(self):
        """The numbers of the slices that show an object."""
        return np.flatnonzero(self.labels.any((1, 2)))

    def prompts(self, z):
        """{label: box} of a slice: the case's own boxes, else those around the labels."""
        numbers = [int(n) for n in np.unique(self.labels[z]) if n > 0]
        if self.boxes is None:
            return {n: surrounding_box(self.labels[z] == n) for n in numbers}
        if self.boxes.ndim != 2 or self.boxes.shape[1] != 4 or len(self.boxes) < max(numbers):
            raise CaseError(f"boxes {self.boxes.shape}, expected ({max(numbers)}, 4): one for each label")
        return {n: self.boxes[n - 1] for n in numbers}


@dataclasses.dataclass(frozen=True)
class Slice:
    """An image as the model will see it, before it is padded."""

    image: np.ndarray  # (h, w, 3) or (h, w)
    labels: np.ndarray  # (h, w)
    boxes: dict  # {label: x0, y0, x1, y1 in pixels of the original image}
    shape: tuple  # of the original image


def find(paths):
    """The .npz files among files and folders, in order. Raises CaseError where one of them is missing."""
    found = []
    for path in map(pathlib.Path, paths):
        if not path.exists():
            raise CaseError(f"{path} does not exist")
        found += sorted(path.glob("*.npz")) if path.is_dir() else [path]
    return found


def _arrays(path):
    try:
        with open(path, "rb") as file:
            archive = np.load(file, allow_pickle=False)
            if isinstance(archive, np.ndarray):
                raise CaseError("cannot be read as .npz: it is one array, not an archive")
            return {name: archive[name] for name in ("imgs", "gts", "boxes") if name in archive}
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise CaseError(f"cannot be read as .npz: {error}") from None


def read(path):
    """The case in a file. Raises CaseError unless something is labelled in it."""
    arrays = _arrays(path)
    for name in ("imgs", "gts"):
        if name not in arrays:
            raise CaseError(f"has no {name}")
    images, labels, boxes = arrays["imgs"], arrays["gts"], arrays.get("boxes")
    if images.dtype != np.uint8:
        raise CaseError(f"imgs are {images.dtype}, expected uint8")
    if labels.dtype.kind not in "iub":
        raise CaseError(f"gts are {labels.dtype}, expected whole numbers")
    fits = images.shape[:2] == labels.shape and images.shape[2:] == (3,) or images.shape == labels.shape
    if not fits or labels.ndim not in (2, 3) or images.ndim != 3 or not images.size:
        raise CaseError(f"imgs {images.shape} and gts {labels.shape}, expected (H, W, 3) and (H, W), "
                        "or (D, H, W) twice")
    if labels.min() < 0:
        raise CaseError(f"gts hold {labels.min()}, expected 0 for the background and positive numbers")
    if not labels.any():
        raise CaseError("nothing is labelled: gts are 0")
    if labels.ndim == 3:
        return Case(path, images, labels, None)
    return Case(path, images[None], labels[None], boxes)


def surrounding_box(mask):
    """x0, y0, x1, y1 around a mask; the last two are beyond its last pixels."""
    xs, ys = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    return np.array([xs[0], ys[0], xs[-1] + 1, ys[-1] + 1])


def scaled_shape(shape, side):
    scale = side / max(shape)
    return tuple(max(1, int(n * scale + 0.5)) for n in shape)


def resized(image, side):
    """uint8 (H, W, 3) or (H, W), the longer side brought to `side` by area interpolation."""
    height, width = scaled_shape(image.shape[:2], side)
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)


def resized_labels(labels, side):
    """Labels (H, W) brought to the same shape: what lies in the middle of each pixel."""
    rows, columns = (
        ((np.arange(n) + 0.5) * was / n).astype(int) for n, was in zip(scaled_shape(labels.shape, side), labels.shape)
    )
    return labels[rows[:, None], columns]


def normalised(image):
    """uint8 to float32 from 0 to 1, by its least and its largest value, with three channels."""
    image = image.astype(np.float32)
    image = (image - image.min()) / max(image.max() - image.min(), 1e-8)
    return image if image.ndim == 3 else np.repeat(image[..., None], 3, -1)


def padded(pixels, side):
    """(h, w, 3) to (3, side, side), zeros to the right and below."""
    height, width = pixels.shape[:2]
    whole = np.zeros((3, side, side), np.float32)
    whole[:, :height, :width] = pixels.transpose(2, 0, 1)
    return whole


def to_input(box, shape, side):
    """A box in pixels of an image of `shape`, in those of the model's input."""
    return (np.asarray(box) * (side / max(shape))).astype(int)


def slices(case, side):
    """The slices of a case that show an object that is large enough at the size of the model's input."""
    found = []
    for z in case.labelled():
        labels = resized_labels(case.labels[z], side)
        numbers, counts = np.unique(labels, return_counts=True)
        numbers = numbers[(counts >= LEAST_PIXELS) & (numbers > 0)]
        boxes = {int(n): surrounding_box(case.labels[z] == n) for n in numbers}
        if boxes:
            found.append(Slice(resized(case.images[z], side), labels, boxes, case.labels[z].shape))
    if not found:
        raise CaseError(f"every object has fewer than {LEAST_PIXELS} pixels at the model's {side} x {side}")
    return found


def turned(box, turns, flip, shape):
    """A box in an image (h, w) after np.rot90 by so many `turns`, and then, with `flip`, from left to right."""
    (x0, y0, x1, y1), (height, width) = box, shape
    for _ in range(turns):
        x0, y0, x1, y1 = y0, width - x1, y1, width - x0
        height, width = width, height
    return np.array([width - x1, y0, width - x0, y1] if flip else [x0, y0, x1, y1])


def varied(pixels, rng):
    """Values from 0 to 1, a little brighter or darker, through a window that is a little narrower."""
    low, high = rng.uniform(0, 0.05), rng.uniform(0.95, 1)
    return np.clip((pixels - low) / (high - low), 0, 1) ** np.exp(rng.uniform(-0.25, 0.25))


def sample(part, side, prompts, rng):
    """What one slice teaches in one step: pixels (3, side, side), and `prompts` of its objects as masks
    (prompts, side, side) and boxes (prompts, 4) around them, each side a little outside; and which
    pixels belong to the image (side, side)."""
    turns, flip = int(rng.integers(4)), bool(rng.integers(2))

    def turn(array):
        array = np.rot90(array, turns)
        return array[:, ::-1] if flip else array

    pixels, labels = varied(normalised(turn(part.image)), rng), turn(part.labels)
    height, width = labels.shape
    scale = side / max(part.shape)
    masks, boxes = np.zeros((prompts, side, side), bool), np.zeros((prompts, 4), np.float32)
    chosen = rng.choice(list(part.boxes), prompts, replace=len(part.boxes) < prompts)
    for mask, box, label in zip(masks, boxes, chosen):
        mask[:height, :width] = labels == label
        outside = rng.uniform(0, JITTER, 4) * max(1.0, scale)
        drawn = np.clip(part.boxes[int(label)] * scale + outside * [-1, -1, 1, 1], 0, side)
        box[:] = turned(drawn, turns, flip, part.labels.shape).astype(int)
    inside = np.zeros((side, side), bool)
    inside[:height, :width] = True
    return padded(pixels, side), masks, boxes, inside
