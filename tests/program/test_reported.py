"""What people's files, folders and machines did to other programs of this kind, and at first to this one."""

import os
import shutil
import struct
import zipfile
import zlib

import cv2
import numpy as np
import pytest

from conftest import SHARED, make_case


def segment(run, model, *inputs, out, **more):
    return run("segment", "-m", model, "-i", *inputs, "-o", out, **more)


def segs_of(folder, name):
    return np.load(folder / name)["segs"]


def png_of(image, *, depth=8):
    """A PNG file's bytes."""
    return cv2.imencode(".png", image.astype(np.uint8 if depth == 8 else np.uint16))[1].tobytes()


def chunk(kind, data, checksum=None):
    right = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", right if checksum is None else checksum)


def test_a_box_of_one_column_is_an_object(run, tiny_model, tmp_path):
    make_case(tmp_path / "a.npz", boxes=[(30, 5, 30, 60), (-1, 5, 40, 50), (5, 5, 62, 71)])
    done = segment(run, tiny_model, tmp_path / "a.npz", out=tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "3 boxes" in done.stdout and segs_of(tmp_path / "out", "a.npz").any()


@pytest.mark.parametrize("shape, good, bad", [
    ((70, 61, 3), [(5, 6, 40, 50), (20, 10, 60, 69)], [(9, 9, 3, 20), (80, 0, 90, 9)]),
    ((5, 70, 61), [(5, 6, 0, 40, 50, 4), (20, 10, 1, 60, 69, 2)], [(9, 9, 0, 3, 20, 4), (5, 6, 4, 40, 50, 90)]),
])
def test_a_bad_box_fails_alone(run, tiny_model, tmp_path, shape, good, bad):
    make_case(tmp_path / "good.npz", 1, shape, good)
    make_case(tmp_path / "mixed.npz", 1, shape, [bad[0], good[0], bad[1], good[1]])
    make_case(tmp_path / "none.npz", 1, shape, bad)
    done = segment(run, tiny_model, tmp_path, out=tmp_path / "out")
    assert done.returncode == 1
    for number in (0, 2):
        assert f"mixed.npz: FAILED: box {number} " in done.stderr
    assert "none.npz FAILED: none of its boxes" in done.stderr
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["good.npz", "mixed.npz"]
    alone, mixed = (segs_of(tmp_path / "out", f"{name}.npz") for name in ("good", "mixed"))
    if len(shape) == 3 and shape[-1] == 3:  # in volumes the number decides, too, what the next slice is asked
        np.testing.assert_array_equal(np.array([0, 2, 4])[alone], mixed)
    assert set(np.unique(mixed)) <= {0, 2, 4} and mixed.any()


def test_png_of_16_bits(run, tiny_model, tmp_path):
    rng = np.random.default_rng(3)
    scan = cv2.GaussianBlur(rng.integers(1000, 3500, (64, 80)).astype(np.float32), (0, 0), 4)
    scan = ((scan - scan.min()) / np.ptp(scan) * 170 + 40).astype(np.uint16)  # of the upper byte nothing is left
    narrow = ((scan - scan.min()) * 255.0 / np.ptp(scan)).round()
    (tmp_path / "wide.png").write_bytes(png_of(scan, depth=16))
    (tmp_path / "narrow.png").write_bytes(png_of(narrow))
    done = segment(run, tiny_model, tmp_path / "wide.png", tmp_path / "narrow.png", "--box", "10,10,60,50",
                   out=tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert f"16-bit values from {scan.min()} to {scan.max()} were spread over 8 bits" in done.stdout
    assert done.stdout.count("16-bit") == 1
    wide, narrow = ((tmp_path / "out" / n).read_bytes() for n in ("wide.png", "narrow.png"))
    assert wide == narrow


def test_checksums_of_chunks_that_do_not_matter(run, tiny_model, tmp_path):
    image = np.random.default_rng(4).integers(0, 256, (30, 40, 3), np.uint8)
    whole = png_of(image)
    header, rest = whole[:33], whole[33:]
    (tmp_path / "right.png").write_bytes(whole)
    (tmp_path / "text.png").write_bytes(header + chunk(b"tEXt", b"Comment\0x", checksum=7) + rest)
    (tmp_path / "pixels.png").write_bytes(whole[:-20] + bytes([whole[-20] ^ 1]) + whole[-19:])
    done = segment(run, tiny_model, tmp_path, "--box", "5,5,30,25", out=tmp_path / "out")
    assert done.returncode == 1 and "pixels.png FAILED" in done.stderr and "text.png" not in done.stderr
    assert (tmp_path / "out/text.png").read_bytes() == (tmp_path / "out/right.png").read_bytes()


def test_labels_of_truth_values_and_whole_spacing(run, tmp_path):
    labels = np.zeros((4, 20, 30), bool)
    labels[1:3, 5:15, 8:20] = True
    for name, kind in (("bool", bool), ("byte", np.uint8)):
        for folder, array in (("g", "gts"), ("s", "segs")):
            (tmp_path / folder).mkdir(exist_ok=True)
            more = {"spacing": np.array([1, 1, 5]) if name == "bool" else np.array([1.0, 1.0, 5.0])}
            values = np.roll(labels, 1 if folder == "s" else 0, 2).astype(kind)
            np.savez(tmp_path / folder / f"{name}.npz", **{array: values}, **more)
    done = run("eval", "-s", tmp_path / "s", "-g", tmp_path / "g", "-o", tmp_path / "m.csv")
    assert done.returncode == 0, done.stderr
    rows = [line.split(",", 1)[1] for line in (tmp_path / "m.csv").read_text().splitlines()[1:]]
    assert len(rows) == 2 and rows[0] == rows[1]
    assert "pixels" not in done.stderr


def test_a_distance_without_spacing_is_in_pixels(run, tmp_path):
    labels = np.zeros((20, 30), np.uint8)
    labels[5:15, 8:20] = 1
    np.savez(tmp_path / "g.npz", gts=labels)
    np.savez(tmp_path / "s.npz", segs=np.roll(labels, 3, 1))
    near = run("eval", "-s", tmp_path / "s.npz", "-g", tmp_path / "g.npz")
    assert "g.npz: no spacing" in near.stderr and "2 pixels" in near.stderr
    far = run("eval", "-s", tmp_path / "s.npz", "-g", tmp_path / "g.npz", "--tolerance", 3)
    assert "3 pixels" in far.stderr and "1.0000" in far.stdout and "1.0000" not in near.stdout


def test_what_lies_in_folders(run, tiny_model, tmp_path):
    cases = tmp_path / "in"
    (cases / "original").mkdir(parents=True)
    make_case(cases / "a.npz", 1)
    make_case(tmp_path / "b.npz", 2)
    shutil.move(tmp_path / "b.npz", cases / "B.NPZ")
    (cases / "._a.npz").write_bytes(b"\0\5\26\7" + bytes(60))
    (cases / ".DS_Store").write_bytes(b"\0")
    (cases / "notes.txt").write_text("of the scanner")
    (cases / "c.PNG").write_bytes(png_of(np.zeros((20, 30, 3))))
    done = segment(run, tiny_model, cases, out=tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["B.NPZ", "a.npz"]
    for name in ("._a.npz", ".DS_Store", "notes.txt", "c.PNG", "original/"):
        assert name in done.stderr
    done = segment(run, tiny_model, cases, "--box", "3,3,20,15", out=tmp_path / "out")
    assert done.returncode == 0 and (tmp_path / "out" / "c.PNG").exists()


@pytest.mark.parametrize("start, words", [
    (b"PK\3\4", "converters/convert.py"), (b"\x80\x02}q", "converters/convert.py"), (b"\x08\x07\x12\x07", "ONNX"),
    (b"\x93NUMPY\1\0", "NumPy"), (b"\x89PNG\r\n\x1a\n", "PNG"), (b"\x89HDF\r\n\x1a\n", "HDF5"),
    (b"\x1f\x8b\x08\0", "gzip"), (b'{\n "format"', "JSON"), (b"GGUF\3\0\0\0", "GGUF"),
])
def test_other_files_given_as_the_model(run, tmp_path, start, words):
    path = tmp_path / "model.safetensors"
    path.write_bytes(start + b"\x7f" * 100)
    done = run("info", "-m", path)
    assert done.returncode != 0 and "model.safetensors" in done.stderr and words in done.stderr
    assert "bytes follow" not in done.stderr


def test_a_checkpoint_given_as_the_model(run, golden_folder):
    done = run("info", "-m", golden_folder / "lite_medsam_s20.pth")
    assert done.returncode != 0 and "converters/convert.py" in done.stderr


def test_archives_that_numpy_does_not_write(run, tiny_model, tmp_path):
    make_case(tmp_path / "a.npz", shape=(300, 400, 3))
    image = np.zeros((2000, 2500, 3), np.uint8)  # constant: deflate shrinks it as far as it ever does
    np.savez_compressed(tmp_path / "black.npz", imgs=image, boxes=np.array([[5, 5, 900, 800]]))
    for name, method in (("bzip2", zipfile.ZIP_BZIP2), ("lzma", zipfile.ZIP_LZMA)):
        with zipfile.ZipFile(tmp_path / "a.npz") as old, zipfile.ZipFile(tmp_path / f"{name}.npz", "w", method) as new:
            for entry in old.namelist():
                new.writestr(entry, old.read(entry))
    done = segment(run, tiny_model, tmp_path, out=tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.npz", "black.npz"]
    assert done.returncode == 1 and done.stderr.count("is compressed by method") == 2


def test_pictures_that_would_replace_each_other(run, tiny_model, tmp_path):
    make_case(tmp_path / "x.npz", 1, (4, 40, 50), [(4, 5, 0, 30, 30, 3)])
    (tmp_path / "x_z001.png").write_bytes(png_of(np.zeros((20, 30, 3))))
    done = segment(run, tiny_model, tmp_path, "--box", "3,3,20,15", "--overlay", tmp_path / "p", out=tmp_path / "out")
    assert done.returncode == 2 and "x_z001.png" in done.stderr and "x.npz" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("variables", [
    {"OMP_NUM_THREADS": "1000000"}, {"OMP_NUM_THREADS": "0"}, {"OMP_NUM_THREADS": "-3"}, {"OMP_NUM_THREADS": "many"},
    {"OMP_NUM_THREADS": " 3 "}, {"OMP_NUM_THREADS": "2,2"}, {"OMP_NUM_THREADS": ""},
    {"OMP_NUM_THREADS": "99999999999999999999"}, {"OMP_SCHEDULE": "x"}, {"OMP_DYNAMIC": "perhaps"},
    {"OMP_THREAD_LIMIT": "1"}, {"OMP_THREAD_LIMIT": "0"}, {"OMP_WAIT_POLICY": "never"},
    {"OMP_STACKSIZE": "1"}, {"OMP_STACKSIZE": "1B"}, {"OMP_STACKSIZE": "9999999G"}, {"OMP_STACKSIZE": "4M"},
    {"OMP_PROC_BIND": "true", "OMP_PLACES": "{0:999}"}, {"OMP_MAX_ACTIVE_LEVELS": "0"},
])
def test_absurd_variables_of_openmp(run, tiny_model, tmp_path, variables):
    make_case(tmp_path / "a.npz")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("OMP_")}
    results = []
    for number, more in enumerate(({}, variables)):
        done = segment(run, tiny_model, tmp_path / "a.npz", out=tmp_path / str(number), env=environment | more)
        assert done.returncode == 0, done.stderr
        results.append(segs_of(tmp_path / str(number), "a.npz"))
    np.testing.assert_array_equal(*results)


def test_paths_that_are_not_utf_8(program, tiny_model, tmp_path):
    import json
    import subprocess

    path = os.fsencode(tmp_path) + b"/m\xff\xe9.safetensors"
    shutil.copy(tiny_model, path)
    done = subprocess.run([program, "bench", "-m", path, "--runs", "1", "--json"], capture_output=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model"].endswith(".safetensors")


def test_the_reported_files(run, tiny_model, tmp_path):
    reports = SHARED / "data" / "reports"
    if not reports.exists():
        pytest.skip(f"no {reports}")
    done = segment(run, tiny_model, reports / "zero_width.npz", out=tmp_path)
    assert done.returncode == 0 and "2 boxes" in done.stdout, done.stderr
    for truth, segs in (("g_bool.npz", "s.npz"), ("v_int.npz", "vs.npz")):
        done = run("eval", "-s", reports / segs, "-g", reports / truth)
        assert done.returncode == 0, done.stderr
    done = segment(run, tiny_model, reports / "gray16_12bit.png", "--box", "20,20,90,90", out=tmp_path)
    assert done.returncode == 0 and "were spread over 8 bits" in done.stdout
