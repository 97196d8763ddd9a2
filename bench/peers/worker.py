#!/usr/bin/env python3
"""One runtime in a process of its own, for compare.py and quantized.py: reads a number of runs from each
line, runs encoder or decoder so often, and answers with a line of JSON: times in ms, peak memory in MB.
A line of two paths instead, with a tab between them, asks for the answer to one file of inputs."""

import argparse
import json
import os
import pathlib
import sys
import time

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]


def pytorch(folder, part, threads, way):
    sys.path.insert(0, str(ROOT / "converters" / "reference"))
    import torch

    import tiny_vit
    import load_weights
    import variants

    torch.set_num_threads(threads)
    model = load_weights.load(folder / "model.pth").eval().requires_grad_(False)
    if way == "explicit":
        variants.use(model, tiny_vit.WindowAttention, variants.ExplicitAttention)
    if way == "nested":
        variants.use(model, tiny_vit.TinyViTBlock, variants.NestedBlock)
    module = model.image_encoder if part == "encoder" else Decoding(model)
    if way == "compiled":
        module = torch.compile(module)
    return lambda inputs: module(*map(torch.from_numpy, inputs.values())).numpy()


def pytorch_saved(folder, part, threads, way):
    """A module that quantizers.py has written, as a pickle or exported."""
    sys.path.insert(0, str(ROOT / "converters" / "reference"))
    import torch

    torch.set_num_threads(threads)
    path = folder / f"{part}.pt2"
    if path.exists():
        import quantizers

        module = quantizers.load_exported(path)
    else:
        module = torch.load(path.with_suffix(".pt"), weights_only=False)
    if way == "compiled":
        import torch._inductor.config

        torch._inductor.config.freezing = True
        module = torch.compile(module)

    def call(inputs):
        with torch.no_grad():
            return module(*map(torch.from_numpy, inputs.values())).numpy()

    return call


def Decoding(model):
    import torch

    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, embedding, boxes):
            return self.model.decode(embedding, boxes=boxes)[0]

    return Module()


def onnx_runtime(folder, part, threads):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    path = str(folder / f"{part}.onnx")
    session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
    return lambda inputs: session.run(None, inputs)[0]


def openvino(folder, part, threads, precision):
    import openvino as ov

    config = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": precision,
              "PERFORMANCE_HINT": "LATENCY"}
    path = folder / f"{part}.xml"
    path = path if path.exists() else path.with_suffix(".onnx")
    request = ov.Core().compile_model(str(path), "CPU", config).create_infer_request()
    return lambda inputs: request.infer(inputs)[0]


RUNTIMES = {
    "pytorch-explicit": lambda *a: pytorch(*a, "explicit"),
    "pytorch-sdpa": lambda *a: pytorch(*a, "sdpa"),
    "pytorch-compiled": lambda *a: pytorch(*a, "compiled"),
    "pytorch-nested": lambda *a: pytorch(*a, "nested"),
    "pytorch-saved": lambda *a: pytorch_saved(*a, "saved"),
    "pytorch-saved-compiled": lambda *a: pytorch_saved(*a, "compiled"),
    "onnxruntime": onnx_runtime,
    "openvino": lambda *a: openvino(*a, "f32"),
    "openvino-bf16": lambda *a: openvino(*a, "bf16"),
}


def peak_memory():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e6
    return 0.0


def described(error):
    """An exception's class and the first sentence of its message."""
    lines = str(error).strip().splitlines() or ["without a message"]
    return f"{type(error).__name__}: {lines[0].split('. ')[0]}"


def timed(call, inputs, runs):
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        call(inputs)
        times.append(1e3 * (time.perf_counter() - start))
    return {"ms": times, "rss_mb": peak_memory()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(",")[0])
    parser.add_argument("runtime", choices=RUNTIMES)
    parser.add_argument("part", choices=["encoder", "decoder"])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("threads", type=int)
    options = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")  # whatever a runtime prints goes to stderr
    os.dup2(2, 1)
    try:
        call = RUNTIMES[options.runtime](options.folder, options.part, options.threads)
        inputs = dict(np.load(options.folder / f"{options.part}_inputs.npz"))
        np.save(options.folder / f"{options.part}_{options.runtime}.npy", call(inputs))
    except Exception as error:
        print(json.dumps({"error": described(error)}), file=answers, flush=True)
        sys.exit(1)
    call(inputs)
    for line in sys.stdin:
        source, _, target = line.strip().partition("\t")
        if target:
            np.save(target, call(dict(np.load(source))))
        answer = {} if target else timed(call, inputs, int(source))
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
