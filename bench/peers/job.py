#!/usr/bin/env python3
"""Times the whole job, from the start of the process to the written file: microtome against PyTorch in
the way of LiteMedSAM's own script (original.py).

    python3 bench/peers/job.py CASE.npz... [--calibrate FOLDER]
    python3 bench/peers/job.py --labels LABELS.npz --calibrate FOLDER

With --labels, ten volumes are painted over the labels of real organs (painting.py), of which PyTorch does one:
it encodes every slice once for every object. What it would take for the others is reckoned by how many slices
their objects have together. With --calibrate, microtome runs in 8 bits, too; calibrating and quantising are
not timed.
"""

import argparse
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import measures  # noqa: E402


def timed(command):
    """Seconds and peak memory, MB, of a process. The kernel counts this process's own memory at the start as
    the new one's; so nothing large is loaded here before the last one has run."""
    start = time.perf_counter()
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(f"{command[0]} {command[1]}: exit status {process.returncode}; its message is above")
    return seconds, usage.ru_maxrss * 1024 / 1e6


def steps(path):
    """How many objects a case has, and how often the original encodes for them: once for an image, in a volume
    for every object its slices."""
    with np.load(path) as case:
        boxes = case["boxes"]
        return len(boxes), int((boxes[:, 5] - boxes[:, 2] + 1).sum()) if measures.is_volume(case) else 1


class Job:
    def __init__(self, options, folder):
        self.options, self.folder = options, folder
        checkpoint = options.checkpoint or measures.real_checkpoint()
        self.commands = {}  # {who: what comes before the case}
        models = {"microtome fp32": measures.convert(checkpoint, folder / "model.safetensors")}
        if options.calibrate:
            models["microtome int8"] = self.quantize(models["microtome fp32"])
        for who, model in models.items():
            self.commands[who] = [options.program, "segment", "-m", model, "--threads", options.threads,
                                  "-o", folder / who, "-i"]
        (folder / "PyTorch").mkdir()
        self.commands["PyTorch"] = [sys.executable, HERE / "original.py", checkpoint, folder / "PyTorch",
                                    options.threads]

    def quantize(self, model):
        program, ranges, target = self.options.program, self.folder / "ranges.json", self.folder / "int8.safetensors"
        moments = self.folder / "moments.safetensors"
        measures.link_cases(self.options.calibrate, self.folder / "calibration")
        measures.run(program, "calibrate", "-m", model, "-i", self.folder / "calibration", "-o", ranges,
                     "--moments", moments)
        measures.run(program, "quantize", "-m", model, "-r", ranges, "--moments", moments, "-o", target, "--scheme",
                     self.options.scheme)
        return target

    def cases(self):
        if not self.options.labels:
            return self.options.cases
        command = [sys.executable, HERE / "painting.py", self.options.labels, "-o", self.folder / "painted",
                   "--count", self.options.volumes]
        command += ["--slices", self.options.slices] if self.options.slices else []
        timed(command)
        return sorted((self.folder / "painted").glob("*.npz"))

    def run(self):
        cases = self.cases()
        by_pytorch = cases[:1] if self.options.labels else cases
        seconds, memory = {who: [] for who in self.commands}, {}
        print("| case | objects | slices of objects | " +
              " | ".join(f"{who}, s" for who in self.commands) + " |\n|" + " --- |" * (3 + len(self.commands)))
        for case in cases:
            objects, encodings = steps(case)
            cells = [case.name, str(objects), str(encodings)]
            for who, command in self.commands.items():
                if who == "PyTorch" and case not in by_pytorch:
                    seconds[who].append(seconds[who][0] * encodings / steps(cases[0])[1])
                    cells.append(f"({seconds[who][-1]:.0f})")
                    continue
                turns = [timed([*command, case]) for _ in range(self.options.rounds)]
                seconds[who].append(statistics.median(s for s, _ in turns))
                memory[who] = max([memory.get(who, 0), *(mb for _, mb in turns)])
                cells.append(f"{seconds[who][-1]:.2f}")
            print("| " + " | ".join(cells) + " |", flush=True)
        self.print_totals(seconds, memory)
        if len(by_pytorch) < len(cases):
            print("\nIn brackets: not run, reckoned from the first volume by slices of objects, and so is the total.")
        self.print_masks(by_pytorch)

    def print_totals(self, seconds, memory):
        totals = {who: sum(values) for who, values in seconds.items()}
        print("\n| all cases | s | PyTorch's time over it | peak memory, MB |\n| --- | --- | --- | --- |")
        for who, total in totals.items():
            print(f"| {who} | {total:.2f} | {totals['PyTorch'] / total:.1f} | {memory[who]:.0f} |")

    def print_masks(self, cases):
        print("\n| masks beside PyTorch's | case | pixels that differ, % | Dice of the two | least |\n"
              "| --- | --- | --- | --- | --- |")
        for case in cases:
            theirs = np.load(self.folder / "PyTorch" / case.name)["segs"]
            for who in list(self.commands)[:-1]:
                ours = np.load(self.folder / who / case.name)["segs"]
                differ, dice = measures.agreement(ours, theirs, steps(case)[0])
                print(f"| {who} | {case.name} | {100 * differ:.5f} | {dice.mean():.5f} | {dice.min():.5f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("cases", nargs="*", type=pathlib.Path, help=".npz cases")
    parser.add_argument("--labels", type=pathlib.Path, help=".npz file with gts (D, H, W) to paint volumes over")
    parser.add_argument("--volumes", type=int, default=10, help="to paint (%(default)s)")
    parser.add_argument("--slices", type=int, help="of each, the middle ones (all; half an hour for 77 with "
                        "eleven organs on two cores)")
    parser.add_argument("--calibrate", type=pathlib.Path, help="folder of cases to calibrate on: 8 bits, too")
    parser.add_argument("--scheme", default="recommended", help="of 8 bits (%(default)s)")
    parser.add_argument("--checkpoint", type=pathlib.Path, help=".pth file (LiteMedSAM's own weights)")
    parser.add_argument("--program", default=measures.PROGRAM)
    parser.add_argument("--threads", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=1, help="turns of each, for medians (%(default)s)")
    options = parser.parse_args()
    if bool(options.cases) == bool(options.labels):
        parser.error("expected cases, or --labels to paint some over")
    with tempfile.TemporaryDirectory() as folder:
        Job(options, pathlib.Path(folder)).run()


if __name__ == "__main__":
    main()
