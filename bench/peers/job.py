#!/usr/bin/env python3
"""Times the whole job, from the start of the process to the written file: microtome against PyTorch in
the way of LiteMedSAM's own script (original.py), on a case each of an image and a volume.

    python3 bench/peers/job.py CHECKPOINT.pth CASE.npz...

Without cases it makes a phantom's: an image with three boxes, a volume of ten slices with two.
"""

import argparse
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT / "converters" / "demo")]


def phantom_cases(folder):
    import phantom

    subprocess.run([sys.executable, phantom.__file__, "-o", folder], check=True, stdout=subprocess.DEVNULL)
    return sorted(pathlib.Path(folder).glob("*.npz"))


def timed(command):
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("checkpoint", help=".pth in the original's key naming")
    parser.add_argument("cases", nargs="*", type=pathlib.Path)
    parser.add_argument("--program", default=ROOT / "build" / "release" / "microtome")
    parser.add_argument("--threads", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each (%(default)s)")
    options = parser.parse_args()
    threads = str(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        for name in ("ours", "theirs", "cases"):
            (folder / name).mkdir()
        model = folder / "model.safetensors"
        subprocess.run([sys.executable, ROOT / "converters" / "convert.py", options.checkpoint, "-o", model],
                       check=True, stdout=subprocess.DEVNULL)
        print("| case | microtome, s | PyTorch, s | ratio | pixels that differ |")
        print("| --- | --- | --- | --- | --- |")
        for case in options.cases or phantom_cases(folder / "cases"):
            ours = [options.program, "segment", "-m", model, "-i", case, "-o", folder / "ours",
                    "--threads", threads]
            theirs = [sys.executable, HERE / "original.py", options.checkpoint, folder / "theirs",
                      threads, case]
            times = [(timed(ours), timed(theirs)) for _ in range(options.rounds)]
            a, b = (statistics.median(t) for t in zip(*times))
            segs = [np.load(folder / who / case.name)["segs"] for who in ("ours", "theirs")]
            print(f"| {case.name} | {a:.2f} | {b:.2f} | {b / a:.1f} | {np.mean(segs[0] != segs[1]):.2e} |",
                  flush=True)


if __name__ == "__main__":
    main()
