#!/usr/bin/env python3
"""Makes the README's picture out of those that scripts/demo leaves.

    .venv/bin/python scripts/demo_picture.py build/demo/pictures docs/demo.png

A row of four: a tumour of the lung on CT and one of the brain on MR, a slice of a volume, and nuclei under
a microscope. Needs NumPy and SimpleITK, which the demo has put into .venv.
"""

import pathlib
import sys

import numpy as np
import SimpleITK

SIDE = 384
GAP = 12

# Picture, and the square of it to show: x, y and side in pixels.
PANELS = (
    ("2D_CT_lung2", 128, 90, 384),
    ("2D_MR_brain1", 6, 4, 500),
    ("3D_MR_cerebellum_z006", 0, 54, 543),
    ("2D_Microscopy_nuclei", 0, 0, 576),
)


def panel(path, x, y, side):
    """A square of a picture, SIDE pixels wide."""
    picture = SimpleITK.ReadImage(str(path))
    step = side / SIDE
    # Pixels have their coordinates in their middle.
    start = (x + step / 2 - 0.5, y + step / 2 - 0.5)
    scaled = SimpleITK.Resample(
        picture, (SIDE, SIDE), SimpleITK.Transform(), SimpleITK.sitkLinear, start, (step, step)
    )
    return SimpleITK.GetArrayFromImage(scaled)[:, :, :3]


def main(pictures, output):
    gap = np.full((SIDE, GAP, 3), 255, np.uint8)
    row = []
    for name, *part in PANELS:
        row += [gap, panel(pathlib.Path(pictures) / f"{name}.png", *part)]
    image = SimpleITK.GetImageFromArray(np.concatenate(row[1:], 1), isVector=True)
    SimpleITK.WriteImage(image, output, useCompression=True, compressionLevel=9)


if __name__ == "__main__":
    main(*sys.argv[1:])
