"""Writes microtome's model files: safetensors with the configuration as metadata."""

import json
import os
import struct
import tempfile

FORMAT_VERSION = "1"
ALIGNMENT = 64
_DTYPES = {"f4": "F32", "f2": "F16", "i1": "I8"}


def write(path, tensors, config, scheme=None):
    """Writes {name: array} all or nothing: into a file beside `path`, which is then renamed.

    The format is safetensors (https://github.com/huggingface/safetensors): the length of the
    header, the header as JSON, the tensors without gaps. The header is padded so that the data starts
    on a multiple of 64 bytes. `scheme` says which layers are in 8 bits (see quantized.scheme).
    """
    header = {
        "__metadata__": {
            "format": "microtome",
            "format_version": FORMAT_VERSION,
            "model": "lite_medsam",
            "precision": "mixed" if scheme else "fp32",
            "config": json.dumps(config),
        }
    }
    if scheme:
        header["__metadata__"]["scheme"] = scheme
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
