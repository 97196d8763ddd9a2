#!/usr/bin/env python3
"""Makes a phantom of an abdominal CT: a 2-D case and a 3-D case with images, boxes and labels.

The anatomy is drawn, not measured: organs are ellipsoids with wavy outlines, placed roughly where
organs are, filled with texture and vessels at roughly their brightness in a soft-tissue window,
then blurred and made noisy as a scanner would. Needs NumPy alone; the same seed gives the same
files.
"""

import argparse
import pathlib

import numpy as np

from fields import blur, object_boxes, smooth_noise, wavy_radius

SIDE = 512
SLICES = 28
SPACING = (0.8, 0.8, 5.0)  # mm along x, y, z, as SimpleITK orders them

# Organ: centre (x, y, z), half axes, both in units of half the body, turn in degrees, brightness.
# Image coordinates, as radiologists look at them: the patient's right is at the left, front is up.
ORGANS = {
    "liver": ((-0.40, -0.12, -0.05), (0.44, 0.46, 0.85), -18, 0.62),
    "stomach": ((0.36, -0.36, 0.15), (0.27, 0.19, 0.55), 25, 0.46),
    "spleen": ((0.62, 0.16, 0.25), (0.15, 0.26, 0.50), 12, 0.66),
    "right kidney": ((-0.42, 0.42, -0.35), (0.14, 0.18, 0.52), 20, 0.74),
    "left kidney": ((0.42, 0.44, -0.25), (0.14, 0.18, 0.52), -20, 0.74),
    "aorta": ((0.05, 0.34, 0.0), (0.065, 0.065, 9.0), 0, 0.86),
}
BODY_WIDTH, BODY_HEIGHT = 0.86, 0.66  # share of the picture
FAT, MUSCLE, BONE, AIR = 0.22, 0.50, 1.0, 0.0


class Body:
    """Coordinates in which the body is a unit disc, and the canvas that organs are painted on."""

    def __init__(self, rng, slices, side):
        self.rng = rng
        self.shape = (slices, side, side)
        self.z = np.linspace(-1, 1, slices, dtype=np.float32)
        self.line = np.linspace(-1, 1, side, dtype=np.float32)
        # One slow deformation for all, so that neighbours fit together.
        wave = [smooth_noise(rng, self.shape, (slices / 4, side / 7, side / 7)) for _ in range(2)]
        self.x = self.line / BODY_WIDTH + 0.020 * wave[0]
        self.y = self.line[:, None] / BODY_HEIGHT + 0.025 * wave[1]
        self.image = np.zeros(self.shape, np.float32)
        self.labels = np.zeros(self.shape, np.uint8)
        self.grains = {}

    def ellipsoid(self, centre, axes, turn=0, waves=0.06):
        """Where the ellipsoid's equation is below 1, with a wavy outline."""
        inside = np.zeros(self.shape, bool)
        reach = 1.3 * max(axes[:2]) + 0.1  # further than waves and deformation go
        near = np.ix_(
            np.abs(self.z - centre[2]) < axes[2],
            np.abs(self.line / BODY_HEIGHT - centre[1]) < reach,
            np.abs(self.line / BODY_WIDTH - centre[0]) < reach,
        )
        radius = wavy_radius(self.rng, self.x[near], self.y[near], centre, axes, turn, waves)
        height = (self.z[near[0]] - centre[2]) / axes[2]
        inside[near] = radius < np.sqrt(1 - height**2)
        return inside

    def grain(self, scale):
        """Noise for textures: one field for each scale, shifted anew each time."""
        if scale not in self.grains:
            self.grains[scale] = smooth_noise(self.rng, self.shape, (1.0, scale, scale))
        return np.roll(self.grains[scale], self.rng.integers(0, self.shape), (0, 1, 2))

    def paint(self, mask, brightness, texture=0.0, scale=6.0, label=None):
        if texture:
            brightness = brightness + texture * self.grain(scale)[mask]
        self.image[mask] = brightness
        if label is not None:
            self.labels[mask] = label


def draw_vessels(body, organ, brightness, count):
    """Bright branches through an organ: thin level sets of a smooth field, where it is deep."""
    field = smooth_noise(body.rng, body.shape, (3.0, 14.0, 14.0))
    for level in body.rng.normal(0, 0.8, count):
        body.image[organ & (np.abs(field - level) < 0.035)] = brightness


def draw_bowel(body, free):
    """Loops with walls, some with gas, in the space that the organs leave."""
    for _ in range(16):
        centre = (body.rng.uniform(-0.55, 0.6), body.rng.uniform(-0.6, 0.15), body.rng.uniform(-1, 0.2))
        size = body.rng.uniform(0.07, 0.12)
        axes = (size, size * body.rng.uniform(0.7, 1.0), 0.5)
        turn = body.rng.uniform(0, 180)
        outer = body.ellipsoid(centre, axes, turn) & free
        body.paint(outer, 0.54)
        inner = body.ellipsoid(centre, tuple(0.7 * a for a in axes), turn) & free
        body.paint(inner, AIR if body.rng.random() < 0.25 else 0.38, 0.02)


def draw_skeleton(body):
    vertebra = body.ellipsoid((0, 0.60, 0), (0.15, 0.14, 9), waves=0.03)
    body.paint(vertebra, 0.84, 0.05, 3.0)
    body.paint(vertebra & ~body.ellipsoid((0, 0.60, 0), (0.13, 0.12, 9), waves=0.0), BONE)
    body.paint(body.ellipsoid((0, 0.78, 0), (0.05, 0.045, 9)), 0.45)
    for side in (-1, 1):
        body.paint(body.ellipsoid((side * 0.15, 0.80, 0), (0.12, 0.03, 9), side * 25), BONE)
        for angle in np.linspace(-1.0, 1.0, 6):
            rib = (side * 0.90 * np.cos(angle), 0.90 * np.sin(angle), body.rng.uniform(-0.2, 0.2))
            body.paint(body.ellipsoid(rib, (0.065, 0.022, 0.9), np.rad2deg(side * angle) + 90), BONE)


def make_volume(rng, slices, side):
    """Returns image uint8 and labels uint8, both (slices, side, side); labels follow ORGANS."""
    body = Body(rng, slices, side)
    whole = np.hypot(body.x, body.y)
    body.paint(whole < 1.0, 0.42)  # skin
    body.paint(whole < 0.985, FAT, 0.012)
    body.paint(whole < 0.93, MUSCLE, 0.03, 3.0)
    inside = whole < 0.84
    body.paint(inside, FAT + 0.02, 0.02)
    for side_of_spine in (-1, 1):
        body.paint(body.ellipsoid((side_of_spine * 0.27, 0.62, 0), (0.11, 0.13, 9)), MUSCLE, 0.03, 3.0)
    organs = {
        name: body.ellipsoid(centre, axes, turn) & (inside | (name == "aorta"))
        for name, (centre, axes, turn, _) in ORGANS.items()
    }
    draw_bowel(body, inside & ~np.logical_or.reduce(list(organs.values())))
    draw_skeleton(body)
    for label, (name, mask) in enumerate(organs.items(), 1):
        centre, axes, turn, brightness = ORGANS[name]
        body.paint(mask, brightness, 0.018, 4.0, label)
        if name == "liver":
            draw_vessels(body, mask, brightness + 0.14, 3)
        if name.endswith("kidney"):  # the pelvis is darker than the cortex
            body.paint(body.ellipsoid(centre, tuple(0.5 * a for a in axes), turn), 0.52, 0.02)
        if name == "stomach":
            level = centre[1] - 0.4 * axes[1]
            body.paint(body.ellipsoid(centre, tuple(0.82 * a for a in axes), turn) & (body.y < level), AIR)
    image = blur(body.image, 1.1)
    image += 0.02 * smooth_noise(rng, body.shape, (0.3, 0.9, 0.9))
    return np.clip(image * 235, 0, 255).astype(np.uint8), body.labels


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("-o", "--output", required=True, help="folder for 2D_phantom.npz and 3D_phantom.npz")
    parser.add_argument("--seed", type=int, default=4, help="(%(default)s)")
    options = parser.parse_args()
    folder = pathlib.Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(options.seed)
    image, labels = make_volume(rng, SLICES, SIDE)

    middle = int(np.argmax([np.unique(s).size * 1e6 + (s > 0).sum() for s in labels]))
    slice_labels = labels[middle]
    np.savez_compressed(
        folder / "2D_phantom.npz",
        imgs=np.repeat(image[middle][..., None], 3, 2),
        gts=slice_labels,
        boxes=object_boxes(slice_labels, rng),
        spacing=np.array(SPACING[:2]),
    )
    np.savez_compressed(
        folder / "3D_phantom.npz",
        imgs=image,
        gts=labels,
        boxes=object_boxes(labels, rng),
        spacing=np.array(SPACING),
    )
    print(f"{folder}: 2D_phantom.npz (slice {middle}) and 3D_phantom.npz, {', '.join(ORGANS)}")


if __name__ == "__main__":
    main()
