#!/usr/bin/env python3
"""Times the image encoder and the decoder of boxes, of LiteMedSAM or another model, in microtome, PyTorch, ONNX Runtime and
OpenVINO: the same weights, inputs and number of threads, in turns, so that a machine that slows down
slows all of them. Prints tables of medians, ratios and peak memory, and draws them.

    pip install -r bench/peers/requirements.txt
    python3 bench/peers/compare.py [--model CHECKPOINT.pth] [--image CASE.npz]
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
import torch

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1] / "converters" / "reference")]

import load_weights  # noqa: E402
import measures  # noqa: E402
import original  # noqa: E402
from worker import Decoding  # noqa: E402

BOXES = 16
ROWS = {  # label: how it runs
    "microtome": ["--padding", "exact"],
    "microtome, padding computed": ["--padding", "padded"],
    "microtome, padding dropped": ["--padding", "dropped"],
    "microtome bf16": ["--precision", "bf16"],
    "PyTorch, as in the original": "pytorch-explicit",
    "PyTorch, SDPA": "pytorch-sdpa",
    "PyTorch, torch.compile": "pytorch-compiled",
    "PyTorch, nested tensors": "pytorch-nested",
    "ONNX Runtime": "onnxruntime",
    "OpenVINO": "openvino",
    "OpenVINO bf16": "openvino-bf16",
}
ENCODER_ONLY = ["microtome, padding computed", "microtome, padding dropped", "PyTorch, as in the original",
                "PyTorch, nested tensors"]


class Program:
    """microtome itself, started for each turn."""

    def __init__(self, program, model, part, threads, arguments):
        self.command = [program, "bench", "-m", model, "--threads", str(threads), "--json",
                        *arguments, "--runs"]
        self.key = {"encoder": "encoder_ms", "decoder": "batched_box_ms"}[part]
        self.memory_key = {"encoder": "encoder_peak_rss_mb", "decoder": "peak_rss_mb"}[part]

    def turn(self, runs):
        output = subprocess.run([*self.command, str(runs)], check=True, capture_output=True, text=True)
        self.result = json.loads(output.stdout)
        self.memory = self.result[self.memory_key]
        return self.result[self.key]["median"]

    def end(self):
        pass


class Worker:
    """A runtime that waits in a process of its own between its turns."""

    def __init__(self, runtime, part, folder, threads):
        self.scale = 1 / BOXES if part == "decoder" else 1
        self.process = subprocess.Popen(
            [sys.executable, HERE / "worker.py", runtime, part, folder, str(threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        self.turn(1)  # until it is ready

    def ask(self, request):
        try:
            print(request, file=self.process.stdin, flush=True)
        except BrokenPipeError:
            pass  # it ended, and may have said why
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("a runtime ended early; its message is above")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def turn(self, runs):
        answer = self.ask(runs)
        self.memory = answer["rss_mb"]
        return self.scale * statistics.median(answer["ms"])

    def answer(self, inputs, path):
        """Writes the answer to the inputs in an .npz file as an .npy file."""
        self.ask(f"{inputs}\t{path}")

    def end(self):
        self.process.stdin.close()
        self.process.wait()


def prepare(options, folder):
    """Weights, inputs and ONNX models of both parts. The inputs are an image and its boxes, repeated where
    there are fewer than are timed."""
    checkpoint = options.model or measures.real_checkpoint()
    measures.convert(checkpoint, folder / "model.safetensors")
    (folder / "model.pth").symlink_to(checkpoint.resolve())
    model = load_weights.load(checkpoint).eval().requires_grad_(False)
    if model.config["input"]["normalize"] == "range":
        case = np.load(options.image or measures.link_cases(None, folder / "cases")[0])
        image = original.preprocess(case["imgs"])
        boxes = [original.to_input(box, case["imgs"].shape[:2]) for box in case["boxes"]]
        boxes = torch.from_numpy(np.resize(boxes, (BOXES, 4))).float()
    else:  # noise: what it shows changes no runtime's time
        side, frame = model.config["image_encoder"]["image_size"], model.config["input"]["frame"]
        image = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(1))
        boxes = torch.tensor([[0.2, 0.3, 0.7, 0.6]]).repeat(BOXES, 1) * frame
    embedding = model.image_encoder(image)
    for part, module, inputs in (
        ("encoder", model.image_encoder, {"image": image}),
        ("decoder", Decoding(model), {"embedding": embedding, "boxes": boxes}),
    ):
        np.savez(folder / f"{part}_inputs.npz", **{k: v.numpy() for k, v in inputs.items()})
        torch.onnx.export(module, tuple(inputs.values()), str(folder / f"{part}.onnx"), dynamo=False,
                          opset_version=17, input_names=list(inputs))


def chosen(label, words):
    return not words or any(word.lower() in label.lower() for word in words)


def start(part, options, folder):
    """The contenders, those of them that run here."""
    contenders = {}
    for label, how in ROWS.items():
        if part == "decoder" and label in ENCODER_ONLY:
            continue
        if not chosen(label, options.only):
            continue
        if isinstance(how, list):
            model = folder / "model.safetensors"
            contenders[label] = Program(options.program, model, part, options.threads, how)
            continue
        try:
            contenders[label] = Worker(how, part, folder, options.threads)
        except RuntimeError as error:
            print(f"{label}: left out, {error}", file=sys.stderr)
    return contenders


def differences(part, contenders, folder):
    """Largest difference of each runtime's answer to PyTorch's, over its standard deviation."""
    path = folder / f"{part}_pytorch-sdpa.npy"
    if not path.exists():
        return {}
    right = np.load(path)
    return {label: np.abs(np.load(folder / f"{part}_{ROWS[label]}.npy") - right).max() / right.std()
            for label, c in contenders.items() if isinstance(c, Worker)}


def take_turns(contenders, rounds, runs):
    """Times of each contender, one for each of its turns."""
    times = {label: [] for label in contenders}
    for _ in range(rounds):
        for label, contender in contenders.items():
            time.sleep(0.1)  # until the other runtime's threads no longer spin
            times[label].append(contender.turn(runs))
    return times


def compare(part, options, folder):
    contenders = start(part, options, folder)
    times = take_turns(contenders, options.rounds, options.runs)
    for contender in contenders.values():
        contender.end()
    medians = {label: statistics.median(values) for label, values in times.items()}
    base = medians["microtome"] if "microtome" in medians else next(iter(medians.values()))
    off = differences(part, contenders, folder)
    title = "encoder" if part == "encoder" else f"decoder, each of {BOXES} boxes"
    print(f"| {title} | median ms | min | max | times microtome's | peak MB | off by, of std |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for label, values in times.items():
        print(f"| {label} | {medians[label]:.1f} | {min(values):.1f} | {max(values):.1f} | "
              f"{medians[label] / base:.2f} | {contenders[label].memory:.0f} | "
              f"{f'{off[label]:.0e}' if label in off else ''} |")
    print(flush=True)
    return medians, next((c.result for c in contenders.values() if isinstance(c, Program)), {})


def draw(results, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(6 * len(results), 4), layout="constrained")
    for ax, (title, medians) in zip(np.atleast_1d(axes), results.items()):
        labels = sorted(medians, key=medians.get, reverse=True)
        colors = ["#2a7f62" if label.startswith("microtome") else "#9aa5b1" for label in labels]
        bars = ax.barh(labels, [medians[label] for label in labels], color=colors)
        ax.bar_label(bars, fmt="%.0f", padding=3)
        ax.set_title(title + ", ms")
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--model", type=pathlib.Path, help=".pth file (LiteMedSAM's own weights)")
    parser.add_argument("--image", help=".npz case of an image (the first of those fetched)")
    parser.add_argument("--program", default=measures.PROGRAM)
    parser.add_argument("--threads", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each (%(default)s)")
    parser.add_argument("--runs", type=int, default=3, help="runs in a turn (%(default)s)")
    parser.add_argument("--only", nargs="+", help="rows whose names contain one of these")
    parser.add_argument("--part", choices=["encoder", "decoder"], help="only this one")
    parser.add_argument("--plot", help="picture of the medians, .svg or .png")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        folder = pathlib.Path(folder)
        prepare(options, folder)
        results = {}
        for part in [options.part] if options.part else ["encoder", "decoder"]:
            medians, ours = compare(part, options, folder)
            results[part] = medians
        if ours:
            print(f"fp32 but where it says otherwise; {options.threads} threads, target {ours['target']}, FMA "
                  f"peak {ours['peak_gflops']:.0f} GFLOP/s; medians of {options.rounds} turns of "
                  f"{options.runs} runs; PyTorch {torch.__version__}")
        if options.plot:
            draw(results, options.plot)


if __name__ == "__main__":
    main()
