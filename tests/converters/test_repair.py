"""Pruning by second moments: how much less the layers' outputs err than by magnitudes, against exhaustive search and
exact least squares."""

import itertools

import numpy as np
import pytest

import convert
import model_file
import pruning
import quantized
import repair
from test_pruning import CONFIG, naive_two_of_four
import seeded_weights

CONV = "image_encoder.neck.2"
LINEAR = "image_encoder.layers.1.blocks.1.mlp.fc1"
UPSCALING = "mask_decoder.output_upscaling.0"


def moments_of(depth, seed=0):
    """Of inputs of which each is partly a mixture of few, as those of real layers are."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(500, max(2, depth // 3))) @ rng.normal(size=(max(2, depth // 3), depth))
    x = (x + rng.normal(size=x.shape)) * rng.uniform(0.1, 3, depth)
    return (x.T @ x / len(x)).astype(np.float32)


def error(weight, other, moments):
    """Of the output, relative to its size."""
    def energy(w):
        return np.einsum("oi,ij,oj->", w, moments, w, dtype=np.float64)

    return energy(other - weight) / energy(weight)


def least_squares(weight, zero, moments):
    """The best of all weights that are zero there."""
    best = np.zeros_like(weight, np.float64)
    for row, gone in enumerate(zero):
        kept = np.flatnonzero(~gone)
        best[row, kept] = np.linalg.solve(moments[np.ix_(kept, kept)], (moments @ weight[row])[kept])
    return best


def make(name, shape, seed=0):
    weight = np.random.default_rng(seed + 7).normal(size=shape).astype(np.float32)
    depth = shape[0] if quantized.out_axis(name) else int(np.prod(shape[1:]))
    moments = moments_of(depth, seed)
    return weight, moments, repair.Layer(name, weight, moments)


def test_nearly_the_best_of_all_choices():
    errors = []
    for seed in range(12):
        weight, moments, layer = make(LINEAR, (1, 9), seed)
        found = layer.pruned(repair.smallest(5 / 9))
        assert (found == 0).sum() == 5
        every = []
        for gone in itertools.combinations(range(9), 5):
            zero = np.zeros((1, 9), bool)
            zero[0, list(gone)] = True
            every.append(error(weight, least_squares(weight, zero, moments), moments))
        errors.append((error(weight, found, moments), min(every), np.median(every)))
    found, least, median = np.sum(errors, axis=0)
    assert least <= found < 1.7 * least and found < 0.4 * median


@pytest.mark.parametrize("name, shape", [(LINEAR, (37, 53)), (CONV, (19, 13, 3, 3)), (UPSCALING, (45, 11, 2, 2))])
@pytest.mark.parametrize("fraction", [0.2, 0.5, 0.8])
def test_weights_that_stay_make_up_for_the_others(name, shape, fraction):
    weight, moments, layer = make(name, shape)
    found = layer.pruned(repair.smallest(fraction))
    assert found.shape == weight.shape and found.dtype == np.float32
    assert (found == 0).sum() == round(fraction * weight.size)

    def rows(w):
        return w.reshape(len(w), -1).T if quantized.out_axis(name) else w.reshape(len(w), -1)

    by_magnitude = np.where(pruning.smallest(np.abs(weight).ravel(), fraction).reshape(shape), 0, weight)
    best = least_squares(rows(weight), rows(found) == 0, moments)
    assert error(rows(weight), rows(found), moments) < 0.5 * error(rows(weight), rows(by_magnitude), moments)
    assert error(rows(weight), rows(found), moments) < 1.1 * error(rows(weight), best, moments) + 1e-6


@pytest.mark.parametrize("name, shape", [(LINEAR, (17, 24)), (LINEAR, (17, 27)), (CONV, (9, 14, 3, 3)),
                                         (UPSCALING, (22, 5, 2, 2))])
def test_two_of_four_along_the_inputs(name, shape):
    weight, moments, layer = make(name, shape)
    found = layer.pruned(repair.two_of_four(layer.inputs))
    axis = 1 - quantized.out_axis(name)
    # Those that stay are what the pattern would leave of them.
    assert not (naive_two_of_four(found, axis) & (found != 0)).any()
    whole = shape[axis] // 4 * 4
    assert (np.moveaxis(found, axis, 0)[:whole] == 0).mean() == 0.5
    rows = (lambda w: w.reshape(len(w), -1).T) if quantized.out_axis(name) else lambda w: w.reshape(len(w), -1)
    by_magnitude = np.where(naive_two_of_four(weight, axis), 0, weight)
    assert error(rows(weight), rows(found), moments) < 0.6 * error(rows(weight), rows(by_magnitude), moments)


def test_fractions_are_spread_at_one_price():
    sizes = {"cheap": 1000, "dear": 3000, "in vain": 500}
    losses = {
        "cheap": [1e-4 * f**2 for f in repair.FRACTIONS],
        "dear": [f**2 for f in repair.FRACTIONS],
        "in vain": [0.0 for _ in repair.FRACTIONS],
    }
    for zeros in (900, 2000, 3500):
        chosen = repair.spread(losses, sizes, zeros)
        assert abs(sum(chosen[n] * sizes[n] for n in sizes) - zeros) <= 0.006 * sum(sizes.values())
        assert chosen["in vain"] >= chosen["cheap"] >= chosen["dear"]


# A model

@pytest.fixture(scope="module")
def tensors():
    return convert.convert(seeded_weights.seeded_state(CONFIG, seed=3), CONFIG)[0]


def write_moments(path, tensors, but=(), **changed):
    """Those of a model in which calibration did not see some layers."""
    seen = {}
    for name, weight in pruning.layers(tensors).items():
        if any(part in name for part in but):
            continue
        inputs = weight.shape[1 - quantized.out_axis(name)]
        depth = len(weight) if quantized.out_axis(name) else int(np.prod(weight.shape[1:]))
        seen[f"{name}.moments"] = moments_of(depth) if inputs > 1 else np.zeros((len(weight), 9, 9), np.float32)
    numpy_files = pytest.importorskip("safetensors.numpy")
    metadata = {"format": "microtome moments", "model": model_file.fingerprint(tensors)}
    numpy_files.save_file(seen | changed, path, metadata)
    return path


@pytest.fixture
def model(tmp_path, tensors):
    path = tmp_path / "model.safetensors"
    model_file.write(path, tensors, CONFIG)
    return path


@pytest.mark.parametrize("options, share, text", [
    (["--prune", "0"], 0, None),
    (["--prune", "0.3"], 0.3, "global 0.3, by moments"),
    (["--prune", "0.6", "--storage", "fp16"], 0.6, "global 0.6, by moments"),
    (["--prune", "0.4", "--prune-layerwise"], None, "per layer 0.4, by moments"),
    (["--prune-2-4", "--prune-keep", "*.qkv"], None, "2:4 but for *.qkv, by moments"),
])
def test_a_model_is_pruned_by_moments(tmp_path, capsys, tensors, model, options, share, text):
    moments = write_moments(tmp_path / "moments.safetensors", tensors, ["hypernetworks_mlps.1"])
    out = tmp_path / "out.safetensors"
    assert convert.main([str(model), "-o", str(out), "--calibration", str(moments), *options]) == 0
    pruned, config, metadata = model_file.read(out)
    said = capsys.readouterr().out
    assert config == CONFIG and metadata.get("pruning") == text and (not text or text in said)
    assert "3 layers that calibration did not see stay" in said
    for name, weight in pruning.layers(pruned).items():
        same = "hypernetworks_mlps.1" in name or weight.shape[1 - quantized.out_axis(name)] < 4 or (
            "--prune-keep" in options and name.endswith(".qkv"))
        before = tensors[f"{name}.weight"].astype(weight.dtype)
        assert not (same or share == 0) or np.array_equal(weight, before)
        if share is None and not same:
            gone = naive_two_of_four(weight, 1 - quantized.out_axis(name)) if "--prune-2-4" in options else None
            expected = round(0.4 * weight.size) if gone is None else gone.sum()
            assert (weight == 0).sum() == expected and (weight != before).any()
    if share is not None:
        assert abs(pruning.sparsity(pruned) - share) < 0.01
    for name in tensors:
        if name.removesuffix(".weight") not in pruning.layers(tensors):
            assert np.array_equal(pruned[name], tensors[name].astype(pruned[name].dtype))


def refused(tmp_path, capsys, model, moments, *options):
    out = tmp_path / "bad.safetensors"
    arguments = [str(model), "-o", str(out), "--calibration", str(moments), *(options or ("--prune", "0.5"))]
    assert convert.main(arguments) == 1 and not out.exists()
    message = capsys.readouterr().err
    assert str(moments) in message or "8 bits" in message or "--prune" in message
    return message


def test_moments_that_do_not_fit(tmp_path, capsys, tensors, model):
    path = tmp_path / "moments.safetensors"
    assert "No such file" in refused(tmp_path, capsys, model, path)
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    assert "not a safetensors file" in refused(tmp_path, capsys, model, path)
    assert "not a file of second moments" in refused(tmp_path, capsys, model, model)
    changed = dict(tensors, **{f"{LINEAR}.weight": -tensors[f"{LINEAR}.weight"]})
    write_moments(path, changed)
    message = refused(tmp_path, capsys, model, path)
    assert f"another model ({model_file.fingerprint(changed)}, but this one is {model_file.fingerprint(tensors)})" in message
    write_moments(path, tensors, **{f"{LINEAR}.moments": np.zeros((3, 3), np.float32)})
    assert f"{LINEAR}.moments has shape (3, 3), expected" in refused(tmp_path, capsys, model, path)
    depth = tensors[f"{LINEAR}.weight"].shape[1]
    write_moments(path, tensors, **{f"{LINEAR}.moments": np.full((depth, depth), np.nan, np.float32)})
    assert f"{LINEAR}.moments holds what is no moment" in refused(tmp_path, capsys, model, path)
    write_moments(path, tensors)
    assert "at most" in refused(tmp_path, capsys, model, path, "--prune", "1")


def test_calibration_without_pruning(tmp_path, capsys, model):
    with pytest.raises(SystemExit):
        convert.main([str(model), "-o", str(tmp_path / "x"), "--calibration", "moments"])
    assert "--calibration needs --prune or --prune-2-4" in capsys.readouterr().err
