"""Layers in 8 bits, as microtome's model files hold them.

A layer NAME is `NAME.weight`, whole numbers from -127 to 127 in the checkpoint's shape, and
`NAME.weight_scale`, one for each output channel: a weight is their product. Where its input is
quantised, too, there are `NAME.input_scale` and `NAME.input_zero_point`, with which a number x becomes
the byte clamp(round(x / scale) + zero_point, 0, 255): one of each, or for a depthwise convolution one of each
per channel. (`microtome quantize` writes `NAME.input_factor` per channel for others; it is not read or written
here.)
"""

import dataclasses
import re

import numpy as np

from architecture import ArchitectureError, is_layer

# Of scales and their inverses, as the runtime takes them: far from where fp32 ends.
LEAST_SCALE = 1e-20
_TRANSPOSED = re.compile(r"mask_decoder\.output_upscaling\.[03]")


def out_axis(name):
    """Which axis of a layer's weight the output channels are."""
    return 1 if _TRANSPOSED.fullmatch(name) else 0


def per_channel(values, name, ndim):
    """Numbers (out) in the shape that they have beside a layer's weight."""
    shape = [1] * ndim
    shape[out_axis(name)] = -1
    return values.reshape(shape)


def input_ranges(name, shape):
    """How many ranges the input of a layer with a weight of this shape may have: one, or for a depthwise
    convolution one for each channel."""
    return shape[0] if len(shape) == 4 and out_axis(name) == 0 and shape[1] == 1 else 1


def check_scale(scale, name):
    """Raises ArchitectureError unless all of a scale is finite, positive and of a sensible size."""
    bad = ~(np.isfinite(scale) & (scale >= LEAST_SCALE) & (scale <= 1 / LEAST_SCALE))
    if bad.any():
        raise ArchitectureError(
            f"{name} holds {np.ravel(scale)[np.ravel(bad)][0]}, expected scales from {LEAST_SCALE} to "
            f"{1 / LEAST_SCALE}"
        )


@dataclasses.dataclass(frozen=True)
class Input:
    """How a layer's input becomes bytes: scales and zero points, one each or one for each channel."""

    scale: tuple
    zero_point: tuple

    def check(self, name, most):
        """`most` is what input_ranges says."""
        check_scale(np.array(self.scale, np.float32), f"{name}.input_scale")
        count = len(self.scale)
        if count not in (1, most) or len(self.zero_point) != count:
            raise ArchitectureError(
                f"{name}: its input has {count} scales and {len(self.zero_point)} zero points, expected one of each"
                + (f" or {most}" if most > 1 else "; only depthwise convolutions have one for each channel")
            )
        for zero_point in self.zero_point:
            if not 0 <= zero_point <= 255:
                raise ArchitectureError(f"{name}.input_zero_point is {zero_point:g}, expected 0 to 255")


@dataclasses.dataclass(frozen=True)
class Layer:
    name: str
    whole: np.ndarray
    scale: np.ndarray
    input: Input | None = None

    def check(self):
        name = self.name
        if not is_layer(name, self.whole.ndim):
            raise ArchitectureError(f"{name}.weight is quantised, but {name} is no convolution and not linear")
        check_scale(self.scale, f"{name}.weight_scale")
        out = self.whole.shape[out_axis(name)]
        if self.scale.shape != (out,):
            raise ArchitectureError(f"{name}.weight_scale has shape {self.scale.shape}, expected {(out,)}")
        if np.abs(self.whole.astype(np.int64)).max(initial=0) > 127:
            raise ArchitectureError(
                f"{name}.weight holds whole numbers from {self.whole.min()} to {self.whole.max()}, "
                "expected -127 to 127"
            )
        if self.input:
            self.input.check(name, input_ranges(name, self.whole.shape))

    def folded(self, factor):
        """The layer with every output channel multiplied by one of `factor`. Its whole numbers stay,
        but for their signs; those of a channel that vanishes become 0."""
        scale = (self.scale.astype(np.float64) * np.abs(factor)).astype(np.float32)
        vanished = scale < LEAST_SCALE
        sign = np.where(vanished, 0, np.sign(factor)).astype(np.int8)
        whole = self.whole * per_channel(sign, self.name, self.whole.ndim)
        return dataclasses.replace(
            self, whole=whole, scale=np.where(vanished, np.float32(1), scale).astype(np.float32)
        )

    def tensors(self):
        """{name: array} of what the model file holds."""
        held = {f"{self.name}.weight": self.whole.astype(np.int8), f"{self.name}.weight_scale": self.scale}
        if self.input:
            held[f"{self.name}.input_scale"] = np.array(self.input.scale, np.float32)
            held[f"{self.name}.input_zero_point"] = np.array(self.input.zero_point, np.float32)
        return held


def place(name):
    """Where a layer stands, as the runtime's schemes name it: (stage, block, layer)."""
    part, _, path = name.removesuffix(".c").removesuffix(".conv").partition(".")
    if part == "image_encoder":
        inner = path.removeprefix("layers.").removeprefix("backbone.stages.")
        staged = inner != path
        stage, _, path = inner.partition(".")
        path = path.removeprefix("middle.")
        block = "-"
        if staged or path.startswith("op_list.") or "_ops." in path:
            block, _, path = path.removeprefix("blocks.").removeprefix("op_list.").partition(".")
        for wrapper in ("context_module.", "local_module.", "main."):
            path = path.removeprefix(wrapper)
        return stage, block, path or "conv"
    block, _, path = path.removeprefix("transformer.").removeprefix("layers.").partition(".")
    return ("decoder" if part == "mask_decoder" else "prompt"), block, path


def scheme(layers):
    """The scheme that says what each layer is computed in; those it does not name are fp32."""
    rules = {}
    for layer in sorted(layers, key=lambda layer: layer.name):
        stage, block, path = place(layer.name)
        precision = "int8" if layer.input else "int8-weights"
        rules.setdefault((stage, block, precision), []).append(path)
    return ", ".join(
        f"{stage}:{block}:{'|'.join(paths)}={precision}"
        for (stage, block, precision), paths in rules.items()
    )
