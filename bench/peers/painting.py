#!/usr/bin/env python3
"""Paints volumes that look like a CT of the abdomen over the labels of real organs, for job.py: one way to
have as many volumes of real shape and size as a measurement needs.

    python3 painting.py LABELS.npz -o FOLDER [--count 10] [--slices N]

LABELS has gts (D, H, W) and may have spacing. The cases, 3D_painted_00.npz and on, differ in brightness,
texture, clutter and boxes.
"""

import argparse
import pathlib

import cv2
import numpy as np


def smooth_noise(rng, shape, scale):
    """Gaussian noise of unit variance, periodic, with features of about `scale` voxels along each axis."""
    spectrum = np.fft.rfftn(rng.standard_normal(shape, np.float32))
    for axis, (n, size) in enumerate(zip(shape, scale)):
        frequency = np.fft.rfftfreq(n) if axis == len(shape) - 1 else np.fft.fftfreq(n)
        falloff = np.exp(-2 * (np.pi * frequency * size) ** 2).astype(np.float32)
        spectrum *= falloff.reshape([-1 if i == axis else 1 for i in range(len(shape))])
    noise = np.fft.irfftn(spectrum, shape, axes=range(len(shape)))
    return (noise / noise.std()).astype(np.float32)


def radius_around(labels):
    """(H, W): 1 on an ellipse through the corners of the box around all labels, smaller within."""
    squares = 0
    for pixels, size in zip(np.nonzero(labels.any(0)), labels.shape[1:]):
        middle, reach = (pixels.min() + pixels.max()) / 2, (np.ptp(pixels) + 1) / 2**0.5
        squares = np.add.outer(squares, ((np.arange(size) - middle) / reach) ** 2)
    return np.sqrt(squares)


def paint(labels, rng):
    """An image, uint8, over labels (D, H, W) from 1 on: each organ of its own brightness, bowel-like clutter
    between them, a wall of muscle, fat, air; speckled, as a window of soft tissue shows it."""
    depth, height, _ = labels.shape
    coarse = smooth_noise(rng, labels.shape, (depth / 8, height / 28, height / 28))
    grain = smooth_noise(rng, labels.shape, (0.5, 1.2, 1.2))
    radius = radius_around(labels) + 0.02 * coarse
    fat, muscle = rng.uniform(35, 70), rng.uniform(100, 130)
    image = np.select([radius > 1.4, radius > 1.3, radius > 1.15], [0, fat, muscle], fat)
    image = np.where((radius < 1.1) & (coarse > 0.6), muscle - 15, image)
    image = np.where((radius < 1.1) & (coarse > 2), 5, image)
    organs = rng.permutation(np.linspace(120, 205, labels.max())) + rng.normal(0, 4, labels.max())
    image = np.where(labels > 0, np.append(0, organs)[labels], image)
    blurred = np.stack([cv2.GaussianBlur(of_slice, (0, 0), 0.9) for of_slice in image])
    return np.clip(blurred + 6 * grain, 0, 255).astype(np.uint8)


def object_boxes(labels, rng, margin=6):
    """(N, 6): a box around each label of (D, H, W), as a person would draw it, up to `margin` pixels wider on
    each side, with exact slices."""
    boxes = []
    for label in range(1, labels.max() + 1):
        zs, ys, xs = np.nonzero(labels == label)
        y0, x0 = (max(0, axis.min() - rng.integers(margin)) for axis in (ys, xs))
        y1, x1 = (min(size, axis.max() + 1 + rng.integers(margin)) for axis, size in zip((ys, xs), labels.shape[1:]))
        boxes.append([x0, y0, zs.min(), x1, y1, zs.max()])
    return np.array(boxes, np.int64)


def numbered(labels):
    """Labels from 1 on without gaps, as boxes number them."""
    present = np.unique(labels[labels > 0])
    return np.where(labels > 0, np.searchsorted(present, labels) + 1, 0).astype(np.uint8)


def write_cases(source, folder, count, slices=None):
    """`count` cases over the labels in the .npz file `source`, or over their `slices` in the middle."""
    with np.load(source) as file:
        if "gts" not in file or file["gts"].ndim != 3:
            raise SystemExit(f"{source}: expected gts, labels (D, H, W)")
        labels, spacing = file["gts"], file["spacing"] if "spacing" in file else np.ones(3)
    first = max(0, len(labels) - (slices or len(labels))) // 2
    labels = numbered(labels[first : first + (slices or len(labels))])
    for number in range(count):
        rng = np.random.default_rng(number)
        np.savez_compressed(folder / f"3D_painted_{number:02}.npz", imgs=paint(labels, rng), gts=labels,
                            boxes=object_boxes(labels, rng), spacing=spacing)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("labels", help=".npz file with gts (D, H, W)")
    parser.add_argument("-o", "--output", required=True, type=pathlib.Path, help="folder for the cases")
    parser.add_argument("--count", type=int, default=10, help="volumes (%(default)s)")
    parser.add_argument("--slices", type=int, help="so many slices of the middle (all)")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    write_cases(options.labels, options.output, options.count, options.slices)


if __name__ == "__main__":
    main()
