"""Reads layers trained with quantisation in the loop off the state dict of a Brevitas model.

Brevitas (https://github.com/Xilinx/brevitas, read and run at 0.13.4) keeps weights in fp32 and
quantises them in every forward pass. Its state dict holds only what is learned. Of a layer NAME these
are read, and any other key of a quantiser is refused:

    NAME.weight_quant.tensor_quant.scaling_impl.value
    NAME.input_quant.fused_activation_quant_proxy.tensor_quant.scaling_impl.value
        The largest magnitude T (not the scale), one for the tensor or, of weights, one for each
        output channel as (out, 1, 1, 1), in a transposed convolution (1, out, 1, 1); of a depthwise
        convolution's input one for each channel as (1, channels, 1, 1). The scale is T / 127
        for weights, which go from -127 to 127; T / 128 for signed inputs, which go from -128 to 127;
        T / 255 for unsigned ones. Where the scale is restricted to logarithms (LOG_FP), log2(T) is
        kept; where to powers of two (POWER_OF_TWO, the quantisers named FixedPoint), also, T being
        2^ceil(value), and the scale T / 128, for unsigned T / 256. Early versions say `learned_value`.
    NAME.input_quant.fused_activation_quant_proxy.tensor_quant.zero_point_impl.value
        The least input V (ShiftedUint8ActPerTensorFloat). Such inputs are unsigned, T their range, and
        the zero point is round(|V| / scale).
    ... .tensor_quant.msb_clamp_bit_width_impl.bit_width_offset
        Learned bit widths less 2; early versions keep `bit_width` itself. Only 8 bits are accepted.

No key says which of signed and unsigned, and of the three kinds of scale, was meant; see Choices. Nor is
there one for a bit width that is not learned, which is taken for 8, or for weight scales that follow
from the weights, as those of Int8WeightPerTensorFloat and Int8WeightPerChannelFloat: T is then the
largest of |weight|.
"""

import dataclasses
import fnmatch
import re

import numpy as np

import quantized
from architecture import ArchitectureError

_QUANTISER = re.compile(r"(.+?)\.((?:weight|input|output|bias|act)_quant)\.(.+)")
_TENSOR_QUANT = {
    "weight_quant": "tensor_quant.",
    "input_quant": "fused_activation_quant_proxy.tensor_quant.",
}
_LEAST_BITS = 2


@dataclasses.dataclass(frozen=True)
class Choices:
    """What the state dict does not say. Brevitas's own values come first, but for `weight_scales`."""

    scaling: str = "float"  # float, log or power-of-two: what scaling_impl.value holds
    weight_scales: str = "channel"  # channel or tensor: of weights whose scales are not kept
    unsigned: tuple = ()  # patterns of the layers whose inputs are unsigned

    def is_unsigned(self, name):
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.unsigned)


def _single(value, key):
    if value.size != 1:
        raise ArchitectureError(f"{key} has shape {value.shape}, expected one number")
    return np.float32(value.reshape(()))


class _Quantiser:
    """The keys of one quantiser of a layer."""

    def __init__(self, layer, kind, entries):
        self.prefix = f"{layer}.{kind}.{_TENSOR_QUANT[kind]}"
        self.entries = dict(entries)

    def take(self, *parts):
        """The value and the key of the first of `parts` that there is, or None."""
        for part in parts:
            if self.prefix + part in self.entries:
                key = self.prefix + part
                value = np.asarray(self.entries.pop(key))
                if value.dtype.kind != "f" or not np.isfinite(value).all():
                    raise ArchitectureError(f"{key} holds what is no finite number")
                return value.astype(np.float32), key
        return None

    def check_bits(self):
        bit_width = "msb_clamp_bit_width_impl.bit_width"
        for part, base in ((bit_width + "_offset", _LEAST_BITS), (bit_width, 0)):
            if found := self.take(part):
                value, key = found
                bits = round(abs(float(_single(value, key)))) + base
                if bits != 8:
                    raise ArchitectureError(f"{key}: {bits} bits, expected 8")

    def check_empty(self):
        for key in self.entries:
            raise ArchitectureError(f"{key} is not understood: see brevitas_state.py for what is")


def _threshold(value, key, choices):
    """T of a stored value."""
    if choices.scaling != "float":
        exponent = np.ceil(value) if choices.scaling == "power-of-two" else value
        with np.errstate(over="ignore"):
            value = np.exp2(exponent.astype(np.float32))
    elif (value < 0).any():
        raise ArchitectureError(
            f"{key} holds {value.min()}, expected positive numbers; should these be logarithms, say "
            "--scaling log or power-of-two"
        )
    quantized.check_scale(value, key)
    return value


def _weight_threshold(weight, name, choices):
    """T of weights whose scale is not kept, (out)."""
    axes = tuple(i for i in range(weight.ndim) if i != quantized.out_axis(name))
    largest = np.abs(weight).max(axis=axes)
    if choices.weight_scales == "tensor":
        largest = np.full_like(largest, largest.max())
    if choices.scaling == "power-of-two":
        largest = np.exp2(np.ceil(np.log2(np.maximum(largest, np.float32(quantized.LEAST_SCALE)))))
    return largest


def _weight_scale(quantiser, weight, name, choices):
    levels = np.float32(128 if choices.scaling == "power-of-two" else 127)
    out = weight.shape[quantized.out_axis(name)]
    stored = quantiser.take("scaling_impl.value", "scaling_impl.learned_value")
    if not stored:
        scale = _weight_threshold(weight, name, choices) / levels
        return np.where(scale < quantized.LEAST_SCALE, np.float32(1), scale)  # a channel of zeros
    value, key = stored
    shape = quantized.per_channel(np.empty(out), name, weight.ndim).shape
    if value.size == 1:
        value = np.full(shape, value.reshape(()))
    if value.shape not in (shape, (out,)):
        raise ArchitectureError(f"{key} has shape {value.shape}, expected one number or {shape}")
    return _threshold(value, key, choices).reshape(out) / levels


def _per_channel(found, name, weight):
    """The numbers of an input quantiser: one, or for a depthwise convolution maybe one for each channel."""
    value, key = found
    most = quantized.input_ranges(name, weight.shape)
    if value.size != 1 and value.shape not in ((1, most, 1, 1), (most,)):
        expected = f"one number or {(1, most, 1, 1)}" if most > 1 else "one number"
        raise ArchitectureError(f"{key} has shape {value.shape}, expected {expected}")
    return value.reshape(-1), key


def _input(quantiser, name, weight, choices):
    stored = quantiser.take("scaling_impl.value", "scaling_impl.learned_value")
    if not stored:
        raise ArchitectureError(
            f"{quantiser.prefix}scaling_impl.value is missing: the scale of {name}'s input was never learned"
        )
    threshold = _threshold(*_per_channel(stored, name, weight), choices)
    least = quantiser.take("zero_point_impl.value")
    unsigned = least is not None or choices.is_unsigned(name)
    levels = 2.0 ** (8 if unsigned else 7)
    if unsigned and choices.scaling != "power-of-two":
        levels = 255.0
    scale = threshold / np.float32(levels)
    if least is None:
        return quantized.Input(tuple(scale.tolist()), (0 if unsigned else 128,) * len(scale))
    value, key = _per_channel(least, name, weight)
    with np.errstate(over="ignore"):
        scale, zero_point = np.broadcast_arrays(scale, np.rint(np.abs(value) / scale))
    if (zero_point > 255).any():
        raise ArchitectureError(f"{key} makes the zero point {zero_point.max():g}, expected 0 to 255")
    return quantized.Input(tuple(scale.tolist()), tuple(zero_point.astype(int).tolist()))


def _layer(name, entries, state, choices):
    for kind, found in entries.items():
        if kind not in _TENSOR_QUANT:
            raise ArchitectureError(
                f"{next(iter(found))}: only weights and the inputs of layers may be quantised, not "
                f"what {kind} stands for"
            )
    weight = state.get(f"{name}.weight")
    if weight is None or weight.ndim < 2 or weight.dtype.kind != "f":
        raise ArchitectureError(f"{next(iter(next(iter(entries.values()))))} belongs to no layer: "
                                f"{name}.weight is missing or no matrix of floats")
    weight = weight.astype(np.float32)
    if not np.isfinite(weight).all():
        raise ArchitectureError(f"{name}.weight holds NaN or infinite values")
    quantisers = {kind: _Quantiser(name, kind, entries.get(kind, {})) for kind in _TENSOR_QUANT}
    for quantiser in quantisers.values():
        quantiser.check_bits()
    scale = _weight_scale(quantisers["weight_quant"], weight, name, choices)
    quantized.check_scale(scale, f"{name}.weight_scale")
    levels = np.rint(weight / quantized.per_channel(scale, name, weight.ndim))
    taken = None
    if quantisers["input_quant"].entries:
        taken = _input(quantisers["input_quant"], name, weight, choices)
    for quantiser in quantisers.values():
        quantiser.check_empty()
    return quantized.Layer(name, np.clip(levels, -127, 127).astype(np.int8), scale, taken)


def read(state, choices=Choices()):
    """Splits a state dict {name: array} into the one of floats and the list of quantised layers."""
    found = {}
    plain = {}
    for key, value in state.items():
        if match := _QUANTISER.match(key):
            name, kind, _ = match.groups()
            found.setdefault(name, {}).setdefault(kind, {})[key] = value
        else:
            plain[key] = value
    for pattern in choices.unsigned:
        if not fnmatch.filter(found, pattern):
            raise ArchitectureError(f"--unsigned {pattern!r} matches no quantised layer")
    return plain, [_layer(name, entries, plain, choices) for name, entries in found.items()]
