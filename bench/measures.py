"""What the measurements share: the program, the real model and real cases, and how masks are compared.

Cases are .npz files with imgs, boxes and, to measure on, gts. Where no model or folder is named, it is what
scripts/fetch_model and scripts/fetch_images bring.
"""

import csv
import pathlib
import subprocess
import sys
import tempfile

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
PROGRAM = ROOT / "build" / "release" / "microtome"


def fetched(script):
    """The path that scripts/fetch_model or fetch_images prints; they fetch only what is not there yet."""
    answer = subprocess.run([ROOT / "scripts" / script], check=True, stdout=subprocess.PIPE, text=True)
    return pathlib.Path(answer.stdout.strip())


def real_model():
    """LiteMedSAM's own weights as a model file."""
    return fetched("fetch_model")


def real_checkpoint():
    """LiteMedSAM's own weights in PyTorch's form."""
    return real_model().with_suffix(".pth")


def convert(source, target, *options):
    command = [sys.executable, ROOT / "converters" / "convert.py", source, "-o", target, *options]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return target


def run(program, *arguments):
    """Runs the program; what it says on stderr is in the RuntimeError where it fails."""
    done = subprocess.run([program, *map(str, arguments)], stdout=subprocess.DEVNULL,
                          stderr=subprocess.PIPE, text=True)
    if done.returncode:
        said = done.stderr.strip() or f"exit status {done.returncode}"
        raise RuntimeError(f"microtome {arguments[0]}: {said}")


def is_volume(case):
    """Whether a loaded case's boxes have a third dimension."""
    return case["boxes"].shape[-1] == 6


def link_cases(source, folder, volumes=False):
    """Fills a new folder with links to the cases of `source`, those with images alone unless `volumes`,
    which take minutes. Returns the links, by name."""
    source = pathlib.Path(source or fetched("fetch_images"))
    folder.mkdir(parents=True)
    for path in source.glob("*.npz"):
        with np.load(path) as case:
            if "boxes" in case and (volumes or not is_volume(case)):
                (folder / path.name).symlink_to(path.resolve())
    links = sorted(folder.iterdir())
    if not links:
        kinds = "imgs and boxes" if volumes else "imgs and boxes of images (volumes are left out)"
        raise SystemExit(f"{source}: no case in this folder, expected .npz files with {kinds}")
    return links


def metrics(program, segs, cases):
    """The rows of `microtome eval`, one per object, for a folder of masks and one of labelled cases."""
    with tempfile.TemporaryDirectory() as folder:
        table = pathlib.Path(folder) / "metrics.csv"
        run(program, "eval", "-s", segs, "-g", cases, "-o", table)
        with open(table) as file:
            return [dict(row, dice=float(row["dice"]), nsd=float(row["nsd"])) for row in csv.DictReader(file)]


def mean(rows, key="dice"):
    """The mean over cases of the mean over the objects of each."""
    cases = {}
    for row in rows:
        cases.setdefault(row["case"], []).append(row[key])
    return float(np.mean([np.mean(values) for values in cases.values()]))


def agreement(one, other, objects):
    """How alike two sets of masks (H, W) or (D, H, W) with labels 1 to `objects` are: the share of pixels that
    differ, and the Dice coefficient of each object, 1 where neither has it."""

    def sizes(labels):
        return np.bincount(labels.ravel(), minlength=objects + 1)[1 : objects + 1]

    total = sizes(one) + sizes(other)
    common = sizes(one[one == other])
    return float(np.mean(one != other)), np.where(total > 0, 2 * common / np.maximum(total, 1), 1.0)
