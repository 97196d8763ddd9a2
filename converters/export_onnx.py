#!/usr/bin/env python3
"""Writes encoder and decoder of a model file (.safetensors) as ONNX graphs, for those who deploy elsewhere.

    export_onnx.py MODEL.safetensors -o FOLDER

    encoder.onnx    image (1, 3, side, side), normalised    -> embedding (1, dim, n, n)
    decoder.onnx    embedding, boxes (N, 4) in pixels of the frame    -> masks (N, 1, 4 n, 4 n), iou (N, 1)

Layers in 8 bits become QuantizeLinear and DequantizeLinear around products in floats, with the scales and zero
points of the file; what a runtime makes of them is its own. Needs PyTorch and onnx.
"""

import argparse
import pathlib
import sys
import warnings

import numpy as np
import torch
from torch import nn

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "reference")]

import architecture  # noqa: E402
import load_weights  # noqa: E402
import model_file  # noqa: E402
import quantized  # noqa: E402

OPSET = 17


class QuantizedLayer(nn.Module):
    """A layer whose weight is whole numbers times scales, and whose input becomes bytes and floats again."""

    def __init__(self, layer, name, weight_scale, levels, factor):
        super().__init__()
        self.layer = layer
        self.axis = quantized.out_axis(name)
        self.register_buffer("weight_scale", torch.tensor(weight_scale))
        self.register_buffer("weight_zero", torch.zeros(len(weight_scale), dtype=torch.int32))
        self.channels_last = isinstance(layer, nn.Linear)
        self.levels = levels is not None
        if self.levels:
            scale, zero = levels
            self.register_buffer("scale", torch.tensor(scale))
            self.register_buffer("zero", torch.tensor(zero.astype(np.int32)))
        self.factor = factor is not None
        if self.factor:
            factor = np.tile(factor, getattr(layer, "groups", 1))  # groups share theirs
            self.register_buffer("divisor", torch.tensor(factor if self.channels_last else factor[:, None, None]))

    def forward(self, x):
        if self.factor:
            x = x / self.divisor
        if self.levels and len(self.scale) == 1:
            x = torch.fake_quantize_per_tensor_affine(x, float(self.scale), int(self.zero), 0, 255)
        elif self.levels:
            x = torch.fake_quantize_per_channel_affine(x, self.scale, self.zero, 1, 0, 255)
        weight = torch.fake_quantize_per_channel_affine(
            self.layer.weight, self.weight_scale, self.weight_zero, self.axis, -128, 127
        )
        if isinstance(self.layer, nn.Linear):
            return nn.functional.linear(x, weight, self.layer.bias)
        if isinstance(self.layer, nn.ConvTranspose2d):
            return nn.functional.conv_transpose2d(x, weight, self.layer.bias, self.layer.stride)
        return nn.functional.conv2d(x, weight, self.layer.bias, self.layer.stride, self.layer.padding,
                                    groups=self.layer.groups)


def load(path):
    """The model in a file, with its layers in 8 bits, and how many there are."""
    tensors, config, _ = model_file.read(path)
    layers = [n.removesuffix(".weight_scale") for n in tensors if n.endswith(".weight_scale")]
    parts = ("weight_scale", "input_scale", "input_zero_point", "input_factor")
    extra = {f"{name}.{part}": tensors.pop(f"{name}.{part}", None) for name in layers for part in parts}
    for name in layers:
        weight = tensors[f"{name}.weight"].astype(np.float32)
        tensors[f"{name}.weight"] = weight * quantized.per_channel(extra[f"{name}.weight_scale"], name, weight.ndim)
    architecture.check({n: v.shape for n, v in tensors.items()}, config)
    model = load_weights.build(config, tensors)
    model.load_state_dict({n: torch.from_numpy(v.astype(np.float32)) for n, v in tensors.items()}, strict=False)
    for name in layers:
        holder, _, last = name.rpartition(".")
        levels = factor = None
        if extra[f"{name}.input_scale"] is not None:
            levels = extra[f"{name}.input_scale"], extra[f"{name}.input_zero_point"]
            factor = extra[f"{name}.input_factor"]
        layer = model.get_submodule(name)
        setattr(model.get_submodule(holder), last,
                QuantizedLayer(layer, name, extra[f"{name}.weight_scale"], levels, factor))
    return model.eval().requires_grad_(False), len(layers)


class Decoding(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, embedding, boxes):
        return self.model.decode(embedding, boxes=boxes)


def export(path, folder):
    """Returns what was written, in words."""
    model, count = load(path)
    encoder, policy = model.config["image_encoder"], model.config["input"]
    image = torch.rand(1, 3, encoder["image_size"], encoder["image_size"])
    boxes = torch.tensor([[0.2, 0.3, 0.7, 0.6], [0.1, 0.2, 0.5, 0.9]]) * policy["frame"]
    folder.mkdir(parents=True, exist_ok=True)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sizes become constants, as they should; constants that are not folded
        torch.onnx.export(model.image_encoder, (image,), str(folder / "encoder.onnx"), dynamo=False,
                          opset_version=OPSET, input_names=["image"], output_names=["embedding"])
        torch.onnx.export(
            Decoding(model), (model.image_encoder(image), boxes), str(folder / "decoder.onnx"), dynamo=False,
            opset_version=OPSET, input_names=["embedding", "boxes"], output_names=["masks", "iou"],
            dynamic_axes={"boxes": {0: "n"}, "masks": {0: "n"}, "iou": {0: "n"}},
        )
    words = f"encoder.onnx and decoder.onnx of {architecture.model_name(model.config)}"
    return words + (f", {count} layers in 8 bits" if count else "")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=pathlib.Path, help=".safetensors model file")
    parser.add_argument("-o", "--output", type=pathlib.Path, required=True, help="folder for the two graphs")
    options = parser.parse_args(arguments)
    try:
        written = export(options.model, options.output)
    except (architecture.ArchitectureError, model_file.ModelFileError, OSError) as error:
        print(f"export_onnx.py: {options.model}: {error}", file=sys.stderr)
        return 1
    print(f"{options.output}: {written}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
