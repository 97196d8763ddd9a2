#!/usr/bin/env python3
"""Segments .npz cases with PyTorch the way LiteMedSAM's own inference script does: a box at a time, a
volume object by object from the middle slice outwards, every slice encoded anew for every object. What
job.py times microtome against, and accuracy.py compares its masks with.

    python3 original.py CHECKPOINT.pth OUTPUT_FOLDER THREADS CASE.npz...

An object that the original would lose, because its number is a multiple of 256 and volumes are drawn in 8
bits, keeps its mask here; see next_box.
"""

import pathlib
import sys

import cv2
import numpy as np
import torch
import torch.nn.functional as F

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "converters" / "reference")]

import tiny_vit  # noqa: E402
import load_weights  # noqa: E402
import variants  # noqa: E402

SIDE = 256
MARGIN = 3


def scaled_shape(height, width):
    scale = SIDE / max(height, width)
    return int(height * scale + 0.5), int(width * scale + 0.5)


def preprocess(image):
    """(H, W, 3) uint8 to (1, 3, SIDE, SIDE) in [0, 1], zeros right and below."""
    height, width = scaled_shape(*image.shape[:2])
    small = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    small = (small - small.min()) / np.clip(small.max() - small.min(), 1e-8, None)
    small = np.pad(small, ((0, SIDE - height), (0, SIDE - width), (0, 0)))
    return torch.from_numpy(small).float().permute(2, 0, 1)[None]


def decode(model, embedding, box, shape):
    """The mask of one box (pixels of the model's input) in an image of `shape`."""
    logits, _ = model.decode(embedding, boxes=torch.tensor(box)[None].float())
    height, width = scaled_shape(*shape)
    logits = F.interpolate(logits[..., :height, :width], shape, mode="bilinear", align_corners=False)
    return (logits[0, 0].sigmoid() > 0.5).numpy().astype(np.uint8)


def to_input(box, shape):
    return (np.array(box) * (SIDE / max(shape))).astype(int)


def next_box(mask, label, whole):
    """Around the mask of the slice before, in pixels of the model's input.

    The original draws the mask with the object's number into 8 bits and shrinks that by area, rounding to
    whole numbers: the higher the number, the less of a pixel has to be covered to count. Number 256 is
    drawn as 0. Where nothing is left, the box is `whole`; the original fails there, or for an empty mask
    takes `whole` too.
    """
    height, width = scaled_shape(*mask.shape)
    drawn = mask * np.uint8(label % 256)
    ys, xs = np.nonzero(cv2.resize(drawn, (width, height), interpolation=cv2.INTER_AREA))
    if not len(ys):
        return whole
    x0, x1 = max(0, xs.min() - MARGIN), min(SIDE, xs.max() + MARGIN)
    y0, y1 = max(0, ys.min() - MARGIN), min(SIDE, ys.max() + MARGIN)
    return np.array([x0, y0, x1, y1])


def segment_boxes(model, embedding, boxes, shape):
    segs = np.zeros(shape, np.uint16)
    for label, box in enumerate(boxes, 1):
        segs[decode(model, embedding, to_input(box, shape), shape) > 0] = label
    return segs


def segment_image(model, image, boxes):
    return segment_boxes(model, model.image_encoder(preprocess(image)), boxes, image.shape[:2])


def segment_volume(model, volume, boxes):
    shape = volume.shape[1:]
    segs = np.zeros(volume.shape, np.uint16)
    for label, (x0, y0, z0, x1, y1, z1) in enumerate(boxes, 1):
        found = np.zeros(volume.shape, np.uint8)
        whole = to_input([x0, y0, x1, y1], shape)
        middle = (z0 + z1) // 2

        def segment_slice(z, before):
            box = whole if before is None else next_box(found[before], label, whole)
            image = np.repeat(volume[z][..., None], 3, -1)
            found[z] = decode(model, model.image_encoder(preprocess(image)), box, shape)

        for z in range(middle, min(z1 + 1, len(volume))):
            segment_slice(z, z - 1 if z > middle else None)
        for z in range(middle - 1, z0 - 1, -1):
            segment_slice(z, z + 1)
        segs[found > 0] = label
    return segs


def main():
    checkpoint, folder, threads, *cases = sys.argv[1:]
    torch.set_num_threads(int(threads))
    model = load_weights.load(checkpoint)
    variants.use(model, tiny_vit.WindowAttention, variants.ExplicitAttention)
    model.eval().requires_grad_(False)
    for case in map(pathlib.Path, cases):
        data = np.load(case)
        image, boxes = data["imgs"], data["boxes"]
        segment = segment_volume if boxes.shape[-1] == 6 else segment_image
        segs = segment(model, image, boxes)
        np.savez_compressed(pathlib.Path(folder) / case.name, segs=segs)


if __name__ == "__main__":
    main()
