"""Training that goes on from given weights: zeros stay zeros, and the loss falls."""

import argparse
import contextlib
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

import checkpoint
import convert
import held_zeros
import load_weights
import model_file
import pruning
import seeded_weights
import train
from conftest import ROOT
from test_pruning import CONFIG, SIDE

TRAIN = ROOT / "converters" / "demo" / "train.py"
FC = "image_encoder.layers.1.blocks.1.mlp.fc1.weight"
CONV = "image_encoder.layers.0.blocks.1.conv1"


@pytest.fixture(scope="module")
def state():
    return seeded_weights.seeded_state(CONFIG, seed=3)


@pytest.fixture
def pruned(tmp_path, state):
    """A model file with half of its weights zero."""
    path = tmp_path / "pruned.safetensors"
    zeroed, _, _ = pruning.prune(state, [], pruning.Choices(0.5))
    model_file.write(path, *convert.convert(zeroed, CONFIG), pruning="global 0.5")
    return path


def run(*arguments, lines=None):
    """Runs a training to its end, or asks it to stop after so many lines; returns its exit code and what
    it said in its errors."""
    command = [sys.executable, TRAIN, "--sides", f"{SIDE}:1", "--batch", "2", "--prompts", "4", "--report", "5",
               "--workers", "0", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            for _ in range(lines or 0):
                assert process.stdout.readline()
            if lines:
                process.send_signal(signal.SIGTERM)
            _, said = process.communicate(timeout=120)
        finally:
            process.kill()
    return process.returncode, said


def zeros(tensors):
    return {n: np.asarray(w) == 0 for n, w in pruning.layers(tensors).items()}


@torch.no_grad()
def loss_of(tensors):
    """The mean loss of a state dict, whose BatchNorms are folded, on some of the images of training."""
    model = load_weights.build(CONFIG, tensors).eval()
    model.load_state_dict({n: torch.as_tensor(v) for n, v in tensors.items()})
    data = train.Scenes(1, SIDE, 4)
    losses = []
    for i in range(12):
        pixels, masks, boxes, _, _ = data[i]
        embedding = model.image_encoder(pixels[None]).expand(4, -1, -1, -1)
        losses.append(train.mask_losses(model.decode(embedding, boxes=boxes)[0], masks)[0].mean().item())
    return np.mean(losses)


def test_the_loss_falls(tmp_path, pruned):
    options = argparse.Namespace(seed=1, output=tmp_path / "none.pth", rate=2e-3, finetune=pruned, hold_zeros=True)
    training = train.Training(options, torch.device("cpu"))
    before, _, _ = model_file.read(pruned)
    data = train.Scenes(1, SIDE, 4)
    for i in range(24):
        batch = [t[None] for t in data[i]]
        loss, _ = train.step_loss(training.model, training.dense, batch, False, contextlib.nullcontext())
        training.descend(loss, 2e-3)
    after = training.model.state_dict()
    assert loss_of(after) < 0.97 * loss_of(before)
    for name, was in zeros(before).items():
        assert np.array_equal(after[f"{name}.weight"].numpy() == 0, was), name


def test_zeros_stay_zeros_after_an_interruption(tmp_path, pruned):
    saved = tmp_path / "state.pth"
    arguments = ["-o", saved, "--finetune", pruned, "--hold-zeros", "--rate", "2e-3"]
    assert run(*arguments, "--minutes", 5, lines=1) == (0, "")
    first = torch.load(saved)
    assert first["step"] >= 5 and first["seconds"] < 100
    minutes = (first["seconds"] + 5) / 60
    assert run(*arguments, "--minutes", minutes) == (0, "")
    second = torch.load(saved)
    assert second["step"] > first["step"] and second["curve"][: len(first["curve"])] == first["curve"]
    assert 60 * minutes <= second["seconds"] < 60 * minutes + 30

    before, _, _ = model_file.read(pruned)
    for tensors in (second["model"], second["mean"]):
        assert tensors.keys() == before.keys()
        for name, was in zeros(before).items():
            weight = tensors[f"{name}.weight"].numpy()
            assert (weight[was] == 0).all() and (weight[~was] != 0).all(), name
            learns = name.startswith("image_encoder.")  # nothing asks for mask prompts
            assert not learns or (weight != before[f"{name}.weight"])[~was].any(), name

    assert run("-o", saved, "--export", tmp_path / "e.pth") == (0, "")
    target = tmp_path / "tuned.safetensors"
    assert convert.main([str(tmp_path / "e.pth"), "-o", str(target), "--image-size", str(SIDE)]) == 0
    after, config, metadata = model_file.read(target)
    assert config == CONFIG and metadata["pruning"] == "found in the checkpoint"
    assert all(np.array_equal(after[n], second["mean"][n].numpy()) for n in after)


def test_options_that_make_no_sense(tmp_path, pruned):
    code, said = run("-o", tmp_path / "x.pth", "--hold-zeros")
    assert code == 2 and "--hold-zeros needs --finetune" in said
    torch.save({"dense": {}, "model": {}}, tmp_path / "x.pth")
    code, said = run("-o", tmp_path / "x.pth", "--finetune", pruned)
    assert code == 1 and "x.pth is no fine-tuning" in said


def test_zeros_that_an_optimizer_moves(state):
    model = load_weights.build(CONFIG, state)
    weight = model.get_parameter(FC)
    token = model.mask_decoder.iou_token.weight
    with torch.no_grad():
        weight[::2] = 0
        token[:] = 0
    held = held_zeros.HeldZeros(model)
    weight.grad = torch.ones_like(weight)
    held.clear_gradients()
    assert not weight.grad[::2].any() and weight.grad[1::2].all()
    with torch.no_grad():
        weight += 1
        token += 1
    held.clear_weights()
    assert not weight[::2].any() and weight[1::2].all() and token.all()


def test_the_reference_with_given_weights(tmp_path, state):
    """The same from a checkpoint, from one whose BatchNorms are folded, and from a model file."""
    torch.manual_seed(1)
    folded = convert.fold_batch_norm(state)
    partly = {n: v for n, v in state.items() if not n.startswith(f"{CONV}.")}
    partly |= {n: v for n, v in folded.items() if n.startswith(f"{CONV}.")}
    plain = load_weights.build(CONFIG, state)
    plain.load_state_dict({n: torch.tensor(v) for n, v in state.items()}, strict=False)
    image, boxes = torch.rand(1, 3, SIDE, SIDE), torch.tensor([[5.0, 6, 40, 50]])
    with torch.no_grad():
        expected, _ = plain.eval()(image, boxes)
    for name, tensors in (("state", state), ("folded", folded), ("partly", partly)):
        torch.save({k: torch.tensor(v) for k, v in tensors.items()}, tmp_path / f"{name}.pth")
    model_file.write(tmp_path / "model.safetensors", folded, CONFIG)
    for name in ("state.pth", "folded.pth", "partly.pth", "model.safetensors"):
        config, read = load_weights.read(tmp_path / name)
        assert {**config, "image_size": SIDE} == CONFIG  # a checkpoint does not tell the size
        model = load_weights.build(CONFIG, read)
        model.load_state_dict(read, strict=False)
        with torch.no_grad():
            found, _ = model.eval()(image, boxes)
        assert (found - expected).abs().max() < 1e-4 * expected.std(), name
    assert load_weights.load(tmp_path / "model.safetensors").config == CONFIG
    pairs = pruning.joined(checkpoint.load(tmp_path / "state.pth"))
    pairs[f"{FC}_orig"] = pairs.pop(FC)
    pairs[f"{FC}_mask"] = np.zeros_like(pairs[f"{FC}_orig"])
    torch.save({k: torch.tensor(v) for k, v in pairs.items()}, tmp_path / "pairs.pth")
    assert not load_weights.load(tmp_path / "pairs.pth").get_parameter(FC).any()
