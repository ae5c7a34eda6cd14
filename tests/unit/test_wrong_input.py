"""What strangers hand over: every kind of it ends in one line and exit code 2, never in a traceback, within two seconds
of CPU and 500 MB.

The kinds are those with which an audit got tracebacks or hangs; hypothesis makes up others.
"""

from __future__ import annotations

import contextlib
import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from opd_ray import __main__ as command_line
from opd_ray import config as configs
from opd_ray.run import preflight
from tiny_checkpoints import make_setting

_MOST_CPU_S, _MOST_BYTES = 2.0, 500e6


class _Accepted(Exception):
    """Nothing to object to, as far as no weights are looked at and no Ray is asked."""


def _unreachable(*_: Any, **__: Any) -> None:
    raise ConnectionError("no network")


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Asks preflight about a good setting with changes; exit code and what was said."""
    root = tmp_path_factory.mktemp("asked")
    (root / "here").mkdir()
    setting = make_setting(root)
    files = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}

    def ask(*arguments: str, changed: dict[str, bytes] | None = None) -> tuple[int, str]:
        for name, data in (changed or {}).items():
            (root / name).write_bytes(data)
        Path("/proc/self/clear_refs").write_text("5")
        said, began_s, before = io.StringIO(), time.process_time(), _peak_bytes()
        asked = [each.replace("ROOT", str(root)) for each in arguments]
        options = [each for each in asked if each.startswith("--")] + ["--run-dir=run"] * (
            "--run-dir" not in str(asked)
        )
        overrides = [f"{name}={value}" for name, value in setting.items()]
        overrides += [each for each in asked if not each.startswith("--")]
        try:
            with contextlib.redirect_stderr(said):
                command_line.main(["preflight", *options, "--", *overrides])
        except SystemExit as end:
            code = end.code
        except _Accepted:
            code = 0
        finally:
            for path in (root / name for name in changed or {}):
                path.unlink() if path not in files else path.write_bytes(files[path])
        assert time.process_time() - began_s < _MOST_CPU_S and _peak_bytes() - before < _MOST_BYTES
        text = said.getvalue()
        assert (code, text.count("\n")) == (2, 1) or code == 0, (code, text)
        return code, text

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root / "here")
        patch.setattr(preflight, "check_weights", lambda *_: (_ for _ in ()).throw(_Accepted))
        patch.setattr("huggingface_hub.HfApi.model_info", _unreachable)
        patch.setattr("huggingface_hub.HfApi.dataset_info", _unreachable)
        yield ask


def _peak_bytes() -> int:
    """Since ``clear_refs``, which every kind begins with: ru_maxrss is that of the whole life of the process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024


def _row(**values: Any) -> bytes:
    return json.dumps({"prompt": "1+1=", "answer": "2"} | values).encode()


def _raw(more: str) -> bytes:
    return _row()[:-1] + f", {more}}}".encode()


def _flipped(at: float) -> bytes:
    file = io.BytesIO()
    table = pa.table({"prompt": ["1+1=", "12+1="] * 50, "answer": ["2", "13"] * 50, "id": list(map(str, range(100)))})
    pq.write_table(table, file)
    data = bytearray(file.getvalue())
    data[int(len(data) * at)] ^= 0xFF
    return bytes(data)


_BILLION = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{here}: &{here} [{','.join([f'*{before}'] * 9)}]\n" for before, here in zip("abcdefgh", "bcdefghi", strict=True)
)
OVERRIDES = {
    "a seed of 23 digits": ("seed=" + "1" * 23, "seed: has 23 digits"),
    "a seed of 400 digits": ("seed=" + "1" * 400, "seed: has 400 digits"),
    "a seed of 33 bits": (f"seed={2**32}", "seed: Input should be less than 4294967296"),
    "5,000 digits": ("seed=" + "1" * 5000, "a number of thousands of digits"),
    "digits in a list": (f"loss.student.coef=[[{10**30},1]]", "config: loss.student.coef.0.0: has 31 digits"),
    "a deep value": ("data.x=" + "[" * 3000 + "]" * 3000, "maximum nesting depth"),
    "a URL that is none": ("teacher.url=false", "config: teacher.url.0: Input should be a valid string"),
    "a deep name": (".".join("a" * 3000) + "=1", "nested too deeply"),
    "half a character": ("data.system_prompt=\ud800", "half a surrogate pair"),
    "a null byte": ("student.path=a\0b", "#x0000"),
    "a path of 300 characters": ("student.path=" + "x" * 300, "neither a directory here nor a checkpoint"),
    "a file of 300 characters": ("data.prompts=" + "x" * 300 + ".jsonl", "no such file"),
    "a run directory of 300 characters": ("--run-dir=" + "x" * 300, "File name too long"),
    "a run directory of 5,000 characters": ("--run-dir=" + "x/" * 2500, "File name too long"),
    "a run directory with a null byte": ("--run-dir=a\0b", "embedded null byte"),
    "a run directory in a file": ("--run-dir=ROOT/prompts.jsonl/run", "which is a file"),
    "a configuration that is a directory": ("--config=ROOT", "is no file"),
    "a configuration without end": ("--config=/dev/zero", "is no file"),
    "a configuration of 300 characters": ("--config=" + "x" * 300, "File name too long"),
}
CONFIGURATIONS = {
    "binary": (bytes(range(256)), "is not UTF-8 text (byte 128)"),
    "UTF-16": ("seed: 1\n".encode("utf-16"), "is not UTF-8 text (byte 0)"),
    "Latin-1": ("name: \xe9\n".encode("latin-1"), "is not UTF-8 text (byte 6)"),
    "large": (b"# " + b"x" * 2**20, "has more than 1048576 bytes"),
    "lists in lists": (b"a: " + b"[" * 5000 + b"]" * 5000, "maximum nesting depth"),
    "mappings in mappings": ("".join(" " * i + "a:\n" for i in range(1000)).encode(), "nest"),
    "5,000 digits": (b"seed: " + b"1" * 5000, "a number of thousands of digits"),
    "aliases of aliases": (_BILLION.encode(), "YAML node expansion exceeds"),
    "an object of Python's": (b"a: !!python/object/apply:os.system [echo]\n", "could not determine a constructor"),
    "a number as a name": (b"3: 4\n", "config: 3: Keys should be strings"),
    "a number": (b"3\n", "Invalid loaded object type"),
    "a list for a section": (b"data: []\n", "a list stands where options have a section"),
    "one key twice": (b"seed: 4\nseed: 5\n", "found duplicate key seed"),
}
DATA = {
    "a row of nothing but brackets": (
        "prompts.jsonl",
        _raw('"x": ' + "[" * 50_000 + "]" * 50_000),
        "nested too deeply",
    ),
    "a number of 5,000 digits": ("prompts.jsonl", _raw('"x": ' + "9" * 5000), "a number of thousands of digits"),
    "half a character": ("prompts.jsonl", _row(prompt="1+1=\ud800"), "\\ud800 is half of a surrogate pair"),
    "half a character in an answer": ("prompts.jsonl", _row(answer="\ud800"), "is half of a surrogate pair"),
    "half a character in a solution": ("golden.jsonl", _row(response="4\ud800"), "is half of a surrogate pair"),
    "half a character, as bytes": ("prompts.jsonl", b'{"prompt": "\xed\xa0\x80"}', "is not UTF-8 text"),
    "UTF-16": ("prompts.jsonl", _row().decode().encode("utf-16"), "is not UTF-8 text"),
    "a token of 71 bits": ("golden.jsonl", _row(prompt_tokens=[3], response_tokens=[2**70]), "is no token id"),
    "a negative one": ("golden.jsonl", _row(prompt_tokens=[-(2**70)], response_tokens=[1]), "is no token id"),
    "a token of another vocabulary": ("golden.jsonl", _row(prompt_tokens=[3], response_tokens=[999, 1]), "token 999"),
    "a row of 50 MB": ("prompts.jsonl", _row(prompt="1" * 50_000_000), "has more than 33554432 bytes"),
    "a prompt of 8 MB": (
        "prompts.jsonl",
        _row(prompt="1" * 8_000_000),
        "its 8000000 bytes are more than any context",
    ),
    "a problem of 8 MB": ("test.jsonl", _row(prompt="1" * 8_000_000), "its 8000000 bytes are more than any context"),
    "a solution of 8 MB": ("golden.jsonl", _row(response="1" * 8_000_000), "1 over length (row 1)"),
    "a config.json of brackets": ("student/config.json", b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}", "recursion"),
    "a config.json of bytes": ("student/config.json", bytes(range(256)), "not a checkpoint that transformers can read"),
    "an EOS that is text": (
        "student/generation_config.json",
        b'{"eos_token_id": "x"}',
        "expected a token id or several",
    ),
    "no EOS": ("student/generation_config.json", b'{"eos_token_id": []}', "expected a token id or several"),
    "a generation_config.json of bytes": ("student/generation_config.json", b"\xff\xfe", "is damaged"),
    "a tokenizer of bytes": ("student/tokenizer.json", b"\xff\xfe", "not a checkpoint that transformers can read"),
    "half a template": ("student/chat_template.jinja", b"{% for x in %}", "its prompt cannot be rendered"),
    "a template without end": (
        "student/chat_template.jinja",
        b"{% for x in range(10**9) %}{% endfor %}",
        "its prompt cannot be rendered",
    ),
    "a header of 2**64 bytes": ("student/model.safetensors", b"\xff" * 8 + b"{}", "model.safetensors is damaged"),
}


@pytest.mark.parametrize("kind", OVERRIDES)
def test_wrong_options_are_told_in_a_line(ask: Callable[..., tuple[int, str]], kind: str) -> None:
    argument, said = OVERRIDES[kind]
    code, text = ask(argument)
    assert code == 2 and said in text


@pytest.mark.parametrize("kind", CONFIGURATIONS)
def test_wrong_configurations_are_told_in_a_line(ask: Callable[..., tuple[int, str]], kind: str) -> None:
    data, said = CONFIGURATIONS[kind]
    code, text = ask("--config=ROOT/run.yaml", changed={"run.yaml": data})
    assert code == 2 and said in text and "run.yaml" in text + "run.yaml" * text.startswith("opd-ray: config: ")


@pytest.mark.parametrize("kind", DATA)
def test_wrong_files_are_told_in_a_line(ask: Callable[..., tuple[int, str]], kind: str) -> None:
    file, data, said = DATA[kind]
    code, text = ask(changed={file: data})
    assert code == 2 and said in text


@pytest.mark.parametrize("at", [0.16, 0.4, 0.48, 0.8])
def test_a_flipped_byte_of_a_parquet_file_is_told_in_a_line(ask: Callable[..., tuple[int, str]], at: float) -> None:
    code, text = ask("data.prompts=ROOT/p.parquet", changed={"p.parquet": _flipped(at)})
    assert code == 2 and "p.parquet: Parquet that cannot be read" in text


def test_what_is_longer_than_any_context_is_left_out_where_that_is_asked_for(
    ask: Callable[..., tuple[int, str]],
) -> None:
    """The bug: a prompt of 50 MB took a minute and 16 GB, to be found too long."""
    rows = _row() + b"\n" + _row(prompt="1" * 8_000_000)
    assert ask("data.prompt_problems=skip", changed={"prompts.jsonl": rows}) == (0, "")


# ---- what hypothesis makes up ----

_FIELDS = sorted({field.name for field in (*configs.describe(), *configs.describe_absent())})
_COLUMNS = ("id", "prompt", "answer", "response", "teacher", "messages", "generations", "prompt_tokens")
_COLUMNS += ("response_tokens", "prompt_id", "finish_reason", "correct", "text", "problem", "role", "content")
_SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(0, 3),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(["none", "inf", "[", "{a: 1}", "${a}", "embedded", "student", "${oc.env:HOME}", "1e400", "\ud800"]),
)


def _nested(names: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    keys = st.one_of(names, st.text(max_size=5))
    return st.recursive(
        _SCALARS, lambda below: st.lists(below, max_size=3) | st.dictionaries(keys, below, max_size=4), max_leaves=8
    )


_fuzz = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.mark.slow
@_fuzz
@given(st.lists(st.tuples(st.sampled_from(_FIELDS), _SCALARS), min_size=1, max_size=3))
def test_any_override_has_a_verdict(ask: Callable[..., tuple[int, str]], changes: list[tuple[str, Any]]) -> None:
    ask(*(f"{name}={value}" for name, value in changes))


@pytest.mark.slow
@_fuzz
@given(
    st.dictionaries(
        st.sampled_from(_FIELDS).map(lambda name: name.partition(".")[0]),
        _nested(st.sampled_from([name.rpartition(".")[2] for name in _FIELDS])),
        max_size=3,
    )
    | st.binary(max_size=60)
    | st.text(max_size=60)
)
def test_any_configuration_has_a_verdict(ask: Callable[..., tuple[int, str]], raw: Any) -> None:
    text = raw if isinstance(raw, str) else "" if isinstance(raw, bytes) else yaml.safe_dump(raw, allow_unicode=True)
    data = raw if isinstance(raw, bytes) else text.encode("utf-8", "surrogatepass")
    ask("--config=ROOT/run.yaml", changed={"run.yaml": data})


@pytest.mark.slow
@_fuzz
@given(
    st.sampled_from(["prompts.jsonl", "golden.jsonl", "test.jsonl"]),
    st.lists(st.one_of(
        st.dictionaries(st.sampled_from(_COLUMNS), _nested(st.sampled_from(_COLUMNS)), max_size=5), _nested(st.text())
    ), min_size=1, max_size=3) | st.binary(max_size=60),
)  # fmt: skip
@example("golden.jsonl", [{"prompt_tokens": [], "response_tokens": []}])
def test_any_data_has_a_verdict(ask: Callable[..., tuple[int, str]], file: str, rows: Any) -> None:
    data = rows if isinstance(rows, bytes) else b"\n".join(json.dumps(row).encode() for row in rows)
    ask(changed={file: data})


@pytest.mark.slow
@_fuzz
@given(st.lists(st.tuples(st.floats(0, 0.999), st.integers(1, 255)), min_size=1, max_size=3))
def test_any_damage_of_parquet_has_a_verdict(
    ask: Callable[..., tuple[int, str]], flips: list[tuple[float, int]]
) -> None:
    data = bytearray(_flipped(0))
    data[0] ^= 0xFF  # back to what it was
    for at, bits in flips:
        data[int(len(data) * at)] ^= bits
    ask("data.prompts=ROOT/p.parquet", changed={"p.parquet": bytes(data)})
