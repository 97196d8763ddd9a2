"""Reads a quantised ONNX graph: QuantizeLinear and DequantizeLinear (QDQ) around Conv, ConvTranspose,
MatMul and Gemm, as quantisers of ONNX models and exports of models trained with quantisation in the
loop write it. Nothing is executed. Needs the `onnx` package.

The second input of such a node is a layer's weight where only constants lead to it: an initializer
or Constant, through DequantizeLinear, and through QuantizeLinear, Clip, Transpose, Reshape and Identity.
The layer's input is quantised where its first input is a DequantizeLinear of a QuantizeLinear with the
same scale, maybe reshaped; of a depthwise convolution it may be one for each channel, then not reshaped.
(https://onnx.ai/onnx/operators says what the nodes compute.)

Exporters keep some names and lose others. A layer is known by its weight's (`NAME.weight`, and what
follows, such as `_quantized`), or else by its bias's, of Gemm and Conv the third input, of MatMul what
an Add adds to it; by its weight scale's, NAME.weight_quant... in Brevitas's exports; or else by the node's,
/image_encoder/layers.1/blocks.0/attn/qkv/MatMul.
"""

import dataclasses
import re

import numpy as np

import quantized
from architecture import ArchitectureError
from checkpoint import CheckpointError

_PARTS = "image_encoder|prompt_encoder|mask_decoder"
_TENSOR = re.compile(rf"(?:.*[./])?((?:{_PARTS})\..+?)\.(?:weight|bias)(?:_.*)?")
_NODE = re.compile(rf"(?:.*/)?((?:{_PARTS})/.+)/[^/]*")
_PREFIX = re.compile(rf"(?:.*[./])?(?=(?:{_PARTS})\.)")
_MOVES = {"Identity", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze"}
_LAYERS = {"Conv", "ConvTranspose", "MatMul", "Gemm"}
# No chain of nodes between a constant and a layer is nearly as long; in a damaged graph they go in circles.
_LONGEST_CHAIN = 32


@dataclasses.dataclass(frozen=True)
class Constant:
    """A constant tensor: `values`, times `scale` of the same shape where it is quantised."""

    values: np.ndarray
    source: str
    scale: np.ndarray | None = None
    scale_source: str = ""

    def moved(self, move):
        scale = None if self.scale is None else move(self.scale)
        return dataclasses.replace(self, values=move(self.values), scale=scale)

    def floats(self):
        values = self.values.astype(np.float32)
        return values if self.scale is None else values * self.scale


def _load(path):
    try:
        import onnx
    except ImportError:
        raise CheckpointError("reading ONNX files needs the onnx package: pip install onnx") from None
    try:
        return onnx, onnx.load(path).graph
    except OSError:
        raise
    except Exception as error:  # a damaged file can raise anything
        raise CheckpointError(f"not an ONNX file, or damaged: {type(error).__name__}: {error}") from None


class Graph:
    def __init__(self, path):
        self._onnx, graph = _load(path)
        self.nodes = graph.node
        self.initializers = {tensor.name: tensor for tensor in graph.initializer}
        self._makers = {name: node for node in graph.node for name in node.output}
        self._users = {}
        for node in graph.node:
            for name in node.input:
                self._users.setdefault(name, []).append(node)

    def array(self, tensor):
        try:
            return self._onnx.numpy_helper.to_array(tensor)
        except Exception as error:  # as above
            raise CheckpointError(f"tensor {tensor.name!r} is damaged: {error}") from None

    def attributes(self, node):
        return {a.name: self._onnx.helper.get_attribute_value(a) for a in node.attribute}

    def maker(self, name):
        return self._makers.get(name)

    def users(self, name):
        return self._users.get(name, [])

    def constant(self, name, depth=0):
        """The Constant that a tensor is, or None."""
        if name in self.initializers:
            return Constant(self.array(self.initializers[name]), name)
        node = self.maker(name)
        if node is None or depth > _LONGEST_CHAIN:
            return None
        if node.op_type == "Constant":
            value = self.attributes(node).get("value")
            return None if value is None else Constant(self.array(value), name)
        evaluate = {
            "Identity": lambda x, *_: x,
            "Transpose": self._transpose,
            "Reshape": self._reshape,
            "QuantizeLinear": self._quantize,
            "DequantizeLinear": self._dequantize,
            "Clip": self._clip,
        }.get(node.op_type)
        if evaluate is None or not node.input:
            return None
        x = self.constant(node.input[0], depth + 1)
        try:
            return None if x is None else evaluate(x, node)
        except (ValueError, TypeError) as error:  # shapes that do not fit
            raise ArchitectureError(f"{x.source}, in {node.op_type} {node.name!r}: {error}") from None

    def operand(self, node, index):
        """The array of an input that is constant, or None where it is left out."""
        if len(node.input) <= index or not node.input[index]:
            return None
        found = self.constant(node.input[index])
        if found is None or found.scale is not None:
            raise ArchitectureError(
                f"{node.input[index]}, which {node.op_type} {node.name!r} takes, is not constant"
            )
        return found.values

    def _transpose(self, x, node):
        order = self.attributes(node).get("perm")
        return x.moved(lambda a: a.transpose(order))

    def _reshape(self, x, node):
        shape = [int(n) for n in self.operand(node, 1)]
        shape = [x.values.shape[i] if n == 0 else n for i, n in enumerate(shape)]
        return x.moved(lambda a: a.reshape(shape))

    def _clip(self, x, node):
        low, high = self.operand(node, 1), self.operand(node, 2)
        return dataclasses.replace(x, values=np.clip(x.values, low, high).astype(x.values.dtype))

    def levels(self, node, quantised):
        """The scale and the zero point of a QuantizeLinear or DequantizeLinear, with the zero point's
        type, in the shape of or for broadcasting to that of `quantised`."""
        scale, zero_point = self.operand(node, 1), self.operand(node, 2)
        if scale is None or scale.dtype.kind != "f":
            raise ArchitectureError(f"{node.name!r} has no floating-point scale")
        quantized.check_scale(scale, node.input[1])
        if zero_point is None:
            zero_point = np.zeros_like(scale, np.uint8 if quantised is None else quantised.dtype)
        if zero_point.shape != scale.shape:
            raise ArchitectureError(f"{node.input[2]} has shape {zero_point.shape}, expected {scale.shape}")
        if self.attributes(node).get("block_size"):
            raise ArchitectureError(f"{node.input[1]}: scales of blocks are not supported")
        return scale.astype(np.float32), zero_point

    def _beside(self, node, array, *parts):
        """Scales and zero points per tensor or along an axis, in the shape of `array`."""
        axis = self.attributes(node).get("axis", 1)
        for part in parts:
            if part.size > 1:
                shape = [1] * array.ndim
                if part.ndim != 1 or not -array.ndim <= axis < array.ndim:
                    raise ArchitectureError(
                        f"{node.input[1]} has shape {part.shape}, expected one scale per channel"
                    )
                shape[axis] = part.size
                part = part.reshape(shape)
            yield np.broadcast_to(part.reshape(part.shape if part.size > 1 else ()), array.shape)

    def _quantize(self, x, node):
        scale, zero_point = self.levels(node, None)
        if zero_point.dtype not in (np.int8, np.uint8):
            raise ArchitectureError(f"{x.source} is quantised to {zero_point.dtype}, expected 8 bits")
        limits = np.iinfo(zero_point.dtype)
        scale, offset = self._beside(node, x.values, scale, zero_point)
        whole = np.rint(x.floats() / scale) + offset
        if not np.isfinite(whole).all():
            raise ArchitectureError(f"{x.source} holds NaN or infinite values")
        return Constant(np.clip(whole, limits.min, limits.max).astype(zero_point.dtype), x.source)

    def _dequantize(self, x, node):
        if x.values.dtype not in (np.int8, np.uint8, np.int32):
            raise ArchitectureError(f"{x.source} has dtype {x.values.dtype}, expected 8 bits")
        scale, zero_point = self.levels(node, x.values)
        if zero_point.dtype != x.values.dtype:
            raise ArchitectureError(f"{node.input[2]} has dtype {zero_point.dtype}, expected {x.values.dtype}")
        scale, offset = self._beside(node, x.values, scale, zero_point)
        return Constant(x.values.astype(np.int64) - offset, x.source, scale, node.input[1])

    def quantisation(self, name, layer):
        """How a layer's input, the tensor `name`, is quantised, or None."""
        node = self._past_moves(name)
        if node is None or node.op_type != "DequantizeLinear":
            return None
        written = self._past_moves(node.input[0])
        if written is not None and written.op_type == "Clip":
            raise ArchitectureError(f"{layer}: its input is clipped to less than 8 bits by {written.name!r}")
        if written is None or written.op_type != "QuantizeLinear":
            raise ArchitectureError(f"{layer}: {node.name!r} dequantises its input, but nothing quantises it")
        output_type = self.attributes(written).get("output_dtype")
        unsaid = np.zeros(0, np.int8 if output_type == self._onnx.TensorProto.INT8 else np.uint8)
        found = []
        for end in (written, node):
            scale, zero_point = self.levels(end, unsaid)
            if scale.size != 1:
                # Of a convolution's input (1, channels, height, width), where nothing moves its axes.
                moved = self.maker(name) is not node or self.maker(node.input[0]) is not written
                if moved or self.attributes(end).get("axis", 1) not in (1, -3):
                    raise ArchitectureError(
                        f"{end.input[1]}: the {scale.size} scales of {layer}'s input are not of its channels"
                    )
            found.append((scale.ravel().tolist(), zero_point.ravel().tolist(), zero_point.dtype))
        if found[0] != found[1]:
            raise ArchitectureError(f"{layer}: its input is quantised and dequantised with different levels")
        scale, zero_point, dtype = found[0]
        if dtype not in (np.int8, np.uint8):
            raise ArchitectureError(f"{layer}: its input is quantised to {dtype}, expected 8 bits")
        offset = 128 if dtype == np.int8 else 0
        return quantized.Input(tuple(scale), tuple(int(z) + offset for z in zero_point))

    def _past_moves(self, name):
        """What makes the values of a tensor, wherever they were moved then."""
        for _ in range(_LONGEST_CHAIN):
            node = self.maker(name)
            if node is None or node.op_type not in _MOVES or not node.input:
                return node
            name = node.input[0]
        return None

    def bias(self, node):
        """The bias of a layer's node as a Constant, or None."""
        if node.op_type != "MatMul":
            return self.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        name = node.output[0]
        for _ in range(3):  # the product itself may be quantised, and then dequantised
            for user in self.users(name):
                if user.op_type == "Add":
                    others = [self.constant(i) for i in user.input if i != name]
                    if others and others[0] is not None and others[0].values.ndim == 1:
                        return others[0]
            following = [u for u in self.users(name) if u.op_type in ("QuantizeLinear", "DequantizeLinear")]
            if not following or not following[0].output:
                return None
            name = following[0].output[0]
        return None

    def weight(self, node):
        """The weight of a layer's node as a Constant in the checkpoint's layout, or None."""
        if len(node.input) < 2:
            return None
        found = self.constant(node.input[1])
        if found is None or node.op_type in ("Conv", "ConvTranspose"):
            return found
        if found.values.ndim != 2:
            return None
        attributes = self.attributes(node)
        if node.op_type == "Gemm":
            if attributes.get("alpha", 1) != 1 or attributes.get("beta", 1) != 1 or attributes.get("transA"):
                raise ArchitectureError(f"{found.source}: Gemm {node.name!r} is more than a linear layer")
            if attributes.get("transB"):
                return found
        return found.moved(np.transpose)


def _layer_name(node, weight, bias):
    for source in (weight.source, bias.source if bias else "", weight.scale_source):
        if match := _TENSOR.fullmatch(source):
            return match[1]
    match = _NODE.fullmatch(node.name)
    if not match:
        return None
    path = []
    for part in match[1].split("/"):  # a Sequential names its parts seq/seq.0
        if path and part.startswith(path[-1] + "."):
            path.pop()
        path.append(part)
    return ".".join(path)


def _channel_scales(weight, name):
    """The scale of each output channel."""
    axis = quantized.out_axis(name)
    rows = np.moveaxis(weight.scale, axis, 0).reshape(weight.scale.shape[axis], -1)
    if rows.shape[1] == 0 or (rows != rows[:, :1]).any():
        raise ArchitectureError(f"{weight.source}: its scales are not one for each output channel of {name}")
    return rows[:, 0].copy()


def _same(a, b):
    return np.array_equal(a.whole, b.whole) and np.array_equal(a.scale, b.scale) and a.input == b.input


def read(path):
    """Reads an ONNX file: {name: array} of all that has a name of the checkpoint's, with the weights of
    quantised layers in floats, and the list of quantised layers. Of a layer's tensors those that its node
    takes come before those of their name."""
    graph = Graph(path)
    state = {}
    for name, tensor in graph.initializers.items():
        match = _PREFIX.match(name)
        if match and tensor.data_type in (1, 10, 11, 16):  # float, half, double and bfloat16
            state[name[match.end() :]] = graph.array(tensor).astype(np.float32)
    layers = {}
    for node in graph.nodes:
        if node.op_type not in _LAYERS or (weight := graph.weight(node)) is None:
            continue
        bias = graph.bias(node)
        name = _layer_name(node, weight, bias)
        if name is None:
            if weight.scale is None:
                continue
            raise ArchitectureError(
                f"{weight.source}, quantised, at {node.op_type} {node.name!r}: neither its name nor that of "
                "its bias, its scale or the node is a layer's"
            )
        state[f"{name}.weight"] = weight.floats()
        if bias is not None:
            state[f"{name}.bias"] = bias.floats()
        if weight.scale is None:
            continue
        if weight.values.ndim <= quantized.out_axis(name):
            raise ArchitectureError(f"{weight.source} has shape {weight.values.shape}, too few dimensions")
        layer = quantized.Layer(
            name, weight.values, _channel_scales(weight, name), graph.quantisation(node.input[0], name)
        )
        if name in layers and not _same(layers[name], layer):
            raise ArchitectureError(f"{name} is in the graph twice, and differs")
        layers[name] = layer
    return state, list(layers.values())
