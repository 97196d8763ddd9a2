"""What every generator of images draws with: smooth noise, blur, wavy outlines. NumPy alone."""

import numpy as np


def smooth_noise(rng, shape, scale):
    """Gaussian noise of unit variance, periodic, smoothed to features of about `scale` pixels (one
    number, or one per axis)."""
    scale = np.broadcast_to(scale, len(shape))
    spectrum = np.fft.rfftn(rng.standard_normal(shape, np.float32))
    for axis, (n, s) in enumerate(zip(shape, scale)):
        f = np.fft.rfftfreq(n) if axis == len(shape) - 1 else np.fft.fftfreq(n)
        view = [1] * len(shape)
        view[axis] = f.size
        spectrum *= np.exp(-2 * (np.pi * f * s) ** 2).reshape(view)
    noise = np.fft.irfftn(spectrum, shape, axes=range(len(shape)))
    return (noise / noise.std()).astype(np.float32)


def blur(image, sigma):
    """Gaussian blur of the last two axes, which wrap around."""
    rows = np.exp(-2 * (np.pi * np.fft.fftfreq(image.shape[-2]) * sigma) ** 2)
    columns = np.exp(-2 * (np.pi * np.fft.rfftfreq(image.shape[-1]) * sigma) ** 2)
    spectrum = np.fft.rfft2(image) * rows[:, None] * columns
    return np.fft.irfft2(spectrum, image.shape[-2:]).astype(np.float32)


def wavy_radius(rng, x, y, centre, axes, turn=0.0, waves=0.06):
    """Distance from `centre` in units of a wavy ellipse's outline: below 1 inside, at the points
    (x, y). `turn` in degrees; `waves` is how far the outline strays."""
    turn = np.deg2rad(turn)
    dx, dy = x - centre[0], y - centre[1]
    u = (dx * np.cos(turn) + dy * np.sin(turn)) / axes[0]
    v = (dy * np.cos(turn) - dx * np.sin(turn)) / axes[1]
    angle = np.arctan2(v, u)
    ripple = sum(
        rng.normal(0, waves / k) * np.cos(k * angle + rng.uniform(0, 6.28)) for k in (2, 3, 4, 5)
    )
    return np.hypot(u, v) * (1 + ripple)


def object_boxes(labels, rng, margin=6):
    """A box around each label of (H, W) or (D, H, W), as a person would draw it: each side up to
    `margin` pixels outside. Rows are x0, y0, x1, y1, or x0, y0, z0, x1, y1, z1 with exact z."""
    boxes = []
    for label in np.unique(labels[labels > 0]):
        where = [(axis.min(), axis.max()) for axis in np.nonzero(labels == label)]
        low, high = [], []
        for (first, last), n in zip(where[-1:-3:-1], labels.shape[-1:-3:-1]):
            low.append(max(0, first - rng.integers(0, margin)))
            high.append(min(n, last + 1 + rng.integers(0, margin)))
        if labels.ndim == 3:
            low.append(where[0][0])
            high.append(where[0][1])
        boxes.append(low + high)
    return np.array(boxes, np.int64)
