#!/usr/bin/env python3
"""PyTorch checkpoints: an input is what is pickled in one, put into an archive with two storages, or after a zero
byte the archive itself. Needs atheris, which fuzz/run installs.

    python fuzz/checkpoint.py [libFuzzer's options] CORPUS...
"""

import io
import os
import pathlib
import sys
import zipfile

import atheris

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "converters"))
with atheris.instrument_imports(include=["checkpoint"]):
    import checkpoint


# On a file system in memory.
PATH = pathlib.Path("/dev/shm") / f"microtome-fuzz-{os.getpid()}"


def archive_of(pickled):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x/data.pkl", pickled)
        for key in "01":
            archive.writestr(f"x/data/{key}", bytes(64))
    file.seek(0)
    return file


def read(data):
    try:
        if data[:1] == b"\0":
            PATH.write_bytes(data[1:])
            checkpoint.load(PATH)
        else:
            checkpoint.load(archive_of(data))
    except checkpoint.CheckpointError:
        pass


if __name__ == "__main__":
    atheris.Setup(sys.argv, read)
    atheris.Fuzz()
