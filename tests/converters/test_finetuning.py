"""Training that goes on from given weights: what it learns, what it holds, and what an interruption leaves."""

import os
import pathlib
import signal

import cv2
import numpy as np
import pytest
import torch

import checkpoint
import convert
import finetune
import labelled_cases
import load_weights
import model_file
import pruning
import sam
import seeded_weights
from test_labelled_cases import discs, image_of, write
from test_pruning import CONFIG, SIDE

FC = "image_encoder.layers.1.blocks.1.mlp.fc1.weight"
CONV = "image_encoder.layers.0.blocks.1.conv1"
CHOICES = {"half": pruning.Choices(0.5), "2:4": pruning.Choices(two_of_four=True)}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The small model has nothing to share among threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def state():
    return seeded_weights.seeded_state(CONFIG, seed=3)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory, state):
    """Model files {name of the pattern: path}."""
    paths = {}
    for name, choices in CHOICES.items():
        paths[name] = tmp_path_factory.mktemp("pruned") / f"{name[0]}.safetensors"
        zeroed, _, _ = pruning.prune(state, [], choices)
        model_file.write(paths[name], *convert.convert(zeroed, CONFIG), pruning=choices.text())
    return paths


@pytest.fixture(scope="module")
def original(tmp_path_factory, state):
    path = tmp_path_factory.mktemp("original") / "model.pth"
    torch.save({"model": {f"module.{n}": torch.tensor(v) for n, v in state.items()}, "epoch": 3}, path)
    return path


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """A folder with an image and a volume."""
    folder = tmp_path_factory.mktemp("cases")
    write(folder / "2D_image.npz", discs((70, 90), (30, 30), (65, 45)))
    volume = np.zeros((5, 60, 50), np.uint8)
    for z in (1, 2, 3):
        volume[z] = discs((60, 50), (22 + z, 33), radius=10)
    write(folder / "3D_volume.npz", volume)
    return folder


def tune(model, cases, output, *more):
    return finetune.main(["-m", str(model), "-i", str(cases), "-o", str(output), "--batch", "2", *map(str, more)])


def zeros(tensors):
    return {n: np.asarray(w) == 0 for n, w in pruning.layers(tensors).items()}


@torch.no_grad()
def loss_of(config, tensors, cases):
    model = load_weights.build(config, tensors).eval()
    model.load_state_dict({n: torch.tensor(v) for n, v in tensors.items()}, strict=False)
    parts = [s for path in labelled_cases.find([cases]) for s in labelled_cases.slices(labelled_cases.read(path), SIDE)]
    samples = [labelled_cases.sample(p, SIDE, 4, np.random.default_rng(i)) for i, p in enumerate(4 * parts)]
    return np.mean([finetune.image_loss(model, *map(torch.from_numpy, s)).item() for s in samples])


@pytest.mark.parametrize("pattern", CHOICES)
def test_the_loss_falls_and_zeros_stay(tmp_path, pruned, cases, capsys, pattern):
    output = tmp_path / "tuned.pth"
    assert tune(pruned[pattern], cases, output, "--hold-zeros", "--steps", 12, "--rate", 3e-3) == 0
    said = capsys.readouterr().out
    assert "2 cases, 4 images, 5 objects\n" in said and "are zero and stay so\n" in said and "step 12 of 12" in said
    before, _, _ = model_file.read(pruned[pattern])
    after = checkpoint.load(output)
    assert loss_of(CONFIG, after, cases) < 0.8 * loss_of(CONFIG, before, cases)
    assert after.keys() == before.keys()
    for name, was in zeros(before).items():
        weight = after[f"{name}.weight"]
        assert np.array_equal(weight == 0, was), name
        learns = name.startswith("image_encoder.")  # nothing asks for mask prompts
        assert not learns or (weight != before[f"{name}.weight"])[~was].any(), name
    assert [p.name for p in tmp_path.iterdir()] == ["tuned.pth"]

    target = tmp_path / "tuned.safetensors"
    assert convert.main([str(output), "-o", str(target), "--image-size", str(SIDE)]) == 0
    found, config, metadata = model_file.read(target)
    assert config == CONFIG and metadata["pruning"] == "found in the checkpoint"
    assert all(np.array_equal(found[n], after[n]) for n in after)


def test_a_checkpoint_keeps_its_names_and_its_statistics(tmp_path, original, state, cases):
    output = tmp_path / "tuned.pth"
    assert tune(original, cases, output, "--steps", 2, "--image-size", SIDE) == 0
    after = torch.load(output)
    sam.Sam(CONFIG).load_state_dict(after, strict=True)
    for part in ("running_mean", "running_var"):
        assert all(np.array_equal(after[n], v) for n, v in state.items() if n.endswith(part))
    assert (after[f"{CONV}.bn.weight"].numpy() != state[f"{CONV}.bn.weight"]).all()
    target = tmp_path / "tuned.safetensors"
    assert convert.main([str(output), "-o", str(target), "--image-size", str(SIDE)]) == 0


def test_zeros_that_are_not_held(tmp_path, pruned, cases, capsys):
    assert tune(pruned["half"], cases, tmp_path / "tuned.pth", "--steps", 2) == 0
    assert "without --hold-zeros they will not stay so" in capsys.readouterr().out
    assert pruning.sparsity(checkpoint.load(tmp_path / "tuned.pth")) < 0.1


def test_an_interruption_changes_nothing(tmp_path, monkeypatch, pruned, cases, capsys):
    arguments = pruned["half"], cases
    more = ["--hold-zeros", "--steps", 6, "--rate", 1e-3, "--validate", cases]
    assert tune(*arguments, tmp_path / "whole.pth", *more) == 0
    advance = finetune.Training.advance

    def interrupted(training):
        advance(training)
        if training.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    output = tmp_path / "parts.pth"
    with monkeypatch.context() as patch:
        patch.setattr(finetune.Training, "advance", interrupted)
        assert tune(*arguments, output, *more) == 128 + signal.SIGTERM
    assert {p.name for p in tmp_path.iterdir()} == {"whole.pth", "parts.pth.training"}
    assert torch.load(tmp_path / "parts.pth.training")["step"] == 2
    whole = capsys.readouterr().out.split("interrupted: the same command goes on")[0]

    assert tune(*arguments, output, *more[:-2], "--rate", 2e-3) == 1
    assert "of a training with another --validate, --rate" in capsys.readouterr().err
    assert tune(pruned["2:4"], cases / "2D_image.npz", output, *more) == 1
    assert "of a training with another -m, -i" in capsys.readouterr().err

    assert tune(*arguments, output, *more) == 0
    said = capsys.readouterr().out
    assert "goes on after step 2" in said and "Dice before" not in said
    lines = [line for line in whole.splitlines() if "Dice after" in line or "->" in line]
    assert len(lines) == 3 and all(line in said for line in lines)
    assert {p.name for p in tmp_path.iterdir()} == {"whole.pth", "parts.pth"}
    first, second = (checkpoint.load(tmp_path / f"{n}.pth") for n in ("whole", "parts"))
    assert first.keys() == second.keys() and all(np.array_equal(first[n], second[n]) for n in first)


def test_an_interruption_while_it_measures(tmp_path, monkeypatch, pruned, cases):
    measure = finetune.case_dice
    calls = []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 3:  # the first of the cases after the training
            os.kill(os.getpid(), signal.SIGINT)
        return measure(*arguments)

    monkeypatch.setattr(finetune, "case_dice", interrupted)
    output = tmp_path / "t.pth"
    more = ["--steps", 1, "--validate", cases]
    assert tune(pruned["half"], cases, output, *more) == 128 + signal.SIGINT
    assert len(calls) == 3 and {p.name for p in tmp_path.iterdir()} == {"t.pth", "t.pth.training"}
    trained = output.read_bytes()
    assert tune(pruned["half"], cases, output, *more) == 0
    assert len(calls) == 5 and [p.name for p in tmp_path.iterdir()] == ["t.pth"]
    assert output.read_bytes() == trained


def test_files_are_there_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "t.pth"
    finetune.save(path, {"a": 1})

    def cut_off(content, temporary):
        temporary.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", cut_off)
    with pytest.raises(OSError):
        finetune.save(path, {"a": 2})
    assert torch.load(path) == {"a": 1} and list(tmp_path.iterdir()) == [path]


def test_cases_that_cannot_be_used_are_named(tmp_path, pruned, cases, capsys):
    (tmp_path / "broken.npz").write_bytes(b"nothing")
    labels = discs((70, 90), (30, 30))
    np.savez(tmp_path / "unlabelled.npz", imgs=np.zeros((70, 90, 3), np.uint8))
    write(tmp_path / "empty.npz", 0 * labels)
    write(tmp_path / "speck.npz", np.eye(200, dtype=np.uint8) * (np.arange(200) == 50))
    assert tune(pruned["half"], tmp_path, tmp_path / "t.pth") == 1
    said = capsys.readouterr().err
    for name, reason in [("broken", "cannot be read"), ("unlabelled", "has no gts"), ("empty", "nothing is labelled"),
                         ("speck", "fewer than 6 pixels")]:
        assert f"{tmp_path / name}.npz: skipped: " in said and reason in said
    assert f"none of 4 .npz files in {tmp_path} can be used to train with" in said

    write(tmp_path / "good.npz", labels)
    write(tmp_path / "boxless.npz", labels, boxes=np.zeros((0, 4), int))
    assert tune(pruned["half"], tmp_path, tmp_path / "t.pth", "--steps", 1, "--validate", tmp_path) == 0
    said = capsys.readouterr()
    assert "2 cases, 2 images, 2 objects" in said.out  # boxes do not matter for training
    assert f"{tmp_path / 'boxless'}.npz: skipped: boxes (0, 4)" in said.err
    assert "good" in said.out and "boxless" not in said.out
    assert tune(pruned["half"], tmp_path / "nowhere", tmp_path / "t.pth") == 1
    assert "nowhere does not exist" in capsys.readouterr().err


def test_what_makes_no_sense(tmp_path, pruned, cases, original, capsys):
    for more, message in [(["--steps", 0], "0 is not positive"), (["--rate", "nan"], "nan is not positive"),
                          (["--seed", -1], "--seed is not negative"), (["--image-size", 64], "has its own")]:
        with pytest.raises(SystemExit, match="2"):
            tune(pruned["half"], cases, tmp_path / "t.pth", *more)
        assert message in capsys.readouterr().err
    for output in ("t.safetensors", "none/t.pth"):
        with pytest.raises(SystemExit, match="2"):
            tune(pruned["half"], cases, tmp_path / output)
        assert "in a folder that exists" in capsys.readouterr().err
    (tmp_path / "t.pth.training").write_bytes(b"nothing")
    assert tune(pruned["half"], cases, tmp_path / "t.pth") == 1
    assert "t.pth.training is no state of a training" in capsys.readouterr().err
    assert tune(cases / "2D_image.npz", cases, tmp_path / "u.pth") == 1
    assert "2D_image.npz: not a checkpoint" in capsys.readouterr().err
    assert tune(original, cases, tmp_path / "u.pth", "--image-size", SIDE, "--steps", 9, "--rate", 1e30) == 1
    assert "try a lower --rate" in capsys.readouterr().err and not (tmp_path / "u.pth").exists()


def test_other_models_are_refused(tmp_path, cases, capsys):
    other = pathlib.Path(__file__).parents[1] / "data" / "tiny_efficientvit.safetensors"
    assert tune(other, cases, tmp_path / "t.pth") == 1
    said = capsys.readouterr().err
    assert f"{other}: fine-tuning knows LiteMedSAM's way" in said and not list(tmp_path.glob("t.pth*"))


@torch.no_grad()
def reference_dice(model, image, truth, box):
    """LiteMedSAM's own way with one object."""
    scale = SIDE / max(truth.shape)
    size = int(truth.shape[1] * scale + 0.5), int(truth.shape[0] * scale + 0.5)
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA).astype(np.float32)
    pixels = torch.zeros(1, 3, SIDE, SIDE)
    small = (small - small.min()) / (small.max() - small.min())
    pixels[..., : size[1], : size[0]] = torch.tensor(small).permute(2, 0, 1)
    logits, _ = model(pixels, torch.tensor([[int(v * scale) for v in box]]).float())
    logits = torch.nn.functional.interpolate(logits[..., : size[1], : size[0]], truth.shape, mode="bilinear")
    mask = logits[0, 0].numpy() > 0
    return 2 * (mask & truth).sum(), mask.sum() + truth.sum()


def test_dice_is_that_of_the_original(pruned, cases):
    model = load_weights.load(pruned["half"]).eval()
    image, volume = (labelled_cases.read(p) for p in labelled_cases.find([cases]))
    expected = [np.divide(*reference_dice(model, image.images[0], image.labels[0] == n, box))
                for n, box in image.prompts(0).items()]
    assert 0 < np.mean(expected) < 1
    assert finetune.case_dice(model, image, "cpu") == pytest.approx(np.mean(expected), abs=1e-3)
    sums = [reference_dice(model, np.repeat(volume.images[z][..., None], 3, -1), volume.labels[z] == 1, box)
            for z in (1, 2, 3) for box in volume.prompts(z).values()]
    assert finetune.case_dice(model, volume, "cpu") == pytest.approx(np.divide(*np.sum(sums, 0)), abs=1e-3)


def test_losses_of_known_masks():
    masks = torch.zeros(2, 20, 30, dtype=torch.bool)
    masks[0, 3:9, 4:20] = True
    masks[1, 10:, :24] = True
    inside = torch.zeros(20, 30, dtype=torch.bool)
    inside[:, :24] = True
    sure = torch.where(masks, 20.0, -20.0)
    losses, iou = finetune.mask_losses(sure, masks, inside)
    assert losses.max() < 1e-3 and iou.min() > 0.999
    losses, iou = finetune.mask_losses(-sure, masks, inside)
    assert losses.min() > 15 and iou.max() == 0
    logits = torch.randn(2, 20, 30)
    expected = finetune.mask_losses(logits, masks, inside)
    logits[:, :, 24:] = 9
    found = finetune.mask_losses(logits, masks, inside)  # what is padding does not count
    assert all(torch.equal(a, b) for a, b in zip(found, expected))
    part = finetune.mask_losses(logits[..., :24], masks[..., :24], inside[:, :24])
    assert all(torch.allclose(a, b) for a, b in zip(part, expected))


def test_surroundings_of_a_mask():
    masks = torch.zeros(2, 40, 60, dtype=torch.bool)
    masks[0, 10:21, 30:51] = True  # 11 rows, 21 columns
    masks[1, 0, 59] = True
    near = finetune.surroundings(masks)
    ys, xs = torch.nonzero(near[0], as_tuple=True)
    assert (ys.min(), ys.max(), xs.min(), xs.max()) == (10 - 6, 20 + 6, 30 - 9, 50 + 9)
    assert near[0].sum() == (ys.max() - ys.min() + 1) * (xs.max() - xs.min() + 1)
    assert near[1].sum() == 4 * 4 and near[1, 0, 59]


def test_the_learning_rate_rises_and_falls():
    rates = np.array([finetune.learning_rate(i, 100, 2.0) for i in range(100)])
    assert rates.argmax() == 2 and rates[0] < 0.7 and 1.99 < rates.max() <= 2 and rates[-1] < 1e-3
    assert (np.diff(rates[3:]) < 0).all() and finetune.learning_rate(0, 1, 2.0) == 2


def test_every_case_comes_before_one_comes_again(pruned, cases):
    parts = [labelled_cases.slices(labelled_cases.read(p), SIDE) for p in labelled_cases.find([cases])]
    config, start = load_weights.read(pruned["half"])
    options = finetune.parse(["-m", str(pruned["half"]), "-i", str(cases), "-o", "t.pth"])
    training = finetune.Training(options, config, start, parts, [], torch.device("cpu"))
    wide = [training.sample(i)[3].sum() for i in range(20)]  # pixels that are no padding tell the cases apart
    assert len(set(wide)) == 2 and all(a != b for a, b in zip(wide[::2], wide[1::2]))
    assert len(set(wide[::2])) == 2  # in a random order
    sample, asked = training.sample, []
    training.sample = lambda number: asked.append(number) or sample(number)
    for _ in range(3):
        training.advance()
    assert asked == list(range(3 * options.batch))


def test_only_zeros_of_layers_are_held(state):
    model = load_weights.build(CONFIG, state)
    weight, token = model.get_parameter(FC), model.mask_decoder.iou_token.weight
    with torch.no_grad():
        weight[::2] = 0
        token[:] = 0
    finetune.hold_zeros(model)
    (weight.sum() + token.sum()).backward()
    assert not weight.grad[::2].any() and weight.grad[1::2].all() and token.grad.all()


def test_the_reference_with_given_weights(tmp_path, state):
    """The same from a checkpoint, from one whose BatchNorms are folded, and from a model file."""
    torch.manual_seed(1)
    folded = convert.fold_batch_norm(state, 1e-5)
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
        config["image_encoder"]["image_size"] = config["input"]["frame"] = SIDE  # a checkpoint does not tell it
        assert config == CONFIG
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
