"""Pruning: which weights become zero, and what a checkpoint says that arrives pruned.

Pruned are the weights of convolutions and linear layers, by their magnitudes in the checkpoint, before
BatchNorm is folded. Biases, norms, embeddings and the attention's biases are never pruned.
"""

import dataclasses
import fnmatch
import re

import numpy as np

import quantized
from architecture import ArchitectureError, is_layer

FOUND = "found in the checkpoint"
LEAST_FOUND = 0.05  # of the weights; 8 bits alone make some per cent of them zero
GROUP, KEPT = 4, 2
_PART = re.compile(r"(.+)_(orig|mask)")


@dataclasses.dataclass(frozen=True)
class Choices:
    """What to prune: a fraction of the weights, or all but two of every four."""

    amount: float | None = None
    two_of_four: bool = False
    layerwise: bool = False  # the fraction in each layer by itself
    keep: tuple = ()  # patterns of the layers that stay as they are

    def asked(self):
        return self.two_of_four or self.amount is not None

    def text(self):
        what = "2:4" if self.two_of_four else f"{'per layer' if self.layerwise else 'global'} {self.amount:g}"
        return what + (" but for " + ", ".join(self.keep) if self.keep else "")


def layers(tensors):
    """{layer: weight} of all that may be pruned."""
    weights = {n.removesuffix(".weight"): v for n, v in tensors.items() if n.endswith(".weight")}
    return {n: v for n, v in weights.items() if is_layer(n, v.ndim)}


def sparsity(tensors):
    """Which share of the weights that may be pruned is zero."""
    weights = layers(tensors).values()
    return sum(np.sum(w == 0) for w in weights) / max(1, sum(w.size for w in weights))


def without_kept(weights, patterns):
    """Those of {layer: weight} that no pattern matches. A convolution before a BatchNorm goes by the
    name of both, too: NAME as well as NAME.c."""
    kept = set()
    for pattern in patterns:
        found = [n for n in weights
                 if fnmatch.fnmatchcase(n, pattern) or fnmatch.fnmatchcase(n.removesuffix(".c"), pattern)]
        if not found:
            raise ArchitectureError(f"--prune-keep {pattern!r} matches no convolution and no linear layer")
        kept.update(found)
    return {n: w for n, w in weights.items() if n not in kept}


def smallest(magnitudes, amount):
    """True for this fraction of a list, its smallest numbers; of equal ones the earlier."""
    pruned = np.zeros(magnitudes.size, bool)
    pruned[np.argsort(magnitudes, kind="stable")[: round(amount * magnitudes.size)]] = True
    return pruned


def outside_two_of_four(magnitudes):
    """True for all but the two largest of every four numbers along axis 0; of equal ones the earlier
    stay. Fewer than four at the end are a group, too."""
    short = -len(magnitudes) % GROUP
    padded = np.pad(magnitudes, [(0, short)] + [(0, 0)] * (magnitudes.ndim - 1), constant_values=-1)
    groups = padded.reshape(-1, GROUP, *magnitudes.shape[1:])
    order = np.argsort(-groups, axis=1, kind="stable")
    pruned = np.ones(groups.shape, bool)
    np.put_along_axis(pruned, order[:, :KEPT], False, axis=1)
    return pruned.reshape(padded.shape)[: len(magnitudes)]


def _pruned_in_groups(name, weight):
    """Depthwise convolutions and the embedding of pixels have fewer than four inputs, and stay."""
    axis = 1 - quantized.out_axis(name)
    if weight.shape[axis] < GROUP:
        return np.zeros(weight.shape, bool)
    return np.moveaxis(outside_two_of_four(np.moveaxis(np.abs(weight), axis, 0)), 0, axis)


def pruned_weights(weights, choices):
    """{layer: True where a weight becomes zero} of {layer: weight}, as `choices` say. The fractions are
    those of torch.nn.utils.prune: weights that are zero already count."""
    weights = without_kept(weights, choices.keep)
    if choices.two_of_four:
        return {n: _pruned_in_groups(n, w) for n, w in weights.items()}
    magnitudes = {n: np.abs(w).ravel() for n, w in weights.items()}
    if choices.layerwise:
        return {n: smallest(m, choices.amount).reshape(weights[n].shape) for n, m in magnitudes.items()}
    if not weights:
        return {}
    together = smallest(np.concatenate(list(magnitudes.values())), choices.amount)
    parts = np.split(together, np.cumsum([w.size for w in weights.values()])[:-1])
    return {n: part.reshape(w.shape) for (n, w), part in zip(weights.items(), parts)}


def prune(state, eight_bit, choices):
    """A state dict {name: array} with its weights pruned, its layers in 8 bits, whose whole numbers become
    zero where their weights do and whose scales stay, and whether any weight has changed."""
    if not choices.asked():
        return state, eight_bit, False
    weights = {n: w for n, w in layers(state).items() if w.dtype.kind == "f"}
    pruned = pruned_weights(weights, choices)
    changed = any((weights[n][p] != 0).any() for n, p in pruned.items())
    zeroed = {f"{n}.weight": np.where(p, weights[n].dtype.type(0), weights[n]) for n, p in pruned.items()}
    eight_bit = [
        dataclasses.replace(e, whole=np.where(pruned[e.name], 0, e.whole).astype(e.whole.dtype))
        if e.name in pruned else e
        for e in eight_bit
    ]
    return state | zeroed, eight_bit, changed


def joined(state):
    """A state dict in which NAME_orig and NAME_mask, which torch.nn.utils.prune leaves of a parameter NAME,
    are the one tensor that they stand for."""
    parts, whole = {}, {}
    for name, value in state.items():
        if match := _PART.fullmatch(name):
            parts.setdefault(match[1], {})[match[2]] = value
        else:
            whole[name] = value
    for name, found in parts.items():
        for part, other in (("orig", "mask"), ("mask", "orig")):
            if part not in found:
                raise ArchitectureError(f"{name}_{other} {found[other].shape} is there without {name}_{part}")
        if name in whole:
            raise ArchitectureError(f"{name} {whole[name].shape} is there beside {name}_orig and {name}_mask")
        whole[name] = _masked(name, found["orig"], found["mask"])
    return whole


def _masked(name, value, mask):
    if value.shape != mask.shape:
        raise ArchitectureError(f"{name}_mask has shape {mask.shape}, but {name}_orig has {value.shape}")
    other = mask[(mask != 0) & (mask != 1)]
    if other.size:
        raise ArchitectureError(f"{name}_mask {mask.shape} holds {other[0]}, expected 0 and 1")
    with np.errstate(invalid="ignore"):
        return value * mask.astype(value.dtype)
