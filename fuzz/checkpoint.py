#!/usr/bin/env python3
"""PyTorch checkpoints: an input is what is pickled in one, put into an archive with two storages, or after a zero
byte the archive itself. Needs atheris, which fuzz/run installs.

    python fuzz/checkpoint.py [libFuzzer's options] CORPUS...
"""

import io
import os
import pathlib
import struct
import sys
import zlib

import atheris

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "converters"))
with atheris.instrument_imports(include=["checkpoint"]):
    import checkpoint


# On a file system in memory.
PATH = pathlib.Path("/dev/shm") / f"microtome-fuzz-{os.getpid()}"


def archive_of(pickled):
    """Put together by hand: zipfile would take as long for it as reading it takes."""
    local = central = b""
    for name, content in ((b"x/data.pkl", pickled), (b"x/data/0", bytes(64)), (b"x/data/1", bytes(64))):
        size = len(content)
        shared = struct.pack("<5H3L2H", 20, 0, 0, 0, 33, zlib.crc32(content), size, size, len(name), 0)
        central += b"PK\1\2" + struct.pack("<H", 20) + shared + struct.pack("<3H2L", 0, 0, 0, 0, len(local)) + name
        local += b"PK\3\4" + shared + name + content
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 3, 3, len(central), len(local), 0)
    return io.BytesIO(local + central + end)


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
