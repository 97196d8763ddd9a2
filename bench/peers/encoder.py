#!/usr/bin/env python3
"""Times the image encoder of LiteMedSAM in microtome, ONNX Runtime and PyTorch: the same weights,
image size and number of threads, in turns, so that a machine that slows down slows all of them.

    pip install -r bench/peers/requirements.txt
    python3 bench/peers/encoder.py
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import onnxruntime
import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "converters" / part) for part in ("", "reference", "demo")]

import convert  # noqa: E402
import lite_medsam  # noqa: E402
import model_file  # noqa: E402
import seeded_weights  # noqa: E402


class Microtome:
    def __init__(self, program, model, threads):
        self.command = [program, "bench", "-m", model, "--threads", str(threads), "--json", "--runs"]

    def times(self, runs):
        output = subprocess.run([*self.command, str(runs)], check=True, capture_output=True, text=True)
        self.result = json.loads(output.stdout)
        return [self.result["encoder_ms"]["median"]]


class Peer:
    def __init__(self, call):
        self.call = call

    def times(self, runs):
        self.call()
        result = []
        for _ in range(runs):
            start = time.perf_counter()
            self.call()
            result.append(1e3 * (time.perf_counter() - start))
        return [statistics.median(result)]


def onnx_session(encoder, image, threads, folder):
    path = str(folder / "encoder.onnx")
    torch.onnx.export(encoder, (image,), path, dynamo=False, opset_version=17)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--program", default=ROOT / "build" / "release" / "microtome")
    parser.add_argument("--threads", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each (%(default)s)")
    parser.add_argument("--runs", type=int, default=3, help="runs in a turn (%(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    config = seeded_weights.LITE_MEDSAM
    state = seeded_weights.seeded_state(config, 1)
    model = lite_medsam.LiteMedSAM(config).eval()
    model.load_state_dict({k: torch.tensor(v) for k, v in state.items()}, strict=False)
    encoder = model.image_encoder
    image = torch.rand(1, 3, 256, 256)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        folder = pathlib.Path(folder)
        tensors, _ = convert.convert(state, config)
        model_file.write(folder / "model.safetensors", tensors, config)
        session = onnx_session(encoder, image, options.threads, folder)
        name = session.get_inputs()[0].name
        difference = session.run(None, {name: image.numpy()})[0] - encoder(image).numpy()
        assert np.abs(difference).max() < 1e-3, "the ONNX model computes something else"
        contenders = {
            "microtome": Microtome(options.program, folder / "model.safetensors", options.threads),
            "ONNX Runtime": Peer(lambda: session.run(None, {name: image.numpy()})),
            "PyTorch eager": Peer(lambda: encoder(image)),
        }
        times = {key: [] for key in contenders}
        for _ in range(options.rounds):
            for key, contender in contenders.items():
                times[key] += contender.times(options.runs)

    ours = statistics.median(times["microtome"])
    result = contenders["microtome"].result
    print(f"encoder, fp32, {options.threads} threads, target {result['target']}, FMA peak "
          f"{result['peak_gflops']:.0f} GFLOP/s; medians of {options.rounds} turns of {options.runs} runs")
    print(f"ONNX Runtime {onnxruntime.__version__}, PyTorch {torch.__version__}")
    print(f"{'':14} {'median ms':>9} {'min':>7} {'max':>7} {'ratio':>6}")
    for key, values in times.items():
        median = statistics.median(values)
        print(f"{key:14} {median:9.0f} {min(values):7.0f} {max(values):7.0f} {median / ours:6.2f}")


if __name__ == "__main__":
    main()
