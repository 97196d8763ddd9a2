"""ONNX graphs of model files: ONNX Runtime's answers against the program's."""

import shutil

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import export_onnx
from conftest import ROOT, make_case

MODELS = ["tiny", "tiny_efficientvit"]
BOXES = ((5, 6, 40, 50), (20, 10, 60, 69))


@pytest.fixture(params=MODELS)
def model(request):
    return ROOT / "tests" / "data" / f"{request.param}.safetensors"


def session(path):
    """As the graph says. Where it is fused into 8-bit kernels, those of CPUs without VNNI saturate."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])


def answers(run, model, graphs, tmp_path):
    """Embedding and masks of a case, the program's and ONNX Runtime's."""
    case = tmp_path / "case.npz"
    make_case(case, boxes=BOXES)
    trace = tmp_path / "trace.npz"
    done = run("trace", "-m", model, "-i", case, "-o", trace)
    assert done.returncode == 0, done.stderr
    ours = dict(np.load(trace))
    embedding = session(graphs / "encoder.onnx").run(None, {"image": ours["input"]})[0]
    config = export_onnx.load(model)[0].config
    height, width = np.load(case)["imgs"].shape[:2]
    frame = config["input"]["frame"]
    scale = frame / max(height, width)
    if config["input"]["coordinates"] == "truncated":
        prompts = np.trunc(np.array(BOXES) * scale)
    else:
        inside = [int(width * scale + 0.5) / width, int(height * scale + 0.5) / height]
        prompts = np.array(BOXES) * (inside * 2)
    masks, iou = session(graphs / "decoder.onnx").run(
        None, {"embedding": embedding, "boxes": prompts.astype(np.float32)})
    return ours, dict(embedding=embedding, masks=masks, iou=iou)


def test_fp32(run, model, tmp_path, capsys):
    assert export_onnx.main([str(model), "-o", str(tmp_path / "onnx")]) == 0
    assert "encoder.onnx and decoder.onnx" in capsys.readouterr().out
    ours, theirs = answers(run, model, tmp_path / "onnx", tmp_path)
    assert np.abs(ours["image_embedding"] - theirs["embedding"]).max() < 2e-4
    assert np.abs(ours["low_res_masks"] - theirs["masks"]).max() < 2e-3
    assert np.abs(ours["iou_predictions"] - theirs["iou"]).max() < 2e-3


@pytest.mark.parametrize("scheme", ["full", "weights-only"])
def test_int8(run, model, scheme, tmp_path):
    cases = tmp_path / "cases"
    cases.mkdir()
    for seed in range(3):
        make_case(cases / f"{seed}.npz", seed=seed)
    ranges, quantised = tmp_path / "ranges.json", tmp_path / "int8.safetensors"
    assert run("calibrate", "-m", model, "-i", cases, "-o", ranges).returncode == 0
    assert run("quantize", "-m", model, "-r", ranges, "--scheme", scheme, "-o", quantised).returncode == 0
    assert export_onnx.main([str(quantised), "-o", str(tmp_path / "onnx")]) == 0
    graph = onnx.load(tmp_path / "onnx" / "encoder.onnx").graph
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("DequantizeLinear") > 20
    ours, theirs = answers(run, quantised, tmp_path / "onnx", tmp_path)
    deviation = ours["image_embedding"].std()
    # A whole number that is rounded the other way changes those after it.
    assert np.abs(ours["image_embedding"] - theirs["embedding"]).mean() < 0.02 * deviation
    same = (ours["low_res_masks"] > 0) == (theirs["masks"] > 0)
    assert same.mean() >= 0.95  # of masks that mean nothing: many logits are near 0
    # Before that has happened the numbers are the same.
    early = "backbone.stages.1.op_list.1" if "efficientvit" in model.name else "layers.0.blocks.1"
    loaded = export_onnx.load(quantised)[0].image_encoder
    found = {}
    loaded.get_submodule(early).register_forward_hook(lambda *args: found.update(map=args[2].numpy()))
    loaded(torch.tensor(ours["input"]))
    expected = ours[f"image_encoder.{early}"]
    assert np.abs(found["map"] - expected).mean() < 2e-4 * expected.std()


def test_what_cannot_be_exported(tmp_path, capsys):
    bad = tmp_path / "bad.safetensors"
    shutil.copy(ROOT / "README.md", bad)
    assert export_onnx.main([str(bad), "-o", str(tmp_path / "onnx")]) == 1
    assert str(bad) in capsys.readouterr().err and not (tmp_path / "onnx").exists()
