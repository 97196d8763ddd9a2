#!/usr/bin/env python3
"""A table and a roofline plot of the kernel benchmarks.

    build/release/bench/microtome_bench --benchmark_out=kernels.json
    bench/roofline.py kernels.json -o roofline.png [--threads N]

The table has one row per kernel and shape, with peers of the same product beside ours. Needs
matplotlib for the plot.
"""

import argparse
import collections
import json
import re

COLORS = {
    "gemm": "#2a7f62",
    "gemm_bf16": "#8bc4ae",
    "gemm_int8": "#b02a4f",
    "attention": "#c2571a",
    "attention_bf16": "#e3a77f",
    "depthwise3x3": "#3b5ba9",
    "layer_norm": "#8a4f9e",
    "gelu": "#b59a1d",
    "softmax": "#7d7d7d",
    "softmax_columns": "#a8a8a8",
}


def load(path, threads):
    """Rows {family: {shape: counters}} of the runs on so many threads, and the roofs."""
    report = json.load(open(path))
    context = report["context"]
    roofs = tuple(
        float(context[f"{name}, {threads} threads"]) for name in ("FMA peak, GFLOP/s", "bandwidth, GB/s")
    )
    rows = collections.defaultdict(dict)
    for run in report["benchmarks"]:
        if run.get("threads", 1) != threads or run.get("run_type") == "aggregate":
            continue
        name = re.sub(r"/(real_time|threads:\d+)", "", run["name"])
        family, _, shape = name.partition("/")
        rows[family][shape] = run
    return rows, roofs


def table(rows):
    peers = sorted(f for f in rows if f in ("gemm_onednn", "gemm_openblas", "gemm_xnnpack"))
    print("| kernel | GFLOP/s | GB/s | % of FMA peak | % of roofline | "
          + " | ".join(f"{p.removeprefix('gemm_')} GFLOP/s" for p in peers) + " |")
    print("| --- |" + " --- |" * (4 + len(peers)))
    for family, shapes in rows.items():
        if family in peers:
            continue
        for shape, run in shapes.items():
            others = [rows[p].get(shape) if family == "gemm" else None for p in peers]
            cells = [f"{run[key]:.{digits}f}" for key, digits in
                     (("GFLOP/s", 1), ("GB/s", 1), ("peak_%", 0), ("roof_%", 0))]
            cells += [f"{o['GFLOP/s']:.1f}" if o else "" for o in others]
            print(f"| {family} {shape} | " + " | ".join(cells) + " |")


def draw(rows, roofs, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    peak, bandwidth = roofs
    figure, ax = plt.subplots(figsize=(8, 5), layout="constrained")
    ridge = peak / bandwidth
    ax.plot([0.3, ridge, 1000], [0.3 * bandwidth, peak, peak], color="black", lw=1)
    ax.annotate(f"FMA peak {peak:.0f} GFLOP/s", (1000, peak), ha="right", va="bottom")
    ax.annotate(f"memory {bandwidth:.0f} GB/s", (0.33, 0.38 * bandwidth), rotation=48, rotation_mode="anchor")
    for family, color in COLORS.items():
        runs = rows.get(family, {}).values()
        if runs:
            ax.scatter([r["GFLOP/s"] / r["GB/s"] for r in runs], [r["GFLOP/s"] for r in runs],
                       s=18, color=color, label=family)
    ax.set(xscale="log", yscale="log", xlabel="FLOP per byte that must move", ylabel="GFLOP/s")
    ax.legend(frameon=False, fontsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("report", help="JSON of microtome_bench")
    parser.add_argument("-o", "--output", help="picture, .png or .svg")
    parser.add_argument("--threads", type=int, default=1, help="which runs (%(default)s)")
    options = parser.parse_args()
    rows, roofs = load(options.report, options.threads)
    table(rows)
    if options.output:
        draw(rows, roofs, options.output)


if __name__ == "__main__":
    main()
