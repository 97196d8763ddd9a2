#!/usr/bin/env python3
"""Trains the demo checkpoint: LiteMedSAM's full architecture on generated images (scenes.py).

The schedule is a time, not a number of steps, so that it fits the machine: warm-up, then the learning
rate falls along a cosine to zero when `--minutes` have been spent. Training goes on where it was
interrupted: the same command continues from `--output`, which holds the weights (and their running
mean, which is what is exported), the optimizer, the time spent and the curves.

    python3 train.py -o demo.pth --minutes 30                                               # a GPU
    python3 train.py -o demo.pth --minutes 600 --batch 3 --sides 112:0.4,168:0.3,256:0.3    # a CPU
    python3 train.py -o demo.pth --export lite_medsam_demo.pth         # the original's key naming
    python3 train.py -o tuned.pth --finetune pruned.safetensors --hold-zeros --rate 1e-4    # see below

Training from nothing on few images needs two helps. The cross attentions begin aligned with the
position encoding (`align_positions`), so that a box's corner attends to its place in the image from
the first step; and the decoder first practises on embeddings made from the labels
(`ideal_embedding`): without an encoder a step costs little, and afterwards the encoder's gradients mean
something. Meanwhile dense losses (`DenseHeads`) draw the encoder towards such embeddings. On a CPU most of the steps are on small images, parts of scenes: what a box asks for is learned there
as well, at a fraction of the cost. Sides of 112, 168 and 224 fill windows of 7 and 14 exactly.

Fine-tuning needs none of these helps. It begins with the weights of a checkpoint or a model file, keeps
its BatchNorms as they are and learns masks alone.
"""

import argparse
import contextlib
import copy
import json
import math
import os
import pathlib
import signal
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "reference")]

import held_zeros  # noqa: E402
import load_weights  # noqa: E402
import muon  # noqa: E402
import scenes  # noqa: E402
import seeded_weights  # noqa: E402

FULL_SIDE = 256
POINTS_SHARE = 0.15  # of the batches are prompted with points in place of boxes
PRACTICE_SHARE = 0.12  # of the time: the decoder alone
PRACTICE_SIDE, PRACTICE_PROMPTS = 56, 16
FROZEN_STATISTICS = 0.5  # of the time: from here on BatchNorm uses what it has gathered, as it will later
MUON_FACTOR = 1.0  # of the learning rate, for matrices
EMA_DECAY = 0.998


class Scenes(torch.utils.data.Dataset):
    """Image `i` of a seed, always the same, with `prompts` of its objects: boxes and points. Images
    smaller than the model's are whole scenes or parts of scenes of full size."""

    def __init__(self, seed, side, prompts):
        self.seed, self.side, self.prompts = seed, side, prompts

    def __len__(self):
        return 1 << 40

    def __getitem__(self, index):
        rng = np.random.default_rng([self.seed, self.side, index])
        part = None
        while part is None:
            whole = self.side > 0.8 * FULL_SIDE
            part = scenes.make_scene(rng, self.side if whole else FULL_SIDE)
            if not whole:
                part = scenes.crop(rng, *part, self.side)
        image, labels = self.turned(rng, *part)
        pixels = image.astype(np.float32)
        pixels = (pixels - pixels.min()) / max(pixels.max() - pixels.min(), 1e-8)
        chosen = rng.choice(np.arange(1, labels.max() + 1), self.prompts)
        masks = labels == chosen[:, None, None]
        boxes = np.stack([scenes.jittered_box(rng, mask) for mask in masks])
        points = np.stack([scenes.two_points(rng, mask) for mask in masks])
        return (
            torch.from_numpy(pixels.transpose(2, 0, 1).copy()),
            torch.from_numpy(masks),
            torch.from_numpy(boxes.astype(np.float32)),
            torch.from_numpy(points.astype(np.float32)),
            torch.from_numpy(labels.astype(np.int64)),
        )

    @staticmethod
    def turned(rng, image, labels):
        turns = rng.integers(0, 4)
        image, labels = np.rot90(image, turns), np.rot90(labels, turns)
        if rng.random() < 0.5:
            image, labels = image[:, ::-1], labels[:, ::-1]
        return image, labels


def align_positions(transformer, frequencies, strength=1.5):
    """Makes each cross attention's head begin as a kernel of distance: query and key both read the
    same eight of the position encoding's `frequencies` (2, n), so that their product is a sum of
    cosines of the distance. Heads take bands from low frequencies (far reach) to high ones."""
    order = frequencies.norm(dim=0).argsort().tolist()
    attentions = [transformer.final_attn_token_to_image]
    for layer in transformer.layers:
        attentions += [layer.cross_attn_token_to_image, layer.cross_attn_image_to_token]
    for attention in attentions:
        head_dim = attention.q_proj.out_features // attention.heads
        for projection in (attention.q_proj, attention.k_proj):
            projection.weight.mul_(0.5)
            for head in range(attention.heads):
                band = order[head * len(order) // attention.heads:][: head_dim // 2]
                rows = torch.arange(head * head_dim, head * head_dim + 2 * len(band), 2)
                projection.weight[rows, band] += strength  # sines
                projection.weight[rows + 1, torch.tensor(band) + len(order)] += strength  # cosines


def ideal_embedding(labels, directions, generator):
    """What an encoder that knew the answer could say of labels (B, side, side): every object, and the
    background, has a vector of its own in the space of `directions` (width, dim); a place has the mean
    of its 4 x 4 pixels, some noise is added. Returns (B, dim, side / 4, side / 4), normalised."""
    width, dim = directions.shape
    vectors = torch.randn(len(labels), int(labels.max()) + 1, width, generator=generator)
    pixels = torch.stack([v[l] for v, l in zip(vectors, labels)]).permute(0, 3, 1, 2)
    places = F.avg_pool2d(pixels, 4).permute(0, 2, 3, 1) @ directions
    places = places + 0.3 * places.std() * torch.randn(places.shape, generator=generator)
    return F.layer_norm(places, (dim,)).permute(0, 3, 1, 2)


def surroundings(masks, margin=0.3):
    """(prompts, h, w): the bounding boxes of `masks`, wider by `margin` and 3 pixels on each side."""
    near = []
    for dim in (1, 2):
        at = torch.arange(masks.shape[dim], device=masks.device)
        seen = masks.any(3 - dim)
        low = torch.where(seen, at, masks.shape[dim]).amin(1)[:, None]
        high = torch.where(seen, at, -1).amax(1)[:, None]
        reach = margin * (high - low) + 3
        inside = (at >= low - reach) & (at <= high + reach)
        near.append(inside.unsqueeze(3 - dim))
    return near[0] & near[1]


def mask_losses(logits, masks):
    """Dice plus 20 times focal loss (Kirillov et al. 2023), plus the cross entropy around the object,
    which does not fade where objects are small; and the true IoU. Each (prompts, masks), of logits
    (prompts, masks, h, w) against masks (prompts, h, w)."""
    target = masks[:, None].float().expand_as(logits)
    probability = logits.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    focal = (entropy * (probability - target).abs() ** 2).mean((2, 3))
    near = surroundings(masks)[:, None]
    local = (entropy * near).sum((2, 3)) / near.sum((2, 3))
    both = (probability * target).sum((2, 3))
    dice = 1 - (2 * both + 1) / (probability.sum((2, 3)) + target.sum((2, 3)) + 1)
    with torch.no_grad():
        found = logits > 0
        overlap = (found & (target > 0)).sum((2, 3))
        iou = overlap / ((found | (target > 0)).sum((2, 3)) + 1e-6)
    return dice + 20 * focal + local, iou


class DenseHeads(torch.nn.Module):
    """Gives the encoder something to learn at every pixel, whatever the decoder can do yet: where
    objects end, and which places belong to one object. Not part of the checkpoint."""

    def __init__(self, dim, width=32):
        super().__init__()
        self.edges = torch.nn.Conv2d(dim, 16, 1)  # of the 4 x 4 pixels of each place
        self.objects = torch.nn.Conv2d(dim, width, 1)
        torch.nn.init.orthogonal_(self.objects.weight)
        self.offset = torch.nn.Parameter(torch.zeros(()))

    def forward(self, embedding, labels):
        """The loss for embedding (B, dim, h, w) and labels (B, 4h, 4w)."""
        edges = torch.zeros_like(labels, dtype=torch.bool)
        across, down = labels[:, :, 1:] != labels[:, :, :-1], labels[:, 1:] != labels[:, :-1]
        edges[:, :, 1:] |= across
        edges[:, :, :-1] |= across
        edges[:, 1:] |= down
        edges[:, :-1] |= down
        target = F.pixel_unshuffle(edges[:, None].float(), 4)
        edge_loss = F.binary_cross_entropy_with_logits(
            self.edges(embedding).float(), target, pos_weight=torch.tensor(4.0, device=labels.device)
        )
        places = labels[:, 2::4, 2::4].flatten(1)
        picked = torch.randint(0, places.shape[1], (256,), device=labels.device)
        features = self.objects(embedding).float().flatten(2)[:, :, picked]
        places = places[:, picked]
        likeness = torch.einsum("bci,bcj->bij", features, features) / 32**0.5 + self.offset
        same = (places[:, :, None] == places[:, None, :]).float()
        told = ((places[:, :, None] > 0) | (places[:, None, :] > 0)).float()  # background is anything
        weights = told * torch.where(same > 0, 0.5 / (told * same).sum().clamp(1),
                                     0.5 / (told * (1 - same)).sum().clamp(1))
        losses = F.binary_cross_entropy_with_logits(likeness, same, reduction="none")
        return edge_loss + (losses * weights).sum()


def step_loss(model, dense, batch, with_points, autocast):
    image, masks, boxes, points, labels = batch
    prompts = boxes.shape[1]
    with autocast:
        embedding = model.image_encoder(image)
        dense_loss = dense(embedding, labels) if dense else torch.zeros((), device=image.device)
        embedding = embedding.repeat_interleave(prompts, 0)
        if with_points:
            labels = torch.tensor([1, 0], device=image.device).expand(len(image) * prompts, 2)
            asked = dict(points=points.flatten(0, 1), labels=labels)
        else:
            asked = dict(boxes=boxes.flatten(0, 1))
        logits, iou = model.decode(embedding, multimask=with_points, **asked)
    losses, true_iou = mask_losses(logits.float(), masks.flatten(0, 1))
    # Points are ambiguous: of three masks the best one learns.
    mask_loss = losses.min(1).values.mean()
    iou_loss = F.mse_loss(iou.float(), true_iou)
    reported = mask_loss.item(), dense_loss.item(), true_iou.max(1).values.mean().item()
    return mask_loss + iou_loss + 0.5 * dense_loss, reported


class Training:
    """Everything that an interrupted training needs to go on."""

    def __init__(self, options, device):
        torch.manual_seed(options.seed)
        self.device = device
        self.path = pathlib.Path(options.output)
        saved = torch.load(self.path, map_location="cpu") if self.path.exists() else None
        self.config, start = self.beginning(saved, options.finetune)
        self.tunes = saved["dense"] is None if saved else bool(options.finetune)
        if options.finetune and not self.tunes:
            sys.exit(f"train.py: {self.path} is no fine-tuning: say another --output")
        self.model = load_weights.build(self.config, start or ())
        self.dense = None if self.tunes else DenseHeads(self.config["embed_dim"]).to(device)
        self.seconds, self.step, self.images, self.curve = 0.0, 0, 0, []
        with torch.no_grad():
            positions = self.model.prompt_encoder.pe_layer
            align_positions(self.model.mask_decoder.transformer, positions.positional_encoding_gaussian_matrix)
        if start:
            self.model.load_state_dict(start, strict=False)  # BatchNorm's counters may be missing
        if saved:
            self.seconds, self.step = saved["seconds"], saved["step"]
            self.images, self.curve = saved["images"], saved["curve"]
        if saved and self.dense:
            self.dense.load_state_dict(saved["dense"])
        self.mean = saved["mean"] if saved else copy.deepcopy(self.model.state_dict())
        self.model.to(device)
        self.mean = {k: v.to(device) for k, v in self.mean.items()}
        self.holds = saved.get("holds", False) if saved else options.hold_zeros
        self.held = held_zeros.HeldZeros(self.model) if self.holds else None
        self.optimizers = self.make_optimizers(options.rate)
        if saved:
            for optimizer, state in zip(self.optimizers, saved["optimizers"]):
                optimizer.load_state_dict(state)

    @staticmethod
    def beginning(saved, given):
        """The configuration and the state dict to begin with: what was saved, else what is given to be
        fine-tuned, else None."""
        if saved:
            return saved.get("config", seeded_weights.LITE_MEDSAM), saved["model"]
        if given:
            return load_weights.read(given)
        return dict(seeded_weights.LITE_MEDSAM), None

    def make_optimizers(self, rate):
        parameters = [*self.model.parameters(), *(self.dense.parameters() if self.dense else ())]
        own = self.model.parameters()
        matrices = [p for p in own if p.ndim >= 2 and min(p.flatten(1).shape) >= 16]
        taken = {id(p) for p in matrices}
        rest = [p for p in parameters if id(p) not in taken]
        return [
            muon.Muon(matrices, lr=rate, weight_decay=0.02),
            torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=0.0),
        ]

    def at_size(self, side):
        """The same parameters in a model for images of another side: only positions depend on it."""
        if side == self.config["image_size"]:
            return self.model
        other = load_weights.build({**self.config, "image_size": side}, self.mean).to(self.device)
        own = dict(self.model.named_modules())
        for name, module in other.named_modules():
            module._parameters.update(own[name]._parameters)
            module._buffers.update(own[name]._buffers)
        return other

    def save(self):
        """All or nothing."""
        state = {
            "config": self.config, "model": self.model.state_dict(), "mean": self.mean,
            "dense": self.dense.state_dict() if self.dense else None, "holds": self.holds,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "seconds": self.seconds, "step": self.step, "images": self.images, "curve": self.curve,
        }
        temporary = self.path.with_suffix(".part")
        torch.save(state, temporary)
        os.replace(temporary, self.path)

    def descend(self, loss, rate):
        """One step, for those parameters that the loss depends on."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()
        if self.held:
            self.held.clear_gradients()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer, factor in zip(self.optimizers, (MUON_FACTOR, 1.0)):
            for group in optimizer.param_groups:
                group["lr"] = factor * rate
            optimizer.step()
        if self.held:
            self.held.clear_weights()

    @torch.no_grad()
    def average(self):
        decay = min(EMA_DECAY, (1 + self.step) / (10 + self.step))
        for name, value in self.model.state_dict().items():
            if value.is_floating_point():
                self.mean[name].lerp_(value, 1 - decay)
            else:
                self.mean[name].copy_(value)


def ignore_signals(_):
    """Data workers end with the training, which a signal asks to save its state first."""
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, signal.SIG_IGN)


def learning_rate(share, peak):
    """After `share` of the time: 2 % of warm-up, then a cosine."""
    rise = min(1.0, share / 0.02 + 1e-3)
    return peak * rise * 0.5 * (1 + math.cos(math.pi * min(1.0, share))) + 1e-7


def parse_sides(text):
    """[(side, share of the time), ...] from "64:0.4,256:0.6"."""
    return [(int(s), float(share)) for s, share in (part.split(":") for part in text.split(","))]


def practice(training, options, seconds, stopped):
    """The decoder alone: it learns to find a box's place, and the object there by its likeness, on
    embeddings as they should be."""
    data = Scenes(options.seed + 1, 2 * PRACTICE_SIDE, PRACTICE_PROMPTS)
    model = training.at_size(PRACTICE_SIDE).train()
    directions = training.dense.objects.weight.detach().flatten(1).cpu()
    generator = torch.Generator().manual_seed(options.seed)
    step, recent = round(10 * training.seconds), []  # goes on with other scenes after an interruption
    while training.seconds < seconds and not stopped:
        start = time.monotonic()
        _, masks, boxes, _, labels = data[step]
        embedding = ideal_embedding(labels[None, ::2, ::2], directions, generator).to(training.device)
        embedding = embedding.expand(PRACTICE_PROMPTS, -1, -1, -1)
        logits, iou = model.decode(embedding, boxes=boxes.to(training.device) / 2)
        losses, true_iou = mask_losses(logits, masks[:, ::2, ::2].to(training.device))
        loss = losses.mean() + F.mse_loss(iou, true_iou)
        training.descend(loss, learning_rate(training.seconds / seconds, 1e-3))
        recent.append(true_iou.mean().item())
        step += 1
        training.seconds += time.monotonic() - start
        if step % options.report == 0:
            print(f"practice  {training.seconds / 60:.1f} min  IoU {np.mean(recent[-options.report:]):.3f}",
                  flush=True)


class OneSize:
    """Training on images of one size: the model for it, its data, and the time it has had."""

    def __init__(self, training, options, side, share):
        smallest = min(s for s, _ in options.sides)
        self.images = max(1, round(options.batch * (smallest / side) ** 2))  # in a step
        self.share, self.seconds = share, 0.0
        self.model = training.at_size(side).to(memory_format=torch.channels_last)
        data = Scenes(options.seed, side, options.prompts)
        order = range(training.images, 1 << 40)
        self.batches = iter(torch.utils.data.DataLoader(
            data, self.images, sampler=order, num_workers=options.workers, worker_init_fn=ignore_signals,
            pin_memory=training.device.type == "cuda", prefetch_factor=4 if options.workers else None,
        ))


def train(training, options, device):
    total = 60 * options.minutes
    stopped = []
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *_: stopped.append(True))
    cuda = device.type == "cuda"
    autocast = (
        torch.autocast("cuda", torch.bfloat16) if cuda
        else torch.autocast("cpu", torch.bfloat16) if options.bf16
        else contextlib.nullcontext()
    )
    saved, recent = time.monotonic(), []
    practice_share = 0.0 if training.tunes else PRACTICE_SHARE
    if practice_share:
        practice(training, options, practice_share * total, stopped)
    sizes = [OneSize(training, options, side, share) for side, share in options.sides]
    while training.seconds < total and not stopped:
        since_practice = max(0.0, training.seconds / total - practice_share) / (1 - practice_share)
        size = min(sizes, key=lambda s: s.seconds / s.share)  # the one most behind its share
        model = size.model.train()
        if training.tunes or since_practice > FROZEN_STATISTICS or size.images < 3:
            for module in model.modules():
                if isinstance(module, torch.nn.BatchNorm2d):
                    module.eval()
        start = time.monotonic()
        batch = [t.to(device, non_blocking=True) for t in next(size.batches)]
        with_points = np.random.default_rng([options.seed, training.step]).random() < POINTS_SHARE
        loss, reported = step_loss(model, training.dense, batch, with_points, autocast)
        training.descend(loss, learning_rate(since_practice, options.rate))
        training.average()
        training.step += 1
        training.images += len(batch[0])
        took = time.monotonic() - start
        training.seconds += took
        size.seconds += took
        if not with_points:
            recent.append(reported)
        if training.step % options.report == 0 and recent:
            loss, dense_loss, iou = np.mean(recent, 0)
            recent = []
            training.curve.append((training.step, training.seconds, float(loss), float(iou)))
            print(f"step {training.step}  {training.seconds / 60:.1f} of {options.minutes} min  "
                  f"loss {loss:.3f}  dense {dense_loss:.3f}  IoU {iou:.3f}", flush=True)
        if time.monotonic() - saved > 120:
            training.save()
            saved = time.monotonic()
    training.save()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("-o", "--output", required=True, help="training state, written and continued")
    parser.add_argument("--minutes", type=float, default=30, help="time to train for, in all (%(default)s)")
    parser.add_argument("--sides", type=parse_sides, default="256:1",
                        help="image sides and their shares of the time (%(default)s)")
    parser.add_argument("--batch", type=int, default=8,
                        help="images of the smallest side in a step, fewer of larger ones (%(default)s)")
    parser.add_argument("--prompts", type=int, default=8, help="prompts for each image (%(default)s)")
    parser.add_argument("--rate", type=float, default=8e-4, help="peak learning rate (%(default)s)")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--report", type=int, default=50, help="steps between lines (%(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--bf16", action="store_true", help="bf16 on the CPU, where it has it")
    parser.add_argument("--finetune", metavar="FILE",
                        help="begin with these weights, of a checkpoint (.pth) or model file (.safetensors)")
    parser.add_argument("--hold-zeros", action="store_true",
                        help="with --finetune: weights that are zero in FILE stay zero")
    parser.add_argument("--export", help="write the state dict of the running mean here, and stop")
    options = parser.parse_args()
    if options.hold_zeros and not options.finetune:
        parser.error("--hold-zeros needs --finetune")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    training = Training(options, device)
    if options.export:
        torch.save({k: v.cpu() for k, v in training.mean.items()}, options.export)
        curve = json.dumps([[s, round(t), round(l, 4), round(i, 4)] for s, t, l, i in training.curve])
        pathlib.Path(options.export).with_suffix(".json").write_text(curve)
        return
    train(training, options, device)


if __name__ == "__main__":
    main()
