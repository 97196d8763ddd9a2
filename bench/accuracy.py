#!/usr/bin/env python3
"""How good the program's masks of real cases are: against their labels, and against other masks of them.

    python3 bench/accuracy.py --against FOLDER            # of .npz files with segs, by the cases' names
    python3 bench/accuracy.py --original                  # the original network's masks, made here
    python3 bench/accuracy.py --calibrate FOLDER --scheme full encoder weights-only

Prints Markdown: for every model a row per case, then a table of the totals. Means are over cases of the mean
over objects, pixels are counted over all cases. With several models and no other masks named, the first
model's are what the others are compared with. --original needs PyTorch and OpenCV.
"""

import argparse
import pathlib
import subprocess
import sys
import tempfile

import numpy as np

import measures

HEADS = ["objects", "pixels that differ, %", "Dice of the two", "least", "Dice with labels", "NSD with labels"]


def models(options, folder):
    """Name, file and further options of `microtome segment` of everything that is measured."""
    found = [(path.name, path, []) for path in options.model or [measures.real_model()]]
    first = found[0][1]
    if options.bf16:
        found.append(("bf16", first, ["--precision", "bf16"]))
    if options.scheme:
        ranges, moments = folder / "ranges.json", folder / "moments.safetensors"
        measures.link_cases(options.calibrate, folder / "calibration")
        measures.run(options.program, "calibrate", "-m", first, "-i", folder / "calibration", "-o", ranges,
                     "--moments", moments, "--threads", options.threads)
    for number, scheme in enumerate(options.scheme):
        path = folder / f"{number}.safetensors"
        measures.run(options.program, "quantize", "-m", first, "-r", ranges, "--moments", moments, "-o", path,
                     "--scheme", scheme)
        found.append((scheme, path, []))
    return found


def original_masks(options, cases, folder):
    """The folder of what the original network answers."""
    folder.mkdir()
    script = measures.ROOT / "bench" / "peers" / "original.py"
    checkpoint = options.original or measures.real_checkpoint()
    subprocess.run([sys.executable, script, checkpoint, folder, str(options.threads), *cases], check=True)
    return folder


def compare(cases, segs, others, rows):
    """One dict per case: its masks against the labels, by the rows of `microtome eval`, and against `others`
    where there are any."""
    found = []
    for path in cases:
        of_case = [row for row in rows if row["case"] == path.name]
        result = dict(case=path.name, objects=len(of_case), dice=measures.mean(of_case),
                      nsd=measures.mean(of_case, "nsd"))
        if others:
            one, other = (np.load(masks / path.name)["segs"] for masks in (segs, others))
            if one.shape != other.shape:
                raise SystemExit(f"{others / path.name}: segs has shape {other.shape}, expected {one.shape}")
            differ, dice = measures.agreement(one, other, len(of_case))
            result |= dict(pixels=one.size, differ=differ, same=dice.mean(), least=dice.min())
        found.append(result)
    return found


def total(results):
    """The results of all cases as one."""
    found = dict(objects=sum(r["objects"] for r in results))
    for key in ("dice", "nsd", "same"):
        if key in results[0]:
            found[key] = np.mean([r[key] for r in results])
    if "same" in found:
        found["least"] = min(r["least"] for r in results)
        found["differ"] = np.average([r["differ"] for r in results], weights=[r["pixels"] for r in results])
    return found


def cells(result):
    two = ["", "", ""]
    if "same" in result:
        two = [f"{100 * result['differ']:.4f}", f"{result['same']:.5f}", f"{result['least']:.5f}"]
    return [str(result["objects"]), *two, f"{result['dice']:.4f}", f"{result['nsd']:.4f}"]


def print_row(*texts):
    print("| " + " | ".join(texts) + " |", flush=True)


def print_head(*texts):
    print_row(*texts)
    print("|" + " --- |" * len(texts))


def measure(options, folder):
    cases = measures.link_cases(options.cases, folder / "cases", options.volumes)
    others = options.against
    if options.original is not None:
        others = original_masks(options, cases, folder / "original")
    everything = models(options, folder)
    totals = []
    for number, (name, model, arguments) in enumerate(everything):
        segs = folder / f"segs_{number}"
        measures.run(options.program, "segment", "-m", model, "-i", folder / "cases", "-o", segs,
                     "--threads", options.threads, *arguments)
        if others is None and len(everything) > 1:
            others = segs
        results = compare(cases, segs, others, measures.metrics(options.program, segs, folder / "cases"))
        totals.append([name, *cells(total(results)), f"{model.stat().st_size / 1e6:.1f}"])
        print(f"\n### {name}\n")
        print_head("case", *HEADS)
        for result in results:
            print_row(result["case"], *cells(result))
    print(f"\n### All {len(cases)} cases\n")
    print_head("model", *HEADS, "file, MB")
    for row in totals:
        print_row(*row)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("-m", "--model", nargs="+", type=pathlib.Path, help="model files (LiteMedSAM's own)")
    parser.add_argument("--bf16", action="store_true", help="measure the first model in bf16, too")
    parser.add_argument("--scheme", nargs="+", default=[], help="measure it quantised by these, too")
    parser.add_argument("--calibrate", type=pathlib.Path, help="folder of cases to calibrate it on")
    parser.add_argument("--cases", type=pathlib.Path, help="folder of labelled cases (those fetched)")
    parser.add_argument("--volumes", action="store_true", help="the folder's volumes, too: minutes of each model")
    masks = parser.add_mutually_exclusive_group()
    masks.add_argument("--against", type=pathlib.Path, help="folder of other masks: .npz files with segs")
    masks.add_argument("--original", nargs="?", const="", metavar="CHECKPOINT.pth",
                       help="compare with what the original network answers (LiteMedSAM's own weights)")
    parser.add_argument("--program", default=measures.PROGRAM)
    parser.add_argument("--threads", type=int, default=2, help="(%(default)s)")
    options = parser.parse_args()
    if options.scheme and not options.calibrate:
        parser.error("--scheme needs --calibrate, a folder of cases that are not measured on")
    with tempfile.TemporaryDirectory() as folder:
        measure(options, pathlib.Path(folder))


if __name__ == "__main__":
    main()
