#!/usr/bin/env python3
"""Cycles of the kernels' inner loops on CPUs that are not at hand, by LLVM's models of them.

Compiles bench/cycles.cpp with clang for each CPU, takes the innermost loop with the most vector
instructions out of each function's assembly, and asks llvm-mca how many cycles an iteration takes when
everything is in L1. Prints a table in Markdown.

    bench/cycles.py [--llvm 19] [--show CPU:FUNCTION]
"""

import argparse
import pathlib
import re
import subprocess
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]

# Name, processor, flags of the compiler, CPU of llvm-mca.
CPUS = [
    ("Zen 3", "x86_64", ["-march=znver3"], "znver3"),
    ("Ice Lake", "x86_64", ["-march=icelake-server", "-mprefer-vector-width=512"], "icelake-server"),
    ("Sapphire Rapids", "x86_64", ["-march=sapphirerapids", "-mprefer-vector-width=512"],
     "sapphirerapids"),
    ("M1", "aarch64", ["-mcpu=apple-m1"], "apple-m1"),
    ("Neoverse N1", "aarch64", ["-mcpu=neoverse-n1"], "neoverse-n1"),
    ("Neoverse V1", "aarch64", ["-mcpu=neoverse-v1+nosve"], "neoverse-v1"),
]

# What multiplies and adds.
PRODUCTS = r"\b(vfmadd\w+ps|fmla|vdpbf16ps|vpdpbusd|vpmaddwd|sdot|usdot|bfmlal[bt])\b"
# Multiply-adds of four pixels, or of one vector, however often the compiler unrolls. (Those of products
# depend on the target: see cycles_products.)
ONCE = {"depthwise": 40, "gelu": 10, "exp": 7}
FUNCTIONS = ["gemm", "gemm_bf16", "gemm_int8", "sparse", "sparse_wide", "depthwise", "gelu", "exp"]


def compile_to_assembly(arguments, triple, flags, out):
    command = [f"clang++-{arguments.llvm}", f"--target={triple}-linux-gnu", *flags, "-std=c++20", "-O3",
               "-ffp-contract=off", f"-I{ROOT}", f"-I{ROOT}/include", "-S", "-o", out,
               ROOT / "bench" / "cycles.cpp"]
    subprocess.run(command, check=True)
    return out.read_text()


def body(assembly, function):
    """The lines of a function."""
    match = re.search(rf"^cycles_{function}:.*?^\.Lfunc_end", assembly, re.S | re.M)
    return match.group(0).splitlines()


def loops(lines):
    """Each loop that holds no other, as its lines."""
    at = {m.group(1): i for i, line in enumerate(lines) if (m := re.match(r"(\.L\w+):", line))}
    spans = []
    for i, line in enumerate(lines):
        m = re.match(r"\s+(?:j\w+|b\.?\w*|cbn?z\s+\w+,|tbn?z\s+\w+, #\d+,)\s+(\.L\w+)", line)
        if m and at.get(m.group(1), i) < i:
            spans.append((at[m.group(1)], i))
    inner = [s for s in spans if not any(s != t and s[0] <= t[0] and t[1] <= s[1] for t in spans)]
    return [lines[first : last + 1] for first, last in inner]


def hot_loop(lines):
    found = loops(lines)
    return max(found, key=lambda loop: len(re.findall(PRODUCTS, "\n".join(loop)))) if found else []


def measure(arguments, triple, cpu, loop):
    """Cycles of an iteration."""
    text = "\n".join(line for line in loop if not re.match(r"\s*\.(?!L)", line))
    command = [f"llvm-mca-{arguments.llvm}", f"-mtriple={triple}-linux-gnu", f"-mcpu={cpu}",
               "-iterations=200"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=True)
    total = int(re.search(r"Total Cycles:\s+(\d+)", done.stdout).group(1))
    return total / 200


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llvm", default="19", help="version of clang and llvm-mca")
    parser.add_argument("--show", help="CPU:FUNCTION whose loop to print")
    arguments = parser.parse_args()
    print("| loop | " + " | ".join(name for name, *_ in CPUS) + " |")
    print("| --- |" + " --- |" * len(CPUS))
    cells = {function: [] for function in FUNCTIONS}
    for name, triple, flags, cpu in CPUS:
        with tempfile.TemporaryDirectory() as folder:
            assembly = compile_to_assembly(arguments, triple, flags, pathlib.Path(folder) / "loop.s")
        products = {function: int(count) for function, count in
                    re.findall(r"cycles_(\w*)products:\s+\.(?:quad|xword)\s+(\d+)", assembly)}  # fmt: skip
        for function in FUNCTIONS:
            loop = hot_loop(body(assembly, function))
            if arguments.show == f"{name}:{function}":
                print("\n".join(loop))
            count = len(re.findall(PRODUCTS, "\n".join(loop)))
            cycles = measure(arguments, triple, cpu, loop)
            once = ONCE.get(function) or products.get(f"{function}_") or products[""]
            cells[function].append(f"{once} in {cycles * once / count:.1f}")
    for function, row in cells.items():
        print(f"| {function} | " + " | ".join(row) + " |")


main()
