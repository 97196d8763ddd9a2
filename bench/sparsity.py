#!/usr/bin/env python3
"""Speed and accuracy over sparsity: prunes a model in several ways, times each with the program in turns with
the dense model, and compares its masks with the labels of real cases.

    python3 bench/sparsity.py -o sparsity.json [-m MODEL] [--cases FOLDER] [--plot FILE.png]
    python3 bench/sparsity.py --from sparsity.json --plot FILE.png

Prints a table. Nothing is trained again after pruning but what is given so: `--trained "50 %=FILE" "2:4=FILE"`,
model files whose weights were trained on with their zeros held (converters/finetune.py). With --calibrate FOLDER
weights are also chosen and repaired by what calibration sees of the cases there. Needs matplotlib for the plot.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import tempfile

import accuracy
import measures

WAYS = {  # how it is pruned: options of convert.py
    "dense": [],
    "20 %": ["--prune", "0.2"],
    "50 %": ["--prune", "0.5"],
    "2:4": ["--prune-2-4"],
    "70 %": ["--prune", "0.7"],
    "80 %": ["--prune", "0.8"],
    "80 % of each layer": ["--prune", "0.8", "--prune-layerwise"],
    "90 %": ["--prune", "0.9"],
}
TRAINED = ", trained on"
MOMENTS = ", by moments"
BY_MOMENTS = ("20 %", "50 %", "2:4", "70 %")


def calibrated(options, source, folder):
    """The models pruned by moments."""
    dense = measures.convert(source, folder / "calibrated.safetensors")
    measures.link_cases(options.calibrate, folder / "calibration")
    moments = folder / "moments.safetensors"
    measures.run(options.program, "calibrate", "-m", dense, "-i", folder / "calibration", "-o", folder / "ranges.json",
                 "--moments", moments, "--threads", options.threads)  # fmt: skip
    return {
        way + MOMENTS: measures.convert(source, folder / f"moments_{i}.safetensors", "--storage", "fp16", *WAYS[way],
                                        "--calibration", moments)
        for i, way in enumerate(BY_MOMENTS)
    }  # fmt: skip


def measure(options, folder):
    cases = measures.link_cases(options.cases, folder / "cases", options.volumes)
    source, models = options.model or measures.real_checkpoint(), {}
    for way, arguments in WAYS.items():
        target = folder / f"{len(models)}.safetensors"
        models[way] = measures.convert(source, target, "--storage", "fp16", *arguments)
    if options.calibrate:
        models |= calibrated(options, source, folder)
    for given in options.trained:
        way, file = given.split("=", 1)
        models[f"{way}{TRAINED}"] = pathlib.Path(file)
    times = {way: {"encoder": [], "box": []} for way in models}
    for _ in range(options.rounds):
        for way, model in models.items():
            answer = subprocess.run([options.program, "bench", "-m", model, "--json", "--runs", "3",
                                     "--threads", str(options.threads)],
                                    check=True, capture_output=True)  # fmt: skip
            row = json.loads(answer.stdout)
            times[way]["encoder"].append(row["encoder_ms"]["median"])
            times[way]["box"].append(row["batched_box_ms"]["median"])
    found = {}
    for way, model in models.items():
        segs = folder / "segs" / way
        measures.run(options.program, "segment", "-m", model, "-i", folder / "cases", "-o", segs,
                     "--threads", options.threads)  # fmt: skip
        rows = measures.metrics(options.program, segs, folder / "cases")
        masks = accuracy.total(accuracy.compare(cases, segs, folder / "segs" / "dense", rows))
        found[way] = times[way] | {
            "dice": float(masks["dice"]),
            "agreement": float(masks["same"]),
            "megabytes": model.stat().st_size / 1e6,
        }
    return found


def show(found):
    print("| pruned | encoder ms | min | max | speed-up | a further box, ms | agreement | Dice | file, MB |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    dense = statistics.median(found["dense"]["encoder"])
    for way, row in found.items():
        ms = row["encoder"]
        print(f"| {way} | {statistics.median(ms):.0f} | {min(ms):.0f} | {max(ms):.0f} | "
              f"{dense / statistics.median(ms):.2f} | {statistics.median(row['box']):.1f} | "
              f"{row['agreement']:.3f} | {row['dice']:.3f} | {row['megabytes']:.1f} |")  # fmt: skip


def plot(found, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    places = {w: 0 if w == "dense" else 50 if w.startswith("2:4") else int(w.split()[0]) for w in found}
    single = ("2:4", "80 % of each layer")  # not on the curves
    dense = statistics.median(found["dense"]["encoder"])
    figure, speed = plt.subplots(figsize=(7, 4))
    alike = speed.twinx()
    for axis, value, color, label, top in (
        (speed, lambda w: dense / statistics.median(found[w]["encoder"]), "#2a7f62", "encoder's speed-up", 2.5),
        (alike, lambda w: found[w]["agreement"], "#b02a4f", "Dice with the dense model's masks", 1.05),
    ):
        for kind, style in (("", "o-"), (MOMENTS, "s--"), (TRAINED, "*:")):
            chosen = [w for w in places if w.endswith(kind) and (kind or not w.endswith((MOMENTS, TRAINED)))]
            curve = sorted((w for w in chosen if not w.startswith(single)), key=places.get)
            if kind and axis is speed or not chosen:
                continue
            if kind:
                curve = ["dense", *curve]
            axis.plot([places[w] for w in curve], [value(w) for w in curve], style, color=color,
                      label=kind.removeprefix(", ") or "by magnitude")
            for way in (w for w in chosen if w.startswith(single)):
                axis.plot(places[way], value(way), "^", color=color)
                axis.annotate(way, (places[way], value(way)), fontsize=8, ha="right", textcoords="offset points",
                              xytext=(-6, -4))  # fmt: skip
        axis.set_ylabel(label, color=color)
        axis.set_ylim(0, top)
    alike.legend(loc="lower left", fontsize=8)
    speed.set_xlabel("weights that are zero, %")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("-m", "--model", help=".pth or .safetensors file (LiteMedSAM's own weights)")
    parser.add_argument("--cases", type=pathlib.Path, help="folder of labelled cases (those fetched)")
    parser.add_argument("--calibrate", metavar="FOLDER", help="of cases to calibrate on: prune by moments, too")
    parser.add_argument("--volumes", action="store_true", help="the folder's volumes, too: minutes of each model")
    parser.add_argument("-o", "--output", help="JSON file for what was measured")
    parser.add_argument("--from", dest="source", help="JSON file of an earlier run, to show again")
    parser.add_argument("--plot", help="PNG or SVG file")
    parser.add_argument("--trained", nargs="+", metavar="WAY=FILE", default=[],
                        help="pruned so and trained on, measured too")
    parser.add_argument("--program", default=measures.PROGRAM)
    parser.add_argument("--threads", type=int, default=0, help="0: every CPU")
    parser.add_argument("--rounds", type=int, default=4, help="turns of three runs each (%(default)s)")
    options = parser.parse_args()
    if options.source:
        found = json.loads(pathlib.Path(options.source).read_text())
    else:
        with tempfile.TemporaryDirectory() as folder:
            found = measure(options, pathlib.Path(folder))
    if options.output:
        pathlib.Path(options.output).write_text(json.dumps(found, indent=1))
    show(found)
    if options.plot:
        plot(found, options.plot)


if __name__ == "__main__":
    main()
