#!/usr/bin/env python3
"""A table of the benchmarks of products with pruned weights, and the costs by which layers are chosen.

    build/release/bench/microtome_bench --benchmark_filter='^sparse/.*real_time$' \\
        --benchmark_enable_random_interleaving=true --benchmark_repetitions=9 --benchmark_out=products.json
    python3 bench/sparse_products.py products.json

One row per layer: the dense product's time, and how many times as fast the sparse one is, each by its fastest
repetition: what else runs on a machine only ever adds time. The last rows add up what an image has of each.
`--fit 8,7:128,13:68` prints the costs for kernels/sparse.hpp's sparse_time, given a vector's floats and the
tiles' vectors and depth. Needs NumPy for that.
"""

import argparse
import json
import math
import re

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
    return {layer: (shape, {w: min(t) for w, t in ways.items()})
            for layer, (shape, ways) in found.items()}  # fmt: skip


def row(title, microseconds, times):
    cells = [f"{times['dense'] / times[way]:.2f}" for way in COLUMNS]
    print(f"| {title} | {microseconds} | " + " | ".join(cells) + " |")


def total(found, rows):
    """Seconds of all of these layers in an image."""
    return {way: sum(found[layer][1][way] * n / found[layer][0][0] for layer, n in rows.items())
            for way in ("dense", *COLUMNS)}  # fmt: skip


def fit(found, lanes, tiles):
    """Least squares of what sparse_time says; each product is taken to run in the faster tile."""
    import numpy as np

    unit = np.mean([ways["dense"] / math.prod(shape) for shape, ways in found.values()]) * lanes
    products, times = [], []
    for layer, ((rows, columns, depth), ways) in found.items():
        taps, vectors = TAPS.get(layer, 1), math.ceil(rows / lanes)
        for way in COLUMNS:
            stored = columns * depth * (0.5 if way == "2:4" else 1 - int(way.split(":")[1]) / 100)
            products.append([[vectors * stored, math.ceil(vectors / most) * stored,
                              vectors * columns * taps * math.ceil(depth / taps / block),
                              rows / lanes * (depth + columns)] for most, block in tiles])  # fmt: skip
            times.append(ways[way] / unit)
    terms, times = np.array(products), np.array(times)
    costs = np.array([1.0, 2.0, 7.0, 1.4])
    for _ in range(5):
        faster = terms[range(len(times)), (terms @ costs).argmin(axis=1)] / times[:, None]
        costs = np.linalg.lstsq(faster, np.ones(len(times)), rcond=None)[0]
    off = np.abs(faster @ costs - 1)
    print("\nIn a tile of v vectors {:.2f} v + {:.2f} per element, {:.2f} v per column and block, "
          "{:.2f} v per row and column".format(*costs))  # fmt: skip
    print(f"off by {100 * off.mean():.0f} % in the mean, {100 * off.max():.0f} % at most")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", help="Google Benchmark's JSON, of one precision")
    parser.add_argument("--fit", metavar="LANES,VECTORS:DEPTH,...", help="print the costs, too")
    options = parser.parse_args()
    found = read(options.results)
    print("| layer | dense, us | " + " | ".join(COLUMNS.values()) + " |")
    print("| --- |" + " --- |" * (1 + len(COLUMNS)))
    for layer, (shape, ways) in found.items():
        row(f"{layer} {'x'.join(map(str, shape))}", f"{1e6 * ways['dense']:.0f}", ways)
    row("qkv, proj, fc1, fc2 of all blocks", "", total(found, BLOCKS))
    row("all layers of the encoder", "", total(found, BLOCKS | ROWS))
    if options.fit:
        lanes, *tiles = options.fit.split(",")
        fit(found, int(lanes), [tuple(map(int, tile.split(":"))) for tile in tiles])


if __name__ == "__main__":
    main()
