"""What the Python tests share: the program, the models, and the shared golden data where it is."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
DATA = ROOT / "tests" / "data"
SHARED = ROOT.parent / "shared"
sys.path[:0] = [str(ROOT / "converters" / part) for part in ("", "reference")]


@pytest.fixture(scope="session")
def program():
    path = pathlib.Path(os.environ.get("MICROTOME_PROGRAM", ROOT / "build" / "release" / "microtome"))
    if not path.exists():
        pytest.fail(f"{path} is missing: build it first (scripts/test does)")
    return path


@pytest.fixture(scope="session")
def tiny_model():
    return DATA / "tiny.safetensors"


@pytest.fixture(scope="session")
def golden_folder():
    folder = SHARED / "golden"
    if not folder.exists():
        pytest.skip(f"no golden data in {folder}")
    return folder


@pytest.fixture
def run(program):
    """Runs the program and returns the completed process."""

    def call(*arguments, **options):
        return subprocess.run(
            [program, *map(str, arguments)], capture_output=True, text=True, timeout=300, **options
        )

    return call


def make_case(path, seed=0, shape=(70, 61, 3), boxes=((5, 6, 40, 50), (20, 10, 60, 69))):
    """Writes a .npz case of noise and returns its image."""
    image = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    np.savez_compressed(path, imgs=image, boxes=np.array(boxes, np.int64))
    return image
