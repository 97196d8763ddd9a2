#!/usr/bin/env python3
"""Rewrites the arrays of a .npz file as a safetensors file, for tests where there is no libzip.

    npz_to_safetensors.py IN.npz OUT.safetensors
"""

import ast
import itertools
import json
import math
import operator
import sys
import zipfile

DTYPES = {"<f4": "F32", "<f8": "F64", "|u1": "U8", "<i4": "I32", "<i8": "I64"}


def read_npy(data):
    """dtype, shape and bytes of a .npy file of version 1."""
    assert data[:7] == b"\x93NUMPY\x01", "not a .npy file of version 1"
    start = 10 + int.from_bytes(data[8:10], "little")
    header = ast.literal_eval(data[10:start].decode())
    dtype, shape = header["descr"], header["shape"]
    return dtype, shape, row_major(data[start:], shape, int(dtype[2]), header["fortran_order"])


def row_major(data, shape, size, column_major):
    """The elements of an array, the last axis fastest."""
    if not column_major:
        return data
    strides = [size * math.prod(shape[:axis]) for axis in range(len(shape))]
    places = (sum(map(operator.mul, at, strides)) for at in itertools.product(*map(range, shape)))
    return b"".join(data[place : place + size] for place in places)


def main(source, destination):
    header, payload = {}, b""
    with zipfile.ZipFile(source) as archive:
        for name in archive.namelist():
            dtype, shape, data = read_npy(archive.read(name))
            header[name.removesuffix(".npy")] = {
                "dtype": DTYPES[dtype],
                "shape": shape,
                "data_offsets": [len(payload), len(payload) + len(data)],
            }
            payload += data
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(destination, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text + payload)


main(*sys.argv[1:])
