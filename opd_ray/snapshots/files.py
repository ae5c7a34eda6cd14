"""What is written and read: arrays, record batches, files. :mod:`opd_ray.snapshots.runners` says where these run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from opd_ray.errors import RunError
from opd_ray.snapshots.storage import FileFact, Storage

_CODES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}
"""NumPy's names of dtypes to those of safetensors."""
_DTYPES = {code: np.dtype(name) for name, code in _CODES.items()}


def write_arrays(storage: Storage, name: str, arrays: Mapping[str, np.ndarray]) -> FileFact:
    """Writes ``arrays`` as one safetensors file, none of them copied. Raises RunError for a dtype that it has no name
    for (give bfloat16 as uint16)."""
    header, offset = {}, 0
    for key in _order(arrays):
        array = arrays[key]
        if array.dtype.name not in _CODES or not array.dtype.isnative:
            raise RunError(f"{storage.url(name)}: {key} has dtype {array.dtype}, expected one of {', '.join(_CODES)}")
        header[key] = {
            "dtype": _CODES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
    text = json.dumps({key: header[key] for key in arrays}).encode()
    text += b" " * (-len(text) % 8)  # so that every array lies aligned in the file

    def chunks() -> Iterator[bytes | np.ndarray]:
        yield len(text).to_bytes(8, "little") + text
        for key in _order(arrays):
            yield np.ascontiguousarray(arrays[key]).reshape(-1).view(np.uint8)

    return storage.write(name, chunks())


def read_arrays(storage: Storage, fact: FileFact, otherwise: str) -> dict[str, np.ndarray]:
    """What ``write_arrays`` wrote, in the same order, read-only. Raises RunError, which ends with ``otherwise``, when
    the file is not as it was written."""
    content = storage.verified(fact, otherwise)
    start = 8 + int.from_bytes(memoryview(content)[:8], "little")
    header = json.loads(bytes(memoryview(content)[8:start]))
    arrays = {}
    for key, entry in header.items():
        dtype, (first, last) = _DTYPES[entry["dtype"]], entry["data_offsets"]
        values = np.frombuffer(content, dtype, (last - first) // dtype.itemsize, start + first)
        arrays[key] = values.reshape(entry["shape"])
    return arrays


def write_batch(storage: Storage, name: str, batch: pa.RecordBatch) -> FileFact:
    """Writes one record batch as an Arrow IPC file."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return storage.write(name, [sink.getvalue()])


def read_batch(storage: Storage, fact: FileFact, otherwise: str) -> pa.RecordBatch:
    """What ``write_batch`` wrote. Raises RunError, which ends with ``otherwise``, when the file is not as it was
    written."""
    with pa.ipc.open_file(storage.verified(fact, otherwise)) as reader:
        return reader.get_batch(0)


def write_files(directory: str, files: Mapping[str, np.ndarray]) -> list[FileFact]:
    """Writes the bytes (uint8) of files below ``directory``, each whole or not at all."""
    storage = Storage(directory)
    return [storage.write(name, [content]) for name, content in files.items()]


def answer_or_payload(function: Callable[..., Any], stays: bool, *args: Any) -> tuple[Any, Any]:
    """What ``function(*args)`` returns, as the answer or, where it ``stays`` in the object store, as the payload."""
    value = function(*args)
    return (None, value) if stays else (value, None)


def _order(arrays: Mapping[str, np.ndarray]) -> Sequence[str]:
    """Wide values first, as safetensors has it: then each array is aligned to its dtype."""
    return sorted(arrays, key=lambda key: -arrays[key].dtype.itemsize)
