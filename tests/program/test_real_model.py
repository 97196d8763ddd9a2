"""LiteMedSAM's own weights on real images: the program against the PyTorch reference, and against what the
original network and its script answered (../shared/data/real, where it is there).

MICROTOME_REAL_MODEL and MICROTOME_REAL_IMAGES say where scripts/fetch_model and scripts/fetch_images have
put them; scripts/test calls both."""

import os
import pathlib
import sys

import numpy as np
import pytest

from conftest import ROOT, SHARED

sys.path.insert(0, str(ROOT / "bench" / "peers"))



def from_environment(name, script):
    path = os.environ.get(name)
    if not path:
        pytest.skip(f"{name} is not set: scripts/{script} could not bring it")
    if os.environ.get("MICROTOME_SANITIZED"):
        pytest.skip("too slow under the sanitizers; the small model goes the same ways")
    return pathlib.Path(path)


@pytest.fixture(scope="module")
def real_model():
    return from_environment("MICROTOME_REAL_MODEL", "fetch_model")


@pytest.fixture(scope="module")
def real_images():
    return from_environment("MICROTOME_REAL_IMAGES", "fetch_images")


@pytest.fixture(scope="module")
def originals_answers():
    folder = SHARED / "data" / "real" / "test"
    if not folder.exists():
        pytest.skip(f"no real cases in {folder}")
    return folder


def object_dice(a, b):
    """Of each label in either of two label maps."""
    return [2 * np.sum((a == n) & (b == n)) / (np.sum(a == n) + np.sum(b == n))
            for n in np.union1d(a, b) if n]


def check_masks(run, model, cases, expected, folder):
    """The program's answers to `cases` differ from `expected` (one label map each) in at most 0.02 % of all
    pixels, and the mean Dice coefficient of the two is at least 0.9995."""
    done = run("segment", "-m", model, "-i", *cases, "-o", folder)
    assert done.returncode == 0, done.stderr
    found = [np.load(folder / case.name)["segs"] for case in cases]
    different = sum(np.count_nonzero(a != b) for a, b in zip(found, expected))
    assert different <= 2e-4 * sum(a.size for a in found)
    assert all(a.any() for a in found)
    dice = [d for a, b in zip(found, expected) for d in object_dice(a, b)]
    assert np.mean(dice) >= 0.9995 and min(dice) >= 0.99


@pytest.mark.parametrize("kind", ["2D_*", "3D_MR_brain1", "3D_CT_abdomen", "3D_MR_colin27"])
def test_masks_are_the_originals(run, real_model, originals_answers, kind, tmp_path):
    cases = sorted(originals_answers.glob(f"{kind}.npz"))
    expected = [np.load(originals_answers / "original" / case.name)["segs"] for case in cases]
    check_masks(run, real_model, cases, expected, tmp_path)


def test_small_objects_of_a_volume_are_the_originals(run, real_model, tmp_path):
    """At 640 x 640 the numbers that masks are drawn with decide about small objects."""
    case = SHARED / "data" / "reports" / "volume_640.npz"
    if not case.exists():
        pytest.skip(f"no {case}")
    check_masks(run, real_model, [case], [np.load(case)["original_segs"]], tmp_path)


def test_masks_are_those_of_the_pytorch_reference(run, real_model, real_images, tmp_path):
    import load_weights
    import original
    import torch

    model = load_weights.load(real_model.with_suffix(".pth")).eval().requires_grad_(False)
    cases = sorted(real_images.glob("2D_*.npz"))
    arrays = [np.load(case) for case in cases]
    with torch.no_grad():
        expected = [original.segment_image(model, a["imgs"], a["boxes"]) for a in arrays]
    check_masks(run, real_model, cases, expected, tmp_path)


def test_every_number_is_that_of_the_pytorch_reference(run, real_model, real_images, tmp_path):
    """Errors are small beside the deviation of what they are errors of."""
    import load_weights
    import original
    import torch

    model = load_weights.load(real_model.with_suffix(".pth")).eval().requires_grad_(False)
    case = sorted(real_images.glob("2D_*.npz"))[0]
    done = run("trace", "-m", real_model, "-i", case, "-o", tmp_path / "t.npz")
    assert done.returncode == 0, done.stderr
    trace, arrays = np.load(tmp_path / "t.npz"), np.load(case)
    boxes = np.array([original.to_input(box, arrays["imgs"].shape[:2]) for box in arrays["boxes"]])
    outputs = {"image_embedding": model.image_encoder(torch.tensor(trace["input"]))}
    masks, outputs["iou_predictions"] = model.decode(
        outputs["image_embedding"].expand(len(boxes), -1, -1, -1), boxes=torch.tensor(boxes).float())
    outputs["low_res_masks"] = masks
    for name, value in outputs.items():
        error = np.abs(trace[name] - value.numpy()).max()
        scale = 1 if name == "iou_predictions" else value.std().item()
        assert error <= 1e-4 * scale, name


def test_8_bits_in_onnx_runtime(run, real_model, real_images, tmp_path):
    """The masks of an int8 model's ONNX graphs are nearer to ours than ours are to fp32's. ONNX Runtime adds up in
    another order: a number near the middle between two levels goes to the other one, which moves those after it, until
    deep in the encoder the two are half as far apart as each is from fp32."""
    import export_onnx
    import onnxruntime
    import original

    cases = sorted(real_images.glob("2D_*.npz"))
    folder = tmp_path / "cases"
    folder.mkdir()
    for case in cases[::2]:
        (folder / case.name).symlink_to(case)
    ranges, model = tmp_path / "ranges.json", tmp_path / "int8.safetensors"
    done = run("calibrate", "-m", real_model, "-i", folder, "-o", ranges)
    assert done.returncode == 0, done.stderr
    done = run("quantize", "-m", real_model, "-r", ranges, "-o", model)
    assert done.returncode == 0, done.stderr
    assert export_onnx.main([str(model), "-o", str(tmp_path)]) == 0
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    encoder, decoder = (onnxruntime.InferenceSession(tmp_path / name, options, ["CPUExecutionProvider"])
                        for name in ("encoder.onnx", "decoder.onnx"))
    agreement, from_fp32 = [], []
    for case in cases:
        arrays = np.load(case)
        traces = []
        for path in model, real_model:
            done = run("trace", "-m", path, "-i", case, "-o", tmp_path / "t.npz")
            assert done.returncode == 0, done.stderr
            traces.append(dict(np.load(tmp_path / "t.npz")))
        ours, exact = traces
        boxes = np.array([original.to_input(box, arrays["imgs"].shape[:2]) for box in arrays["boxes"]], np.float32)
        embedding = encoder.run(None, {"image": ours["input"]})[0]
        masks = decoder.run(None, {"embedding": embedding, "boxes": boxes})[0]
        for a, b, c in zip(ours["low_res_masks"], masks, exact["low_res_masks"]):
            agreement += object_dice(a > 0, b > 0)
            from_fp32 += object_dice(a > 0, c > 0)
    print(f"agreement {np.mean(agreement):.4f}, least {min(agreement):.4f}; with fp32's {np.mean(from_fp32):.4f}")
    assert np.mean(agreement) >= 0.975 and 1 - np.mean(agreement) < (1 - np.mean(from_fp32)) / 2
