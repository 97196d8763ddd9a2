"""Every model of the family: recognised by its keys, told apart, and the PyTorch reference of each."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

import architecture
import convert
import make_data
import model_file
import sam
import seeded_weights
from conftest import SHARED

NAMES = {
    "l0": "efficientvit_sam_l0", "l1": "efficientvit_sam_l1", "l2": "efficientvit_sam_l2",
    "xl0": "efficientvit_sam_xl0", "xl1": "efficientvit_sam_xl1", "mobile_sam": "mobile_sam",
}


def original_shapes(name):
    path = SHARED / "golden" / f"keys_{name}.json"
    if not path.exists():
        pytest.skip(f"no {path}")
    return {key: tuple(shape) for key, shape in json.loads(path.read_text()).items()}


def needed(shapes):
    return {key: shape for key, shape in shapes.items() if not architecture.ignored(key)}


@pytest.mark.parametrize("name", NAMES)
def test_the_original_keys_are_recognised(name):
    shapes = needed(original_shapes(name))
    config = architecture.infer_config(shapes)
    assert architecture.expected_shapes(config) == shapes
    assert architecture.model_name(config) == NAMES[name]
    side = 512 if name in ("l0", "l1", "l2") else 1024
    assert config["image_encoder"]["image_size"] == side and config["input"]["frame"] == 1024
    assert config["input"]["resize"] == "antialiased" and config["input"]["coordinates"] == "exact"
    assert config["decoder"]["norm_epsilon"] == (1e-5 if name == "mobile_sam" else 1e-6)
    with torch.device("meta"):  # shapes alone
        model = sam.Sam(config)
    own = {k: tuple(v.shape) for k, v in model.state_dict().items() if not architecture.ignored(k)}
    assert own == shapes


@pytest.mark.parametrize("name", ["l0", "mobile_sam"])
def test_the_reference_answers_as_the_original(tmp_path, golden_folder, name):
    checkpoint = tmp_path / "x.pth"
    subprocess.run([sys.executable, golden_folder / "make_checkpoint.py", golden_folder / f"keys_{name}.json",
                    "-o", checkpoint], check=True, stdout=subprocess.DEVNULL)
    state = torch.load(checkpoint)
    state = {k: v for k, v in state.items() if not architecture.ignored(k) or k.endswith("num_batches_tracked")}
    config = architecture.infer_config({k: tuple(v.shape) for k, v in state.items()})
    model = sam.Sam(config).eval()
    model.load_state_dict(state, strict=True)
    golden = np.load(golden_folder / f"{NAMES[name]}.npz")
    side = config["image_encoder"]["image_size"]
    resized = torch.tensor(np.load(golden_folder / f"input_{side}.npz")["resized"]).float()
    resized = resized[..., None].expand(-1, -1, 3) if resized.ndim == 2 else resized
    policy = config["input"]
    pixels = (resized - torch.tensor(policy["mean"])) / torch.tensor(policy["deviation"])
    image = torch.zeros(1, 3, side, side)
    image[0, :, : pixels.shape[0], : pixels.shape[1]] = pixels.permute(2, 0, 1)
    with torch.no_grad():
        embedding = model.image_encoder(image)
        masks, iou = model.decode(embedding, boxes=torch.tensor(golden["boxes.scaled"]))
    found = embedding.flatten()[torch.tensor(golden["image_embedding.index"]).long()].numpy()
    assert np.abs(found - golden["image_embedding.value"]).max() < 2e-5
    assert np.abs(masks.numpy() - golden["boxes.low_res_masks"]).max() < 2e-4
    assert np.abs(iou.numpy() - golden["boxes.iou"]).max() < 2e-4


@pytest.fixture(scope="module")
def small():
    """An EfficientViT-SAM of 150 000 weights."""
    return seeded_weights.seeded_state(make_data.EFFICIENTVIT, 4)


def refused(tmp_path, capsys, state):
    path = tmp_path / "x.pth"
    torch.save({k: torch.tensor(v) for k, v in state.items()}, path)
    assert convert.main([str(path), "-o", str(tmp_path / "x.safetensors")]) == 1
    assert not (tmp_path / "x.safetensors").exists()
    return capsys.readouterr().err


def test_a_checkpoint_of_a_mixed_kind(tmp_path, capsys, small):
    tiny = seeded_weights.seeded_state(make_data.CONFIG, 3)
    assert "several image encoders" in refused(tmp_path, capsys, tiny | small)


def test_a_checkpoint_of_another_encoder(tmp_path, capsys, small):
    other = {k.replace("image_encoder.backbone.stages", "image_encoder.blocks"): v for k, v in small.items()}
    message = refused(tmp_path, capsys, other)
    assert "no known image encoder" in message and "efficientvit, tiny_vit" in message


def test_what_is_missing_is_named(tmp_path, capsys, small):
    name = "image_encoder.backbone.stages.3.op_list.1.context_module.main.aggreg.0.0.weight"
    assert name in refused(tmp_path, capsys, {k: v for k, v in small.items() if k != name})
    name = "image_encoder.neck.input_ops.1.op_list.0.norm.running_var"
    message = refused(tmp_path, capsys, {k: v for k, v in small.items() if k != name})
    assert "image_encoder.neck.input_ops.1.op_list.0" in message


def test_the_epsilon_of_batch_norm_is_the_encoders(small):
    tensors, _ = convert.convert(small, make_data.EFFICIENTVIT)
    name = "image_encoder.backbone.stages.0.op_list.0"
    gamma, variance = (small[f"{name}.norm.{part}"].astype(np.float64) for part in ("weight", "running_var"))
    expected = small[f"{name}.conv.weight"] * (gamma / np.sqrt(variance + 1e-6))[:, None, None, None]
    assert np.abs(tensors[f"{name}.conv.weight"] - expected).max() < 1e-7
    assert not any("norm.running" in key for key in tensors)


def test_a_model_file_is_read_again(tmp_path, small):
    tensors, config = convert.convert(small, make_data.EFFICIENTVIT)
    model_file.write(tmp_path / "m.safetensors", tensors, config)
    again, read, metadata = model_file.read(tmp_path / "m.safetensors")
    assert read == make_data.EFFICIENTVIT and metadata["model"] == "efficientvit_sam"
    assert again.keys() == tensors.keys()
