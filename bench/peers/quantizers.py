#!/usr/bin/env python3
"""Quantises the image encoder with one tool, for quantized.py, in a process that ends afterwards, so that
what calibration needs does not count as memory of the model.

    python3 quantizers.py TOOL ENCODER IMAGES.npy FOLDER

ENCODER is .onnx or a pickled module, IMAGES are inputs (N, 3, side, side). Every tool is set up as its
documentation advises for the CPU: where there are no 8-bit dot products, one bit is left out, since
16-bit sums of two products saturate there. The last line on stderr is the exception that was raised.
"""

import pathlib
import sys

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]


def dot_products():
    """Whether the CPU adds four 8-bit products at once, without saturation."""
    try:
        words = pathlib.Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False
    return not {"avx512_vnni", "avx_vnni", "asimddp"}.isdisjoint(words)


def onnx_runtime(encoder, images, folder):
    from onnxruntime import quantization as q
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(q.CalibrationDataReader):
        def __init__(self):
            self.left = iter(images)

        def get_next(self):
            image = next(self.left, None)
            return None if image is None else {"image": image[None]}

    prepared = folder / "prepared.onnx"
    quant_pre_process(str(encoder), str(prepared), skip_symbolic_shape=True)  # all shapes are numbers
    q.quantize_static(
        prepared, folder / "encoder.onnx", Reader(), quant_format=q.QuantFormat.QDQ, per_channel=True,
        activation_type=q.QuantType.QUInt8, weight_type=q.QuantType.QInt8, reduce_range=not dot_products(),
    )
    prepared.unlink()


def openvino(encoder, images, folder):
    import nncf
    import openvino as ov
    from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, OverflowFix

    fix = OverflowFix.DISABLE if dot_products() else OverflowFix.ENABLE
    model = nncf.quantize(
        ov.Core().read_model(encoder), nncf.Dataset([image[None] for image in images]),
        subset_size=len(images), model_type=nncf.ModelType.TRANSFORMER, target_device=nncf.TargetDevice.CPU,
        advanced_parameters=AdvancedQuantizationParameters(overflow_fix=fix),
    )
    ov.save_model(model, folder / "encoder.xml", compress_to_fp16=False)


def load_module(path):
    sys.path.insert(0, str(ROOT / "converters" / "reference"))
    import torch

    return torch, torch.load(path, weights_only=False)


def pytorch_dynamic(encoder, images, folder):
    torch, module = load_module(encoder)
    module = torch.ao.quantization.quantize_dynamic(module, {torch.nn.Linear}, dtype=torch.qint8)
    torch.save(module, folder / "encoder.pt")


def calibrate(torch, module, images):
    for image in images:
        module(torch.from_numpy(image[None]))


def pytorch_eager(encoder, images, folder):
    torch, module = load_module(encoder)
    q = torch.ao.quantization
    module = q.QuantWrapper(module)
    module.qconfig = q.get_default_qconfig("x86")
    q.prepare(module, inplace=True)
    calibrate(torch, module, images)
    q.convert(module, inplace=True)
    module(torch.from_numpy(images[:1]))
    torch.save(module, folder / "encoder.pt")


def pytorch_fx(encoder, images, folder):
    torch, module = load_module(encoder)
    from torch.ao.quantization import get_default_qconfig_mapping, quantize_fx

    example = (torch.from_numpy(images[:1]),)
    module = quantize_fx.prepare_fx(module, get_default_qconfig_mapping("x86"), example)
    calibrate(torch, module, images)
    torch.save(quantize_fx.convert_fx(module), folder / "encoder.pt")


def pytorch_pt2e(encoder, images, folder):
    torch, module = load_module(encoder)
    from torchao.quantization.pt2e import quantize_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    example = (torch.from_numpy(images[:1]),)
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config(reduce_range=not dot_products()))
    module = quantize_pt2e.prepare_pt2e(torch.export.export(module, example).module(), quantizer)
    calibrate(torch, module, images)
    module = quantize_pt2e.convert_pt2e(module)
    used = {node.target for node in module.graph.nodes if node.op == "get_attr"}
    for name, _ in [*module.named_parameters()]:
        if name not in used:  # the weights before quantisation
            owner, _, attribute = name.rpartition(".")
            delattr(module.get_submodule(owner), attribute)
    torch.export.save(torch.export.export(module, example), folder / "encoder.pt2")


def load_exported(path):
    import torch
    import torchao.quantization.pt2e  # noqa: F401, registers the operators

    return torch.export.load(path).module()


TOOLS = {
    "onnxruntime": onnx_runtime,
    "openvino": openvino,
    "pytorch-dynamic": pytorch_dynamic,
    "pytorch-eager": pytorch_eager,
    "pytorch-fx": pytorch_fx,
    "pytorch-pt2e": pytorch_pt2e,
}


def main():
    from worker import described

    tool, *paths = sys.argv[1:]
    encoder, images, folder = map(pathlib.Path, paths)
    try:
        TOOLS[tool](encoder, np.load(images), folder)
    except Exception as error:
        sys.exit(described(error))


if __name__ == "__main__":
    main()
