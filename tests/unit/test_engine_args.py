"""vLLM's arguments from the configuration: what is passed on, and what is refused before anything starts."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

from opd_ray import config as configs
from opd_ray.errors import InputError
from opd_ray.models import vllm as engines
from opd_ray.models.engine_args import check_engine_args

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM's source, and it is not installed")


def test_what_the_installed_vllm_has_is_passed_on() -> None:
    check_engine_args("rollout.engine_args", ["enable_prefix_caching", "enforce_eager", "quantization"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("enable_prefix_cache", "has no such argument; did you mean 'enable_prefix_caching'?"),
        ("dtype", "is the field 'dtype' here; set that one"),
        ("kv_cache_memory_bytes", "is the field 'kv_cache_bytes' here"),
        ("async_scheduling", "the rooms depend on the value"),
        (
            "pipeline_parallel_size",
            "the rooms depend on the value",
        ),  # an engine has the GPUs of its tensor parallelism
        ("data_parallel_size", "the rooms depend on the value"),
    ],
)
def test_others_are_refused_in_one_line(name: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        check_engine_args("teacher.engine_args", [name])
    assert str(caught.value).startswith(f"teacher.engine_args.{name}: ")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_an_engine_that_would_not_read_them_is_refused() -> None:
    with pytest.raises(InputError, match=r"engine_args=\{'enforce_eager': True\} are vLLM's, but engine is torch"):
        configs.load(None, ["teacher.engine_args.enforce_eager=true"])
    config = configs.load(None, ["rollout.engine=vllm", "rollout.engine_args.enforce_eager=true"])
    assert config.rollout.engine_args == {"enforce_eager": True}


def test_they_reach_the_engine_before_what_it_has_by_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: dict[str, object] = {}

    class FakeEngineArgs:
        def __init__(self, **arguments: object) -> None:
            given.update(arguments)

        def create_engine_config(self) -> None:
            raise RuntimeError("far enough")

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(EngineArgs=FakeEngineArgs, LLMEngine=None))
    monkeypatch.setattr(engines, "_prepare_process", lambda: None)
    with pytest.raises(RuntimeError, match="far enough"):
        engines.build(str(tmp_path), engine_args={"enforce_eager": False, "block_size": 32}, enable_prefix_caching=True)
    assert (given["enforce_eager"], given["block_size"], given["enable_prefix_caching"]) == (False, 32, True)
    assert given["model"] == str(tmp_path)
