"""How long prompts and sequences are, and which models meet them."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from opd_ray.data.prompts import Prompts
from opd_ray.data.rendering import Renderer
from opd_ray.models.size import cache_bytes
from opd_ray.run import preflight
from opd_ray.tasks import get_task
from opd_ray.tasks.math import MathTask
from tiny_checkpoints import CHARACTERS, configured, make_checkpoint, make_setting, refused, write_jsonl


@pytest.fixture
def setting(tmp_path: Path) -> dict[str, str]:
    return make_setting(tmp_path)


@pytest.fixture
def sets(setting: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """Two sets of problems: the longer problem has the smaller budget."""
    short = write_jsonl(tmp_path / "short.jsonl", [{"prompt": "3+3=", "answer": "6"}])
    long = write_jsonl(tmp_path / "long.jsonl", [{"prompt": "3+" * 20 + "3=", "answer": "63"}])
    both = f"{{short: {{path: {short}, max_tokens: 50}}, long: {{path: {long}, max_tokens: 5}}}}"
    return setting | {"data.evaluation": "embedded", "evaluation.sets": both}


# ---- the longest prompt ----

# As Llama 3's and Qwen2.5's: a long turn of the system's by default, and a header of its own where a row has one.
_CHAT = (
    "{% if messages[0].role != 'system' %}<system>" + "1" * 20 + "<end>{% endif %}{% for turn in messages %}"
    "<{{ turn.role }}>{% if turn.role == 'system' %}222222{% endif %}{{ turn.content }}<end>{% endfor %}"
)


@pytest.mark.parametrize("own", [True, False])
def test_it_is_found_among_rows_with_and_without_a_system_turn(tmp_path: Path, own: bool) -> None:
    """The bug: what the template adds was measured on the shortest row, for conversations of any form."""
    tokens = [*CHARACTERS, "<user>", "<system>"]
    renderer = Renderer(get_task("math"), str(make_checkpoint(tmp_path / "c", tokens=tokens, chat_template=_CHAT)))
    system = {"before": [{"role": "system", "content": "0"}]}
    rows = [{"prompt": "1"} | (system if own else {})]
    rows += [{"prompt": "1" * size} | more for size in (28, 32, 36) for more in ({}, system)]
    exact = Prompts("data.prompts", rows, renderer)
    lengths = [len(exact[index]) for index in range(len(rows))]
    assert Prompts("data.prompts", rows, renderer).longest()[0] == max(lengths)
    for limit in range(max(lengths) + 1):
        expected = [index for index, length in enumerate(lengths) if length > limit]
        assert Prompts("data.prompts", rows, renderer).longer_than(limit) == expected


def test_what_a_task_asks_with_other_columns_counts(tmp_path: Path) -> None:
    class WithNotes(MathTask):
        def prompt(self, row: Mapping[str, Any]) -> str:
            return row["prompt"] + row["notes"]

    renderer = Renderer(WithNotes(), str(make_checkpoint(tmp_path / "c")))
    rows = [{"prompt": "1" * 5, "notes": ""}, {"prompt": "1", "notes": "2" * 9}, {"prompt": "1" * 4, "notes": ""}]
    assert Prompts("data.prompts", rows, renderer).longest() == (10, 2)


def test_half_a_character_is_refused_with_its_row(setting: dict[str, str]) -> None:
    """The bug: JSON can hold half of a surrogate pair, and counting its bytes ended in a traceback."""
    Path(setting["data.prompts"]).write_text('{"prompt": "1+1="}\n{"prompt": "\\ud800"}\n')
    message = refused(lambda: preflight.check_files(configured(setting)))
    assert "prompts.jsonl row 2: \\ud800 is half of a surrogate pair" in message


# ---- the longest sequence, and who meets it ----


def test_every_set_of_problems_has_its_own_prompts_and_budget(sets: dict[str, str]) -> None:
    """The bug: engines were made for the longest prompt of all with the largest budget of all."""
    facts = preflight.check_files(configured(sets))
    assert (facts.max_prompt_tokens, facts.max_context_tokens) == (42, 4 + 50)
    assert preflight.check_evaluation(configured(sets)).max_context_tokens == 4 + 50


def test_a_teacher_that_looks_at_evaluations_must_take_their_answers(sets: dict[str, str], tmp_path: Path) -> None:
    """The bug: a teacher of a shorter context than the student's ended the run at the first evaluation."""
    make_checkpoint(tmp_path / "teacher", context=53)
    message = refused(lambda: preflight.check_files(configured(sets)))
    assert "evaluation.sets.short.path" in message and "row 1: its 4 prompt tokens" in message
    assert "more than the context of 53 of teacher.path=" in message
    assert "set evaluation.sets.short.max_tokens=49" in message
    facts = preflight.check_files(configured(sets, evaluation__temperature="0.6"))
    assert facts.max_context_tokens == 54, "at another temperature the student alone meets them"
    preflight.check_evaluation(configured(sets))


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
def test_a_cache_holds_what_its_model_takes_and_not_what_others_do(sets: dict[str, str], tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "teacher", context=53)
    sets |= {"evaluation.temperature": "0.6", "teacher.engine": "vllm"}
    size = preflight.check_files(configured(sets)).sizes["teacher"]
    one = cache_bytes(size.kv_bytes_per_token(4), 53 + 1, 1)
    preflight.check_files(configured(sets, teacher__kv_cache_bytes=str(one)))
    small = configured(sets, teacher__kv_cache_bytes="1000")
    assert "teacher.kv_cache_bytes=1000" in refused(lambda: preflight.check_files(small))
