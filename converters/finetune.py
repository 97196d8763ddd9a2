#!/usr/bin/env python3
"""Trains a LiteMedSAM checkpoint on, with labelled cases of yours.

    python3 finetune.py -m lite_medsam.pth -i cases/ -o tuned.pth [--validate others/]
    python3 finetune.py -m pruned.safetensors -i cases/ -o tuned.pth --hold-zeros
    python3 convert.py tuned.pth -o tuned.safetensors

Cases are .npz files with `imgs` and `gts`: see labelled_cases.py. The network is asked for one object at a
time, with a box around it, as it will be later. BatchNorm keeps the means and variances that it has. The
learning rate rises for 3 % of the steps and falls along a cosine to zero.

Interrupted by SIGINT or SIGTERM, it leaves its state in OUTPUT.training, which it also writes every two
minutes, and the same command goes on from there: with as many threads it ends with the same bits as
without an interruption. Needs PyTorch and OpenCV; takes a GPU where PyTorch finds one.
"""

import argparse
import hashlib
import math
import os
import pathlib
import pickle
import signal
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "reference"))

import architecture  # noqa: E402
import checkpoint  # noqa: E402
import convert  # noqa: E402
import labelled_cases  # noqa: E402
import load_weights  # noqa: E402
import model_file  # noqa: E402
import pruning  # noqa: E402

PROMPTS = 4  # boxes for each image and step
WARM_UP = 0.03  # of the steps
LARGEST_GRADIENT = 1.0
SAVE_SECONDS = 120
BOXES_AT_ONCE = 16


class FinetuneError(Exception):
    """Training cannot begin or go on. The message says why."""


class Interruption:
    """Whether SIGINT or SIGTERM has come within a `with`. A second one ends the program where it is."""

    def __enter__(self):
        self.signal = None
        self.before = {n: signal.signal(n, self.note) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for name, handler in self.before.items():
            signal.signal(name, handler)

    def note(self, number, _):
        self.signal = number
        for name in self.before:
            signal.signal(name, signal.SIG_DFL)

    def __bool__(self):
        return self.signal is not None


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


def mask_losses(logits, masks, inside):
    """Dice plus 20 times focal loss (Kirillov et al. 2023), plus the cross entropy around the object,
    which does not fade where objects are small; and the true IoU. Each (prompts), of logits and masks
    (prompts, h, w), among the pixels `inside` the image (h, w)."""
    target = masks.float()
    probability = logits.sigmoid() * inside
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none") * inside
    focal = (entropy * (probability - target).abs() ** 2).sum((1, 2)) / inside.sum()
    near = surroundings(masks) & inside
    local = (entropy * near).sum((1, 2)) / near.sum((1, 2))
    both = (probability * target).sum((1, 2))
    dice = 1 - (2 * both + 1) / (probability.sum((1, 2)) + target.sum((1, 2)) + 1)
    with torch.no_grad():
        found = (logits > 0) & inside
        iou = (found & masks).sum((1, 2)) / (found | masks).sum((1, 2))
    return dice + 20 * focal + local, iou


def image_loss(model, pixels, masks, boxes, inside):
    """The loss of one image's prompts, of which the prediction of the masks' IoU is a part."""
    embedding = model.image_encoder(pixels[None]).expand(len(boxes), -1, -1, -1)
    logits, predicted = model.decode(embedding, boxes=boxes)
    losses, iou = mask_losses(logits[:, 0], masks, inside)
    return losses.mean() + F.mse_loss(predicted[:, 0], iou)


def layer_weights(model):
    """The weights of convolutions and linear layers: those that pruning makes zero."""
    return [p for n, p in model.named_parameters()
            if n.endswith(".weight") and architecture.is_layer(n.removesuffix(".weight"), p.ndim)]


def hold_zeros(model):
    """Lets the weights that are zero now learn nothing. What has never had a gradient, AdamW does not move;
    nor do their gradients shorten others' steps by the norm of all."""
    for weight in layer_weights(model):
        weight.register_hook(lambda gradient, kept=weight != 0: gradient * kept)


def learning_rate(step, steps, peak):
    rise = min(1.0, (step + 1) / max(1, round(WARM_UP * steps)))
    return peak * rise * 0.5 * (1 + math.cos(math.pi * step / steps))


@torch.no_grad()
def case_dice(model, case, device):
    """The mean Dice coefficient over the objects of a case, each asked for with a box in every slice that
    shows it, at the resolution of the case."""
    side = model.config["image_encoder"]["image_size"]
    sums = {}
    for z in case.labelled():
        prompts = case.prompts(z)
        shape = case.labels[z].shape
        height, width = labelled_cases.scaled_shape(shape, side)
        small = labelled_cases.normalised(labelled_cases.resized(case.images[z], side))
        embedding = model.image_encoder(torch.from_numpy(labelled_cases.padded(small, side)[None]).to(device))
        boxes = np.array([labelled_cases.to_input(box, shape, side) for box in prompts.values()])
        found = []
        for part in torch.from_numpy(boxes).float().to(device).split(BOXES_AT_ONCE):
            logits, _ = model.decode(embedding.expand(len(part), -1, -1, -1), boxes=part)
            logits = F.interpolate(logits[..., :height, :width], shape, mode="bilinear", align_corners=False)
            found += list((logits[:, 0] > 0).cpu().numpy())
        for label, mask in zip(prompts, found):
            truth = case.labels[z] == label
            both, total = sums.get(label, (0, 0))
            sums[label] = both + (mask & truth).sum(), total + mask.sum() + truth.sum()
    return float(np.mean([2 * both / total for both, total in sums.values()]))


def validate(model, paths, device, interrupted):
    """{path: mean Dice of the case's objects}, or None where it was interrupted."""
    found = {}
    for path in paths:
        if interrupted:
            return None
        found[str(path)] = case_dice(model, labelled_cases.read(path), device)
    return found


def usable(paths, what, use):
    """[(path, use(case))] of the cases in files and folders, of which `use` may refuse some. Names those
    that are left out; raises FinetuneError where none is left."""
    found = []
    files = labelled_cases.find(paths)
    for path in files:
        try:
            found.append((path, use(labelled_cases.read(path))))
        except labelled_cases.CaseError as error:
            print(f"{path}: skipped: {error}", file=sys.stderr)
    if not found:
        raise FinetuneError(f"none of {len(files)} .npz files in {' '.join(paths)} can be used to {what}")
    return found


def digest(cases):
    """What tells whether a training goes on with the cases that it began with."""
    state = hashlib.sha256()
    for case in cases:
        for part in case:
            for array in (part.image, part.labels):
                state.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
            state.update(repr([(n, *map(int, b)) for n, b in part.boxes.items()]).encode())
    return state.hexdigest()


def save(path, content):
    """All or nothing."""
    temporary = path.with_name(path.name + ".part")
    try:
        torch.save(content, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class Training:
    """The model, the optimizer and the step that they are at, as they are kept beside the output."""

    def __init__(self, options, config, start, cases, validation, device):
        self.cases, self.device = cases, device
        self.steps, self.rate, self.batch, self.seed = options.steps, options.rate, options.batch, options.seed
        self.output = pathlib.Path(options.output)
        self.path = self.output.with_name(self.output.name + ".training")
        self.settings = {
            "-m": hashlib.sha256(pathlib.Path(options.model).read_bytes()).hexdigest(),
            "-i": digest(cases),  # or another --image-size
            "--validate": [str(path) for path in validation],
            **{f"--{n.replace('_', '-')}": getattr(options, n)
               for n in ("steps", "rate", "batch", "seed", "hold_zeros")},
        }
        self.model = load_weights.build(config, start)
        self.model.load_state_dict(start, strict=False)  # BatchNorm's counters may be missing
        # Nothing but BatchNorm is different in training, and that keeps its statistics.
        self.model.to(device).eval()
        if options.hold_zeros:
            hold_zeros(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.rate)
        self.step, self.losses, self.before = 0, [], None
        if self.path.exists():
            self.resume()

    def resume(self):
        try:
            saved = torch.load(self.path, map_location="cpu")
            other = [n for n, value in self.settings.items() if saved["settings"][n] != value]
        except (RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError):
            raise FinetuneError(f"{self.path} is no state of a training: delete it, or say another --output") from None
        if other:
            raise FinetuneError(
                f"{self.path} is of a training with another {', '.join(other)}: delete it, or say another --output"
            )
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step, self.losses, self.before = saved["step"], saved["losses"], saved["before"]

    def save(self):
        save(self.path, {
            "settings": self.settings, "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
            "step": self.step, "losses": self.losses, "before": self.before,
        })

    def sample(self, number):
        """The `number`th image of the training, always the same. Every case comes once, in a random order,
        before one comes again; of a volume, one slice."""
        turn, place = divmod(number, len(self.cases))
        order = np.random.default_rng([self.seed, 0, turn]).permutation(len(self.cases))
        rng = np.random.default_rng([self.seed, 1, number])
        case = self.cases[order[place]]
        chosen = case[rng.integers(len(case))]
        return labelled_cases.sample(chosen, self.model.config["image_encoder"]["image_size"], PROMPTS, rng)

    def advance(self):
        """One step. Images come one after the other, since a batch of them takes more memory and, with
        BatchNorm as it is, teaches the same."""
        self.optimizer.zero_grad()
        total = 0.0
        for i in range(self.batch):
            image = [torch.from_numpy(a).to(self.device) for a in self.sample(self.step * self.batch + i)]
            loss = image_loss(self.model, *image) / self.batch
            loss.backward()
            total += loss.item()
        if not math.isfinite(total):
            raise FinetuneError(f"the loss of step {self.step + 1} is {total}: try a lower --rate")
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), LARGEST_GRADIENT)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.steps, self.rate)
        self.optimizer.step()
        self.step += 1
        self.losses.append(total)

    def run(self, interrupted):
        """Trains to the end, or until it is interrupted, and saves."""
        saved = reported = time.monotonic()
        first = last = self.step
        every = max(1, self.steps // 20)
        while self.step < self.steps and not interrupted:
            self.advance()
            if self.step % every == 0 or self.step in (first + 1, self.steps):
                pace = (time.monotonic() - reported) / (self.step - last)
                reported, last = time.monotonic(), self.step
                print(f"step {self.step} of {self.steps}  loss {np.mean(self.losses[-every:]):.4f}  "
                      f"{pace:.2f} s a step, {pace * (self.steps - self.step) / 60:.1f} min to go", flush=True)
            if time.monotonic() - saved > SAVE_SECONDS:
                self.save()
                saved = time.monotonic()
        self.save()

    def finish(self):
        """Writes the weights, under the checkpoint's names."""
        save(self.output, {n: v.cpu() for n, v in self.model.state_dict().items()})


def run(options, device, interrupted):
    """Returns whether it came to the end."""
    config, start = load_weights.read(options.model, options.image_size)
    if config["input"]["normalize"] != "range":
        raise architecture.ArchitectureError("fine-tuning knows LiteMedSAM's way to make an image its input alone")
    cases = [part for _, part in usable(options.input, "train with",
                                        lambda case: labelled_cases.slices(case, config["image_encoder"]["image_size"]))]
    validation = []
    if options.validate:
        held_out = usable(options.validate, "validate with", lambda case: [case.prompts(z) for z in case.labelled()])
        validation = [path for path, _ in held_out]
    print(f"{len(cases)} cases, {sum(map(len, cases))} images, "
          f"{sum(len(part.boxes) for case in cases for part in case)} objects", flush=True)
    training = Training(options, config, start, cases, validation, device)
    weights = layer_weights(training.model)
    zeros = 100 * sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
    if options.hold_zeros:
        print(f"{zeros:.1f} % of the layers' weights are zero and stay so")
    elif zeros > 100 * pruning.LEAST_FOUND:
        print(f"{zeros:.1f} % of the layers' weights are zero; without --hold-zeros they will not stay so")
    if training.step:
        print(f"goes on after step {training.step}, from {training.path}", flush=True)
    if validation and not training.before:
        training.before = validate(training.model, validation, device, interrupted)
        if training.before:
            print(f"Dice before: {np.mean(list(training.before.values())):.4f}", flush=True)
    training.run(interrupted)
    if training.step < options.steps:
        return False
    training.finish()
    if validation:
        after = validate(training.model, validation, device, interrupted)
        if not after:
            return False
        width = max(len(path.stem) for path in validation)
        for path in validation:
            print(f"  {path.stem:{width}}  {training.before[str(path)]:.4f} -> {after[str(path)]:.4f}")
        print(f"Dice after: {np.mean(list(after.values())):.4f}, "
              f"before: {np.mean(list(training.before.values())):.4f}")
    training.path.unlink()
    print(f"{training.output}: {training.step} steps")
    return True


def positive(kind):
    def parse(text):
        value = kind(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not positive")
        return value

    return parse


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("-m", "--model", required=True, help="checkpoint (.pth), or model file (.safetensors) in "
                        "floating point, pruned or not")
    parser.add_argument("-i", "--input", required=True, nargs="+", metavar="FILE or DIR", help="labelled .npz cases")
    parser.add_argument("-o", "--output", required=True, help="checkpoint (.pth) to write")
    parser.add_argument("--hold-zeros", action="store_true", help="weights that are zero in the model stay zero")
    parser.add_argument("--validate", nargs="+", metavar="FILE or DIR",
                        help="labelled cases to measure Dice with, before and after; nothing is chosen by it")
    parser.add_argument("--steps", type=positive(int), default=200, help="(%(default)s)")
    parser.add_argument("--batch", type=positive(int), default=4, help="images in a step (%(default)s)")
    parser.add_argument("--rate", type=positive(float), default=1e-4, help="peak learning rate (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the order of images and how they vary (%(default)s)")
    parser.add_argument("--image-size", type=positive(int),
                        help="side of a checkpoint's input (256)")
    options = parser.parse_args(arguments)
    if options.seed < 0:
        parser.error("--seed is not negative")
    if convert.is_model_file(options.output) or not pathlib.Path(options.output).absolute().parent.is_dir():
        parser.error("--output is a checkpoint (.pth), in a folder that exists")
    if options.image_size and convert.is_model_file(options.model):
        parser.error("--image-size is for checkpoints: a model file has its own")
    return options


def main(arguments=None):
    options = parse(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        with Interruption() as interrupted:
            if run(options, device, interrupted):
                return 0
    except (checkpoint.CheckpointError, architecture.ArchitectureError, model_file.ModelFileError) as error:
        print(f"finetune.py: {options.model}: {error}", file=sys.stderr)
        return 1
    except (FinetuneError, labelled_cases.CaseError, OSError) as error:
        print(f"finetune.py: {error}", file=sys.stderr)
        return 1
    print("interrupted: the same command goes on")
    return 128 + interrupted.signal


if __name__ == "__main__":
    sys.exit(main())
