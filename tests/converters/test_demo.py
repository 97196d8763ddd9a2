"""What the demo checkpoint is trained with: scenes, painted labels, the training's own parts."""

import argparse
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

import convert
import checkpoint
import lite_medsam
import painting
import scenes
import seeded_weights
import train
from conftest import ROOT

TRAIN = ROOT / "converters" / "demo" / "train.py"


@pytest.mark.parametrize("kind", scenes.KINDS, ids=lambda k: k.__name__)
@pytest.mark.parametrize("side", [57, 112])
def test_scenes(kind, side):
    image, labels = scenes.make_scene(np.random.default_rng([1, side]), side, kind)
    again, same = scenes.make_scene(np.random.default_rng([1, side]), side, kind)
    other, _ = scenes.make_scene(np.random.default_rng([2, side]), side, kind)
    assert image.dtype == np.uint8 and image.shape == (side, side, 3) and image.std() > 5
    assert (image == again).all() and (labels == same).all() and (image != other).any()
    numbers, sizes = np.unique(labels, return_counts=True)
    assert labels.shape == (side, side) and (numbers == np.arange(len(numbers)))[1:].all()
    assert len(numbers) > 1 and (sizes >= 10).all()


def test_objects_that_are_mostly_hidden_are_no_objects():
    canvas = scenes.Canvas(np.random.default_rng(1), 40)
    for columns in (np.s_[:, :10], np.s_[:, 6:20], np.s_[:, 16:30]):  # 60 and 71 % are seen
        mask = np.zeros((40, 40), bool)
        mask[columns] = True
        canvas.label(mask)
    canvas.label(np.arange(40) >= np.full((40, 1), 30), drawn=900)  # most of it outside the body
    assert set(np.unique(canvas.labels)) == {1, 2, 3, 4}
    assert set(np.unique(canvas.labels_seen())) == {0, 1, 2, 3}
    assert set(np.unique(canvas.labels_seen(least=0.7))) == {0, 2, 3}


def test_boxes_are_drawn_as_by_a_person():
    rng = np.random.default_rng(3)
    mask = np.zeros((80, 90), bool)
    mask[30:50, 40:75] = True
    boxes = np.array([scenes.jittered_box(rng, mask) for _ in range(200)])
    assert np.abs(boxes - [40, 30, 75, 50]).max() <= 3 and boxes.std(0).min() > 0.5
    mask[:] = True
    boxes = np.array([scenes.jittered_box(rng, mask[:80, :80]) for _ in range(50)])
    assert boxes.min() >= 0 and boxes.max() <= 80


def test_inscribed_ellipses():
    tall, small = scenes.inscribed_ellipses([[10, 5, 41, 90], [3, 4, 4, 5]], 100)
    ys, xs = np.nonzero(tall)
    assert (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) == (10, 5, 41, 90)
    assert abs(tall.sum() - np.pi / 4 * 31 * 85) < 10
    assert small.sum() == 1 and small[4, 3]


def test_painting_over_labels():
    labels = np.zeros((6, 90, 110), np.uint8)
    labels[1:5, 20:45, 20:50] = 3
    labels[2:6, 40:70, 60:95] = 7
    image = painting.paint(labels, np.random.default_rng(1))
    assert image.dtype == np.uint8 and image.shape == labels.shape
    assert (image == painting.paint(labels, np.random.default_rng(1))).all()
    inner = {n: image[labels == n].astype(float) for n in (3, 7)}
    for values in inner.values():
        assert values.std() < 20 and abs(values.mean() - image[:, 30:60, 50:58].mean()) > 20
    assert abs(inner[3].mean() - inner[7].mean()) > 3


def test_attention_begins_at_the_place_of_a_point():
    torch.manual_seed(1)
    model = lite_medsam.LiteMedSAM(seeded_weights.LITE_MEDSAM)
    encoding = model.prompt_encoder.pe_layer
    with torch.no_grad():
        train.align_positions(model.mask_decoder.transformer, encoding.positional_encoding_gaussian_matrix)
        attention = model.mask_decoder.transformer.layers[1].cross_attn_token_to_image
        keys = attention.k_proj(model.prompt_encoder.dense_position()[0].flatten(1).T)
        for x, y in [(20, 200), (130, 64), (250, 3)]:
            query = attention.q_proj(encoding((torch.tensor([x, y]) + 0.5) / 256))
            places = (keys * query).unflatten(-1, (attention.heads, -1)).sum(-1)  # (h * w, heads)
            last = places[:, -1].argmax().item()  # the head of the highest frequencies
            assert abs(last % 64 - x / 4) < 2 and abs(last // 64 - y / 4) < 2
            mean = places.mean(1).argmax().item()
            assert abs(mean % 64 - x / 4) < 2 and abs(mean // 64 - y / 4) < 2


def test_losses_of_known_masks():
    masks = torch.zeros(2, 20, 30, dtype=torch.bool)
    masks[0, 3:9, 4:20] = True
    masks[1, 10:, :] = True
    sure = torch.where(masks, 20.0, -20.0)[:, None]
    losses, iou = train.mask_losses(sure, masks)
    assert losses.max() < 1e-3 and iou.min() > 0.999
    losses, iou = train.mask_losses(-sure, masks)
    assert losses.min() > 15 and iou.max() == 0


def test_the_image_is_scored_at_every_pixel():
    dense = train.DenseHeads(8)
    labels = torch.zeros(1, 16, 16, dtype=torch.int64)
    labels[:, 4:12, 4:12] = 1
    edges = torch.zeros(16, 16)  # the square's outline, a pixel to each side
    edges[3:13, 3:13] = 1
    edges[5:11, 5:11] = 0
    edges[[3, 3, 12, 12], [3, 12, 3, 12]] = 0
    perfect = torch.nn.functional.pixel_unshuffle(40 * edges[None, None] - 20, 4)
    embedding = torch.zeros(1, 8, 4, 4)
    embedding[:, 0] = -1
    embedding[:, 0, 1:3, 1:3] = 1
    with torch.no_grad():
        for p in dense.parameters():
            p.zero_()
        dense.objects.weight[:, 0] = 4.0
        dense.edges.forward = lambda x: perfect
        assert dense(embedding, labels) < 1e-3
        dense.edges.forward = lambda x: -perfect
        assert dense(embedding, labels) > 5


def train_for(path, minutes, interrupt=False):
    """Runs a training, which is interrupted after its first line; returns what it saved."""
    command = [sys.executable, TRAIN, "-o", path, "--minutes", str(minutes), "--sides", "32:1",
               "--batch", "1", "--prompts", "2", "--report", "1", "--workers", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline()
            if interrupt:
                process.send_signal(signal.SIGTERM)
            process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 0
    return torch.load(path)


def test_training_goes_on_where_it_was_interrupted(tmp_path):
    state = tmp_path / "state.pth"
    first = train_for(state, 2, interrupt=True)
    assert 0 < first["seconds"] < 100 and first["step"] == 0
    minutes = (first["seconds"] + 20) / 60
    second = train_for(state, minutes)
    assert second["step"] > 0 and 60 * minutes <= second["seconds"] < 60 * minutes + 30

    subprocess.run([sys.executable, TRAIN, "-o", state, "--export", tmp_path / "e.pth"], check=True)
    tensors, config = convert.convert(checkpoint.load(tmp_path / "e.pth"))
    assert config == seeded_weights.LITE_MEDSAM
    model = lite_medsam.LiteMedSAM(config)
    model.load_state_dict(torch.load(tmp_path / "e.pth"), strict=True)


def test_smaller_images_train_the_same_parameters(tmp_path):
    options = argparse.Namespace(seed=1, output=tmp_path / "none.pth", rate=1e-3, finetune=None, hold_zeros=False)
    training = train.Training(options, torch.device("cpu"))
    small = training.at_size(32)
    assert [p.data_ptr() for p in small.parameters()] == [p.data_ptr() for p in training.model.parameters()]
    small.train()
    small.image_encoder(torch.randn(2, 3, 32, 32))
    norm = training.model.image_encoder.patch_embed.seq[0].bn
    assert norm.num_batches_tracked == 1 and norm.running_mean.abs().max() > 0


def test_surroundings_of_a_mask():
    masks = torch.zeros(2, 40, 60, dtype=torch.bool)
    masks[0, 10:21, 30:51] = True  # 11 rows, 21 columns
    masks[1, 0, 59] = True
    near = train.surroundings(masks)
    ys, xs = torch.nonzero(near[0], as_tuple=True)
    assert (ys.min(), ys.max(), xs.min(), xs.max()) == (10 - 6, 20 + 6, 30 - 9, 50 + 9)
    assert near[0].sum() == (ys.max() - ys.min() + 1) * (xs.max() - xs.min() + 1)
    assert near[1].sum() == 4 * 4 and near[1, 0, 59]
