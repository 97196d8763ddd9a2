"""Randomised medical-looking images with known masks, for training and testing the demo checkpoint.

Every kind of scene is a function of a random generator and a side that returns an image, float
(side, side) or (side, side, 3) in about [0, 1], and labels (side, side), 0 for background. `make_scene`
picks one, spoils it as scanners and cameras do, and returns 8 bits.
"""

import numpy as np

from fields import blur, smooth_noise, wavy_radius


class Canvas:
    """An image and its labels, painted object over object."""

    def __init__(self, rng, side, background=0.0, channels=1):
        self.rng = rng
        self.side = side
        line = np.linspace(-1, 1, side, dtype=np.float32)
        self.x, self.y = line[None, :], line[:, None]
        # A slow deformation that all objects share.
        self.x = self.x + rng.uniform(0, 0.04) * smooth_noise(rng, (side, side), side / 6)
        self.y = self.y + rng.uniform(0, 0.04) * smooth_noise(rng, (side, side), side / 6)
        shape = (side, side) if channels == 1 else (side, side, channels)
        self.image = np.full(shape, background, np.float32)
        self.labels = np.zeros((side, side), np.uint16)
        self.drawn = []  # pixels of each labelled object, hidden or not
        self.textures = {}

    def texture(self, scale):
        """Smooth noise. One field for all scales within a factor of 1.4, shifted by chance each time:
        it is periodic, and dear to make."""
        key = round(2 * np.log2(scale))
        if key not in self.textures:
            self.textures[key] = smooth_noise(self.rng, (self.side, self.side), 2 ** (key / 2))
        shift = self.rng.integers(0, self.side, 2)
        return self.rng.choice([-1, 1]) * np.roll(self.textures[key], shift, (0, 1))

    def ellipse(self, centre, axes, turn=0.0, waves=0.06):
        mask = np.zeros((self.side, self.side), bool)
        reach = 2.5 * max(axes) + 0.15  # outlines and the deformation stay within
        low, high = ((np.asarray(centre) + [[-reach], [reach]] + 1) / 2 * self.side).astype(int)
        (left, top), (right, bottom) = np.maximum(low, 0), np.maximum(high, 0)
        part = np.s_[top:bottom, left:right]
        mask[part] = wavy_radius(self.rng, self.x[part], self.y[part], centre, axes, turn, waves) < 1
        return mask

    def lump(self, centre, axes, turn=0.0):
        """An ellipse with a rough outline, dented and bulging."""
        radius = wavy_radius(self.rng, self.x, self.y, centre, axes, turn, 0.2)
        rough = self.texture(self.side * axes[1] * self.rng.uniform(0.1, 0.4) + 1)
        return radius + self.rng.uniform(0, 0.3) * rough < 1

    def tube(self, centre, length, width):
        """A bent tube of changing width, as the pancreas, the bowel and vessels look in a slice."""
        rng = self.rng
        along = np.linspace(-1, 1, 24)
        angle = rng.uniform(0, 6.28) + rng.normal(0, 1.2) * along + rng.normal(0, 1.0) * along**2
        steps = length / 12 * np.stack([np.cos(angle), np.sin(angle)])
        path = np.cumsum(steps, axis=1)
        path += np.reshape(centre, (2, 1)) - path.mean(axis=1, keepdims=True)
        widths = width * (1 + rng.uniform(0, 0.5) * np.sin(rng.uniform(1, 4) * along + rng.uniform(0, 6.28)))
        mask = np.zeros((self.side, self.side), bool)
        for (px, py), w in zip(path.T, widths):
            mask |= (self.x - px) ** 2 + (self.y - py) ** 2 < w**2
        return mask

    def paint(self, mask, value, texture=0.0, scale=3.0):
        if texture:
            grain = texture * self.texture(scale)
            value = value + (grain if self.image.ndim == 2 else grain[..., None])
        self.image = np.where(mask if self.image.ndim == 2 else mask[..., None], value, self.image)

    def label(self, mask, drawn=None):
        """Makes `mask` the next object, what is to be seen of one of `drawn` pixels."""
        self.drawn.append(drawn or np.count_nonzero(mask))
        self.labels[mask] = len(self.drawn)

    def labels_seen(self, least=0.5):
        """The labels, without objects of which less than a part of `least` is in the picture: organs do
        not lie over each other, and nobody would ask for what is left of one that did."""
        seen = np.bincount(self.labels.ravel(), minlength=len(self.drawn) + 1)
        hidden = seen < least * np.array([0, *self.drawn])
        return np.where(hidden[self.labels], 0, self.labels)


def somewhere(rng, reach=0.8):
    return rng.uniform(-reach, reach, 2)


def random_axes(rng, small, large):
    """Two half axes, the second down to half of the first; sizes spread evenly over scales."""
    first = small * (large / small) ** rng.random()
    return first, first * rng.uniform(0.5, 1)


def abdomen(rng, side):
    """A slice like CT or MR: skin, fat, muscle, spine, ribs, bowel, and organs of distinct tissue."""
    c = Canvas(rng, side, rng.uniform(0, 0.08))
    width, height = rng.uniform(0.75, 0.97), rng.uniform(0.55, 0.85)
    dark, bright = sorted(rng.uniform(0.1, 0.9, 2))
    fat, muscle = (dark, bright) if rng.random() < 0.7 else (bright, dark)
    body = np.hypot(c.x / width, c.y / height)
    c.paint(body < 1, fat + rng.uniform(0, 0.2))
    c.paint(body < 0.98, fat, 0.02)
    wall = rng.uniform(0.85, 0.95)
    c.paint(body < wall, muscle, 0.03)
    inside = body < wall - rng.uniform(0.04, 0.12)
    c.paint(inside, fat, 0.03, 5)
    for _ in range(rng.integers(0, 14)):  # bowel: rings with dark or bright filling
        centre, axes, turn = somewhere(rng, 0.5), random_axes(rng, 0.04, 0.12), rng.uniform(0, 180)
        c.paint(c.ellipse(centre, axes, turn) & inside, muscle + rng.normal(0, 0.05))
        if rng.random() < 0.8:
            inner = c.ellipse(centre, np.multiply(axes, 0.7), turn) & inside
            c.paint(inner, rng.choice([0.0, fat, rng.uniform(0, 1)]))
    bone = rng.uniform(0.8, 1.1)
    spine = c.ellipse((rng.normal(0, 0.03), 0.6 * height), random_axes(rng, 0.10, 0.17), 0, 0.03)
    c.paint(spine, bone, 0.08)
    if rng.random() < 0.3:
        c.label(spine)
    for angle in rng.uniform(-2.6, -0.5, rng.integers(0, 9)) * rng.choice([-1, 1]):
        rib = wall * width * np.sin(angle), wall * height * np.cos(angle)
        c.paint(c.ellipse(rib, (0.06, 0.025), np.rad2deg(np.arctan2(rib[1], rib[0])) + 90), bone)
    tissue = rng.uniform(0.15, 0.95, 4)  # several organs may share one
    for _ in range(rng.integers(3, 10)):
        radius = rng.uniform(0, 0.8) ** 0.5
        angle = rng.uniform(0, 6.28)
        centre = radius * width * np.cos(angle), radius * height * np.sin(angle)
        axes = random_axes(rng, 0.02 if rng.random() < 0.15 else 0.04, 0.45)
        form = rng.random()
        if form < 0.25:
            organ = c.tube(centre, axes[0] * rng.uniform(1, 3), max(0.025, axes[0] * rng.uniform(0.15, 0.5)))
        elif form < 0.6:
            organ = c.lump(centre, axes, rng.uniform(0, 180))
        else:
            organ = c.ellipse(centre, axes, rng.uniform(0, 180), 0.18)
        drawn = np.count_nonzero(organ)
        organ &= inside
        value = rng.choice(tissue) + rng.normal(0, 0.03)
        if abs(value - fat) < 0.07:  # nobody could see it
            value = fat + rng.choice([-1, 1]) * rng.uniform(0.07, 0.2)
        c.paint(organ, value, rng.uniform(0.01, 0.05), rng.uniform(1, 5))
        if rng.random() < 0.4:  # vessels
            field = c.texture(side / 24)
            c.paint(organ & (np.abs(field - rng.normal()) < 0.05), value + rng.choice([-0.12, 0.12]))
        if rng.random() < 0.2:  # a darker or brighter part within, such as a kidney's pelvis
            c.paint(organ & c.ellipse(centre, random_axes(rng, 0.03, 0.1)), value + rng.choice([-0.2, 0.15]))
        c.label(organ, drawn)
    return blur(c.image, rng.uniform(0.4, 1.2)), c.labels_seen()


def ultrasound(rng, side):
    """A fan of speckle with dark cysts, solid nodules and the shadows below them."""
    c = Canvas(rng, side, rng.uniform(0.25, 0.6))
    for _ in range(rng.integers(1, 6)):  # layers of tissue
        y = rng.uniform(-1, 1) + 0.15 * c.texture(side / 5)
        c.paint((c.y > y) & (c.y < y + rng.uniform(0.05, 0.4)), rng.uniform(0.2, 0.75))
    for _ in range(rng.integers(1, 5)):
        centre, axes = somewhere(rng, 0.65), random_axes(rng, 0.06, 0.35)
        mass = c.ellipse(centre, axes, rng.normal(0, 25), 0.15)
        value = rng.choice([rng.uniform(0.02, 0.15), rng.uniform(0.7, 1.0)])
        below = (np.abs(c.x - centre[0]) < axes[0] * 0.8) & (c.y > centre[1])
        c.image[below & ~mass] *= 1.3 if value < 0.2 else 0.6
        c.paint(mass, value, 0.04, 4)
        c.label(mass)
    image = blur(c.image, 1.0)
    grain = rng.uniform(0.6, 1.2)
    real, imaginary = (
        blur(rng.standard_normal((side, side)), grain) for _ in range(2)
    )
    speckle = np.hypot(real, imaginary)
    image = image * (speckle / speckle.mean()) ** rng.uniform(0.5, 1.0)
    if rng.random() < 0.6:  # the fan
        angle = np.arctan2(c.x, c.y + 1.6)
        fan = (np.abs(angle) < rng.uniform(0.4, 0.6)) & (np.hypot(c.x, c.y + 1.6) < 2.5)
        image = np.where(fan, image, 0)
        c.labels[~fan] = 0
    return image, c.labels_seen()


def cells(rng, side):
    """Fluorescent nuclei on black, or stained ones on pink."""
    stained = rng.random() < 0.5
    ground = rng.uniform([0.75, 0.55, 0.7], [0.98, 0.85, 0.95]) if stained else rng.uniform(0, 0.12, 3)
    c = Canvas(rng, side, 0.0, 3)
    c.paint(np.ones((side, side), bool), ground, 0.06 if stained else 0.02, rng.uniform(2, 8))
    size = rng.uniform(0.03, 0.14)
    tint = rng.uniform([0.2, 0.1, 0.4], [0.5, 0.35, 0.7]) if stained else rng.uniform(0.2, 1, 3)
    for _ in range(rng.integers(4, 32)):
        centre = somewhere(rng, 0.95)
        first = size * rng.uniform(0.7, 1.4)
        cell = c.ellipse(centre, (first, first * rng.uniform(0.6, 1)), rng.uniform(0, 180), 0.1)
        value = np.clip(tint * rng.uniform(0.7, 1.2), 0, 1)
        c.paint(cell, value, 0.05, rng.uniform(1, 3))
        rim = cell & ~c.ellipse(centre, (first * 0.85, first * 0.8))
        if rng.random() < 0.5:
            c.paint(rim, value * 0.8)
        c.label(cell)
    return np.stack([blur(c.image[..., i], rng.uniform(0.3, 1.0)) for i in range(3)], -1), c.labels_seen()


def skin(rng, side):
    """A pigmented lesion on skin, sometimes with hairs and a dark frame."""
    tone = rng.uniform([0.55, 0.35, 0.25], [0.95, 0.75, 0.65])
    c = Canvas(rng, side, 0.0, 3)
    c.paint(np.ones((side, side), bool), tone, 0.03, rng.uniform(2, 20))
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        radius = wavy_radius(rng, c.x, c.y, somewhere(rng, 0.4), random_axes(rng, 0.12, 0.6),
                             rng.uniform(0, 180), 0.25)
        radius = radius + 0.06 * c.texture(side / 20)
        edge = 0.5 - 0.5 * np.tanh((radius - 1) * rng.uniform(6, 30))  # a soft border
        color = tone * rng.uniform(0.25, 0.75) * rng.uniform(0.8, 1.1, 3)
        shade = color + (0.08 * c.texture(rng.uniform(3, 12)))[..., None]
        c.image = c.image + edge[..., None] * (shade - c.image)
        c.label(radius < 1)
    if rng.random() < 0.4:
        for _ in range(rng.integers(3, 20)):
            bend = rng.normal(0, 0.3)
            angle = rng.uniform(0, 3.14)
            u = c.x * np.cos(angle) + c.y * np.sin(angle)
            v = c.y * np.cos(angle) - c.x * np.sin(angle)
            c.paint(np.abs(v - bend * u**2 - rng.uniform(-1, 1)) < 0.006, tone * 0.3)
    if rng.random() < 0.3:
        c.paint(np.hypot(c.x, c.y) > rng.uniform(1.0, 1.3), 0.05)
    return np.stack([blur(c.image[..., i], 0.6) for i in range(3)], -1), c.labels_seen()


def shapes(rng, side):
    """Ellipses, stars and polygons of one tissue on another."""
    channels = rng.choice([1, 3])
    c = Canvas(rng, side, 0.0, channels)

    def tint():
        return rng.uniform(0, 1, channels) if channels == 3 else rng.uniform(0, 1)

    c.paint(np.ones((side, side), bool), tint(), rng.uniform(0, 0.1), rng.uniform(1, 20))
    for _ in range(rng.integers(1, 8)):
        centre, axes = somewhere(rng), random_axes(rng, 0.05, 0.5)
        if rng.random() < 0.6:
            shape = c.ellipse(centre, axes, rng.uniform(0, 180), rng.uniform(0, 0.4))
        else:  # a convex polygon: the points on one side of each of its lines
            shape = np.ones((side, side), bool)
            for angle in np.sort(rng.uniform(0, 6.28, rng.integers(3, 8))):
                dx, dy = c.x - centre[0], c.y - centre[1]
                shape &= dx * np.cos(angle) + dy * np.sin(angle) < axes[0]
        c.paint(shape, tint(), rng.uniform(0, 0.1), rng.uniform(1, 10))
        c.label(shape)
    image = c.image if channels == 3 else c.image[..., None]
    image = np.stack([blur(image[..., i], rng.uniform(0.3, 1.0)) for i in range(channels)], -1)
    return np.squeeze(image), c.labels_seen()


KINDS = {abdomen: 0.45, ultrasound: 0.15, cells: 0.12, skin: 0.12, shapes: 0.16}


def spoil(rng, image):
    """Contrast window, bias field and noise; returns 8 bits."""
    side = image.shape[0]
    if rng.random() < 0.4:
        field = 1 + rng.uniform(0, 0.2) * smooth_noise(rng, (side, side), side / 4)
        image = image * (field if image.ndim == 2 else field[..., None])
    low, high = np.quantile(image, [rng.uniform(0, 0.02), 1 - rng.uniform(0, 0.02)])
    image = np.clip((image - low) / max(high - low, 1e-3), 0, 1) ** rng.uniform(0.6, 1.6)
    if image.ndim == 2 and rng.random() < 0.1:
        image = 1 - image
    noise = rng.uniform(0, 0.06) * smooth_noise(rng, image.shape[:2], rng.uniform(0.2, 1.0))
    image = image + (noise if image.ndim == 2 else noise[..., None])
    return np.clip(image * 255, 0, 255).astype(np.uint8)


def drop_fragments(labels, least):
    """Removes labels of fewer than `least` pixels, mostly hidden by later objects, or all over the
    picture, and numbers the rest from 1."""
    out = np.zeros(labels.shape, np.uint8)
    kept = 0
    for label in np.unique(labels[labels > 0]):
        mask = labels == label
        ys, xs = np.nonzero(mask)
        box = (ys.max() - ys.min() + 1) * (xs.max() - xs.min() + 1)
        if ys.size < 0.9 * mask.size and ys.size >= max(least, 0.2 * box) and kept < 255:
            kept += 1
            out[mask] = kept
    return out


def make_scene(rng, side=256, kind=None):
    """Returns an image, uint8 (side, side, 3), and labels, uint8 (side, side), with at least one."""
    while True:
        draw = kind or rng.choice(list(KINDS), p=list(KINDS.values()))
        image, labels = draw(rng, side)
        labels = drop_fragments(labels, least=max(10, side * side // 2000))
        if labels.any():
            image = spoil(rng, image)
            return (image if image.ndim == 3 else np.repeat(image[..., None], 3, 2)), labels


def crop(rng, image, labels, side):
    """A part of a scene, (side, side), with at least one object of 25 pixels or more: details keep
    their size in pixels. None where there is no such object."""
    ys, xs = np.nonzero(labels)
    at = rng.integers(ys.size)
    top, left = (
        int(np.clip(c - rng.integers(0, side), 0, n - side)) for c, n in zip((ys[at], xs[at]), labels.shape)
    )
    part = np.s_[top : top + side, left : left + side]
    kept = drop_fragments(labels[part], least=25)
    return (image[part], kept) if kept.any() else None


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


def inscribed_ellipses(boxes, side):
    """What a box alone tells: masks (count, side, side) of the ellipses that touch its sides."""
    at = np.arange(side) + 0.5
    x0, y0, x1, y1 = np.asarray(boxes, np.float64).T[:, :, None]
    x = (at - (x0 + x1) / 2) / np.maximum((x1 - x0) / 2, 0.5)
    y = (at - (y0 + y1) / 2) / np.maximum((y1 - y0) / 2, 0.5)
    return x[:, None, :] ** 2 + y[:, :, None] ** 2 < 1
