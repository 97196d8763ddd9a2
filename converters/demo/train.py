#!/usr/bin/env python3
"""Trains the demo checkpoint: LiteMedSAM's full architecture on generated images (scenes.py).

The schedule is a time, not a number of steps, so that it fits the machine: warm-up, then the learning
rate falls along a cosine to zero when `--minutes` have been spent. Training goes on where it was
interrupted: the same command continues from `--output`, which holds the weights (and their running
mean, which is what is exported), the optimizer, the time spent and the curves.

    python3 train.py -o demo.pth --minutes 30                                               # a GPU
    python3 train.py -o demo.pth --minutes 600 --batch 2 --sides 112:0.5,224:0.3,256:0.2    # a CPU
    python3 train.py -o demo.pth --export lite_medsam_demo.pth         # the original's key naming

Training from nothing on few images needs two helps. The cross attentions begin aligned with the
position encoding (`align_positions`), so that a box's corner attends to its place in the image from
the first step; and the decoder first practises on noise, where the answer is the box's ellipse
(`ellipse_batch`): without an encoder a step costs little, and afterwards the encoder's gradients mean
something. On a CPU most of the time goes to small images: what a box asks for is learned there as
well, at a fraction of the cost. Sides of 112 and 224 fill the attention windows of 7 and 14 exactly.
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

import lite_medsam  # noqa: E402
import scenes  # noqa: E402
import seeded_weights  # noqa: E402

POINTS_SHARE = 0.15  # of the batches are prompted with points in place of boxes
PRACTICE_SHARE = 0.05  # of the time: the decoder alone
PRACTICE_SIDE, PRACTICE_BATCH = 56, 16
EMA_DECAY = 0.998


class Scenes(torch.utils.data.Dataset):
    """Image `i` of a seed, always the same, with `prompts` of its objects: boxes and points."""

    def __init__(self, seed, side, prompts):
        self.seed, self.side, self.prompts = seed, side, prompts

    def __len__(self):
        return 1 << 40

    def __getitem__(self, index):
        rng = np.random.default_rng([self.seed, self.side, index])
        image, labels = scenes.make_scene(rng, self.side)
        image, labels = self.turned(rng, image, labels)
        pixels = image.astype(np.float32)
        pixels = (pixels - pixels.min()) / max(pixels.max() - pixels.min(), 1e-8)
        chosen = rng.choice(np.arange(1, labels.max() + 1), self.prompts)
        masks = labels == chosen[:, None, None]
        boxes = np.stack([jittered_box(rng, mask) for mask in masks])
        points = np.stack([two_points(rng, mask) for mask in masks])
        return (
            torch.from_numpy(pixels.transpose(2, 0, 1).copy()),
            torch.from_numpy(masks),
            torch.from_numpy(boxes.astype(np.float32)),
            torch.from_numpy(points.astype(np.float32)),
        )

    @staticmethod
    def turned(rng, image, labels):
        turns = rng.integers(0, 4)
        image, labels = np.rot90(image, turns), np.rot90(labels, turns)
        if rng.random() < 0.5:
            image, labels = image[:, ::-1], labels[:, ::-1]
        return image, labels


def jittered_box(rng, mask):
    """x0, y0, x1, y1 around a mask, each side off by a few pixels, rather too large than too small."""
    ys, xs = np.nonzero(mask)
    box = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
    reach = max(2.0, 0.06 * max(box[2] - box[0], box[3] - box[1]))
    off = np.round(rng.uniform(-0.3 * reach, reach, 4))
    box = box + off * [-1, -1, 1, 1]
    return np.clip(box, 0, mask.shape[0])


def two_points(rng, mask):
    """One point inside and one outside, x and y."""
    inside, outside = np.argwhere(mask), np.argwhere(~mask)
    pair = [inside[rng.integers(len(inside))], outside[rng.integers(len(outside))]]
    return np.array(pair)[:, ::-1]


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


def ellipse_batch(rng, side, count):
    """Boxes (count, 4) and the ellipses inscribed in them, masks (count, side, side)."""
    centre = rng.uniform(0, side, (count, 2))
    reach = side * 0.03 * 15 ** rng.random((count, 1)) * rng.uniform(0.5, 1, (count, 2))
    low, high = np.clip(centre - reach, 0, side), np.clip(centre + reach, 0, side)
    masks = inscribed_ellipses(np.concatenate([low, high], 1), side)
    boxes = np.concatenate([low, high], 1).astype(np.float32)
    return torch.from_numpy(boxes), torch.from_numpy(masks)


def inscribed_ellipses(boxes, side):
    """What a box alone tells: masks (count, side, side) of the ellipses that touch its sides."""
    at = np.arange(side) + 0.5
    x0, y0, x1, y1 = np.asarray(boxes, np.float64).T[:, :, None]
    x = (at - (x0 + x1) / 2) / np.maximum((x1 - x0) / 2, 0.5)
    y = (at - (y0 + y1) / 2) / np.maximum((y1 - y0) / 2, 0.5)
    return x[:, None, :] ** 2 + y[:, :, None] ** 2 < 1


def mask_losses(logits, masks):
    """Dice plus 20 times focal loss (Kirillov et al. 2023) and the true IoU, each (prompts, masks), of
    logits (prompts, masks, h, w) against masks (prompts, h, w)."""
    target = masks[:, None].float().expand_as(logits)
    probability = logits.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    focal = (entropy * (probability - target).abs() ** 2).mean((2, 3))
    both = (probability * target).sum((2, 3))
    dice = 1 - (2 * both + 1) / (probability.sum((2, 3)) + target.sum((2, 3)) + 1)
    with torch.no_grad():
        found = logits > 0
        overlap = (found & (target > 0)).sum((2, 3))
        iou = overlap / ((found | (target > 0)).sum((2, 3)) + 1e-6)
    return dice + 20 * focal, iou


def step_loss(model, batch, with_points, autocast):
    image, masks, boxes, points = batch
    prompts = boxes.shape[1]
    with autocast:
        embedding = model.image_encoder(image).repeat_interleave(prompts, 0)
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
    return mask_loss + iou_loss, mask_loss.item(), true_iou.max(1).values.mean().item()


class Training:
    """Everything that an interrupted training needs to go on."""

    def __init__(self, options, device):
        torch.manual_seed(options.seed)
        config = dict(seeded_weights.LITE_MEDSAM)
        self.config = config
        self.model = lite_medsam.LiteMedSAM(config)
        self.optimizer = None
        self.seconds, self.step, self.images, self.curve = 0.0, 0, 0, []
        self.device = device
        self.path = pathlib.Path(options.output)
        saved = torch.load(self.path, map_location="cpu") if self.path.exists() else None
        with torch.no_grad():
            positions = self.model.prompt_encoder.pe_layer
            align_positions(self.model.mask_decoder.transformer, positions.positional_encoding_gaussian_matrix)
        if saved:
            self.model.load_state_dict(saved["model"])
            self.mean = saved["mean"]
            self.seconds, self.step = saved["seconds"], saved["step"]
            self.images, self.curve = saved["images"], saved["curve"]
        else:
            self.mean = copy.deepcopy(self.model.state_dict())
        self.model.to(device)
        self.mean = {k: v.to(device) for k, v in self.mean.items()}
        decay = [p for p in self.model.parameters() if p.ndim >= 2]
        rest = [p for p in self.model.parameters() if p.ndim < 2]
        groups = [dict(params=decay, weight_decay=0.02), dict(params=rest, weight_decay=0.0)]
        self.optimizer = torch.optim.AdamW(groups, lr=options.rate, betas=(0.9, 0.98))
        if saved:
            self.optimizer.load_state_dict(saved["optimizer"])

    def at_size(self, side):
        """The same parameters in a model for images of another side: only positions depend on it."""
        if side == self.config["image_size"]:
            return self.model
        other = lite_medsam.LiteMedSAM({**self.config, "image_size": side}).to(self.device)
        own = dict(self.model.named_modules())
        for name, module in other.named_modules():
            module._parameters.update(own[name]._parameters)
            module._buffers.update(own[name]._buffers)
        return other

    def save(self):
        """All or nothing."""
        state = {
            "model": self.model.state_dict(), "mean": self.mean, "optimizer": self.optimizer.state_dict(),
            "seconds": self.seconds, "step": self.step, "images": self.images, "curve": self.curve,
        }
        temporary = self.path.with_suffix(".part")
        torch.save(state, temporary)
        os.replace(temporary, self.path)

    def descend(self, loss, rate):
        """One step of the optimizer, for those parameters that the loss depends on."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

    @torch.no_grad()
    def average(self):
        decay = min(EMA_DECAY, (1 + self.step) / (10 + self.step))
        for name, value in self.model.state_dict().items():
            if value.is_floating_point():
                self.mean[name].lerp_(value, 1 - decay)
            else:
                self.mean[name].copy_(value)


def learning_rate(share, peak):
    """After `share` of the time: 2 % of warm-up, then a cosine."""
    rise = min(1.0, share / 0.02 + 1e-3)
    return peak * rise * 0.5 * (1 + math.cos(math.pi * min(1.0, share))) + 1e-7


def parse_sides(text):
    """[(side, share of the time), ...] from "64:0.4,256:0.6"."""
    return [(int(s), float(share)) for s, share in (part.split(":") for part in text.split(","))]


def side_at(sides, share):
    for side, part in sides:
        share -= part
        if share < 0:
            return side
    return sides[-1][0]


def practice(training, options, seconds, stopped):
    """The decoder alone: embeddings are noise, the answer is the box's ellipse."""
    side, count = PRACTICE_SIDE, PRACTICE_BATCH
    model = training.at_size(side).train()
    size = side // 4
    step, recent = 0, []
    while training.seconds < seconds and not stopped:
        start = time.monotonic()
        rng = np.random.default_rng([options.seed, step])
        boxes, masks = ellipse_batch(rng, side, count)
        noise = rng.normal(0, 0.5, (1, training.config["embed_dim"], size, size)).astype(np.float32)
        embedding = torch.from_numpy(noise).expand(count, -1, -1, -1).to(training.device)
        logits, iou = model.decode(embedding, boxes=boxes.to(training.device))
        losses, true_iou = mask_losses(logits, masks.to(training.device))
        loss = losses.mean() + F.mse_loss(iou, true_iou)
        training.descend(loss, learning_rate(training.seconds / seconds, 1e-3))
        recent.append(true_iou.mean().item())
        step += 1
        training.seconds += time.monotonic() - start
        if step % 100 == 0:
            print(f"practice on ellipses  {training.seconds / 60:.1f} min  IoU {np.mean(recent[-100:]):.3f}",
                  flush=True)


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
    saved, side, loader = time.monotonic(), None, None
    model = batches = None
    recent = []
    practice(training, options, PRACTICE_SHARE * total, stopped)
    while training.seconds < total and not stopped:
        share = training.seconds / total
        since_practice = max(0.0, share - PRACTICE_SHARE) / (1 - PRACTICE_SHARE)
        wanted = side_at(options.sides, share)
        if wanted != side:
            side = wanted
            model = training.at_size(side).train().to(memory_format=torch.channels_last)
            data = Scenes(options.seed, side, options.prompts)
            batch = options.batch * training.config["image_size"] // side
            order = range(training.images, 1 << 40)
            loader = torch.utils.data.DataLoader(
                data, batch, sampler=order, num_workers=options.workers, pin_memory=cuda,
                prefetch_factor=4 if options.workers else None,
            )
            batches = iter(loader)
        start = time.monotonic()
        batch = [t.to(device, non_blocking=True) for t in next(batches)]
        with_points = np.random.default_rng([options.seed, training.step]).random() < POINTS_SHARE
        loss, mask_loss, iou = step_loss(model, batch, with_points, autocast)
        training.descend(loss, learning_rate(since_practice, options.rate))
        training.average()
        training.step += 1
        training.images += len(batch[0])
        training.seconds += time.monotonic() - start
        if not with_points:
            recent.append((mask_loss, iou))
        if training.step % options.report == 0 and recent:
            loss, iou = np.mean(recent, 0)
            recent = []
            training.curve.append((training.step, training.seconds, float(loss), float(iou)))
            print(f"step {training.step}  {training.seconds / 60:.1f} of {options.minutes} min  side {side}  "
                  f"loss {loss:.3f}  IoU {iou:.3f}", flush=True)
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
                        help="images of full size, more of smaller ones (%(default)s)")
    parser.add_argument("--prompts", type=int, default=8, help="prompts for each image (%(default)s)")
    parser.add_argument("--rate", type=float, default=8e-4, help="peak learning rate (%(default)s)")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--report", type=int, default=50, help="steps between lines (%(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--bf16", action="store_true", help="bf16 on the CPU, where it has it")
    parser.add_argument("--export", help="write the state dict of the running mean here, and stop")
    options = parser.parse_args()
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
