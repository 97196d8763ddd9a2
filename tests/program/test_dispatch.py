"""The library microtome::dispatch: what its object files define, and what the program makes of
MICROTOME_TARGET."""

import os
import pathlib
import re
import shutil
import subprocess

import numpy as np
import pytest

from conftest import ROOT, make_case

BUILD = pathlib.Path(os.environ.get("MICROTOME_BUILD", ROOT / "build" / "release"))
OBJECTS = {
    path.parts[-3].removeprefix("microtome_target_").removesuffix(".dir"): path
    for path in BUILD.glob("kernels/CMakeFiles/microtome_target_*.dir/targets/compiled.cpp.o*")
}

needs_library = pytest.mark.skipif(not OBJECTS, reason="built without MICROTOME_BUILD_DISPATCH")


def defined_symbols(path):
    """The symbols, as they are mangled, that another object file could be linked to."""
    nm = subprocess.run(["nm", "-P", path], capture_output=True, text=True, check=True).stdout
    for line in nm.splitlines():
        name, kind = line.split()[:2]
        if kind != "U" and (kind.isupper() or kind == "u"):  # v, w: weak and undefined
            yield name


def outside(symbols, target):
    """Those that are not in microtome::kernels::<target>. A name that is mangled so may stand for a
    guard variable (GV), a table of types (T.) or something local to a function (Z) in there."""
    inside = re.compile(rf"_?_Z(GV|GR|T[VIST])?Z*N[KVRO]*9microtome7kernels{len(target)}{target}")
    return [name for name in symbols if not inside.match(name)]


@needs_library
@pytest.mark.parametrize("target", OBJECTS)
def test_nothing_compiled_for_a_target_can_be_taken_for_another(target):
    symbols = list(defined_symbols(OBJECTS[target]))
    assert any("gemm" in name for name in symbols)
    found = outside(symbols, target)
    names = subprocess.run(["c++filt"], input="\n".join(found), capture_output=True, text=True).stdout
    assert not found, f"the linker may take these, compiled for {target}, for another target:\n{names}"


@needs_library
def test_a_function_outside_the_namespace_is_noticed(tmp_path):
    compiler = shutil.which("g++") or shutil.which("clang++")
    source = tmp_path / "bad.cpp"
    source.write_text(
        "namespace std { template <class T> [[gnu::noinline]] T smallest(T a, T b) { return a < b ? a : b; } }\n"
        "namespace microtome::kernels::avx2 {\n"
        "inline int table = 0; int kernel(int x) { static int calls = x; return std::smallest(x, calls + table); } }\n"
        "namespace microtome::kernels { int shared(int x) { return avx2::kernel(x); } }\n"
        "namespace microtome::kernels::avx20 { int other = 1; }\n"
    )
    subprocess.run([compiler, "-c", source, "-o", tmp_path / "bad.o"], check=True)
    found = outside(defined_symbols(tmp_path / "bad.o"), "avx2")
    assert sorted(found) == sorted(
        ["_ZSt8smallestIiET_S0_S0_", "_ZN9microtome7kernels6sharedEi", "_ZN9microtome7kernels5avx205otherE"]
    )


def targets(run, **environment):
    """The targets that `microtome info` lists, each with what it says of it."""
    lines = run("info", env={**os.environ, "MICROTOME_TARGET": "", **environment}).stdout.splitlines()
    return dict(line.split(maxsplit=1) for line in lines if line.startswith("  "))


def test_every_target_that_the_cpu_has_segments(run, tiny_model, tmp_path):
    (tmp_path / "in").mkdir()
    make_case(tmp_path / "in" / "a.npz")
    masks = {}
    for target, state in targets(run).items():
        out = tmp_path / target
        done = run("segment", "-m", tiny_model, "-i", tmp_path / "in", "-o", out,
                   env={**os.environ, "MICROTOME_TARGET": target})
        if "lacks" in state:
            assert done.returncode == 2 and target in done.stderr and "this CPU runs" in done.stderr
            assert not out.exists()
            continue
        assert done.returncode == 0, done.stderr
        assert targets(run, MICROTOME_TARGET=target)[target] == "chosen"
        masks[target] = np.load(out / "a.npz")["segs"]
    first = next(iter(masks.values()))
    assert first.any()
    # fp32 differs in its last bits where there are no fused multiply-adds, and a pixel may flip.
    for other in masks.values():
        assert (other != first).mean() < 1e-3


def test_a_target_that_is_not_there_is_an_error(run, tiny_model):
    for arguments in (["info"], ["bench", "-m", tiny_model]):
        done = run(*arguments, env={**os.environ, "MICROTOME_TARGET": "mmx"})
        assert done.returncode == 2
        assert "'mmx'" in done.stderr and "compiled in: " in done.stderr and "runs: " in done.stderr
