"""Pruning by second moments: which weights become zero, and how the others make up for them.

`microtome calibrate --moments` writes, for every layer, the mean H of x x^T over the inputs x that it saw. Weights
W' in place of W change the layer's output by a squared error of trace((W' - W) H (W' - W)^T), which is made least
under the constraint that enough of W' is zero, by the alternating direction method of multipliers:
V. Boza, Fast and Effective Weight Update for Pruned Large Language Models, 2024.

Pruned are convolutions and linear layers as the model file has them, BatchNorm folded. Depthwise convolutions, the
first layer, which sees pixels, and what calibration did not see (the tokens for several masks) stay.
"""

import math

import numpy as np

import model_file
import pruning
import quantized
from architecture import ArchitectureError

DAMPING = 0.01  # of the mean moment is added to each, so that what was rarely seen is not taken for free
PENALTY = 0.3  # for weights that differ from their pruned ones, where inputs have a moment of 1
GRADUAL, FIXED = 40, 20  # steps in which more and more weights are zero, then steps with the same ones
SKETCHED_ROWS, SKETCHED_STEPS = 96, 12  # by which a layer's loss is foretold
FRACTIONS = (0.02, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.95)  # of its weights, for which it is


class Moments:
    """What `microtome calibrate --moments` wrote."""

    def __init__(self, path):
        self._tensors, metadata = model_file.read_safetensors(path)
        self._path = path
        if metadata.get("format") != "microtome moments":
            raise model_file.ModelFileError("not a file of second moments, which `microtome calibrate --moments` writes")
        self.model = metadata.get("model")  # the fingerprint of the one they were seen in

    def of(self, name, depth):
        """H (depth, depth) of a layer, or None where calibration did not see it."""
        found = self._tensors.get(f"{name}.moments")
        if found is None:
            return None
        if found.shape != (depth, depth):
            raise ArchitectureError(f"{self._path}: {name}.moments has shape {found.shape}, expected {(depth, depth)}")
        if not np.isfinite(found).all() or (np.diag(found) < 0).any():
            raise ArchitectureError(f"{self._path}: {name}.moments holds what is no moment")
        return found


class Layer:
    """A weight as the matrix (rows, depth) that multiplies inputs whose moments are 1."""

    def __init__(self, name, weight, moments):
        self._shape, self._transposed = weight.shape, quantized.out_axis(name) == 1
        self.inputs = _inputs(name, weight)
        flat = weight.reshape(len(weight), -1)
        moments = moments.astype(np.float64)
        moments = moments + np.eye(len(moments)) * (DAMPING * np.trace(moments) / len(moments) + 1e-30)
        size = np.sqrt(np.diag(moments))
        self._size = size.astype(np.float32)
        self._rows = (flat.T if self._transposed else flat) * self._size
        moments = moments / size / size[:, None]
        self._moments = moments.astype(np.float32)
        self._inverse = np.linalg.inv(moments + PENALTY * np.eye(len(moments))).astype(np.float32)

    def pruned(self, outside):
        """The weight, in the checkpoint's shape, without those that `outside` chooses: see `smallest`."""
        flat = self._solve(self._rows, outside, GRADUAL, FIXED) / self._size
        return (flat.T if self._transposed else flat).reshape(self._shape)

    def losses(self):
        """The squared error of the output relative to its size, for each of FRACTIONS, by some of the rows."""
        rows = self._rows[:: math.ceil(len(self._rows) / SKETCHED_ROWS)]
        size = self._energy(rows) + 1e-30
        return [
            self._energy(self._solve(rows, smallest(fraction), SKETCHED_STEPS, SKETCHED_STEPS // 2) - rows) / size
            for fraction in FRACTIONS
        ]

    def _energy(self, rows):
        return float(np.sum(rows @ self._moments * rows))

    def _solve(self, rows, outside, gradual, fixed):
        product = rows @ self._moments
        free, multiplier = rows, np.zeros_like(rows)
        for step in range(gradual + fixed):
            if step < gradual:
                zero = outside(np.abs(free + multiplier), ((step + 1) / gradual) ** (1 / 3))
            held = np.where(zero, np.float32(0), free + multiplier)
            multiplier = multiplier + free - held
            free = (product + np.float32(PENALTY) * (held - multiplier)) @ self._inverse
        return np.where(zero, np.float32(0), free + multiplier)


def _inputs(name, weight):
    return weight.shape[1 - quantized.out_axis(name)]


def _smallest(sizes, count):
    """True for so many of the magnitudes (rows, depth)."""
    zero = np.zeros(sizes.size, bool)
    if count:
        zero[np.argpartition(sizes.ravel(), count - 1)[:count]] = True
    return zero.reshape(sizes.shape)


def smallest(fraction):
    """Chooses a fraction of a layer's weights: says of magnitudes (rows, depth) which become zero in a step in which
    only `part` of them shall."""
    return lambda sizes, part: _smallest(sizes, round(fraction * part * sizes.size))


def two_of_four(inputs):
    """Chooses two of every four weights that follow each other along the inputs, as `smallest` does."""

    def outside(sizes, part):
        along = np.moveaxis(sizes.reshape(len(sizes), inputs, -1), 1, 0)
        zero = np.moveaxis(pruning.outside_two_of_four(along), 0, 1).reshape(sizes.shape)
        if part < 1:
            zero &= _smallest(np.where(zero, sizes, np.inf), round(part * np.count_nonzero(zero)))
        return zero

    return outside


def spread(losses, sizes, zeros):
    """{layer: fraction} such that `zeros` of the weights are zero together and the sum of the relative losses is
    least: every layer gives up weights up to the same price. `losses` are for FRACTIONS, `sizes` in weights."""
    fine = np.linspace(0, FRACTIONS[-1], 191)

    def curve(values):  # between fractions that were tried the loss is a power of the fraction
        return np.exp(np.interp(np.log(fine + 1e-3), np.log(np.add(FRACTIONS, 1e-3)), np.log(np.add(values, 1e-9))))

    curves = {name: curve(values) for name, values in losses.items()}
    low, high = -60.0, 20.0
    for _ in range(80):
        price = math.exp((low + high) / 2)  # of a weight, in relative loss
        chosen = {n: float(fine[np.argmin(c - price * fine * sizes[n])]) for n, c in curves.items()}
        if sum(chosen[n] * sizes[n] for n in chosen) < zeros:
            low = (low + high) / 2
        else:
            high = (low + high) / 2
    return chosen


def prune(tensors, moments, choices):
    """{name: array} of the weights among a model's tensors that change where they are pruned as `choices`
    (pruning.Choices) say, and how many layers stay because calibration did not see them. Fractions are of all that
    could be pruned without calibration."""
    weights = pruning.without_kept(pruning.layers(tensors), choices.keep)
    layers, unseen = {}, 0
    for name, weight in weights.items():
        if _inputs(name, weight) < pruning.GROUP:
            continue
        seen = moments.of(name, len(weight) if quantized.out_axis(name) else weight[0].size)
        if seen is None:
            unseen += 1
        else:
            layers[name] = Layer(name, weight.astype(np.float32), seen)
    if choices.two_of_four:
        choosers = {name: two_of_four(layer.inputs) for name, layer in layers.items()}
    else:
        choosers = {name: smallest(f) for name, f in _fractions(layers, weights, choices).items() if f}
    return {f"{name}.weight": layers[name].pruned(outside) for name, outside in choosers.items()}, unseen


def _fractions(layers, weights, choices):
    if choices.layerwise or not choices.amount:
        return dict.fromkeys(layers, choices.amount)
    sizes = {name: weights[name].size for name in layers}
    asked, most = choices.amount * sum(w.size for w in weights.values()), FRACTIONS[-1] * sum(sizes.values())
    if asked > most:
        raise ArchitectureError(
            f"--prune {choices.amount:g} is {asked:.0f} weights; by moments at most {most:.0f} become zero, "
            f"{FRACTIONS[-1]:.0%} of each layer that calibration saw"
        )
    return spread({name: layer.losses() for name, layer in layers.items()}, sizes, asked)
