#!/usr/bin/env python3
"""Measures a checkpoint with the program itself, on images that training never saw.

    python3 evaluate.py -m MODEL.safetensors -o FOLDER [--labels LABELS.npz] [--checkpoint MODEL.pth]

- held-out scenes (scenes.py with seeds of their own), prompted with jittered boxes, beside the answer
  that ignores the image: the ellipse inscribed in each box;
- with `--labels`, an .npz file with gts (D, H, W) and spacing: slices painted over these labels
  (painting.py), every fourth one, and the volume as a whole, followed through its slices;
- with `--checkpoint`: the masks of the PyTorch reference beside the program's.

Cases, segmentations and tables stay in FOLDER. Prints a table in Markdown.
"""

import argparse
import csv
import pathlib
import subprocess
import sys

import numpy as np

import painting
import scenes
from fields import object_boxes

HERE = pathlib.Path(__file__).resolve().parent
HELD_OUT_SEED = 20_000_003  # training counts its images from zero under another seed


def write_case(path, image, labels, boxes, **more):
    np.savez_compressed(path, imgs=image, gts=labels, boxes=np.asarray(boxes, np.int64), **more)


def write_scenes(folder, count):
    folder.mkdir(parents=True, exist_ok=True)
    kinds, shares = list(scenes.KINDS), list(scenes.KINDS.values())
    for i in range(count):
        rng = np.random.default_rng([HELD_OUT_SEED, i])
        kind = rng.choice(kinds, p=shares)
        image, labels = scenes.make_scene(rng, 256, kind)
        boxes = [scenes.jittered_box(rng, labels == n) for n in range(1, labels.max() + 1)]
        write_case(folder / f"{kind.__name__}_{i:03}.npz", image, labels, boxes)


def write_ellipses(cases, folder):
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(cases.glob("*.npz")):
        case = np.load(path)
        segs = np.zeros(case["gts"].shape, np.uint16)
        for i, mask in enumerate(scenes.inscribed_ellipses(case["boxes"], segs.shape[0])):
            segs[mask] = i + 1
        np.savez_compressed(folder / path.name, segs=segs)


def write_painted(slices, volumes, labels, spacing):
    for folder in (slices, volumes):
        folder.mkdir(parents=True, exist_ok=True)
    present, numbers = np.unique(labels, return_inverse=True)  # boxes number the labels from 1
    labels = numbers.reshape(labels.shape).astype(np.uint8) + (0 if present[0] == 0 else 1)
    rng = np.random.default_rng(HELD_OUT_SEED)
    image = painting.paint(labels, rng)
    write_case(volumes / "3D_painted.npz", image, labels, object_boxes(labels, rng), spacing=spacing)
    for z in range(0, len(labels), 4):
        here, numbers = np.unique(labels[z], return_inverse=True)
        numbers = numbers.reshape(labels[z].shape).astype(np.uint8)
        if here.size > 1:
            boxes = object_boxes(numbers, rng)
            picture = np.repeat(image[z][..., None], 3, 2)
            write_case(slices / f"slice_{z:03}.npz", picture, numbers, boxes, organs=here[1:])


def run(program, *arguments):
    subprocess.run([program, *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


def rows_of(program, segs, cases, table):
    run(program, "eval", "-s", segs, "-g", cases, "-o", table)
    with open(table) as file:
        return [dict(r, dice=float(r["dice"]), nsd=float(r["nsd"])) for r in csv.DictReader(file)]


def mean(rows, key="dice", by="case"):
    """The mean over cases (or labels) of the mean over what each of them has."""
    groups = {}
    for row in rows:
        groups.setdefault(row[by], []).append(row[key])
    return np.mean([np.mean(values) for values in groups.values()])


def compare_with_pytorch(checkpoint, cases, segs):
    """Dice of the reference's and the program's masks, object by object."""
    sys.path[:0] = [str(HERE.parent), str(HERE.parent / "reference")]
    import torch

    import load_weights

    model = load_weights.load(checkpoint).eval()
    found = []
    for path in sorted(cases.glob("*.npz"))[::5]:
        case = np.load(path)
        pixels = case["imgs"].astype(np.float32)
        pixels = (pixels - pixels.min()) / max(pixels.max() - pixels.min(), 1e-8)
        own = np.zeros(case["gts"].shape, np.uint16)
        with torch.no_grad():
            embedding = model.image_encoder(torch.from_numpy(pixels).permute(2, 0, 1)[None])
            boxes = torch.from_numpy(case["boxes"]).float()
            logits, _ = model.decode(embedding.expand(len(boxes), -1, -1, -1), boxes=boxes)
        for i, mask in enumerate(logits[:, 0].numpy() > 0):
            own[mask] = i + 1
        other = np.load(segs / path.name)["segs"]
        for label in np.unique(own[own > 0]):
            a, b = own == label, other == label
            found.append(2 * (a & b).sum() / (a.sum() + b.sum()))
    return np.array(found)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument("-o", "--output", required=True, type=pathlib.Path)
    parser.add_argument("--program", default=str(HERE.parents[1] / "build/release/microtome"))
    parser.add_argument("--count", type=int, default=200, help="held-out scenes (%(default)s)")
    parser.add_argument("--labels", help=".npz file with gts (D, H, W) and spacing to paint over")
    parser.add_argument("--checkpoint", help=".pth file that the model was converted from, or the model file")
    options = parser.parse_args()
    out = options.output

    def segment(name):
        run(options.program, "segment", "-m", options.model, "-i", out / name, "-o", out / f"{name}_segs")
        return rows_of(options.program, out / f"{name}_segs", out / name, out / f"{name}.csv")

    write_scenes(out / "scenes", options.count)
    write_ellipses(out / "scenes", out / "ellipses")
    found = segment("scenes")
    guessed = rows_of(options.program, out / "ellipses", out / "scenes", out / "ellipses.csv")
    print("| | objects | Dice | NSD | Dice of the inscribed ellipse |\n| --- | --- | --- | --- | --- |")
    for kind in ["", *(k.__name__ for k in scenes.KINDS)]:
        rows = [r for r in found if r["case"].startswith(kind)]
        if rows:
            ellipses = [r for r in guessed if r["case"].startswith(kind)]
            print(f"| held-out {kind or 'images, all'} | {len(rows)} | {mean(rows):.3f} | "
                  f"{mean(rows, 'nsd'):.3f} | {mean(ellipses):.3f} |")
    if options.labels:
        source = np.load(options.labels)
        spacing = source["spacing"] if "spacing" in source else np.ones(3)
        write_painted(out / "slices", out / "volumes", source["gts"], spacing)
        rows = segment("slices")
        for row in rows:
            row["organ"] = np.load(out / "slices" / row["case"])["organs"][int(row["label"]) - 1]
        print(f"| painted slices, mean over organs | {len(rows)} | {mean(rows, by='organ'):.3f} | "
              f"{mean(rows, 'nsd', 'organ'):.3f} | |")
        rows = segment("volumes")
        print(f"| painted volume, mean over organs | {len(rows)} | {mean(rows):.3f} | {mean(rows, 'nsd'):.3f} | |")
        print("\nOrgans of the volume: " + ", ".join(f"{r['dice']:.2f}" for r in rows))
    if options.checkpoint:
        same = compare_with_pytorch(options.checkpoint, out / "scenes", out / "scenes_segs")
        print(f"\nDice of PyTorch's masks and the program's, {same.size} objects: mean {same.mean():.5f}, "
              f"least {same.min():.5f}")


if __name__ == "__main__":
    main()
