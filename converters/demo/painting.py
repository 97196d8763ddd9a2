#!/usr/bin/env python3
"""Paints an image over labels: real or drawn organs, given as `gts` of an .npz file, become a volume
that looks like a CT in a soft-tissue window. The demo checkpoint is tested on such volumes; it never
saw their labels in training.

    python3 painting.py LABELS.npz -o CASE.npz [--slices 30:60]
"""

import argparse

import numpy as np

from fields import blur, object_boxes, smooth_noise


def body_around(labels, margin):
    """(D, H, W) coordinates in which an ellipse around all labels of the volume has radius 1."""
    _, ys, xs = np.nonzero(labels)
    centre_y, centre_x = (ys.min() + ys.max()) / 2, (xs.min() + xs.max()) / 2
    # The corners of the labels' bounding box lie on the inner wall.
    reach_y = (ys.max() - ys.min()) / 2**0.5 * margin
    reach_x = (xs.max() - xs.min()) / 2**0.5 * margin
    y, x = np.ogrid[: labels.shape[1], : labels.shape[2]]
    return np.hypot((y - centre_y) / reach_y, (x - centre_x) / reach_x)


def paint(labels, rng):
    """An image, uint8, over labels (D, H, W): every label a tissue of its own brightness and texture,
    in fat, within a wall of muscle, with bowel-like clutter between."""
    depth, height, width = labels.shape
    side = max(height, width)
    slow = smooth_noise(rng, labels.shape, (depth / 4, side / 12, side / 12))
    grain = smooth_noise(rng, labels.shape, (1, 2.5, 2.5))
    radius = body_around(labels, 1.15)[None] + 0.02 * slow
    fat, muscle = rng.uniform(0.15, 0.3), rng.uniform(0.42, 0.55)
    image = np.where(radius < 1.25, fat + 0.02 * grain, 0.0)
    image = np.where((radius > 1.05) & (radius < 1.18), muscle + 0.03 * grain, image)
    clutter = smooth_noise(rng, labels.shape, (depth / 8, side / 28, side / 28))
    inside = radius < 1.0
    image = np.where(inside & (clutter > 0.6), muscle - 0.06 + 0.02 * grain, image)
    image = np.where(inside & (clutter > 2.0), 0.02, image)
    tissues = np.linspace(0.5, 0.85, 13) + rng.normal(0, 0.02, 13)
    rng.shuffle(tissues)
    for label in np.unique(labels[labels > 0]):
        mask = labels == label
        value = tissues[int(label) % 13]
        image = np.where(mask, value + rng.uniform(0.01, 0.025) * grain, image)
    image = blur(image.astype(np.float32), 0.9)
    image += 0.02 * smooth_noise(rng, labels.shape, (0.3, 0.7, 0.7))
    return np.clip(image * 245, 0, 255).astype(np.uint8)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("labels", help=".npz file with gts (D, H, W)")
    parser.add_argument("-o", "--output", required=True, help=".npz case with imgs, boxes, gts, spacing")
    parser.add_argument("--slices", help="first:last, the last one left out; all if not given")
    parser.add_argument("--seed", type=int, default=1, help="(%(default)s)")
    options = parser.parse_args()
    source = np.load(options.labels)
    labels = source["gts"]
    if options.slices:
        labels = labels[slice(*map(int, options.slices.split(":")))]
    rng = np.random.default_rng(options.seed)
    present, numbers = np.unique(labels, return_inverse=True)  # boxes number the labels from 1
    labels = numbers.reshape(labels.shape).astype(np.uint8) + (0 if present[0] == 0 else 1)
    spacing = source["spacing"] if "spacing" in source else np.ones(3)
    np.savez_compressed(options.output, imgs=paint(labels, rng), gts=labels,
                        boxes=object_boxes(labels, rng), spacing=spacing)


if __name__ == "__main__":
    main()
