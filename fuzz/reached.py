#!/usr/bin/env python3
"""Of an lcov file: how many lines of the functions that read files are reached, and which are not."""

import collections
import pathlib
import re
import sys

READERS = ["model_file/safetensors", "model_file/config", "model_file/weights", "quantization/calibration",
           "quantization/scheme", "io/npy", "io/npz", "io/png", "io/case", "io/coco"]
# What these headers hold besides.
OTHERS = re.compile(r"write|writer|encode|compose|histogram|calibrator|layer_watcher|npy_header_bytes|make_overlay|"
                    r"layer_sparsity|whole_file|channel9?end_case|least_|divergence|squared_error|observer")


def main():
    lines, functions = collections.defaultdict(dict), collections.defaultdict(dict)
    for line in open(sys.argv[1]):
        kind, _, rest = line.strip().partition(":")
        if kind == "SF":
            name = rest.partition("include/microtome/")[2].removesuffix(".hpp")
        elif kind == "FN":
            start, function = rest.split(",", 1)
            functions[name].setdefault(int(start), function)
        elif kind == "DA":
            number, count = map(int, rest.split(",")[:2])
            lines[name][number] = max(lines[name].get(number, 0), count)
    total = reached = 0
    missing = []
    for name in READERS:
        starts = sorted(functions[name])
        counted = hit = 0
        for number, count in sorted(lines[name].items()):
            start = max((s for s in starts if s <= number), default=None)
            if start is None or OTHERS.search(functions[name][start]):
                continue
            counted += 1
            hit += count > 0
            if not count:
                missing.append(f"{name}.hpp:{number}")
        total, reached = total + counted, reached + hit
        print(f"{name + '.hpp':28} {hit:5} of {counted:5} lines {100 * hit / max(counted, 1):6.1f} %")
    print(f"{'all':28} {reached:5} of {total:5} lines {100 * reached / total:6.1f} %")
    for entry in missing:
        path, _, number = entry.rpartition(":")
        text = pathlib.Path("include/microtome", path).read_text().splitlines()[int(number) - 1]
        print(f"  {entry:28} {text.strip()}")


if __name__ == "__main__":
    main()
