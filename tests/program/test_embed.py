"""The example in examples/embed, built by CMake from an installation and by the README's bare
compiler line, gives what the program gives."""

import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys

import cv2
import numpy as np
import pytest

from conftest import ROOT

EXAMPLE = ROOT / "examples" / "embed"


def read_pgm(path):
    return cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    folder = tmp_path_factory.mktemp("image")
    pixels = np.random.default_rng(4).integers(0, 256, (77, 93, 3), np.uint8)
    cv2.imwrite(str(folder / "image.ppm"), pixels)
    cv2.imwrite(str(folder / "image.png"), pixels)
    return folder


def check(embed, run, tiny_model, image, tmp_path):
    box = ["7", "9", "60", "70"]
    done = subprocess.run([embed, tiny_model, image / "image.ppm", *box, tmp_path / "m.pgm"])
    assert done.returncode == 0
    run("segment", "-m", tiny_model, "-i", image / "image.png", "-o", tmp_path, "--box", ",".join(box))
    expected = cv2.imread(str(tmp_path / "image.png")).any(-1)
    got = read_pgm(tmp_path / "m.pgm") > 0
    assert expected.any() and (got == expected).all()
    bad = subprocess.run([embed, "nowhere", image / "image.ppm", *box, tmp_path / "n.pgm"],
                         capture_output=True, text=True)
    assert bad.returncode == 1 and "nowhere" in bad.stderr


def test_with_the_bare_compiler_line(run, tiny_model, image, tmp_path):
    line = re.search(r"^ *(g\+\+ -std=c\+\+20 .*main\.cpp.*)$", (ROOT / "README.md").read_text(), re.M)
    assert line, "the README shows no compiler line"
    command = line[1].replace("path/to/microtome", str(ROOT)).replace("main.cpp", str(EXAMPLE / "main.cpp"))
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    check(tmp_path / "main", run, tiny_model, image, tmp_path)


@pytest.mark.parametrize("dispatch", ["OFF", "ON"])
def test_with_cmake_from_an_installation(dispatch, run, tiny_model, image, tmp_path):
    build = os.environ.get("MICROTOME_BUILD", ROOT / "build" / "release")
    prefix = tmp_path / "prefix"
    quiet = dict(check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["cmake", "--install", build, "--prefix", prefix], **quiet)
    assert (prefix / "bin" / "microtome").exists()
    subprocess.run(["cmake", "-G", "Ninja", "-S", EXAMPLE, "-B", tmp_path / "b",
                    f"-DCMAKE_PREFIX_PATH={prefix}", f"-DEMBED_DISPATCH={dispatch}"], **quiet)
    subprocess.run(["cmake", "--build", tmp_path / "b"], **quiet)
    embed = tmp_path / "b" / "embed"
    if dispatch == "ON":  # nothing compiled for one CPU may be left in the user's own object file
        symbols = subprocess.run(["nm", "-C", next((tmp_path / "b").rglob("main.cpp.o"))],
                                 capture_output=True, text=True, check=True).stdout
        assert "kernels::active()" in symbols
        assert not re.search(r"kernels::(avx|sse|neon|scalar|wasm)|xsimd|hwy", symbols)
    check(embed, run, tiny_model, image, tmp_path)


X86 = platform.machine() in ("x86_64", "AMD64")


@pytest.mark.parametrize("target, flags", [
    ("avx2", "-march=x86-64-v3"),
    ("avx512_vnni_bf16", "-march=x86-64-v4 -mavx512vnni -mavx512bf16"),
] if X86 else [(None, "-march=native")])
def test_from_one_header(run, tiny_model, image, tmp_path, target, flags):
    """Without a warning, for CPUs that this one may not be, whatever of the compiler's headers came before."""
    header = tmp_path / "microtome.hpp"
    subprocess.run([sys.executable, ROOT / "scripts" / "amalgamate", "-o", header], check=True)
    assert "#include <microtome/" not in header.read_text()
    source = (EXAMPLE / "main.cpp").read_text().replace("<microtome/microtome.hpp>", '"microtome.hpp"')
    before = "#include <immintrin.h>\n#include <xsimd/xsimd.hpp>\n" if X86 else ""
    (tmp_path / "main.cpp").write_text(before + source)
    subprocess.run(["g++", "-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", *flags.split(), "-fopenmp",
                    "main.cpp", "-o", "main"], check=True, cwd=tmp_path)
    # Whatever it is compiled for: every target's file is in there.
    for file in (ROOT / "kernels" / "targets").glob("*.hpp"):
        assert f"#define MICROTOME_TARGET_NAMESPACE {file.stem}\n" in header.read_text()
    if target and re.search(rf"^  {target} +this CPU lacks", run("info").stdout, re.M):
        pytest.skip(f"compiled; not run, since this CPU lacks {target}")
    check(tmp_path / "main", run, tiny_model, image, tmp_path)


# What headers that are often included before others define as macros: Qt, windows.h, X11, macOS, Arduino, C.
HOSTILE = """
#define emit
#define slots
#define signals public
#define foreach(x, y) for (x : y)
#define forever for (;;)
#define min(a, b) (((a) < (b)) ? (a) : (b))
#define max(a, b) (((a) > (b)) ? (a) : (b))
#define small char
#define near
#define far
#define interface struct
#define IN
#define OUT
#define OPTIONAL
#define ERROR 0
#define DELETE 1
#define Success 0
#define Status int
#define None 0L
#define Bool int
#define True 1
#define False 0
#define Always 2
#define Above 0
#define Below 1
#define Complex 0
#define Convex 2
#define Unsorted 0
#define check(x)
#define verify(x)
#define require(x, y)
#define nil 0
#define abs(x) ((x) > 0 ? (x) : -(x))
#define round(x) ((x) >= 0 ? (long)((x) + 0.5) : (long)((x) - 0.5))
#define sq(x) ((x) * (x))
#define bit(b) (1UL << (b))
#define word unsigned
#define F(x) x
#define PI 3.14
#define radians(x) ((x) * 0.01)
#define degrees(x) ((x) * 57)
#define constrain(x, a, b) ((x) < (a) ? (a) : (x))
#define HIGH 1
#define LOW 0
#define I 1
#define index strchr
#define border(a) (a)
#define major(x) (x)
#define minor(x) (x)
"""


@pytest.mark.parametrize("dispatch", [False, True])
def test_after_headers_that_define_words(dispatch, run, tiny_model, image, tmp_path):
    """Every public header means what it says where words are macros, and gives the macros back: `emit`, which
    Qt defines as nothing, once made a call of a comma expression, and every mask empty without a warning."""
    folder = ROOT / "include" / "microtome"
    headers = sorted(f"microtome/{path.relative_to(folder)}" for path in folder.rglob("*.hpp"))
    includes = [line for line in (EXAMPLE / "main.cpp").read_text().splitlines() if line.startswith("#include <")]
    standard = "\n".join(line for line in includes if "microtome" not in line)
    main = (EXAMPLE / "main.cpp").read_text().split("#include <microtome/microtome.hpp>")[1]
    names = re.findall(r"#define (\w+)", HOSTILE)
    kept = "\n".join(f"#ifndef {name}\n#error {name} is gone\n#endif\n#undef {name}" for name in names)
    text = "\n".join([standard, HOSTILE, *(f"#include <{header}>" for header in headers), kept, main])
    (tmp_path / "main.cpp").write_text(text)
    flags = ["-DMICROTOME_DISPATCH"] if dispatch else ["-march=x86-64-v3" if X86 else "-march=native"]
    build = pathlib.Path(os.environ.get("MICROTOME_BUILD", ROOT / "build" / "release"))
    library = [next(build.rglob("libmicrotome_dispatch.a"))] if dispatch else []
    jpeg = subprocess.run(["g++", "-E", "-x", "c++", "-include", "cstdio", "-include", "jpeglib.h", "/dev/null"],
                          capture_output=True).returncode == 0
    flags += ["-DMICROTOME_HAS_JPEG=1"] if jpeg else []
    library += ["-ljpeg"] if jpeg else []
    subprocess.run(["g++", "-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", *flags, "-fopenmp", "-I", ROOT,
                    "-I", ROOT / "include", "main.cpp", *library, "-o", "main", "-lzip", "-lspng"],
                   check=True, cwd=tmp_path)
    check(tmp_path / "main", run, tiny_model, image, tmp_path)


@pytest.mark.parametrize("compiler", ["g++", "clang++"])
@pytest.mark.parametrize("flag", ["-ffast-math", "-Ofast", "-ffinite-math-only"])
def test_relaxed_arithmetic_is_refused(compiler, flag, tmp_path):
    if not shutil.which(compiler):
        pytest.skip(f"no {compiler}")
    (tmp_path / "main.cpp").write_text("#include <microtome/microtome.hpp>\n")
    done = subprocess.run([compiler, "-std=c++20", flag, "-fsyntax-only", "-DMICROTOME_DISPATCH", "-I", ROOT,
                           "-I", ROOT / "include", "main.cpp"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode != 0 and "compile this file without -ffast-math" in done.stderr
