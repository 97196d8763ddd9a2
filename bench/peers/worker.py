#!/usr/bin/env python3
"""One runtime in a process of its own, for compare.py: reads a number of runs from each line, runs
encoder or decoder so often, and answers with a line of JSON: times in ms, peak memory in MB."""

import argparse
import json
import os
import pathlib
import sys
import time

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]


def torch_model(folder, threads):
    sys.path[:0] = [str(ROOT / "converters" / "reference"), str(ROOT / "converters" / "demo")]
    import torch

    import lite_medsam
    import seeded_weights

    torch.set_num_threads(threads)
    model = lite_medsam.LiteMedSAM(seeded_weights.LITE_MEDSAM)
    model.load_state_dict(torch.load(folder / "model.pth"), strict=False)
    return torch, lite_medsam, model.eval().requires_grad_(False)


def pytorch(folder, part, threads, way):
    torch, lite_medsam, model = torch_model(folder, threads)
    import variants

    if way == "explicit":
        variants.use(model, lite_medsam.WindowAttention, variants.ExplicitAttention)
    if way == "nested":
        variants.use(model, lite_medsam.TinyViTBlock, variants.NestedBlock)
    arrays = {k: torch.from_numpy(v) for k, v in np.load(folder / f"{part}_inputs.npz").items()}
    module = model.image_encoder if part == "encoder" else Decoding(model)
    if way == "compiled":
        module = torch.compile(module)
    return lambda: module(*arrays.values()).numpy()


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
    inputs = dict(np.load(folder / f"{part}_inputs.npz"))
    return lambda: session.run(None, inputs)[0]


def openvino(folder, part, threads, precision):
    import openvino as ov

    config = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": precision,
              "PERFORMANCE_HINT": "LATENCY"}
    model = ov.Core().compile_model(str(folder / f"{part}.onnx"), "CPU", config)
    inputs = dict(np.load(folder / f"{part}_inputs.npz"))
    request = model.create_infer_request()
    return lambda: request.infer(inputs)[0]


RUNTIMES = {
    "pytorch-explicit": lambda *a: pytorch(*a, "explicit"),
    "pytorch-sdpa": lambda *a: pytorch(*a, "sdpa"),
    "pytorch-compiled": lambda *a: pytorch(*a, "compiled"),
    "pytorch-nested": lambda *a: pytorch(*a, "nested"),
    "onnxruntime": onnx_runtime,
    "openvino": lambda *a: openvino(*a, "f32"),
    "openvino-bf16": lambda *a: openvino(*a, "bf16"),
}


def peak_memory():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e6
    return 0.0


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(",")[0])
    parser.add_argument("runtime", choices=RUNTIMES)
    parser.add_argument("part", choices=["encoder", "decoder"])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("threads", type=int)
    options = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")  # whatever a runtime prints goes to stderr
    os.dup2(2, 1)
    call = RUNTIMES[options.runtime](options.folder, options.part, options.threads)
    np.save(options.folder / f"{options.part}_{options.runtime}.npy", call())
    call()
    for line in sys.stdin:
        times = []
        for _ in range(int(line)):
            start = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - start))
        print(json.dumps({"ms": times, "rss_mb": peak_memory()}), file=answers, flush=True)


if __name__ == "__main__":
    main()
