"""What stands around a problem: system prompt, template, the chat template's own arguments, and its <think>."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from opd_ray import config as configs
from opd_ray.config.data import DataConfig
from opd_ray.data.rendering import Renderer
from opd_ray.run import preflight
from opd_ray.tasks import get_task
from tiny_checkpoints import CHARACTERS, configured, make_checkpoint, make_setting, refused, write_jsonl

LETTERS = (*CHARACTERS, "<user>", "<system>", "<assistant>", "<think>", "</think>", "\n\n", *sorted(set("xyz{}\\ \n")))
MODELS = ("student.path", "teacher.path", "reference.path")
CHAT = (
    "{% for turn in messages %}<{{ turn['role'] }}>{{ turn['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if thinking %}<think>\n{% endif %}{% endif %}"
)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {
        name: str(make_checkpoint(root / name, tokens=LETTERS, chat_template=template))
        for name, template in (("chat", CHAT), ("base", None))
    }


def rendered(path: str, row: dict[str, Any], **data: Any) -> str:
    renderer = Renderer(get_task("math"), path, DataConfig(**data))
    return renderer.tokenizer.decode(renderer.prompt(row))


def test_the_prompt_is_asked_as_it_stands_unless_told_otherwise(checkpoints: dict[str, str]) -> None:
    assert rendered(checkpoints["chat"], {"prompt": "1+1="}) == "<user>1+1=<assistant>"
    assert rendered(checkpoints["base"], {"prompt": "1+1="}) == "1+1="


def test_system_prompt_and_template_stand_around_it(checkpoints: dict[str, str]) -> None:
    around = {"system_prompt": "x", "prompt_template": "z{prompt}\\y{}"}
    assert rendered(checkpoints["chat"], {"prompt": "1+1="}, **around) == "<system>x<user>z1+1=\\y{}<assistant>"
    assert rendered(checkpoints["base"], {"prompt": "1+1="}, **around) == "x\n\nz1+1=\\y{}"


def test_braces_stay_as_they_are(checkpoints: dict[str, str]) -> None:
    assert rendered(checkpoints["base"], {"prompt": "{x}"}, prompt_template="{prompt}{x}") == "{x}{x}"


def test_a_conversation_keeps_its_own_system_turn(checkpoints: dict[str, str]) -> None:
    before = [
        {"role": "system", "content": "y"},
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "2"},
    ]
    text = rendered(checkpoints["chat"], {"prompt": "3", "before": before}, system_prompt="x")
    assert text == "<system>y<user>1<assistant>2<user>3<assistant>"
    text = rendered(checkpoints["chat"], {"prompt": "3", "before": before[1:]}, system_prompt="x")
    assert text == "<system>x<user>1<assistant>2<user>3<assistant>"


def test_template_kwargs_reach_the_chat_template(checkpoints: dict[str, str]) -> None:
    text = rendered(checkpoints["chat"], {"prompt": "1"}, template_kwargs={"thinking": True})
    assert text == "<user>1<assistant><think>\n"


@pytest.mark.parametrize(
    ("prompt", "response", "expected"),
    [
        ("1<think>\n", "<think>\nxy</think>2", "xy</think>2"),
        ("1<think>\n", "<think>xy</think>2", "xy</think>2"),
        ("1<think>", "<think>\nxy</think>2", "\nxy</think>2"),
        ("1<think>\n", "xy</think>2", "xy</think>2"),
        ("1<think>\n\n</think>\n\n", "<think>\nxy</think>2", "<think>\nxy</think>2"),
        ("1", "<think>\nxy</think>2", "<think>\nxy</think>2"),
    ],
)
def test_what_the_template_has_opened_is_not_opened_twice(
    checkpoints: dict[str, str], prompt: str, response: str, expected: str
) -> None:
    renderer = Renderer(get_task("math"), checkpoints["base"])
    assert renderer.continuation(renderer.tokenizer.encode(prompt), response) == expected


def test_golden_responses_are_trained_on_without_it(checkpoints: dict[str, str], tmp_path: Path) -> None:
    setting = make_setting(tmp_path) | dict.fromkeys(
        ("student.path", "teacher.path", "reference.path"), checkpoints["chat"]
    )
    rows = [{"prompt": "2+2=", "answer": "4", "response": "<think>\nx</think>4"}]
    setting["data.golden"] = str(write_jsonl(tmp_path / "thought.jsonl", rows))
    opened = preflight.check_files(configured(setting, data__template_kwargs="{thinking: true}"))
    assert opened.data.golden.hand_over()[1]["text"].to_pylist() == ["x</think>4"]
    closed = preflight.check_files(configured(setting))
    assert closed.data.golden.hand_over()[1]["text"].to_pylist() == ["<think>\nx</think>4"]


def test_what_the_chat_template_does_not_look_at_is_refused(checkpoints: dict[str, str], tmp_path: Path) -> None:
    """The bug of others: a mistyped enable_thinking changed nothing, and nobody said so."""
    setting = make_setting(tmp_path)
    unused = {"data__template_kwargs": "{thinkin: true}"}
    message = refused(lambda: preflight.check_files(configured(setting, **unused)))
    assert "data.template_kwargs.thinkin: the chat template of student.path=" in message
    assert "is missing: it is a base model" in message
    setting |= dict.fromkeys(MODELS, checkpoints["chat"])
    assert "does not use it; leave it out or mend its name" in refused(
        lambda: preflight.check_files(configured(setting, **unused))
    )


def test_a_template_without_a_place_for_the_problem_is_refused() -> None:
    message = refused(lambda: configs.from_dict({"data": {"prompt_template": "Solve it."}}))
    assert message == "config: data: prompt_template is 'Solve it.', without {prompt} for the problem"


def test_a_chat_template_that_raises_is_told_with_the_row(tmp_path: Path) -> None:
    setting = make_setting(tmp_path)
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    setting |= dict.fromkeys(MODELS, str(make_checkpoint(tmp_path / "c", chat_template=template)))
    message = refused(lambda: preflight.check_files(configured(setting, data__system_prompt="x")))
    assert "row 1: its prompt cannot be rendered (no system role)" in message
