#!/usr/bin/env python3
"""Quantises the image encoder to 8 bits with microtome, ONNX Runtime, OpenVINO and PyTorch on the same
calibration images, and compares them: time in turns as in compare.py, peak memory, size, and Dice of
the masks that the fp32 decoder makes of what they answer.

    pip install -r bench/peers/requirements.txt
    python3 bench/peers/quantized.py --calibrate FOLDER [--cases FOLDER]

Folders of .npz cases, of which those with images are taken, of any size.
"""

import argparse
import json
import pathlib
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile

import numpy as np
import torch

from compare import HERE, Program, Worker, chosen, take_turns

import accuracy
import load_weights
import measures
import original

SCHEMES = {  # label: scheme of `microtome quantize`
    "microtome fp32": None,
    "microtome int8, encoder": "encoder",
    "microtome int8, all layers": "full",
    "microtome int8, recommended": "recommended",
    "microtome int8 weights": "weights-only",
}
PEERS = {  # label: runtime of worker.py, tool of quantizers.py, what it begins with
    "ONNX Runtime fp32": ("onnxruntime", None, "encoder.onnx"),
    "ONNX Runtime int8": ("onnxruntime", "onnxruntime", "encoder.onnx"),
    "OpenVINO fp32": ("openvino", None, "encoder.onnx"),
    "OpenVINO int8, NNCF": ("openvino", "openvino", "encoder.onnx"),
    "PyTorch fp32": ("pytorch-saved", None, "encoder.pt"),
    "PyTorch int8, dynamic": ("pytorch-saved", "pytorch-dynamic", "encoder.pt"),
    "PyTorch int8, eager": ("pytorch-saved", "pytorch-eager", "encoder.pt"),
    "PyTorch int8, FX": ("pytorch-saved", "pytorch-fx", "encoder.pt"),
    "PyTorch compiled fp32": ("pytorch-saved-compiled", None, "encoder.pt"),
    "PyTorch compiled int8, PT2E": ("pytorch-saved-compiled", "pytorch-pt2e", "encoder.pt"),
}


def read_header(path):
    with open(path, "rb") as file:
        return json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))


def input_of(case):
    """What the encoder takes of a case."""
    return original.preprocess(np.load(case)["imgs"]).numpy()


class Comparison:
    def __init__(self, options, folder):
        self.options, self.folder = options, folder
        self.failed, self.contenders, self.models, self.sizes = {}, {}, {}, {}
        self.model = options.model or measures.real_model()
        self.reference = load_weights.load(self.model).eval().requires_grad_(False)
        self.cases = measures.link_cases(options.cases, folder / "test")
        self.inputs = folder / "inputs"
        self.inputs.mkdir()
        for path in self.cases:
            np.savez(self.inputs / path.name, image=input_of(path))
        self.calibration = measures.link_cases(options.calibrate, folder / "calibration")
        calibration = np.concatenate([input_of(path) for path in self.calibration])
        np.save(folder / "images.npy", calibration)
        self.example = torch.from_numpy(calibration[:1])
        torch.save(self.reference.image_encoder, folder / "encoder.pt")
        torch.onnx.export(self.reference.image_encoder, (self.example,), str(folder / "encoder.onnx"),
                          dynamo=False, opset_version=17, input_names=["image"])

    def start(self):
        for label, scheme in SCHEMES.items():
            if chosen(label, self.options.only):
                self.attempt(label, self.start_ours, scheme)
        for label, how in PEERS.items():
            if chosen(label, self.options.only):
                self.attempt(label, self.start_peer, *how)

    def attempt(self, label, start, *how):
        print(label, file=sys.stderr, flush=True)
        try:
            start(label, *how)
        except RuntimeError as error:
            self.failed[label] = str(error)

    def start_ours(self, label, scheme):
        program, model = self.options.program, self.model
        if scheme:
            ranges, moments = self.folder / "ranges.json", self.folder / "moments.safetensors"
            if not ranges.exists():
                measures.run(program, "calibrate", "-m", model, "-i", self.folder / "calibration", "-o", ranges,
                             "--moments", moments, "--observer", self.options.observer)
            model = self.folder / f"{scheme}.safetensors"
            measures.run(program, "quantize", "-m", self.model, "-r", ranges, "--moments", moments, "-o", model,
                         "--scheme", scheme)
        sizes = [np.diff(tensor["data_offsets"])[0] for name, tensor in read_header(model).items()
                 if name.startswith("image_encoder.")]
        self.models[label], self.sizes[label] = model, sum(sizes)
        self.contenders[label] = Program(program, model, "encoder", self.options.threads, [])

    def start_peer(self, label, runtime, tool, source):
        folder = self.folder / label.replace(" ", "_")
        folder.mkdir()
        if tool:
            arguments = [tool, self.folder / source, self.folder / "images.npy", folder]
            done = subprocess.run([sys.executable, HERE / "quantizers.py", *arguments], text=True,
                                  stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            if done.returncode:
                said = done.stderr.strip() or f"exit status {done.returncode}"
                raise RuntimeError(said.splitlines()[-1])
        else:
            shutil.copy(self.folder / source, folder)
        self.sizes[label] = sum(path.stat().st_size for path in folder.glob("encoder.*"))
        np.savez(folder / "encoder_inputs.npz", image=self.example.numpy())
        self.contenders[label] = Worker(runtime, "encoder", folder, self.options.threads)

    def accuracy(self):
        """Dice of each contender's masks with the labels and with the masks of PyTorch in fp32."""
        fp32 = self.folder / "fp32"
        fp32.mkdir()
        for path in self.cases:
            pixels = torch.from_numpy(np.load(self.inputs / path.name)["image"])
            self.decode(self.reference.image_encoder(pixels), path, fp32)
        found = {}
        for label, contender in self.contenders.items():
            print(f"{label}: accuracy", file=sys.stderr, flush=True)
            segs = self.folder / "segs" / label.replace(" ", "_")
            segs.mkdir(parents=True)
            try:
                self.segment(label, contender, segs)
            except RuntimeError as error:
                print(error, file=sys.stderr)
                continue
            rows = measures.metrics(self.options.program, segs, self.folder / "test")
            found[label] = accuracy.total(accuracy.compare(self.cases, segs, fp32, rows))
        return found

    def segment(self, label, contender, folder):
        if label in self.models:
            measures.run(self.options.program, "segment", "-m", self.models[label], "-i", self.folder / "test",
                         "-o", folder, "--threads", self.options.threads)
            return
        answer = self.folder / "embedding.npy"
        for path in self.cases:
            contender.answer(self.inputs / path.name, answer)
            self.decode(torch.from_numpy(np.load(answer)), path, folder)

    def decode(self, embedding, path, folder):
        """Writes the masks that PyTorch's decoder makes of a case's embedding."""
        case = np.load(path)
        segs = original.segment_boxes(self.reference, embedding, case["boxes"], case["imgs"].shape[:2])
        np.savez_compressed(folder / path.name, segs=segs)

    def print_table(self, times, results):
        medians = {label: statistics.median(values) for label, values in times.items()}

        def ratio(label, base):
            return f"{medians[label] / medians[base]:.2f}" if base in medians else ""

        print("| encoder | median ms | min | max | times microtome's fp32 | times its own fp32 | peak MB | "
              "weights MB | Dice | Dice with fp32's masks |")
        print("|" + " --- |" * 10)
        for label in [*SCHEMES, *PEERS]:
            if label in self.failed:
                print(f"| {label} | {self.failed[label]} |" + " |" * 8)
            elif label in times:
                values = times[label]
                found = results.get(label)
                dice = [f"{found[key]:.4f}" for key in ("dice", "same")] if found else ["", ""]
                print(f"| {label} | {medians[label]:.1f} | {min(values):.1f} | {max(values):.1f} | "
                      f"{ratio(label, 'microtome fp32')} | {ratio(label, label.split(' int8')[0] + ' fp32')} | "
                      f"{self.contenders[label].memory:.0f} | {self.sizes[label] / 1e6:.1f} | "
                      f"{dice[0]} | {dice[1]} |")

    def run(self):
        options = self.options
        self.start()
        if not self.contenders:
            self.print_table({}, {})
            return
        times = take_turns(self.contenders, options.rounds, options.runs)
        results = {} if options.skip_accuracy else self.accuracy()
        for contender in self.contenders.values():
            contender.end()
        self.print_table(times, results)
        print(f"\n{options.threads} threads; medians of {options.rounds} turns of {options.runs} runs; "
              f"calibrated on {len(self.calibration)} images, Dice over {len(self.cases)}; PyTorch "
              f"{torch.__version__}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("-m", "--model", type=pathlib.Path, help="model file in fp32 (LiteMedSAM's own)")
    parser.add_argument("--calibrate", type=pathlib.Path, required=True, help="folder of cases to calibrate on")
    parser.add_argument("--cases", type=pathlib.Path, help="folder of labelled cases (those fetched)")
    parser.add_argument("--program", default=measures.PROGRAM)
    parser.add_argument("--observer", default="mse", help="of `microtome calibrate` (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each (%(default)s)")
    parser.add_argument("--runs", type=int, default=3, help="runs in a turn (%(default)s)")
    parser.add_argument("--only", nargs="+", help="rows whose names contain one of these")
    parser.add_argument("--skip-accuracy", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        Comparison(options, pathlib.Path(folder)).run()


if __name__ == "__main__":
    main()
