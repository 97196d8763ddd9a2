#!/usr/bin/env python3
"""A table of the benchmarks of products with pruned weights, and the costs by which layers are chosen.

    build/release/bench/microtome_bench --benchmark_filter='^sparse/.*real_time$' \\
        --benchmark_enable_random_interleaving=true --benchmark_repetitions=3 --benchmark_out=products.json
    python3 bench/sparse_products.py products.json

One row per layer: the dense product's time, and how many times as fast the sparse one is. The last rows add
up what an image has of each. `--fit BLOCK` prints the costs for kernels/sparse.hpp's sparse_time; BLOCK is
the kernel's tile_depth (128 with vectors of 8 floats). Needs NumPy for that.
"""

import argparse
import json
import math
import re
import statistics

COLUMNS = {"sparsity:0": "0 %", "sparsity:20": "20 %", "sparsity:50": "50 %", "2:4": "2:4",
           "sparsity:70": "70 %", "sparsity:80": "80 %", "sparsity:90": "90 %", "sparsity:95": "95 %"}  # fmt: skip
NAME = re.compile(r"sparse(?:_\w+)?/([^/]+)/(\d+)x(\d+)x(\d+)/([^/]+)/real_time")
# Rows that an image of 256 x 256 has of each layer: tokens times blocks.
ROWS = {"patch_embed.2": 65536, "layers.0.conv1": 2 * 65536, "layers.0.conv3": 2 * 65536,
        "layers.0.merge1": 65536, "layers.0.merge3": 16384, "layers.1.merge1": 16384, "layers.1.merge3": 4096,
        "layers.2.merge1": 4096, "layers.2.merge3": 4096, "neck.0": 4096, "neck.2": 4096}  # fmt: skip
BLOCKS = {f"layers.{stage}.{part}": rows
          for stage, rows in ((1, 2 * 16384), (2, 6 * 4096), (3, 2 * 4096))
          for part in ("qkv", "proj", "fc1", "fc2")}  # fmt: skip
TAPS = {"neck.2": 9}


def read(path):
    """{layer: ((rows, columns, depth), {"dense", "sparsity:50", ...: seconds})}"""
    found = {}
    with open(path) as file:
        runs = json.load(file)["benchmarks"]
    for run in runs:
        match = NAME.fullmatch(run.get("run_name", run["name"]))
        if not match or run.get("run_type") != "iteration":
            continue
        layer, *shape, way = match.groups()
        ways = found.setdefault(layer, (tuple(map(int, shape)), {}))[1]
        ways.setdefault(way, []).append(run["real_time"] * {"ns": 1e-9, "us": 1e-6, "ms": 1e-3}[run["time_unit"]])
    return {layer: (shape, {w: statistics.median(t) for w, t in ways.items()})
            for layer, (shape, ways) in found.items()}  # fmt: skip


def row(title, microseconds, times):
    cells = [f"{times['dense'] / times[way]:.2f}" for way in COLUMNS]
    print(f"| {title} | {microseconds} | " + " | ".join(cells) + " |")


def total(found, rows):
    """Seconds of all of these layers in an image."""
    return {way: sum(found[layer][1][way] * n / found[layer][0][0] for layer, n in rows.items())
            for way in ("dense", *COLUMNS)}  # fmt: skip


def fit(found, block):
    """Least squares of what sparse_time says a row costs, relative to a dense multiply-add."""
    import numpy as np

    unit = np.mean([ways["dense"] / math.prod(shape) for shape, ways in found.values()])
    terms, times = [], []
    for layer, ((rows, columns, depth), ways) in found.items():
        blocks = TAPS.get(layer, 1) * math.ceil(depth / TAPS.get(layer, 1) / block)
        for way in COLUMNS:
            kept = 0.5 if way == "2:4" else 1 - int(way.split(":")[1]) / 100
            terms.append([columns * depth * kept, columns * blocks, depth + columns])
            times.append(ways[way] / rows / unit)
    relative = np.array(terms) / np.array(times)[:, None]
    costs = np.linalg.lstsq(relative, np.ones(len(times)), rcond=None)[0]
    off = np.abs(relative @ costs - 1)
    print("\n{:.2f} per element, {:.2f} per column and block, {:.2f} per row and column".format(*costs))
    print(f"off by {100 * off.mean():.0f} % in the mean, {100 * off.max():.0f} % at most")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", help="Google Benchmark's JSON, of one precision")
    parser.add_argument("--fit", metavar="BLOCK", type=int, help="print the costs, too")
    options = parser.parse_args()
    found = read(options.results)
    print("| layer | dense, us | " + " | ".join(COLUMNS.values()) + " |")
    print("| --- |" + " --- |" * (1 + len(COLUMNS)))
    for layer, (shape, ways) in found.items():
        row(f"{layer} {'x'.join(map(str, shape))}", f"{1e6 * ways['dense']:.0f}", ways)
    row("qkv, proj, fc1, fc2 of all blocks", "", total(found, BLOCKS))
    row("all layers of the encoder", "", total(found, BLOCKS | ROWS))
    if options.fit:
        fit(found, options.fit)


if __name__ == "__main__":
    main()
