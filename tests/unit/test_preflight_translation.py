"""Preflight of teachers with another tokenizer: a line says so, and what they cannot be asked is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from opd_ray.run import preflight
from opd_ray.score.translation import Translation
from tiny_checkpoints import configured, encode, make_checkpoint, make_setting, refused, write_jsonl

PAIRS = ("<pad>", "<eos>", "<end>", "<stop>", "12", "1+", *"=+-0123456789ab")
SPANS = {"loss__student__divergence": "k1", "loss__advantage__policy": "behaviour"}
TEMPLATE = "{% for turn in messages %}<end>{{ turn['content'] }}{% endfor %}<stop>"


@pytest.fixture
def setting(tmp_path: Path) -> dict[str, str]:
    """Of a teacher with a token more in front of the others."""
    setting = make_setting(tmp_path)
    make_checkpoint(tmp_path / "teacher", tokens=PAIRS, eos=[3, 1], chat_template=TEMPLATE)
    return setting


def test_the_run_says_so_and_has_what_it_takes_to_ask(setting: dict[str, str]) -> None:
    facts = preflight.check_files(configured(setting, **SPANS))
    [line] = [line for line in facts.data.remarks() if "tokenizer" in line]
    assert "has another tokenizer than the student, so that the loss compares spans of text, not tokens" in line
    assert "(token '0' is id 9 there, id 3 in the student's)" in line
    assert facts.eos_token_ids == (1,), "ids of the teacher's are none of the student's"
    student, teacher = (setting[f"{name}.path"] for name in ("student", "teacher"))
    assert facts.translations == {"teacher": Translation(student, teacher, (1,), (1, 3), 5 + 2 + 40)}
    assert facts.max_context_tokens == 5 + 2 + 40


def test_prompts_are_rendered_with_the_template_and_the_tokens_of_their_teacher(
    setting: dict[str, str], tmp_path: Path
) -> None:
    make_checkpoint(tmp_path / "code")
    rows = [{"prompt": "1+1=", "answer": "2"}, {"prompt": "2+1=", "answer": "3", "teacher": "code"}]
    write_jsonl(Path(setting["data.prompts"]), rows)
    config = configured(setting, **SPANS, more_teachers__code__path=str(tmp_path / "code"), data__shuffle="false")
    data = preflight.check_files(config).data
    first, second = (data.prompt_stream(0)[slot] for slot in range(2))
    shown = [PAIRS.index(token) for token in ("<end>", "1", "+", "1", "=", "<stop>")]
    assert first.privileged_prompt_tokens == tuple(shown) and first.prompt_tokens == tuple(encode("1+1="))
    assert second.privileged_prompt_tokens == (), "its teacher has the student's tokenizer"
    [problem] = (stream[0] for stream in data.problem_streams().values())
    assert problem.privileged_prompt_tokens == (2, *[PAIRS.index(token) for token in "3+3="], 3)
    data.leave_out("held_out", [0])
    assert data.prompt_stream(0)[0].prompt_id == "2" and data.prompt_stream(0)[0].privileged_prompt_tokens == ()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "loss.student.divergence=reverse_kl compares distributions over tokens: spans of text are compared with"),
        ({"loss__student__divergence": "k2"}, "loss.student.divergence=k2 compares distributions"),
        (SPANS | {"loss__advantage__policy": "current"}, "set loss.advantage.policy=behaviour"),
        (SPANS | {"loss__advantage__discount": "1"}, "loss.advantage.discount looks at what it says of each token"),
        (SPANS | {"loss__student__outliers": "mask"}, "loss.student.outliers looks at"),
        (SPANS | {"loss__student__position_weight": "1.5"}, "loss.student.position_weight looks at"),
        (SPANS | {"loss__student__entropy_gate": "1"}, "loss.student.entropy_gate looks at"),
        (SPANS | {"loss__golden__divergence": "forward_kl"}, "golden rollouts take cross_entropy"),
        (
            SPANS | {"buffer__teacher_per_prompt": "1", "loss__teacher__coef": "1"},
            "what it writes is in its own tokens: set buffer.teacher_per_prompt=0",
        ),
        (SPANS | {"teacher__privileged": "true"}, "set privileged=false"),
        (SPANS | {"teacher__update": "periodic"}, "set update=fixed"),
        (SPANS | {"reference__path": "TEACHER"}, "vocabularies differ: token '0' is id 9 in reference.path="),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:40],
)
def test_what_another_tokenizer_cannot_give_is_refused(
    setting: dict[str, str], changes: dict[str, str], said: str
) -> None:
    changes = {name: setting["teacher.path"] if value == "TEACHER" else value for name, value in changes.items()}
    assert said in refused(lambda: preflight.check_files(configured(setting, **changes)))


def test_several_teachers_opinions_are_not_added_up(setting: dict[str, str], tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "code")
    changes = SPANS | {"more_teachers__code__path": str(tmp_path / "code"), "loss__teachers": "weighted"}
    assert "set loss.teachers=routed" in refused(lambda: preflight.check_files(configured(setting, **changes)))
    # Nor on what the first of them wrote, the bug: they were asked for a distribution while the run went on.
    written = {"teacher__path": str(tmp_path / "code"), "more_teachers__code__path": setting["teacher.path"]}
    written |= {"loss__student__coef": "0", "rollout__responses_per_prompt": "0", "buffer__teacher_per_prompt": "1"}
    written |= {"loss__teacher__coef": "1", "loss__teacher__divergence": "forward_kl", "loss__reference__coef": "0"}
    written |= {"loss__teachers": "weighted"}
    assert "set loss.teachers=routed" in refused(lambda: preflight.check_files(configured(setting, **written)))


def test_a_prompt_that_leaves_its_teacher_no_room_is_refused(setting: dict[str, str], tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "teacher", tokens=PAIRS, context=24)
    message = refused(lambda: preflight.check_files(configured(setting, **SPANS)))
    assert "in the tokens of its teacher, its 7 prompt tokens + rollout.max_response_tokens=20 are 27" in message
    assert "more than the context of 24 of teacher.path=" in message
    make_checkpoint(tmp_path / "teacher", tokens=PAIRS)
    preflight.check_files(configured(setting, **SPANS, student__max_context_tokens="25"))  # which are the student's


def test_prompts_that_leave_their_teacher_no_room_are_left_out_where_that_is_asked_for(
    setting: dict[str, str], tmp_path: Path
) -> None:
    """The bug: data.prompt_problems=skip was not looked at."""
    make_checkpoint(tmp_path / "teacher", tokens=PAIRS, context=24)
    rows = [{"prompt": "1+1=", "answer": "2"}, {"prompt": "1+", "answer": "3"}]
    write_jsonl(Path(setting["data.prompts"]), rows)
    data = preflight.check_files(configured(setting, **SPANS, data__prompt_problems="skip")).data
    assert [row["prompt"] for row in data.prompts.rows] == ["1+"] and len(data.translated["teacher"]) == 1
    assert data.report["over_length"] == 1


def test_a_template_that_opens_thoughts_on_one_side_alone_is_refused(setting: dict[str, str], tmp_path: Path) -> None:
    tokens = (*PAIRS, "<think>")
    make_checkpoint(tmp_path / "teacher", tokens=tokens, chat_template=f"{TEMPLATE}<think>")
    message = refused(lambda: preflight.check_files(configured(setting, **SPANS)))
    assert "opens <think> at the end of the prompt, that of student.path=" in message


def test_a_tokenizer_that_changes_what_it_reads_is_refused(setting: dict[str, str], tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "teacher", tokens=[token for token in PAIRS if token != "+"])
    message = refused(lambda: preflight.check_files(configured(setting, **SPANS)))
    assert "its tokens of '1+1=' " in message and "stand for another text" in message


def test_ends_of_the_teacher_s_own_are_its_ids(setting: dict[str, str]) -> None:
    facts = preflight.check_files(configured(setting, **SPANS, teacher__eos_token_ids="[2]"))
    assert facts.translations["teacher"].own_stop_token_ids == (2,) and facts.eos_token_ids == (1,)
    changed = configured(setting, **SPANS, teacher__eos_token_ids="[99]")
    assert "teacher.eos_token_ids names token 99" in refused(lambda: preflight.check_files(changed))
