"""calibrate, quantize, sensitivity: a model in 8 bits, from a folder of cases to a segmentation."""

import csv
import json
import re
import subprocess
import time
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

import model_file
from conftest import make_case


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cases")
    for i in range(3):
        make_case(folder / f"2D_{i}.npz", seed=i)
        data = dict(np.load(folder / f"2D_{i}.npz"))
        labels = np.zeros((70, 61), np.uint8)
        labels[6:50, 5:40] = 1
        labels[20:69, 20:60] = 2
        np.savez_compressed(folder / f"2D_{i}.npz", gts=labels, spacing=np.ones(3), **data)
    return folder


@pytest.fixture
def ranges(run, tiny_model, cases, tmp_path):
    path = tmp_path / "ranges.json"
    done = run("calibrate", "-m", tiny_model, "-i", cases, "-o", path)
    assert done.returncode == 0, done.stderr
    return path


def test_from_calibration_to_masks(run, tiny_model, cases, ranges, tmp_path):
    found = json.loads(ranges.read_text())
    assert found["cases"] == 3 and found["observer"] == "mse" and len(found["layers"]) > 40
    depthwise, balanced = 0, 0
    for layer in found["layers"].values():
        if isinstance(layer, dict):
            balanced += 1
            assert all(0.99e-4 <= f <= 1 for f in layer["factor"]) and len(layer["ranges"]) == 1
            layer = layer["ranges"]
        elif isinstance(layer[0], list):
            depthwise += 1
        else:
            layer = [layer]
        assert all(low <= 0 <= high for low, high in layer)
    assert depthwise == sum("conv2" in name or "local_conv" in name for name in found["layers"]) > 3
    assert balanced > 20
    model = tmp_path / "int8.safetensors"
    done = run("quantize", "-m", tiny_model, "-r", ranges, "-o", model)
    assert done.returncode == 0, done.stderr
    assert "in int8" in done.stdout
    assert model.stat().st_size < 0.55 * tiny_model.stat().st_size
    listed = run("info", "-m", model).stdout
    assert "int8          2:0:attn.qkv" in listed or "int8          1:0:attn.qkv" in listed
    masks = []
    for m, threads in ((tiny_model, 2), (model, 1), (model, 2)):
        out = tmp_path / f"segs{len(masks)}"
        assert run("segment", "-m", m, "-i", cases, "-o", out, "--threads", threads).returncode == 0
        masks.append(np.stack([np.load(p)["segs"] for p in sorted(out.iterdir())]))
    assert (masks[1] == masks[2]).all()
    assert (masks[0] == masks[1]).mean() > 0.8
    assert (masks[0] != masks[1]).any()


def test_bench_says_what_layers_are_computed_in(run, tiny_model, ranges, tmp_path):
    model = tmp_path / "m.safetensors"
    for scheme, named in (("full", "int8"), ("weights-only", "int8-weights"), ("0:*:*=int8", "fp32")):
        assert run("quantize", "-m", tiny_model, "-r", ranges, "-o", model, "--scheme", scheme).returncode == 0
        heading = run("bench", "-m", model, "--runs", 1).stdout.splitlines()[0]
        assert re.search(rf"runs, {named}( \(\d+ layers\)|$)", heading), heading
        assert json.loads(run("bench", "-m", model, "--runs", 1, "--json").stdout)["precision"].startswith(named)
    assert "fp32 (" in heading and "int8 (" in heading  # the last scheme mixes


def test_the_file_is_read_by_the_safetensors_library(run, tiny_model, ranges, tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    model = tmp_path / "int8.safetensors"
    assert run("quantize", "-m", tiny_model, "-r", ranges, "-o", model).returncode == 0
    before, after = (safetensors.load_file(path) for path in (tiny_model, model))
    name = "image_encoder.neck.0.weight"
    assert after[name].dtype == np.int8
    scale = after[f"{name}_scale"].reshape(-1, 1, 1, 1)
    factor = after["image_encoder.neck.0.input_factor"].reshape(-1, 1, 1)
    assert np.abs(after[name] * scale / factor - before[name]).max() <= 0.501 * (scale / factor).max()
    assert np.abs(after[name]).reshape(len(scale), -1).max(1).min() == 127
    # Weights with zeros enough may have become compressed.
    assert set(before) < {name.removesuffix("_values") for name in after}


def test_the_same_cases_give_the_same_ranges(run, tiny_model, cases, ranges, tmp_path):
    again = tmp_path / "again.json"
    assert run("calibrate", "-m", tiny_model, "-i", cases, "-o", again, "--threads", 1).returncode == 0
    assert again.read_text() == ranges.read_text()


@pytest.mark.parametrize("observer", ["min-max", "average", "percentile", "entropy"])
def test_observers(run, tiny_model, cases, observer, tmp_path):
    path = tmp_path / "ranges.json"
    assert run("calibrate", "-m", tiny_model, "-i", cases, "-o", path, "--observer", observer).returncode == 0
    assert json.loads(path.read_text())["observer"] == observer


def test_headroom(run, tiny_model, cases, tmp_path):
    found = []
    for part in ([], ["--headroom", "0"], ["--headroom", "1"]):
        path = tmp_path / "ranges.json"
        assert run("calibrate", "-m", tiny_model, "-i", cases, "-o", path, *part).returncode == 0
        found.append(json.loads(path.read_text())["layers"])
    assert list(found[0]) == list(found[1])
    for usual, seen, twice in zip(*(layers.values() for layers in found)):
        if isinstance(seen, dict):
            assert usual["factor"] == seen["factor"]
            usual, seen, twice = (layer["ranges"] for layer in (usual, seen, twice))
        np.testing.assert_allclose(usual, np.array(seen) * 1.25, rtol=1e-6)
        np.testing.assert_allclose(twice, np.array(seen) * 2, rtol=1e-6)


def test_histograms(run, tiny_model, cases, tmp_path):
    done = run("calibrate", "-m", tiny_model, "-i", cases, "-o", tmp_path / "r.json",
               "--plot", tmp_path / "histograms.svg")
    assert done.returncode == 0, done.stderr
    assert len(list(ElementTree.parse(tmp_path / "histograms.svg").iter())) > 100


def test_weights_are_rounded_by_second_moments(run, tiny_model, cases, ranges, tmp_path):
    numpy_files = pytest.importorskip("safetensors.numpy")
    moments, again = tmp_path / "moments.safetensors", tmp_path / "again.json"
    done = run("calibrate", "-m", tiny_model, "-i", cases, "-o", again, "--moments", moments)
    assert done.returncode == 0, done.stderr
    assert again.read_text() == ranges.read_text()
    weights = numpy_files.load_file(tiny_model)
    seen = numpy_files.load_file(moments)
    # The converter, which prunes by them, knows the model by the same number.
    assert model_file.read_safetensors(moments)[1]["model"] == model_file.fingerprint(weights)
    assert len(seen) == len(json.loads(again.read_text())["layers"])
    error = {}
    for kind, arguments in (("nearest", []), ("moments", ["--moments", moments])):
        model = tmp_path / f"{kind}.safetensors"
        done = run("quantize", "-m", tiny_model, "-o", model, "--scheme", "weights-only", *arguments)
        assert done.returncode == 0, done.stderr
        quantized = numpy_files.load_file(model)
        for name, second in seen.items():
            layer = name.removesuffix(".moments")
            if "upscaling" in layer:
                continue
            weight = weights[f"{layer}.weight"].astype(np.float64)
            scale = quantized[f"{layer}.weight_scale"].reshape(-1, *[1] * (weight.ndim - 1))
            off = (quantized[f"{layer}.weight"] * scale - weight).reshape(len(weight), -1)
            # Of the layer's output, over all that calibration saw.
            square = np.einsum("oi,oij,oj->" if second.ndim == 3 else "oi,ij,oj->", off, second.astype(np.float64), off)
            error.setdefault(layer, []).append(square)
    lost = np.array(list(error.values()))
    assert (lost[:, 1] <= 1.02 * lost[:, 0]).mean() > 0.9 and np.median(lost[:, 1] / lost[:, 0]) < 0.7

    assert "calibrate --moments" in run("quantize", "-m", tiny_model, "-o", tmp_path / "x", "--moments",
                                        tiny_model).stderr
    metadata = {"format": "microtome moments", "model": "0" * 16}
    numpy_files.save_file(seen, tmp_path / "other.safetensors", metadata)
    done = run("quantize", "-m", tiny_model, "-o", tmp_path / "x", "--moments", tmp_path / "other.safetensors")
    assert done.returncode == 1 and "another model" in done.stderr


def test_weights_only_needs_no_ranges(run, tiny_model, cases, tmp_path):
    model = tmp_path / "weights.safetensors"
    done = run("quantize", "-m", tiny_model, "-o", model, "--scheme", "weights-only")
    assert done.returncode == 0 and "in int8-weights" in done.stdout
    assert run("segment", "-m", model, "-i", cases, "-o", tmp_path / "segs").returncode == 0


def test_sensitivity_and_the_scheme_it_proposes(run, tiny_model, cases, ranges, tmp_path):
    table = tmp_path / "sensitivity.csv"
    done = run("sensitivity", "-m", tiny_model, "-r", ranges, "-i", cases, "-o", table, "--by", "stage",
               "--budget", "1", "--plot", tmp_path / "bars.svg")
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert {row["unit"] for row in rows} >= {"0:*:*", "neck:*:*", "decoder:*:*"}
    for row in rows:
        assert 0 <= float(row["dice_to_fp32"]) <= 1 and float(row["bytes_saved"]) > 0
    ElementTree.parse(tmp_path / "bars.svg")
    proposed = done.stdout.splitlines()[-1].split(": ", 1)[1]
    done = run("quantize", "-m", tiny_model, "-r", ranges, "-o", tmp_path / "m.safetensors", "--scheme", proposed)
    assert done.returncode == 0, done.stderr


def read_rows(table):
    return {row["unit"]: row for row in csv.DictReader(table.read_text().splitlines())}


def test_sensitivity_goes_on_where_it_was_interrupted(run, program, tiny_model, cases, ranges, tmp_path):
    arguments = ["sensitivity", "-m", tiny_model, "-r", ranges, "-i", cases, "-o", tmp_path / "s.csv", "--by", "block",
                 "--budget", "1"]
    whole = run(*arguments)
    assert whole.returncode == 0 and [p.name for p in tmp_path.glob("s.csv*")] == ["s.csv"], whole.stderr
    rows = read_rows(tmp_path / "s.csv")
    (tmp_path / "s.csv").unlink()
    progress = tmp_path / "s.csv.progress"
    with subprocess.Popen([program, *map(str, arguments)], stdout=subprocess.DEVNULL) as process:
        while not progress.exists() or progress.read_text().count("\n") < 4:
            time.sleep(0.002)
        process.kill()
    left = progress.read_text().splitlines()
    assert not (tmp_path / "s.csv").exists()
    # What is taken from the file is not measured again: the third line is a lie now.
    number, scheme = left[2].rsplit(",", 1)
    left[2] = "0.5,0.25,0.125,7," + scheme
    progress.write_text("\n".join(left) + "\n0.5,")
    again = run(*arguments)
    assert again.returncode == 0 and f"goes on after {len(left) - 1} measurements" in again.stdout, again.stderr
    lied = read_rows(tmp_path / "s.csv")
    unit = scheme.removesuffix("=int8")
    assert lied[unit].pop("dice_to_fp32") == "0.250000" != rows[unit].pop("dice_to_fp32")
    for name in rows.keys() - {unit}:
        assert lied[name]["dice_to_fp32"] == rows[name]["dice_to_fp32"]
    assert rows.keys() == lied.keys() and len(rows) > 5 and not progress.exists()
    # Measurements of something else are not taken.
    progress.write_text("\n".join(["something else", *left[1:]]) + "\n")
    other = run(*arguments)
    assert other.returncode == 0 and "begun anew" in other.stderr
    assert read_rows(tmp_path / "s.csv")[unit]["dice_to_fp32"] != "0.250000"


def test_a_budget_keeps_layers_in_fp32(run, tiny_model, cases, ranges, tmp_path):
    done = run("sensitivity", "-m", tiny_model, "-r", ranges, "-i", cases, "-o", tmp_path / "s.csv", "--by",
               "stage", "--budget", "0")
    assert done.returncode == 0, done.stderr
    *_, tried, said = done.stdout.splitlines()
    # In the end every stage is in fp32, which loses nothing.
    assert said.startswith("scheme within 0.0000"), said
    assert float(tried.split("loss ")[1].split(",")[0]) <= 0


def test_bad_input_is_named(run, tiny_model, cases, ranges, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    out = tmp_path / "out.safetensors"

    def complaint(*arguments):
        done = run(*arguments)
        assert done.returncode in (1, 2), done.stdout
        assert not out.exists()
        return done.stderr

    assert "no .npz cases" in complaint("calibrate", "-m", tiny_model, "-i", empty, "-o", tmp_path / "r")
    assert "turbo" in complaint("quantize", "-m", tiny_model, "-r", ranges, "-o", out, "--scheme", "turbo")
    assert "no layer" in complaint(
        "quantize", "-m", tiny_model, "-r", ranges, "-o", out, "--scheme", "full, 7:*:*=fp32")
    assert "needs ranges" in complaint("quantize", "-m", tiny_model, "-o", out)

    found = json.loads(ranges.read_text())

    def with_ranges(change):
        changed = json.loads(json.dumps(found))
        change(changed)
        path = tmp_path / "changed.json"
        path.write_text(json.dumps(changed))
        return complaint("quantize", "-m", tiny_model, "-r", path, "-o", out)

    layer = "image_encoder.layers.1.blocks.0.attn.qkv"
    assert "factor" in found["layers"][layer]
    assert "another model" in with_ranges(lambda r: r.update(model="0" * 16))
    assert "format" in with_ranges(lambda r: r.update(format="other"))
    assert layer in with_ranges(lambda r: r["layers"].update({layer: [1, 2]}))
    assert layer in with_ranges(lambda r: r["layers"].update({layer: [0, 0]}))
    assert layer in with_ranges(lambda r: r["layers"].update({layer: "wide"}))
    assert layer in with_ranges(lambda r: r["layers"].update({layer: [-1, 1e39]}))
    assert layer in with_ranges(lambda r: r["layers"][layer].update(factor=[1, 0]))
    assert layer in with_ranges(lambda r: r["layers"][layer].update(factor="large"))
    assert "2 factors" in with_ranges(lambda r: r["layers"][layer].update(factor=[1, 0.5]))
    assert "2 ranges" in with_ranges(lambda r: r["layers"].update({layer: [[-1, 1], [-2, 2]]}))
    assert "layers" in with_ranges(lambda r: r.pop("layers"))
    (tmp_path / "text.json").write_text("{")
    assert "not JSON" in complaint("quantize", "-m", tiny_model, "-r", tmp_path / "text.json", "-o", out)


def test_a_model_is_not_replaced_by_its_quantised_self(run, tiny_model, tmp_path):
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(tiny_model.read_bytes())
    done = run("quantize", "-m", copy, "-o", copy, "--scheme", "weights-only")
    assert done.returncode == 2 and "replace" in done.stderr
    assert copy.read_bytes() == tiny_model.read_bytes()


def test_activations_that_are_always_zero(run, tiny_model, cases, tmp_path):
    """With the neck's first convolution zero, what follows its norm is not; with gamma and beta zero, it is."""
    safetensors = pytest.importorskip("safetensors")
    numpy_files = pytest.importorskip("safetensors.numpy")
    tensors = numpy_files.load_file(tiny_model)
    with safetensors.safe_open(tiny_model, "np") as file:
        metadata = file.metadata()
    for part in ("weight", "bias"):
        tensors[f"image_encoder.neck.1.{part}"] = np.zeros_like(tensors[f"image_encoder.neck.1.{part}"])
    numpy_files.save_file(tensors, tmp_path / "zero.safetensors", metadata)
    done = run("calibrate", "-m", tmp_path / "zero.safetensors", "-i", cases, "-o", tmp_path / "r.json")
    assert done.returncode == 1
    assert "image_encoder.neck.2" in done.stderr and "0 throughout" in done.stderr


def test_damaged_scales_are_named(run, tiny_model, cases, ranges, tmp_path):
    safetensors = pytest.importorskip("safetensors")
    numpy_files = pytest.importorskip("safetensors.numpy")
    model = tmp_path / "int8.safetensors"
    assert run("quantize", "-m", tiny_model, "-r", ranges, "-o", model).returncode == 0
    with safetensors.safe_open(model, "np") as file:
        metadata = file.metadata()
    layer = "image_encoder.neck.0"
    channels = numpy_files.load_file(model)[f"{layer}.input_factor"].size
    for name, value, said in (
        (f"{layer}.input_scale", np.float32([0]), "expected"),
        (f"{layer}.input_scale", np.float32([np.nan]), "finite"),
        (f"{layer}.input_zero_point", np.float32([300]), "0 to 255"),
        (f"{layer}.input_zero_point", np.float32([1.5]), "whole"),
        (f"{layer}.input_factor", np.float32([1, 2]), "shape"),
        (f"{layer}.input_factor", np.zeros(channels, np.float32), "1e-20"),
        (f"{layer}.input_factor", np.full(channels, 2e-20, np.float32), "times"),
        (f"{layer}.weight_scale", np.float32([1, 2]), "shape"),
        (f"{layer}.weight", None, "-128"),
    ):
        tensors = numpy_files.load_file(model)
        if value is None:
            value = tensors[name].copy()
            value.flat[3] = -128
        tensors[name] = value
        damaged = tmp_path / "damaged.safetensors"
        numpy_files.save_file(tensors, damaged, metadata)
        done = run("segment", "-m", damaged, "-i", cases, "-o", tmp_path / "segs")
        assert done.returncode == 1
        assert name in done.stderr and said in done.stderr, done.stderr
