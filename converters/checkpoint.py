"""Reads PyTorch checkpoints (`.pth`, the ZIP format of torch.save) with NumPy alone.

A checkpoint is a pickle, and unpickling can run any code. The unpickler here knows the few globals
that tensors, their containers and numbers need, each replaced by something inert; every other one
is refused, so that nothing from the file is ever executed.
"""

import io
import math
import pickle
import pickletools
import typing
import zipfile

import numpy as np

from shapes import some


class CheckpointError(Exception):
    """The file is no checkpoint that can be read. The message says why."""


# Storage types of torch and the NumPy dtype of their elements; bfloat16 has none and is widened.
STORAGE_DTYPES = {
    "DoubleStorage": "f8",
    "FloatStorage": "f4",
    "HalfStorage": "f2",
    "BFloat16Storage": "bf16",
    "LongStorage": "i8",
    "IntStorage": "i4",
    "ShortStorage": "i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "b1",
}


# What a pickle may make is a tuple: a pickle can set the fields of any other object (opcode BUILD), after they were
# checked, and those of a storage's type for every checkpoint that the program reads later.
class StorageType(typing.NamedTuple):
    dtype: str

    @property
    def itemsize(self):
        return 2 if self.dtype == "bf16" else np.dtype(self.dtype).itemsize


class Storage(typing.NamedTuple):
    """A storage in the archive, not yet read."""

    archive: "Archive"
    key: str
    kind: StorageType
    elements: int


class Tensor(typing.NamedTuple):
    """A strided view of a storage, not yet read."""

    storage: Storage
    offset: int
    shape: tuple
    stride: tuple

    @property
    def dtype(self):
        return self.storage.kind.dtype

    def numpy(self):
        """A contiguous array; bfloat16 becomes float32."""
        flat = self.storage.archive.read_storage(self.storage)
        last = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.stride))
        if math.prod(self.shape) and last >= flat.size:
            raise CheckpointError(
                f"a tensor of shape {self.shape} and strides {self.stride} at {self.offset} reaches "
                f"beyond its storage of {flat.size} elements"
            )
        stride = [s * flat.itemsize for s in self.stride]
        view = np.lib.stride_tricks.as_strided(flat[self.offset :], self.shape, stride)
        return np.ascontiguousarray(view).reshape(self.shape)


class _Rebuild:
    """Stands for torch's functions that make a tensor of a storage."""

    __slots__ = ()

    def __call__(self, storage, offset, shape, stride, *_):
        sizes = (offset, *shape, *stride)
        if not isinstance(storage, Storage) or len(shape) != len(stride) or len(shape) > 8:
            raise CheckpointError("a tensor is malformed")
        if not all(isinstance(n, int) and 0 <= n < 1 << 40 for n in sizes):
            raise CheckpointError(f"a tensor has impossible sizes {shape} or strides {stride}")
        if math.prod(shape) > storage.elements:
            raise CheckpointError(f"a tensor of shape {shape} is larger than its storage")
        return Tensor(storage, offset, tuple(shape), tuple(stride))


class _RebuildParameter:
    __slots__ = ()

    def __call__(self, data, *_):
        return data


class _Inert:
    """Stands for something that does not matter here, such as a NumPy scalar among the metrics."""

    __slots__ = ()

    def __call__(self, *_):
        return self

    def __setstate__(self, _):
        pass


class _Dict(dict):
    """Stands for OrderedDict. What is set on it besides (a state dict's `_metadata`) does not matter, and could
    hide its methods."""

    __slots__ = ()

    def __setstate__(self, _):
        pass


_GLOBALS = {
    ("collections", "OrderedDict"): _Dict,
    ("torch._utils", "_rebuild_tensor_v2"): _Rebuild(),
    ("torch._utils", "_rebuild_parameter"): _RebuildParameter(),
    ("numpy", "dtype"): _Inert(),
    ("numpy.core.multiarray", "scalar"): _Inert(),
    ("numpy._core.multiarray", "scalar"): _Inert(),
    ("_codecs", "encode"): _Inert(),
    **{("torch", name): StorageType(dtype) for name, dtype in STORAGE_DTYPES.items()},
}


def _check_memory(pickled):
    """Python's unpickler makes room for as many objects as the largest number says that one is remembered by."""
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument > len(pickled):
            raise CheckpointError(f"data.pkl is damaged: object {argument} in {len(pickled)} bytes")
        if opcode.name == "STOP":
            break


class _Unpickler(pickle.Unpickler):
    def __init__(self, file, archive):
        super().__init__(file)
        self._archive = archive

    def find_class(self, module, name):
        try:
            return _GLOBALS[module, name]
        except KeyError:
            raise CheckpointError(
                f"the pickle asks for {module}.{name}, which a checkpoint of tensors does not need; "
                "refused. Save a plain state dict: torch.save(model.state_dict(), path)"
            ) from None

    def persistent_load(self, identity):
        match identity:
            case ("storage", StorageType() as kind, str(key), _, int(elements)) if elements >= 0:
                return Storage(self._archive, key, kind, elements)
        raise CheckpointError("a storage is malformed")


class Archive:
    """The ZIP archive of a checkpoint."""

    def __init__(self, path):
        try:
            self._zip = zipfile.ZipFile(path)
        except OSError:
            raise
        except Exception as error:  # zipfile raises many kinds for a damaged directory
            with open(path, "rb") as file:
                if file.read(2) == b"\x80\x02":
                    raise CheckpointError(
                        "this is the format of PyTorch before 1.6: load it there and save it again"
                    ) from None
            raise CheckpointError(
                f"not a checkpoint, or cut off: no ZIP archive ({error})"
            ) from None
        roots = [n.split("/")[0] for n in self._zip.namelist() if n.endswith("/data.pkl")]
        if len(roots) != 1:
            raise CheckpointError("not a checkpoint: no data.pkl in the archive")
        self._root = roots[0]
        self._order = "<"
        if f"{self._root}/byteorder" in self._zip.namelist():
            self._order = ">" if self._read("byteorder") == b"big" else "<"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._zip.close()

    def _read(self, name):
        try:
            entry = self._zip.getinfo(f"{self._root}/{name}")
            if entry.compress_type != zipfile.ZIP_STORED:
                raise CheckpointError(f"{name} is compressed, which torch.save never does")
            return self._zip.read(entry)
        except KeyError:
            raise CheckpointError(f"{name} is missing from the archive") from None
        except CheckpointError:
            raise
        except Exception as error:  # as above
            raise CheckpointError(f"{name} is damaged: {error}") from None

    def read_storage(self, storage):
        """The elements of a storage, flat, in the machine's byte order."""
        data = self._read(f"data/{storage.key}")
        if len(data) != storage.elements * storage.kind.itemsize:
            raise CheckpointError(
                f"storage {storage.key} holds {len(data)} bytes, "
                f"expected {storage.elements} elements of {storage.kind.itemsize}"
            )
        if storage.kind.dtype == "bf16":
            halves = np.frombuffer(data, self._order + "u2").astype("u4")
            return (halves << 16).view("f4")
        values = np.frombuffer(data, np.dtype(storage.kind.dtype).newbyteorder(self._order))
        return values.astype(values.dtype.newbyteorder("="), copy=False)

    def unpickle(self):
        pickled = self._read("data.pkl")
        try:
            _check_memory(pickled)
            return _Unpickler(io.BytesIO(pickled), self).load()
        except CheckpointError:
            raise
        except Exception as error:  # a damaged pickle can raise anything
            raise CheckpointError(f"data.pkl is damaged: {type(error).__name__}: {error}") from None


def _is_state_dict(value):
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(k, str) for k in value)
        and any(isinstance(v, Tensor) for v in value.values())
    )


# Where checkpoints hold the state dict, most usual first, and what the model may be called in it, as a
# member of a module that was saved whole (Lightning's `model.`).
PLACES = ("model", "state_dict", "model_state_dict", "net", "network", "weights", "checkpoint")
OUTER_MODULES = ("model", "net", "network", "sam", "medsam", "medsam_lite_model")
# Modules that wrap another and stand in its names, anywhere: DistributedDataParallel, torch.compile,
# activation checkpoints and FSDP.
WRAPPERS = {"module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
# What a promptable model's own names begin with, by which it is told from a loss or a metric beside it.
PARTS = ("image_encoder.", "prompt_encoder.", "mask_decoder.")


def _place(content, depth=2):
    """The state dict in what a checkpoint holds: under one of the usual keys, which also may hold a
    checkpoint in their turn, else itself, else None. Whatever lies beside does not matter."""
    if not isinstance(content, dict):
        return None
    if depth:
        for key in PLACES:
            found = _place(content.get(key), depth - 1)
            if found:
                return found
    return content if _is_state_dict(content) else None


def _without_wrappers(state):
    """The same tensors by the names that they have in the bare model."""
    bare = {}
    for name, value in state.items():
        short = ".".join(part for part in name.split(".") if part not in WRAPPERS)
        if short in bare:
            raise CheckpointError(f"two tensors are both {short!r} without the prefixes of wrappers: {name!r} "
                                  "is the second")  # fmt: skip
        bare[short] = value
    for outer in OUTER_MODULES:
        if bare and all(name.startswith(outer + ".") for name in bare):
            return _without_wrappers({name[len(outer) + 1 :]: value for name, value in bare.items()})
    return bare


def _outer(name):
    """What stands before a name of the model's own, such as "model." or nothing; None where it is not such a name."""
    own = name
    while not own.startswith(PARTS):
        first, dot, own = own.partition(".")
        if not dot or first not in OUTER_MODULES:
            return None
    return name.removesuffix(own)


def _own(bare):
    """The tensors of the model, where it stands as a member beside tensors of others, and what is said of those."""
    outers = {}
    for name in bare:
        outers.setdefault(_outer(name), name)
    beside = outers.pop(None, None)
    if len(outers) > 1:
        raise CheckpointError(f"tensors of a model are in more than one place: {some(outers.values())}")
    outer = next(iter(outers), "")
    if beside is None or not outer:
        return bare, None
    left = [name for name in bare if not name.startswith(outer)]
    own = {name.removeprefix(outer): value for name, value in bare.items() if name.startswith(outer)}
    return own, left and f"left out, as they are not below {outer!r}: {some(left, 8)}"


def state_dict(content):
    """The tensors of the model in what a checkpoint holds: a state dict itself, or one where training
    scripts put it, with the names that they have in the bare model; and what is left out beside it, in
    words, or None."""
    found = _place(content)
    if not found:
        what = f"a {type(content).__name__}"
        if isinstance(content, dict):
            what += f" with the keys {[key for key in content if isinstance(key, str)][:8]}"
        raise CheckpointError(
            f"no state dict found: expected a dict of tensors, or one under {', '.join(map(repr, PLACES))}; "
            f"found {what}"
        )
    return _own(_without_wrappers({k: v for k, v in found.items() if isinstance(v, Tensor)}))


def load(path, note=lambda text: None):
    """Reads the state dict of the checkpoint at `path` as {name: NumPy array}. `note` is told what was left out."""
    with Archive(path) as archive:
        arrays = {}
        state, left_out = state_dict(archive.unpickle())
        if left_out:
            note(left_out)
        for name, tensor in state.items():
            try:
                arrays[name] = tensor.numpy()
            except CheckpointError as error:
                raise CheckpointError(f"tensor {name!r}: {error}") from None
        return arrays
