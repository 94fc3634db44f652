"""PyTorch's checkpoint files without PyTorch: only tensors and plain data are read, and code in a file is never
executed.

`torch.load(weights_only=True)` is as safe, but needs PyTorch, refuses SA-DPM's `ckpt_*.pth` for its argparse namespace,
and ignores the checksums in a file: flipped bits silently become wrong weights.
"""

import collections
import contextlib
import functools
import io
import math
import os
import pickle
import pickletools
import re
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from s2dm_jax.common.errors import UserError
from s2dm_jax.common.file_kinds import kind_of_file
from s2dm_jax.common.files import ZIP_DAMAGE

_DTYPES = {
    "FloatStorage": np.dtype("<f4"),
    "DoubleStorage": np.dtype("<f8"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}

_NOTE = "s2dm_jax.json"
_LEGACY_MAGIC, _LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001


class Storage(NamedTuple):
    """A file's block of memory, not yet read: its key, type and number of elements."""

    key: str
    dtype: np.dtype
    elements: int


class Tensor(NamedTuple):
    """A tensor, not yet read: a strided view of a storage; offset and strides count elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Ignored:
    """Stands for an object, without its contents, that a training loop saved along with its tensors."""

    def __new__(cls, *_, **__):
        return super().__new__(cls)

    def __setstate__(self, _):
        pass

    def __setitem__(self, _, __):
        pass

    def append(self, _):
        pass

    def extend(self, _):
        pass

    def add(self, _):
        pass


class _Refused(Exception):
    """The file names an object that is neither a tensor nor plain data."""


def _tensor(storage, offset, shape, strides, *_):
    return Tensor(storage, offset, tuple(shape), tuple(strides))


_ALLOWED = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch", "Size"): tuple,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    **{("torch", name): dtype for name, dtype in _DTYPES.items()},
    ("argparse", "Namespace"): _Ignored,
    ("torch", "device"): _Ignored,
    ("numpy", "dtype"): _Ignored,
    ("numpy.core.multiarray", "scalar"): _Ignored,
    ("numpy._core.multiarray", "scalar"): _Ignored,
    ("_codecs", "encode"): _Ignored,
    **{(module, name): _Ignored for module in ("builtins", "__builtin__") for name in ("set", "frozenset", "list")},
}


# Packages whose objects people save beside their tensors: paths, dates, settings, states of generators.
_IGNORED_PACKAGES = ("pathlib", "datetime", "collections", "numpy", "omegaconf", "easydict", "ml_collections", "yacs")
_IGNORED_DTYPES = re.compile(r"torch\.(b?float|u?int|complex|bool|half|double|long)\d*")


class _Unpickler(pickle.Unpickler):
    """Unpickles plain data and tensors, as `Tensor`; refuses everything else."""

    def find_class(self, module, name):
        if (module, name) not in _ALLOWED:
            # Never the object itself: a stand-in runs nothing.
            if module.split(".")[0] in _IGNORED_PACKAGES or _IGNORED_DTYPES.fullmatch(f"{module}.{name}"):
                return _Ignored
            raise _Refused(f"{module}.{name}")
        return _ALLOWED[module, name]

    def persistent_load(self, pid):
        kind, dtype, key, _, count, *views = pid
        if kind != "storage" or not isinstance(dtype, np.dtype) or any(view is not None for view in views):
            raise ValueError("an entry that is not a storage")
        return Storage(str(key), dtype, int(count))


def _unpickle(stream: BinaryIO, size: int) -> Any:
    start = stream.tell()
    for opcode, argument, _ in pickletools.genops(stream):
        # Unpickling makes room for every index up to the highest: a damaged one would take all memory.
        if opcode.name in ("PUT", "LONG_BINPUT") and (argument or 0) > size:
            raise ValueError("a memo index beyond the file")
    stream.seek(start)
    return _Unpickler(stream).load()


@contextlib.contextmanager
def open_torch(path: str | os.PathLike) -> Iterator[tuple[object, Callable[[Tensor], np.ndarray], bool]]:
    """Opens what `torch.save` wrote: the zip files of torch 1.6 and later, or the streams before.

    Yields the contents with a `Tensor` in place of each tensor; a function that reads one as an array of its own
    type; and whether the file has checksums of what is read, which streams do not. Never executes code in the file: an
    object that is neither a tensor nor plain data is a UserError, as is a damaged file or one of another kind.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            is_zip = file.read(4) == b"PK\3\4"
            file.seek(0)
            contents, read = _open_zip(zipfile.ZipFile(file), size) if is_zip else _open_stream(file, size)
            yield contents, functools.partial(_array, read), is_zip
    except _Refused as error:
        if str(error).startswith("torch._utils._rebuild"):
            raise UserError(
                f"{path} cannot be used: it holds tensors of a kind that is not supported ({error}), such as sparse or "
                "quantised ones, or floats of 8 bits; save them as dense float32"
            ) from error
        raise UserError(
            f"{path} is refused: it holds the Python object {error}, which could run code when loaded; only "
            "tensors and plain data are read. Save the network's state_dict() alone"
        ) from error
    except (pickle.UnpicklingError, AttributeError, IndexError, TypeError, MemoryError, *ZIP_DAMAGE) as error:
        # pickle's own words say nothing about a file that is no pickle.
        own = "" if isinstance(error, pickle.UnpicklingError) or "opcode" in str(error) else str(error)
        reason = (
            kind_of_file(path) or own.strip().partition("\n")[0][:120] or "it does not begin like a torch.save file"
        )
        raise UserError(
            f"{path} cannot be read as a PyTorch checkpoint: it is damaged or another kind of file ({reason}); fetch "
            "it again"
        ) from error


def _open_zip(archive, size):
    names = archive.namelist()
    if sum(info.file_size for info in archive.infolist()) > size:
        raise ValueError("its parts claim to be larger than the file")
    for info in archive.infolist():
        # Compares the name with that in front of the part: with a damaged one the part would seem to be missing.
        archive.open(info).close()
    pickles = [name for name in names if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError("it has no data.pkl")
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}byteorder" in names and archive.read(f"{root}byteorder") != b"little":
        raise ValueError("its byte order is not little-endian")
    # Reading all of a part checks its CRC-32.
    data = archive.read(pickles[0])
    contents = _unpickle(io.BytesIO(data), len(data))
    return contents, lambda storage: archive.read(f"{root}data/{storage.key}")


def _open_stream(file, size):
    if _unpickle(file, size) != _LEGACY_MAGIC or _unpickle(file, size) != _LEGACY_PROTOCOL:
        raise ValueError("it does not begin like a torch.save file")
    if _unpickle(file, size).get("little_endian") is not True:
        raise ValueError("its byte order is not little-endian")
    contents, keys = _unpickle(file, size), _unpickle(file, size)
    storages = {storage.key: storage for storage in _storages(contents)}
    if sorted(storages) != sorted(keys):
        raise ValueError("its list of storages is not that of its tensors")
    offsets = {}
    for key in keys:
        offsets[key] = file.tell() + 8
        if struct.unpack("<q", file.read(8)) != (storages[key].elements,):
            raise ValueError(f"storage {key} is not of the size that its tensors name")
        file.seek(storages[key].elements * storages[key].dtype.itemsize, os.SEEK_CUR)
    if file.tell() != size:
        raise ValueError(f"it has {size:,} bytes where its tensors need {file.tell():,}")

    def read(storage):
        file.seek(offsets[storage.key])
        return file.read(storage.elements * storage.dtype.itemsize)

    return contents, read


def _storages(contents: object) -> Iterator[Storage]:
    if isinstance(contents, Tensor):
        yield contents.storage
    elif isinstance(contents, dict | list | tuple):
        for value in contents.values() if isinstance(contents, dict) else contents:
            yield from _storages(value)


def _array(read: Callable[[Storage], bytes], tensor: Tensor) -> np.ndarray:
    (key, dtype, count), offset, shape, strides = tensor
    values = np.frombuffer(read(tensor.storage), dtype)
    numbers = (offset, *shape, *strides)
    fits = len(values) == count and len(shape) == len(strides) and all(type(n) is int for n in numbers)
    fits = fits and min(numbers) >= 0 and math.prod(shape) <= count - offset
    if math.prod(shape):
        last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=False))
        fits = fits and last < count
    if not fits:
        raise ValueError(f"a tensor of shape {shape} does not fit into its storage {key} of {count} numbers")
    return np.lib.stride_tricks.as_strided(values[offset:], shape, [n * dtype.itemsize for n in strides]).copy()


def read_note(path: str | os.PathLike) -> str | None:
    """The note that `write_torch` stored with the tensors, or None; UserError for a damaged file."""
    if not zipfile.is_zipfile(path):
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            notes = [name for name in archive.namelist() if name.endswith(f"/{_NOTE}")]
            return archive.read(notes[0]).decode() if notes else None
    except ZIP_DAMAGE as error:
        raise UserError(f"{path} is damaged ({error}); fetch it again") from error


def write_torch(path: str | os.PathLike, contents: object, note: str) -> None:
    """Writes what `torch.load` reads, also with `weights_only`: torch's zip format, protocol 2; not atomic.

    `contents` are float32 arrays, as tensors, in dicts, lists and tuples with numbers, strings and None; anything else
    is a TypeError. The note becomes a part of its own, which torch ignores.
    """
    arrays: list[np.ndarray] = []
    data = pickle.PROTO + b"\x02" + _pickled(contents, arrays) + pickle.STOP
    with zipfile.ZipFile(path, "w") as archive:
        root = Path(path).stem.lstrip(".")
        parts = {"data.pkl": data, "byteorder": b"little", "version": b"3\n", _NOTE: note.encode()}
        for name, value in parts.items():
            archive.writestr(zipfile.ZipInfo(f"{root}/{name}"), value)
        for key, array in enumerate(arrays):
            archive.writestr(zipfile.ZipInfo(f"{root}/data/{key}"), array.astype("<f4").tobytes())


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _pickled(value: object, arrays: list[np.ndarray]) -> bytes:
    """`value` as opcodes that torch's own safe unpickler knows; appends its arrays to `arrays`."""

    def items(*values):
        return b"".join(_pickled(item, arrays) for item in values)

    if isinstance(value, np.ndarray):
        if value.dtype != np.float32:
            raise TypeError(f"a tensor must be float32, not {value.dtype}")
        strides = tuple(math.prod(value.shape[i + 1 :]) for i in range(value.ndim))
        arrays.append(value)
        storage = items("storage") + _global("torch", "FloatStorage") + items(str(len(arrays) - 1), "cpu", value.size)
        no_hooks = _global("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
        arguments = (
            (pickle.MARK + storage + pickle.TUPLE + pickle.BINPERSID)
            + items(0, value.shape, strides, False)  # offset, shape, strides, requires_grad
            + no_hooks
        )
        return _global("torch._utils", "_rebuild_tensor_v2") + pickle.MARK + arguments + pickle.TUPLE + pickle.REDUCE
    if type(value) in (type(None), bool, int, float, str):
        # Without PROTO, its argument, and STOP.
        return pickle.dumps(value, 2)[2:-1]
    if isinstance(value, tuple):
        return pickle.MARK + items(*value) + pickle.TUPLE
    if isinstance(value, list):
        return pickle.EMPTY_LIST + pickle.MARK + items(*value) + pickle.APPENDS
    if isinstance(value, dict):
        pairs = (part for pair in value.items() for part in pair)
        return pickle.EMPTY_DICT + pickle.MARK + items(*pairs) + pickle.SETITEMS
    raise TypeError(f"a PyTorch file written by s2dm_jax holds no {type(value).__name__}")
