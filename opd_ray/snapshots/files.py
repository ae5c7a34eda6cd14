"""What is written and read: arrays, record batches, files. :mod:`opd_ray.snapshots.calls` says where these run.

Arrays are in safetensors files, which the safetensors library would write and read as well. It needs the whole file in
memory for that, once to write and twice to read it: a rank's share of a large student, beside that in the object store.
Here arrays go into the file and come out of it as they lie in memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

import numpy as np
import pyarrow as pa

from opd_ray.errors import RunError
from opd_ray.snapshots.storage import FileFact, Storage

_BITS = {"float": (64, 32, 16), "int": (64, 32, 16, 8), "uint": (64, 32, 16, 8)}
_CODES = {f"{kind}{bits}": f"{kind[0].upper()}{bits}" for kind in _BITS for bits in _BITS[kind]} | {"bool": "BOOL"}
"""NumPy's names of dtypes to those of safetensors."""
_DTYPES = {code: np.dtype(name) for name, code in _CODES.items()}


def write_arrays(storage: Storage, name: str, arrays: Mapping[str, np.ndarray]) -> FileFact:
    """Writes ``arrays`` as one safetensors file, none of them copied. Raises RunError for a dtype that it has no name
    for (give bfloat16 as uint16)."""
    # Wide values first, as safetensors has it: then each array is aligned to its dtype.
    arrays = dict(sorted(arrays.items(), key=lambda item: -item[1].dtype.itemsize))
    header, offset = {}, 0
    for key, array in arrays.items():
        if array.dtype.name not in _CODES or not array.dtype.isnative:
            raise RunError(f"{storage.url(name)}: {key} has dtype {array.dtype}, expected one of {', '.join(_CODES)}")
        end = offset + array.nbytes
        header[key] = {"dtype": _CODES[array.dtype.name], "shape": array.shape, "data_offsets": (offset, end)}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that every array lies aligned in the file

    def chunks() -> Iterator[bytes | np.ndarray]:
        yield len(text).to_bytes(8, "little") + text
        for array in arrays.values():
            yield np.ascontiguousarray(array).reshape(-1).view(np.uint8)

    return storage.write(name, chunks())


def read_arrays(storage: Storage, fact: FileFact, otherwise: str) -> dict[str, np.ndarray]:
    """What ``write_arrays`` wrote, read-only. Raises RunError, which ends with ``otherwise``, when the file is not as
    it was written."""
    content = memoryview(storage.verified(fact, otherwise))
    start = 8 + int.from_bytes(content[:8], "little")
    arrays = {}
    for key, entry in json.loads(bytes(content[8:start])).items():
        first, last = entry["data_offsets"]
        values = np.frombuffer(content[start + first : start + last], _DTYPES[entry["dtype"]])
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
