#!/usr/bin/env python3
"""Cuts labelled cases (imgs, boxes, gts, spacing) for microtome out of the files of one package.

    cut_cases.py SOURCE FOLDER OUTPUT

FOLDER holds the package's files; OUTPUT, a folder that is there, gets an .npz for each case. scripts/fetch_images
runs it in .venv: it needs NumPy and SimpleITK.

Which cases: every tumour of pyradiomics, on the slice with the most of it, and the large one as a volume;
the hemispheres of the cerebellum in the slices that cut at least half as much of them as the slice that
cuts most; every nucleus that lies wholly in the middle of the picture. What is asked for follows from these
rules, not from how well it is answered. Boxes are the labels' bounding boxes, exactly.
"""

import pathlib
import sys

import numpy as np
import SimpleITK

# Windows for CT: level and width in Hounsfield units. A nodule inside the lung is looked at in the lung's
# window, a mass that reaches the chest wall in that of soft tissue.
SOFT_TISSUE = (40, 400)
LUNG = (-600, 1500)

# Labels of the AAL atlas: odd numbers are left, even right; the vermis between them comes after.
LEFT_CEREBELLUM = range(91, 109, 2)
RIGHT_CEREBELLUM = range(92, 109, 2)

NUCLEI_SIDE = 192


def read(path):
    """Values as (z, y, x) and spacing along x, y, z in mm. Volumes are turned to how a radiologist looks
    at them, whatever their order in the file: the patient's right is at the left, front is up."""
    image = SimpleITK.ReadImage(str(path))
    if image.GetDimension() == 3:
        image = SimpleITK.DICOMOrient(image, "LPS")
    return SimpleITK.GetArrayFromImage(image), image.GetSpacing()


def grey(values, low, high):
    """Values from low to high as bytes from 0 to 255."""
    return np.round((np.clip(values.astype(float), low, high) - low) / (high - low) * 255).astype(np.uint8)


def ct(values, window):
    level, width = window
    return grey(values, level - width / 2, level + width / 2)


def between_percentiles(values):
    """Values without a unit, as of MR: from percentile 0.5 to 99.5 of what is not background."""
    return grey(values, *np.percentile(values[values > 0], (0.5, 99.5)))


def bounding_boxes(labels):
    """x0, y0(, z0), x1, y1(, z1) of each label from 1 on: the first and the last pixel, as LiteMedSAM's
    scripts have them."""
    boxes = []
    for label in range(1, labels.max() + 1):
        where = np.argwhere(labels == label)[:, ::-1]
        boxes.append(np.concatenate([where.min(0), where.max(0)]))
    return np.array(boxes, np.int32)


def save(output, name, image, labels, spacing):
    labels = labels.astype(np.uint8)
    boxes = bounding_boxes(labels)
    if image.ndim == 2:
        image = np.repeat(image[:, :, None], 3, 2)
    spacing = np.array((*spacing, 1.0)[:3], np.float64)
    np.savez_compressed(output / f"{name}.npz", imgs=image, boxes=boxes, gts=labels, spacing=spacing)


def pyradiomics(folder, output):
    def tumour(name):
        values, spacing = read(folder / f"{name}_image.nrrd")
        labels, _ = read(folder / f"{name}_label.nrrd")
        return values, labels, spacing, (labels > 0).sum((1, 2))

    for name, window in (("lung1", LUNG), ("lung2", SOFT_TISSUE)):
        values, labels, spacing, area = tumour(name)
        z = area.argmax()
        save(output, f"2D_CT_{name}", ct(values[z], window), labels[z], spacing)
    # The large one as a volume, with a slice more at each end.
    first, last = np.flatnonzero(area)[[0, -1]]
    part = slice(max(0, first - 1), last + 2)
    save(output, "3D_CT_lung2", ct(values[part], window), labels[part], spacing)
    for name in ("brain1", "brain2", "breast1"):
        values, labels, spacing, area = tumour(name)
        z = area.argmax()
        save(output, f"2D_MR_{name}", between_percentiles(values)[z], labels[z], spacing)


def mricron(folder, output):
    values, spacing = read(folder / "ch2.nii.gz")
    atlas, _ = read(folder / "aal.nii.gz")
    labels = np.isin(atlas, LEFT_CEREBELLUM) + 2 * np.isin(atlas, RIGHT_CEREBELLUM)
    area = (labels > 0).sum((1, 2))
    middle = np.flatnonzero(2 * area >= area.max())
    # Every third slice: 3 mm, as clinical scans have them.
    part = slice(middle[0], middle[-1] + 1, 3)
    spacing = (spacing[0], spacing[1], 3 * spacing[2])
    save(output, "3D_MR_cerebellum", between_percentiles(values)[part], labels[part], spacing)


def stardist(folder, output):
    values, _ = read(folder / "img2d.tif")
    nuclei, _ = read(folder / "mask2d.tif")
    middle = tuple(slice((n - NUCLEI_SIDE) // 2, (n + NUCLEI_SIDE) // 2) for n in nuclei.shape)
    labels, count = np.zeros((NUCLEI_SIDE, NUCLEI_SIDE), np.uint8), 0
    for nucleus in np.unique(nuclei[middle])[1:]:
        inside = nuclei[middle] == nucleus
        if inside.sum() == (nuclei == nucleus).sum():
            count += 1
            labels[inside] = count
    # Pixels without a size: 1 stands in for the spacing.
    save(output, "2D_Microscopy_nuclei", between_percentiles(values)[middle], labels, (1, 1))


if __name__ == "__main__":
    source, folder, output = sys.argv[1:]
    sources = {"pyradiomics": pyradiomics, "mricron": mricron, "stardist": stardist}
    sources[source](pathlib.Path(folder), pathlib.Path(output))
