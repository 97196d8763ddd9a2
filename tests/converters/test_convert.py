"""The converter against the PyTorch reference: same keys, same numbers, clear complaints."""

import json
import struct

import numpy as np
import pytest
import safetensors.numpy
import torch

import architecture
import checkpoint
import convert
import sam
import seeded_weights
import tiny_vit

CONFIGS = {
    "LiteMedSAM": seeded_weights.LITE_MEDSAM,
    "another TinyViT": architecture.upgraded(dict(
        image_size=32,
        pixel_channels=3,
        stages=[
            dict(kind="conv", dim=8, depth=1, expand=3, stride=2),
            dict(kind="attention", dim=12, depth=1, heads=3, window=4, mlp_ratio=2, stride=1),
            dict(kind="attention", dim=320, depth=1, heads=2, window=3, mlp_ratio=1),
        ],
        embed_dim=64,
        mask_in_chans=8,
        decoder=dict(depth=1, heads=8, mlp_dim=48, attention_downsample=2, multimask_outputs=2,
                     iou_hidden=24, iou_depth=2),
    )),
}
# The stride is read off the next width: only 320, 448 and 576 keep the resolution.
CONFIGS["another TinyViT"]["image_encoder"]["stages"][1]["stride"] = 1


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


@pytest.fixture(scope="module")
def state():
    return seeded_weights.seeded_state(seeded_weights.LITE_MEDSAM, 1)


def test_configuration_is_read_off_the_shapes(config):
    shapes = architecture.expected_shapes(config)
    assert architecture.infer_config(shapes, config["image_encoder"]["image_size"]) == config


def test_the_reference_has_the_expected_keys(config):
    model = sam.Sam(config)
    own = {k: tuple(v.shape) for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    assert own == architecture.expected_shapes(config)


def test_the_reference_loads_the_original_keys(golden_folder):
    state = torch.load(golden_folder / "lite_medsam_s20.pth")
    config = architecture.infer_config({k: tuple(v.shape) for k, v in state.items()})
    assert config == seeded_weights.LITE_MEDSAM
    sam.Sam(config).load_state_dict(state, strict=True)


def test_the_reference_answers_as_the_original(golden_folder):
    state = torch.load(golden_folder / "lite_medsam_s20.pth")
    golden = np.load(golden_folder / "lite_medsam_s20.npz")
    model = sam.Sam(seeded_weights.LITE_MEDSAM).eval()
    model.load_state_dict(state)
    with torch.no_grad():
        embedding = model.image_encoder(torch.tensor(golden["input"]))
        masks, iou = model.decode(embedding, boxes=torch.tensor(golden["boxes256"]).float())
        points, point_iou = model.decode(
            embedding,
            multimask=True,
            points=torch.tensor(golden["point.coords"]).float(),
            labels=torch.tensor(golden["point.labels"]),
            masks=torch.tensor(golden["point.mask_input"]),
        )
    assert np.abs(embedding.numpy() - golden["image_embedding"]).max() < 1e-4
    assert np.abs(masks.numpy() - golden["low_res_masks"]).max() < 1e-3
    assert np.abs(iou.numpy() - golden["iou"]).max() < 1e-4
    assert np.abs(points.numpy() - golden["point.low_res_masks"]).max() < 1e-3
    assert np.abs(point_iou.numpy() - golden["point.iou"]).max() < 1e-4


def test_folded_batch_norm_computes_the_same():
    torch.manual_seed(0)
    pair = tiny_vit.Conv2dBN(5, 7, 3)
    with torch.no_grad():
        pair.bn.weight.normal_()
        pair.bn.bias.normal_()
        pair.bn.running_mean.normal_()
        pair.bn.running_var.uniform_(1e-3, 2)
    pair.eval()
    folded = convert.fold_batch_norm({f"x.{k}": v.numpy() for k, v in pair.state_dict().items()}, 1e-5)
    assert sorted(folded) == ["x.c.bias", "x.c.weight"]
    x = torch.randn(1, 5, 8, 9)
    got = torch.nn.functional.conv2d(
        x, torch.tensor(folded["x.c.weight"]), torch.tensor(folded["x.c.bias"]), padding=1
    )
    torch.testing.assert_close(got, pair(x).detach(), rtol=1e-4, atol=1e-4)


def write_checkpoint(path, state):
    torch.save({k: torch.tensor(v) for k, v in state.items()}, path)
    return path


def test_the_file_is_read_by_the_safetensors_library(tmp_path, state):
    source = write_checkpoint(tmp_path / "x.pth", state)
    output = tmp_path / "x.safetensors"
    assert convert.main([str(source), "-o", str(output)]) == 0
    tensors = safetensors.numpy.load_file(output)
    expected = convert.fold_batch_norm(state, 1e-5)
    assert tensors.keys() == expected.keys()
    assert all(np.array_equal(tensors[k], expected[k]) for k in expected)
    raw = output.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    assert (8 + length) % 64 == 0
    metadata = json.loads(raw[8 : 8 + length])["__metadata__"]
    assert metadata["model"] == "lite_medsam"
    assert json.loads(metadata["config"]) == seeded_weights.LITE_MEDSAM


def failure(tmp_path, capsys, state):
    source = write_checkpoint(tmp_path / "x.pth", state)
    output = tmp_path / "y.safetensors"
    assert convert.main([str(source), "-o", str(output)]) == 1
    assert not output.exists() and len(list(tmp_path.iterdir())) == 1
    message = capsys.readouterr().err
    assert "x.pth" in message
    return message


def test_problems_are_all_named(tmp_path, capsys, state):
    state = dict(state)
    del state["mask_decoder.iou_token.weight"]
    state["image_encoder.extra.weight"] = np.zeros((2, 2), np.float32)
    state["image_encoder.neck.1.bias"] = np.zeros(255, np.float32)
    message = failure(tmp_path, capsys, state)
    assert "missing: mask_decoder.iou_token.weight (1, 256)" in message
    assert "unexpected: image_encoder.extra.weight (2, 2)" in message
    assert "mis-shaped: image_encoder.neck.1.bias is (255,), expected (256,)" in message


def lightning(state):
    """What Lightning saves of a module that has the model as a member, a loss with weights, and a metric."""
    beside = {"loss_fn.weight": np.ones(2, np.float32), "metric.total": np.int64(3)}
    return {f"model.{name}": value for name, value in state.items()} | beside


def test_a_model_beside_other_members(tmp_path, capsys, state):
    source, output = write_checkpoint(tmp_path / "x.pth", lightning(state)), tmp_path / "x.safetensors"
    assert convert.main([str(source), "-o", str(output)]) == 0
    said = f"{source}: left out, as they are not below 'model.': 'loss_fn.weight', 'metric.total'"
    assert said in capsys.readouterr().err
    expected = convert.fold_batch_norm(state, 1e-5)
    tensors = safetensors.numpy.load_file(output)
    assert tensors.keys() == expected.keys() and all(np.array_equal(tensors[k], expected[k]) for k in expected)


def test_a_model_beside_other_members_that_is_not_whole(tmp_path, capsys, state):
    name = "mask_decoder.iou_token.weight"
    rest = {k: v for k, v in state.items() if k != name}
    assert f"missing: {name} (1, 256)" in failure(tmp_path, capsys, lightning(rest))
    (tmp_path / "x.pth").unlink()
    assert "more than one place" in failure(tmp_path, capsys, lightning(rest) | {name: state[name]})


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite(tmp_path, capsys, state, bad):
    name = "image_encoder.layers.1.blocks.0.mlp.fc1.weight"
    weight = state[name].copy()
    weight[3, 4] = bad
    assert name in failure(tmp_path, capsys, {**state, name: weight})


def test_integer_weights(tmp_path, capsys, state):
    name = "image_encoder.neck.0.weight"
    assert name in failure(tmp_path, capsys, {**state, name: state[name].astype(np.int32)})


def test_a_negative_variance(tmp_path, capsys, state):
    name = "image_encoder.patch_embed.seq.0.bn.running_var"
    assert name in failure(tmp_path, capsys, {**state, name: -state[name]})


def test_another_model(tmp_path, capsys):
    assert "no known image encoder" in failure(tmp_path, capsys, {"fc.weight": np.zeros((2, 2), np.float32)})


def test_an_output_folder_that_is_missing(tmp_path, capsys, state):
    source = write_checkpoint(tmp_path / "x.pth", state)
    assert convert.main([str(source), "-o", str(tmp_path / "no" / "y.safetensors")]) == 1
    assert "no" in capsys.readouterr().err


def test_half_precision_checkpoints(tmp_path, state):
    halves = {k: v.astype(np.float16) for k, v in state.items()}
    source = write_checkpoint(tmp_path / "x.pth", halves)
    tensors, _ = convert.convert(checkpoint.load(source))
    assert all(v.dtype == np.float32 for v in tensors.values())


def test_storage_in_16_bits(tmp_path, state):
    source, target = write_checkpoint(tmp_path / "x.pth", state), tmp_path / "y.safetensors"
    assert convert.main([str(source), "-o", str(target), "--storage", "fp16"]) == 0
    assert target.stat().st_size < 20.5e6
    wide, _ = convert.convert(state)
    for name, value in safetensors.numpy.load_file(target).items():
        if value.size < 4096:
            assert value.dtype == np.float32, name
        np.testing.assert_allclose(value.astype(np.float32), wide[name], rtol=2**-11, atol=2**-25)


def test_weights_too_large_for_16_bits(tmp_path, capsys, state):
    name = "image_encoder.neck.0.weight"
    weight = state[name].copy()
    weight[3, 4] = 7e4
    source = write_checkpoint(tmp_path / "x.pth", {**state, name: weight})
    assert convert.main([str(source), "-o", str(tmp_path / "y.safetensors"), "--storage", "fp16"]) == 1
    assert name in capsys.readouterr().err
