"""Writes and reads microtome's model files: safetensors with the configuration as metadata.

A weight with many zeros is stored without them: in place of `NAME.weight` there are

    NAME.weight_values  the others, in their order in the weight, row by row
    NAME.weight_mask    U8, a bit for each weight: bit i % 8, from the least, of byte i // 8 says
                        whether weight i is among them; bits past the end are 0
"""

import itertools
import json
import math
import os
import struct
import tempfile

import numpy as np

import architecture

FORMAT_VERSION = "2"
ALIGNMENT = 64
_DTYPES = {"f4": "F32", "f2": "F16", "i1": "I8", "u1": "U8"}
_STORED = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I8": "i1", "U8": "u1"}


class ModelFileError(Exception):
    """The file is no model file that can be read. The message says why."""


def compressed(tensors):
    """{name: array} with the weights of layers stored without their zeros where that takes fewer bytes."""
    held = {}
    for name, value in tensors.items():
        if name.endswith(".weight") and architecture.is_layer(name.removesuffix(".weight"), value.ndim):
            flat = value.ravel()
            mask = np.packbits(flat != 0, bitorder="little")
            values = flat[flat != 0]
            if values.nbytes + mask.nbytes < value.nbytes:
                held |= {f"{name}_values": values, f"{name}_mask": mask}
                continue
        held[name] = value
    return held


def write(path, tensors, config, scheme=None, pruning=None):
    """Writes {name: array} all or nothing: into a file beside `path`, which is then renamed.

    The format is safetensors (https://github.com/huggingface/safetensors): the length of the
    header, the header as JSON, the tensors without gaps. The header is padded so that the data starts
    on a multiple of 64 bytes. `scheme` says which layers are in 8 bits (see quantized.scheme),
    `pruning` how weights became zero.
    """
    metadata = {
        "format": "microtome",
        "format_version": FORMAT_VERSION,
        "model": architecture.model_name(config),
        "precision": "mixed" if scheme else "fp32",
        "config": json.dumps(config),
    }
    if scheme:
        metadata["scheme"] = scheme
    if pruning:
        metadata["pruning"] = pruning
    header = {"__metadata__": metadata}
    tensors = compressed(tensors)
    position = 0
    for name in sorted(tensors):
        array = tensors[name]
        header[name] = {
            "dtype": _DTYPES[array.dtype.str[1:]],
            "shape": list(array.shape),
            "data_offsets": [position, position + array.nbytes],
        }
        position += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    folder = os.path.dirname(os.path.abspath(path))
    handle, temporary = tempfile.mkstemp(dir=folder, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for name in sorted(tensors):
                array = tensors[name]
                file.write(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _header(data):
    size = struct.unpack("<Q", data[:8])[0] if len(data) >= 8 else len(data)
    if size > len(data) - 8:
        raise ModelFileError("not a safetensors file, or cut off: its header is longer than the file")
    try:
        header = json.loads(data[8 : 8 + size])
        return header, {**header.pop("__metadata__")}, 8 + size
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ModelFileError("not a safetensors file: no header with metadata") from None


def fingerprint(tensors):
    """The number by which the program tells a file of these tensors from others: see `fingerprint` in
    include/microtome/model_file/safetensors.hpp."""
    digest = 0xCBF29CE484222325
    for name, value in sorted(compressed(tensors).items()):
        stored = value.astype(value.dtype.newbyteorder("<"), copy=False).tobytes()
        words = np.frombuffer(stored + bytes(-len(stored) % 8), "<u8").tolist()
        shape = "(" + ", ".join(map(str, value.shape)) + ")"
        for word in itertools.chain((name + shape).encode(), words):
            digest = (digest ^ word) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return f"{digest:016x}"


def _tensor(name, entry, data):
    """The array of a header's entry; bfloat16 becomes float32."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        stored = np.dtype(_STORED[dtype])
        whole = len(shape) <= 4 and all(type(n) is int and n >= 0 for n in (*shape, begin, end))
    except (KeyError, TypeError, ValueError):
        raise ModelFileError(f"tensor {name!r} has a malformed dtype, shape or place") from None
    if not whole or end > len(data) or end - begin != math.prod(shape) * stored.itemsize:
        raise ModelFileError(
            f"tensor {name!r}: {dtype} {shape} is not what the file has at bytes {begin} to {end}"
        )
    values = np.frombuffer(data[begin:end], stored).reshape(shape)
    if dtype == "BF16":
        return (values.astype("u4") << 16).view("f4")
    return values.astype(stored.newbyteorder("="))


def _expanded(name, values, mask, shape):
    """The weight of this shape that is stored without its zeros."""
    size = math.prod(shape)
    if mask.dtype != np.uint8 or mask.shape != (-(-size // 8),):
        raise ModelFileError(
            f"{name}_mask is {mask.dtype} {mask.shape}, expected uint8 {(-(-size // 8),)} for {name} {shape}"
        )
    bits = np.unpackbits(mask, bitorder="little").astype(bool)
    if bits[size:].any():
        raise ModelFileError(f"{name}_mask has bits past the end of {name} {shape}")
    if values.shape != (bits.sum(),):
        raise ModelFileError(f"{name}_values has shape {values.shape}, but {name}_mask has {bits.sum()} bits")
    weight = np.zeros(size, values.dtype)
    weight[bits[:size]] = values
    return weight.reshape(shape)


def expanded(tensors, shapes):
    """The inverse of `compressed`, given the shapes that weights have."""
    dense, sparse = {}, set()
    for name, value in tensors.items():
        weight = name.removesuffix("_values").removesuffix("_mask")
        if weight == name:
            dense[name] = value
        else:
            sparse.add(weight)
    for name in sorted(sparse):
        values, mask = (tensors.get(f"{name}_{part}") for part in ("values", "mask"))
        if values is None or mask is None or name in dense or name not in shapes:
            raise ModelFileError(
                f"{name} is not stored as a tensor of the model is: whole, or as {name}_values and {name}_mask"
            )
        dense[name] = _expanded(name, values, mask, shapes[name])
    return dense


def read_safetensors(path):
    """The tensors {name: array} of a file and its metadata."""
    with open(path, "rb") as file:
        data = file.read()
    header, metadata, start = _header(data)
    return {name: _tensor(name, entry, memoryview(data)[start:]) for name, entry in header.items()}, metadata


def read(path):
    """The tensors {name: array} of a model file, weights with all their zeros, its configuration and its
    metadata."""
    tensors, metadata = read_safetensors(path)
    version = metadata.get("format_version")
    if metadata.get("format") != "microtome" or version not in ("1", FORMAT_VERSION):
        raise ModelFileError(f"not a model file of microtome, version 1 or {FORMAT_VERSION}")
    try:
        config = json.loads(metadata["config"])
        if version == "1":
            config = architecture.upgraded(config)
        shapes = architecture.expected_shapes(config, architecture.folded_convolutions(tensors))
        if not all(type(n) is int and n > 0 for shape in shapes.values() for n in shape):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, ArithmeticError, RecursionError):
        raise ModelFileError("metadata 'config' is missing or malformed") from None
    return expanded(tensors, shapes), config, metadata
