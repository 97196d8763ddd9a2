#!/usr/bin/env python3
"""What 8 bits lose on images unlike those of the calibration: of each modality, the second part of a case's name
(2D_CT_lung1.npz), in turn, calibrated on all others.

    .venv/bin/python bench/unseen.py CASE... --observer mse min-max --headroom 0 0.25

Prints Markdown: the root mean square error of the image embedding over its deviation, mean over a modality's cases.
Weights are rounded to the nearest.
"""

import argparse
import pathlib
import tempfile

import numpy as np

import measures


def embedding(options, model, case, folder):
    measures.run(options.program, "trace", "-m", model, "-i", case, "-o", folder / "trace.npz",
                 "--only", "image_embedding")
    return np.load(folder / "trace.npz")["image_embedding"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="+", type=pathlib.Path)
    parser.add_argument("--observer", nargs="+", default=["mse"])
    parser.add_argument("--headroom", nargs="+", default=["0", "0.25"])
    parser.add_argument("--modality", nargs="+", help="only these are left out")
    parser.add_argument("--program", default=measures.ROOT / "build" / "release" / "microtome")
    options = parser.parse_args()
    model = measures.real_model()
    modalities = {}
    for case in options.cases:
        modalities.setdefault(case.stem.split("_")[1], []).append(case)
    chosen = options.modality or sorted(modalities)
    print("| observer, headroom |", " | ".join(chosen), "| mean |")
    print("| --- |" + " --- |" * (len(chosen) + 1))
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        for one in chosen:
            (folder / one).mkdir()
            for case in options.cases:
                if case not in modalities[one]:
                    (folder / one / case.name).symlink_to(case.resolve())
        exact = {case: embedding(options, model, case, folder) for one in chosen for case in modalities[one]}
        for observer in options.observer:
            for headroom in options.headroom:
                found = []
                for one in chosen:
                    ranges, int8 = folder / "ranges.json", folder / "int8.safetensors"
                    measures.run(options.program, "calibrate", "-m", model, "-i", folder / one, "-o", ranges,
                                 "--observer", observer, "--headroom", headroom)
                    measures.run(options.program, "quantize", "-m", model, "-r", ranges, "-o", int8)
                    errors = [np.sqrt(((embedding(options, int8, case, folder) - exact[case]) ** 2).mean())
                              / exact[case].std() for case in modalities[one]]  # fmt: skip
                    found.append(np.mean(errors))
                print(f"| {observer}, {headroom} |", " | ".join(f"{e:.3f}" for e in found), f"| {np.mean(found):.3f} |",
                      flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
