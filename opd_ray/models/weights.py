"""The weights of a checkpoint, looked at before anything loads them: which files they are in, and whether they are the
model that config.json describes.

    check_files     the files are there, whole, and safetensors; needs no torch
    check_weights   names, shapes and number formats, and whether a sample of the numbers is finite

Every failure is an InputError of one line that begins with ``name``, as ``student.path=/some/where``.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Iterator
from pathlib import Path

from opd_ray.errors import InputError, brief
from opd_ray.models import hub

INDEX = "model.safetensors.index.json"
_ADAPTERS = "adapter_config.json"
_FLOATS = ("F64", "F32", "F16", "BF16")
"""Number formats, by safetensors' names, that weights without a quantisation have."""
_OTHER_FORMATS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.npz")


def weight_files(directory: Path) -> list[Path]:
    """The files that transformers and vLLM both read: model.safetensors, or the shards that the index names. Others,
    as the same weights once more in another layout, are none of them."""
    if (whole := directory / "model.safetensors").is_file():
        return [whole]
    with contextlib.suppress(OSError, ValueError, KeyError, AttributeError, TypeError):
        return sorted(
            {directory / shard for shard in json.loads((directory / INDEX).read_bytes())["weight_map"].values()}
        )
    return sorted(directory.glob("*.safetensors"))


def headers(directory: Path) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Name, shape and number format of every tensor."""
    from safetensors import safe_open

    for file in weight_files(directory):
        with safe_open(file, framework="numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (no mapping, whatever it looks like)
                header = tensors.get_slice(name)
                yield name, tuple(header.get_shape()), header.get_dtype()


def check_files(name: str, directory: Path) -> None:
    """Refuses weights that are not there, incomplete, damaged, or in a format that runs code or that not all read."""
    from safetensors import SafetensorError, safe_open

    if not list(directory.glob("*.safetensors")):
        raise InputError(f"{name}: {_no_safetensors(directory)}")
    index = _index(name, directory)
    for shard in sorted(set(index.values())):
        if not (directory / shard).is_file():
            raise InputError(f"{name}: {INDEX} names {shard}, which is not there; is the download complete?")
    if (directory / "model.safetensors").is_file() and set(index.values()) - {"model.safetensors"}:
        raise InputError(
            f"{name}: has model.safetensors and {INDEX}, which names other files; it is not clear which of them the "
            "weights are: remove one of the two"
        )
    if not index and not (directory / "model.safetensors").is_file():
        found = ", ".join(sorted(file.name for file in directory.glob("*.safetensors"))[:3])
        raise InputError(
            f"{name}: has {found}, but neither model.safetensors nor {INDEX}; "
            + _otherwise(_ADAPTERS if (directory / _ADAPTERS).is_file() else None)
        )
    if (directory / _ADAPTERS).is_file():
        raise InputError(
            f"{name}: has {_ADAPTERS} beside weights of its own: transformers would load the adapters on them, vLLM "
            "the weights alone; remove it, or merge the two (merge_and_unload of peft) and give what you save then"
        )
    held: dict[str, str] = {}
    for file in weight_files(directory):
        try:
            with safe_open(file, framework="numpy") as tensors:  # its header tells a truncated file from a whole one
                held |= dict.fromkeys(tensors.keys(), file.name)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{name}: {file.name} is damaged ({brief(error)}); fetch the checkpoint again") from None
    if wrong := [tensor for tensor, shard in sorted(index.items()) if held.get(tensor) != shard]:
        raise InputError(
            f"{name}: {INDEX} says that {index[wrong[0]]} holds {wrong[0]}, which is "
            f"{f'in {held[wrong[0]]}' if wrong[0] in held else 'in no file'} (the first of {len(wrong)}); the index "
            "and the files are not of one checkpoint: fetch it again"
        )
    if not held:
        raise InputError(f"{name}: its safetensors files hold no tensors; fetch the checkpoint again")


def check_names(name: str, files: Collection[str]) -> None:
    """The same of a repository of the Hub, as far as the names of its files tell."""
    if files and not hub.weight_names(files):
        raise InputError(
            f"{name}: has no *.safetensors on the Hub, and other formats can run code or are not read by all rooms; "
            "https://huggingface.co/spaces/safetensors/convert makes them, or give another checkpoint"
        )


def check_weights(name: str, path: str, *, quantised: bool) -> None:
    """Refuses weights that are not those of the model in config.json, or that are not numbers any more.

    Transformers itself is asked, with tensors that have a shape and no memory: it knows which names are old ones, tied
    or fused. A few rows of each tensor are read. ``quantised`` weights may be met, whose names are their quantiser's:
    of these the numbers alone are looked at. A model of the Hub that was never downloaded is left to whoever loads it.
    """
    directory = on_this_node(path)
    if directory is None:
        return
    method = _quantisation(directory)
    if method is None:
        _check_architecture(name, directory)
    elif not quantised:
        raise InputError(
            f"{name}: its weights are quantised ({method}), which a student cannot be trained from and engine=torch "
            "does not read; give the checkpoint that they were made from (a teacher or reference in vLLM may be "
            "quantised: engine=vllm)"
        )
    _check_numbers(name, directory)


def on_this_node(path: str) -> Path | None:
    """The directory of a checkpoint, or of a model of the Hub whose weights were all downloaded."""
    if Path(path).is_dir():
        return Path(path)
    directory = hub.cached(path)
    files = weight_files(directory) if directory else []  # preflight itself has fetched config.json
    return directory if files and all(file.is_file() for file in files) else None


def _check_architecture(name: str, directory: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    given = {}
    for tensor, shape, precision in headers(directory):
        if precision not in _FLOATS:
            raise InputError(
                f"{name}: {tensor} is of format {precision}, expected one of {', '.join(_FLOATS)}; these are quantised "
                "weights, but config.json has no quantization_config: give the checkpoint that they were made from"
            )
        given[tensor] = torch.empty(shape, device="meta")
    with _silent():
        try:
            config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
            with torch.device("meta"):
                kind = type(AutoModelForCausalLM.from_config(config, trust_remote_code=False))
            _, found = kind.from_pretrained(
                None,
                config=config,
                state_dict=given,
                device_map="meta",
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        except Exception as error:  # by the architecture, and by what is wrong with its numbers
            raise InputError(
                f"{name}: transformers cannot make a causal language model of its config.json ({brief(error)}); give a "
                "checkpoint of one"
            ) from None
    where = f"{name}: its weights are not those of the {kind.__name__} that config.json describes"
    whole = "the files belong to another config.json, or were not saved whole"
    if found["mismatched_keys"]:
        tensor, got, expected = min(found["mismatched_keys"])
        others = len(found["mismatched_keys"])
        raise InputError(f"{where}: {tensor} is {list(got)}, expected {list(expected)} ({_first_of(others)}); {whole}")
    for problem, verb in (("missing_keys", "is missing"), ("unexpected_keys", "is none of its parameters")):
        if found[problem]:
            raise InputError(f"{where}: {min(found[problem])} {verb} ({_first_of(len(found[problem]))}); {whole}")
    if problems := [*found.get("error_msgs", ()), *dict(found.get("conversion_errors") or {}).values()]:
        raise InputError(f"{where}: {brief(problems[0])}; {whole}")


def _check_numbers(name: str, directory: Path) -> None:
    """The first, the middle and the last row of each tensor: a run that diverged leaves NaN everywhere."""
    import torch
    from safetensors import safe_open

    for file in weight_files(directory):
        with safe_open(file, framework="pt") as tensors:
            for tensor in tensors.keys():  # noqa: SIM118
                stored = tensors.get_slice(tensor)
                shape = stored.get_shape()
                if 0 in shape:
                    continue
                for share in (0, 1, 2) if len(shape) > 1 else (0,):
                    at = [(size - 1) * share // 2 for size in shape[:-1]]
                    row = stored[tuple(slice(i, i + 1) for i in at)] if shape else tensors.get_tensor(tensor)
                    if row.dtype.is_floating_point and not torch.isfinite(row.float()).all():
                        place = f"{tensor}{at or ''}"
                        raise InputError(
                            f"{name}: {place} in {file.name} has NaN or infinity; the model is broken, or its file is: "
                            "give another checkpoint"
                        )


def _quantisation(directory: Path) -> str | None:
    """By which method, if any, as config.json says."""
    raw = json.loads((directory / "config.json").read_bytes())
    found = raw.get("quantization_config") or raw.get("text_config", {}).get("quantization_config")
    return None if not found else str(found.get("quant_method", "by an unnamed method"))


def _no_safetensors(directory: Path) -> str:
    found = sorted(file.name for pattern in _OTHER_FORMATS for file in directory.glob(pattern))
    if not found:
        return f"has no weights (model.safetensors, or {INDEX} and its files); is the download complete?"
    what = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
    if any(file.endswith(".bin") for file in found):
        return f"its weights are pickles ({what}), which can run code; {_convert(directory)}"
    return f"has {what} and no *.safetensors; {_otherwise(found[0])}"


def _convert(directory: Path) -> str:
    load = f"from transformers import AutoModelForCausalLM as M; M.from_pretrained('{directory}', dtype='auto')"
    return f"if you trust their source, convert them: python -c \"{load}.save_pretrained('{directory}')\""


def _otherwise(found: str | None) -> str:
    if found == _ADAPTERS:
        return "these are adapters: merge them with their base (merge_and_unload of peft), and give what you save then"
    return "give a directory that save_pretrained wrote"


def _index(name: str, directory: Path) -> dict[str, str]:
    """Which file holds a tensor, by the index; empty where there is none."""
    if not (path := directory / INDEX).is_file():
        return {}
    try:
        found = json.loads(path.read_bytes())["weight_map"]
        if not all(isinstance(file, str) and "/" not in file for file in found.values()):
            raise ValueError
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise InputError(f"{name}: {INDEX} is damaged; fetch the checkpoint again") from None
    return found


def _first_of(number: int) -> str:
    return "the only one" if number == 1 else f"the first of {number}"


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Within it transformers shows no progress, and no table of what this module says in a line."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
