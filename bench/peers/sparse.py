#!/usr/bin/env python3
"""Times products with pruned weights, at the shapes of LiteMedSAM's layers: PyTorch's dense linear layer,
PyTorch's CSR matrices and SciPy's, in turns within one process, so that a machine that slows down slows
all of them.

    python3 bench/peers/sparse.py --json peers.json
    build/release/bench/microtome_bench --benchmark_filter=^sparse/ --benchmark_out=ours.json
    python3 bench/peers/sparse.py --microtome ours.json

Every product is (rows, depth) by (depth, columns). Which weights are zero is drawn at random, the same
for all runtimes. The sparse ones take the activations transposed, (depth, rows), as they do best; the time
for turning them is not counted. SciPy has one thread. neck.2, a 3 x 3 convolution, is the product of its
nine places. PyTorch's dense time is measured with the same zeros, which it does not use.
"""

import argparse
import json
import pathlib
import re
import statistics
import sys
import time
import warnings

import numpy as np
import scipy.sparse
import torch
import torch.nn.functional as F

ROWS = 4096
SPARSITIES = (0, 0.2, 0.5, 0.7, 0.8, 0.9, 0.95)
SHAPES = {  # layer: columns and depth, those of bench/kernels.cpp
    "patch_embed.2": (64, 32),
    "layers.0.conv1": (256, 64),
    "layers.0.conv3": (64, 256),
    "layers.0.merge1": (128, 64),
    "layers.0.merge3": (128, 128),
    "layers.1.qkv": (384, 128),
    "layers.1.proj": (128, 128),
    "layers.1.fc1": (512, 128),
    "layers.1.fc2": (128, 512),
    "layers.1.merge1": (160, 128),
    "layers.1.merge3": (160, 160),
    "layers.2.qkv": (480, 160),
    "layers.2.proj": (160, 160),
    "layers.2.fc1": (640, 160),
    "layers.2.fc2": (160, 640),
    "layers.2.merge1": (320, 160),
    "layers.2.merge3": (320, 320),
    "layers.3.qkv": (960, 320),
    "layers.3.proj": (320, 320),
    "layers.3.fc1": (1280, 320),
    "layers.3.fc2": (320, 1280),
    "neck.0": (256, 320),
    "neck.2": (256, 2304),
    "decoder.k_proj": (128, 256),
    "decoder.upscale1": (128, 256),
    "decoder.upscale2": (64, 64),
}
OURS = re.compile(
    r"sparse/([^/]+)/(\d+)x(\d+)x(\d+)/(?:dense|sparsity:([\d.]+))(?:/real_time)?(?:/threads:(\d+))?"
)
UNITS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0}


def contenders(columns, depth, sparsity, seed=1):
    """{runtime: call} of one product, and what each of them should answer."""
    rng = np.random.default_rng(seed)
    weight = rng.normal(0, 1, (columns, depth)).astype(np.float32)
    weight.flat[rng.permutation(weight.size)[: round(sparsity * weight.size)]] = 0
    tokens = rng.normal(0, 1, (ROWS, depth)).astype(np.float32)
    turned = np.ascontiguousarray(tokens.T)
    dense, x, x_turned = map(torch.from_numpy, (weight, tokens, turned))
    csr, scipy_csr = dense.to_sparse_csr(), scipy.sparse.csr_matrix(weight)
    return {
        "PyTorch dense": lambda: F.linear(x, dense).numpy(),
        "PyTorch CSR": lambda: (csr @ x_turned).numpy().T,
        "SciPy CSR": lambda: (scipy_csr @ turned).T,
    }


def check(calls):
    """Raises where runtimes differ; their first calls are not timed."""
    answers = {name: call() for name, call in calls.items()}
    right = answers["PyTorch dense"]
    for name, answer in answers.items():
        if np.abs(answer - right).max() > 1e-4 * max(1.0, np.abs(right).max()):
            raise RuntimeError(f"{name} answers something else")


def take_turns(calls, rounds):
    """Medians of the seconds of each."""
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def read_ours(path, threads):
    """{(layer, sparsity or "dense"): seconds for ROWS rows} in Google Benchmark's output, with as many
    threads; those on one thread where there are no others. Times "/threads:N" are already those of one of
    N copies that share the time."""
    found = {}
    for run in json.loads(pathlib.Path(path).read_text())["benchmarks"]:
        match = OURS.fullmatch(run["name"])
        if not match or run.get("run_type", "iteration") != "iteration":
            continue
        layer, rows, columns, depth, per_cent, copies = match.groups()
        if (int(columns), int(depth)) != SHAPES.get(layer):
            raise SystemExit(f"{path}: {run['name']} is of another shape than here: {SHAPES.get(layer)}")
        count = int(copies or 1)
        if count in (1, threads):
            seconds = run["real_time"] * UNITS[run["time_unit"]] * ROWS / int(rows)
            key = (layer, "dense" if per_cent is None else float(per_cent) / 100)
            found.setdefault(key, {}).setdefault(count, []).append(seconds)
    return {key: statistics.median(by.get(threads) or by[1]) for key, by in found.items()}


def print_rows(layer, results, ours):
    """Milliseconds, and with `ours` how many times those of microtome's sparse product."""
    columns, depth = SHAPES[layer]
    for sparsity, medians in results.items():
        times = list(medians.values())
        ratios = []
        if ours:
            dense, sparse = (ours.get((layer, key)) for key in ("dense", sparsity))
            ratios = [t / sparse if t and sparse else None for t in (dense, *times)]
            times += [dense, sparse]
        cells = [f"{1e3 * t:.2f}" if t else "" for t in times] + [f"{r:.2f}" if r else "" for r in ratios]
        cells = [f"{layer}, {ROWS}x{columns}x{depth}", f"{100 * sparsity:g} %", *cells]
        print("| " + " | ".join(cells) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--threads", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each (%(default)s)")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="layers whose names contain one of these")
    parser.add_argument("--json", help="file for the seconds of each layer, sparsity and runtime")
    parser.add_argument("--microtome", metavar="JSON",
                        help="Google Benchmark's output to set beside, of sparse/LAYER/ROWSxCOLUMNSxDEPTH/dense "
                             "and .../sparsity:80")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
    ours = read_ours(options.microtome, options.threads) if options.microtome else {}
    results = {}
    for layer, (columns, depth) in SHAPES.items():
        if options.only and not any(word in layer for word in options.only):
            continue
        results[layer] = {}
        for sparsity in SPARSITIES:
            calls = contenders(columns, depth, sparsity)
            check(calls)
            results[layer][sparsity] = take_turns(calls, options.rounds)
            if len(results) == 1 and sparsity == SPARSITIES[0]:
                print_head(calls, ours)
        print_rows(layer, results[layer], ours)
        sys.stdout.flush()
    print(f"\nMilliseconds, fp32, {options.threads} threads (SciPy 1); medians of {options.rounds} turns; PyTorch "
          f"{torch.__version__}, SciPy {scipy.__version__}")
    if options.json:
        listed = [
            dict(layer=layer, rows=ROWS, columns=SHAPES[layer][0], depth=SHAPES[layer][1], sparsity=sparsity,
                 seconds=medians)
            for layer, by in results.items() for sparsity, medians in by.items()
        ]
        content = dict(threads=options.threads, rounds=options.rounds, results=listed)
        pathlib.Path(options.json).write_text(json.dumps(content, indent=1) + "\n")


def print_head(names, ours):
    heads = ["layer", "zeros", *names]
    if ours:
        heads += ["microtome dense", "microtome sparse"]
        heads += [f"{name} / microtome sparse" for name in ("microtome dense", *names)]
    print("| " + " | ".join(heads) + " |\n|" + " --- |" * len(heads))


if __name__ == "__main__":
    main()
