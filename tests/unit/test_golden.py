"""Golden solutions: what is loaded, what is refused or left out and counted, and whose solution is whose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from opd_ray.config import Config
from opd_ray.data.dataset import Dataset
from opd_ray.data.golden_problems import KINDS
from opd_ray.messages import ROLLOUT_SCHEMA, RolloutMeta
from opd_ray.models.checkpoints import inspect_run
from opd_ray.run import preflight
from opd_ray.tasks.judge import Judge
from tiny_checkpoints import CHARACTERS as TOKENS
from tiny_checkpoints import configured, encode, make_checkpoint, make_setting, refused, write_jsonl, write_rollouts

EOS = (1, 2)
NO_PROBLEMS = dict.fromkeys(KINDS, 0)
PAIRED = {"buffer__golden_pairing": "prompt"}


@pytest.fixture
def setting(tmp_path: Path) -> dict[str, str]:
    return make_setting(tmp_path)


def as_text(setting: dict[str, str], rows: list[dict[str, Any]]) -> str:
    return str(write_jsonl(Path(setting["data.golden"]), rows))


def as_tokens(setting: dict[str, str], rows: list[dict[str, Any]]) -> str:
    return str(write_rollouts(Path(setting["data.golden"]).with_suffix(".parquet"), rows))


def tokens(prompt: str, response: str, *eos: int, **more: Any) -> dict[str, Any]:
    return {"prompt_tokens": encode(prompt), "response_tokens": [*encode(response), *eos], **more}


def looked_at(config: Config) -> Dataset:
    """The data of a run with its golden solutions checked; the EOS set is that of a scorer with one more."""
    data = Dataset(config)
    with Judge(data.renderer.task) as judge:
        data.read_golden(inspect_run(config), EOS, judge)
    return data


def load(config: Config) -> tuple[list[RolloutMeta], pa.RecordBatch, dict[str, int]]:
    """What a run gets, and the counts."""
    golden = looked_at(config).golden
    return *golden.hand_over(), golden.report


# ---- what is loaded ----


def test_more_tokens_than_a_column_can_count_are_refused(setting: dict[str, str], monkeypatch: Any) -> None:
    """The bug: the ends of the rows were summed up in 32 bits, and past 2^31 tokens rows began at negative ones."""
    monkeypatch.setattr("opd_ray.data.golden.MOST_VALUES", 5)
    as_text(setting, [{"prompt": "2+2=", "answer": "4", "response": "4"}] * 2)
    assert "2 rows have 8 prompt_tokens, more than one batch can hold (5)" in refused(lambda: load(configured(setting)))


def test_rows_of_text_get_the_first_eos_and_rows_of_tokens_stay_as_they_are(setting: dict[str, str]) -> None:
    as_text(setting, [{"id": "x", "prompt": "2+2=", "answer": "4", "response": "4", "finish_reason": "stop"}])
    metas, batch, report = load(configured(setting))
    assert batch.schema == ROLLOUT_SCHEMA
    assert batch["prompt_tokens"].to_pylist() == [encode("2+2=")]
    assert batch["response_tokens"].to_pylist() == [[*encode("4"), 1]]
    assert report == {"rows": 1, "used": 1} | NO_PROBLEMS
    assert (metas[0].prompt_id, metas[0].source, metas[0].teacher) == ("x", "golden", "teacher")

    path = as_tokens(setting, [tokens("2+2=", "4", 2, prompt_id="x", correct=False)])
    metas, batch, _ = load(configured(setting, data__golden=path))
    assert batch["response_tokens"].to_pylist() == [[*encode("4"), 2]]
    assert (batch["text"].to_pylist(), batch["finish_reason"].to_pylist()) == (["4"], ["stop"])
    assert (metas[0].prompt_id, metas[0].correct, metas[0].num_response_tokens) == ("x", False, 2)


def test_golden_rows_have_no_policy_and_no_privilege_unless_asked_for(setting: dict[str, str]) -> None:
    _, batch, _ = load(configured(setting))
    for column in ("behaviour_logprobs", "weight_versions", "topk_ids", "privileged_prompt_tokens"):
        assert batch[column].to_pylist() == [[]]


def test_a_written_batch_is_golden_data_again(setting: dict[str, str], tmp_path: Path) -> None:
    rows = [{"prompt": "2+2=", "response": "4"}, {"prompt": "4+5=", "response": "9"}]
    as_text(setting, rows)
    metas, batch, _ = load(configured(setting))
    pq.write_table(pa.Table.from_batches([batch]), tmp_path / "again.parquet")
    again, other, _ = load(configured(setting, data__golden=str(tmp_path / "again.parquet")))
    assert other.equals(batch)
    assert [meta.prompt_id for meta in again] == [meta.prompt_id for meta in metas]


def test_tokens_may_also_come_as_jsonl(setting: dict[str, str]) -> None:
    as_text(setting, [tokens("2+2=", "4", 1)])
    assert load(configured(setting))[1]["response_tokens"].to_pylist() == [[*encode("4"), 1]]


def test_looping_solutions_are_refused_or_left_out_and_counted(setting: dict[str, str]) -> None:
    """The bug: a golden solution that repeats itself was marked so, and trained on."""
    as_text(setting, [{"prompt": "2+2=", "response": "4"}, {"prompt": "2+2=", "response": "1+1=2" * 9}])
    fields = {
        "rollout__max_response_tokens": "50",
        "student__max_context_tokens": "60",
        "metrics__repetition_window_chars": "30",
    }
    message = refused(lambda: load(configured(setting, **fields)))
    assert "1 that repeat themselves (row 2); row 2: its last 30 characters compress by more than" in message
    skipping = configured(setting, data__golden_problems="skip", **fields)
    metas, _, report = load(skipping)
    assert [meta.rollout_id for meta in metas] == ["golden-1"]
    assert report == {"rows": 2, "used": 1} | NO_PROBLEMS | {"repetitive": 1}


# ---- what is the matter with a row ----

BAD = [
    ({"prompt": "1=", "response": "1", "finish_reason": "length"}, "without_eos", "finish_reason is 'length'"),
    ({"prompt": "1=", "response": "1<eos>"}, "eos_inside", "token 2 of 3 is the EOS 1; one is appended"),
    ({"prompt": "1=", "response": "1<end>1"}, "eos_inside", "token 2 of 4 is the EOS 2"),
    ({"prompt": "1=", "response": "1" * 20}, "over_length", "21 response tokens, EOS included, exceed"),
    (
        {"prompt": "1" * 49, "response": "1" * 15},
        "over_length",
        "prompt, response and EOS are 65 tokens, more than",
    ),
    (tokens("1=", "1"), "without_eos", "its last token is 4, none of the EOS set [1, 2]"),
    (tokens("1=", ""), "without_eos", "it has no tokens"),
    (tokens("1=", "1", 1, finish_reason="length"), "without_eos", "finish_reason is 'length'"),
    (tokens("1=", "1", 1, 1), "eos_inside", "token 2 of 3 is the EOS 1"),
    (tokens("1=", "1" * 20, 1), "over_length", "21 response tokens"),
]


@pytest.mark.parametrize(("row", "kind", "reason"), BAD)
def test_a_bad_row_is_refused_or_left_out_and_counted(
    setting: dict[str, str], row: dict[str, Any], kind: str, reason: str
) -> None:
    as_text(setting, [{"prompt": "1=", "response": "1" * 19}, row])
    message = refused(lambda: load(configured(setting)))
    assert message.startswith(f"data.golden {setting['data.golden']}: 1 of 2 rows cannot be trained on: 1 ")
    assert f"(row 2); row 2: {reason}" in message
    assert message.endswith("mend or remove them, or leave them out with data.golden_problems=skip")
    metas, _, report = load(configured(setting, data__golden_problems="skip"))
    assert [meta.rollout_id for meta in metas] == ["golden-1"]
    assert report == {"rows": 2, "used": 1} | NO_PROBLEMS | {kind: 1}


def test_preflight_counts_rows_and_names_all_problems(setting: dict[str, str]) -> None:
    good = {"prompt": "2+2=", "response": "4"}
    bad = [{"prompt": "1=", "response": "1", "finish_reason": "length"}] * 7 + [{"prompt": "1=", "response": "1" * 20}]
    as_text(setting, [good, *bad])
    message = refused(lambda: preflight.check_files(configured(setting)))
    assert (
        "8 of 9 rows cannot be trained on: 7 without EOS (rows 2, 3, 4, 5, 6, ...), 1 over length (row 9);" in message
    )
    config = configured(setting, data__golden_problems="skip")
    facts = preflight.check_files(config)
    expected = {"rows": 9, "used": 1} | NO_PROBLEMS | {"without_eos": 7, "over_length": 1}
    assert facts.golden == expected


def test_skipping_all_rows_is_refused(setting: dict[str, str]) -> None:
    as_text(setting, [{"prompt": "1=", "response": "1<eos>"}])
    message = refused(lambda: load(configured(setting, data__golden_problems="skip")))
    assert "1 of 1 rows cannot be trained on: 1 with an EOS inside (row 1)" in message
    assert message.endswith("none is left to train on")


def test_the_context_of_a_model_that_scores_golden_rows_counts(setting: dict[str, str], tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "teacher", context=30)
    as_text(setting, [{"prompt": "1" * 15, "response": "1" * 15}])
    load(configured(setting))  # cross-entropy does not ask the teacher
    scored = configured(setting, loss__golden__divergence="forward_kl")
    message = refused(lambda: load(scored))
    assert "31 tokens, more than the context of 30 of teacher.path=" in message


def test_the_longest_budget_of_a_schedule_is_the_measure(setting: dict[str, str]) -> None:
    as_text(setting, [{"prompt": "1=", "response": "1" * 29}])
    _, _, report = load(configured(setting, rollout__max_response_tokens="[[0, 10], [100, 30]]"))
    assert (report["rows"], report["used"], report["over_length"]) == (1, 1, 0)


# ---- tokens that cannot be ours ----


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (tokens("1=", "1", 999), "row 1: token 999 is outside the vocabulary of student.path="),
        (tokens("1=", "1", -1), "row 1: token -1 is outside"),
        (tokens("", "1", 1), "row 1: has no prompt_tokens"),
        (tokens("1=", "12", 1, text="21"), "row 1: its response_tokens read '12' with the tokenizer of"),
        ({"prompt_tokens": [3], "response_tokens": ["1"]}, "row 1: 'response_tokens' is a list, expected a list of"),
        ({"prompt": "1", "response_tokens": [3, 1]}, "row 1: 'prompt_tokens' is missing"),
        (tokens("1=", "1", 1, correct="yes"), "row 1: 'correct' is a string, expected true or false"),
    ],
)
def test_tokens_of_another_kind_are_refused(setting: dict[str, str], row: dict[str, Any], message: str) -> None:
    as_text(setting, [row])
    skipping = configured(setting, data__golden_problems="skip")  # skips rows, not a wrong file
    assert message in refused(lambda: load(skipping))


def test_a_token_column_of_strings_is_refused(setting: dict[str, str], tmp_path: Path) -> None:
    table = pa.table({"prompt_tokens": [[3]], "response_tokens": ["1 2"]})
    pq.write_table(table, tmp_path / "golden.parquet")
    config = configured(setting, data__golden=str(tmp_path / "golden.parquet"))
    assert "column 'response_tokens' holds string, expected lists" in refused(lambda: load(config))


# ---- judged by the task ----


def test_the_filter_asks_the_verifier_and_where_there_is_no_answer_the_log(setting: dict[str, str]) -> None:
    rows = [
        {"prompt": "2+2=", "answer": "4", "response": "+#4"},
        {"prompt": "2+3=", "answer": "5", "response": "+#4"},
        tokens("2+2=", "4", 1, correct=True),
        tokens("2+2=", "3", 1, correct=False),
    ]
    setting["student.path"] = str(make_checkpoint(Path(setting["student.path"]), tokens=[*TOKENS, "#"]))
    setting["teacher.path"] = setting["student.path"]
    as_text(setting, rows)
    assert load(configured(setting))[2]["used"] == 4
    checked = configured(setting, data__golden_filter="correct")
    message = refused(lambda: load(checked))
    assert "2 judged wrong (rows 2, 4); row 2: the task's verifier disagrees with its answer '5'" in message
    skipped = configured(setting, data__golden_filter="correct", data__golden_problems="skip")
    assert load(skipped)[2] == {"rows": 4, "used": 2} | NO_PROBLEMS | {"wrong": 2}


def test_the_filter_without_answers_is_refused(setting: dict[str, str]) -> None:
    as_text(setting, [{"prompt": "2+2=", "response": "4"}])
    config = configured(setting, data__golden_filter="correct", data__golden_problems="skip")
    message = refused(lambda: load(config))
    assert "row 1: has no answer to verify the response with" in message
    assert "data.golden_filter=none" in message


# ---- whose solution is whose ----


def pairs_of(config: Config) -> dict[str, str]:
    """Prompt id to the text of its solution."""
    golden = looked_at(config).golden
    return {prompt_id: golden.solutions[index].text for prompt_id, index in golden.pairs.items()}


def prompts(setting: dict[str, str], rows: list[dict[str, Any]]) -> None:
    write_jsonl(Path(setting["data.prompts"]), [{"answer": "0"} | row for row in rows])


def test_ids_pair_where_both_files_have_them(setting: dict[str, str]) -> None:
    prompts(setting, [{"id": "a", "prompt": "1+1="}, {"id": "b", "prompt": "2+2="}])
    as_text(
        setting,
        [
            {"id": "b", "prompt": "2+2=", "response": "44"},
            {"id": "x", "prompt": "1+1=", "response": "22"},
            {"id": "a", "prompt": "1=", "response": "2"},
        ],
    )
    assert pairs_of(configured(setting, **PAIRED)) == {"a": "2", "b": "44"}


def test_prompts_pair_where_a_file_lacks_ids(setting: dict[str, str]) -> None:
    """The second row's default id is that of another prompt: row numbers must not pair."""
    prompts(setting, [{"prompt": "1+1="}, {"prompt": "2+2="}, {"prompt": "1+1= "}])
    rows = [
        {"prompt": "2+2=", "response": "44"},
        {"prompt": "7=", "response": "7"},
        {"prompt": "1+1=", "response": "2"},
    ]
    as_text(setting, rows)
    assert pairs_of(configured(setting, **PAIRED)) == {"1": "2", "2": "44", "3": "2"}


def test_rollouts_pair_by_their_prompts_tokens_and_the_first_one_counts(setting: dict[str, str]) -> None:
    prompts(setting, [{"prompt": "1+1="}, {"prompt": "2+2="}])
    rows = [
        tokens("2+2=", "44", 1, prompt_id="7"),
        tokens("1+1=", "2", 1, prompt_id="2"),
        tokens("2+2=", "5", 1, prompt_id="7"),
    ]
    config = configured(setting, **PAIRED, data__golden=as_tokens(setting, rows))
    assert pairs_of(config) == {"1": "2", "2": "44"}


def test_prompts_without_their_solution_are_refused_with_counts(setting: dict[str, str]) -> None:
    prompts(setting, [{"id": "a", "prompt": "1+1="}, {"id": "b", "prompt": "2+2="}, {"id": "c", "prompt": "4+4="}])
    as_text(setting, [{"prompt": "1+1=", "response": "2"}, {"prompt": "2+2=", "response": "4<eos>"}])
    config = configured(setting, **PAIRED, data__golden_problems="skip")
    message = refused(lambda: preflight.check_files(config))
    assert "2 of 3 prompts have no golden solution in" in message
    assert "(1 of its rows were left out for their problems), as row 2 (id 'b')" in message
    assert "buffer.golden_pairing=shuffled" in message
    preflight.check_files(configured(setting, data__golden_problems="skip"))
    taught = configured(setting, **PAIRED, data__golden_problems="skip", buffer__evidence="{}")
    prompts(setting, [{"id": name, "prompt": f"{name}=", "answer": "2"} for name in ("1+1", "2+2")])
    facts = preflight.check_files(taught)  # by something else, where there is none
    assert facts.num_prompts == 2 and facts.data.golden.pairs == {"1+1": 0}
    assert any("1 of 2 prompts have no solution" in remark for remark in facts.data.remarks())


def test_pairing_without_prompts_is_refused(setting: dict[str, str]) -> None:
    sft = {"buffer__prompts_per_step": "0", "buffer__golden_per_step": "4", "loss__student__coef": "0"}
    message = refused(lambda: configured(setting, **PAIRED, **sft, loss__reference__coef="0"))
    assert "golden_pairing=prompt has one solution for each of a step's prompts" in message


# ---- a teacher that is shown the solution ----


def self_distillation(setting: dict[str, str], **changes: str) -> Config:
    return configured(setting, teacher__path=setting["student.path"], teacher__privileged="true", **changes)


def test_a_privileged_teacher_sees_the_solution_before_the_problem(setting: dict[str, str]) -> None:
    prompts(setting, [{"prompt": "2+2="}])
    config = self_distillation(setting)
    _, batch, _ = load(config)
    assert batch["privileged_prompt_tokens"].to_pylist() == [encode("42+2=")]
    assert batch["prompt_tokens"].to_pylist() == [encode("2+2=")]
    shown = looked_at(config).prompt_stream(attempt=0)[0]
    assert shown.privileged_prompt_tokens == tuple(encode("42+2="))


def test_rollouts_take_the_text_of_their_prompt_from_the_prompts_file(setting: dict[str, str]) -> None:
    prompts(setting, [{"prompt": "2+2=", "teacher": "teacher"}])
    config = self_distillation(setting, data__golden=as_tokens(setting, [tokens("2+2=", "4", 1)]))
    assert load(config)[1]["privileged_prompt_tokens"].to_pylist() == [encode("42+2=")]


def test_rollouts_of_unknown_prompts_cannot_be_shown(setting: dict[str, str]) -> None:
    prompts(setting, [{"prompt": "2+2="}])
    rows = [tokens("2+2=", "4", 1), tokens("3=", "3", 1)]
    config = self_distillation(setting, data__golden=as_tokens(setting, rows))
    assert "row 2: has tokens only, and its prompt is not in" in refused(lambda: load(config))


def test_a_privileged_teacher_needs_every_prompts_solution(setting: dict[str, str]) -> None:
    message = refused(lambda: preflight.check_files(self_distillation(setting)))
    assert "2 of 2 prompts have no golden solution" in message
    assert "but a privileged teacher is shown each prompt's own" in message


def test_without_on_policy_prompts_only_golden_rows_are_shown(setting: dict[str, str]) -> None:
    sft = {"buffer__prompts_per_step": "0", "buffer__golden_per_step": "4", "loss__student__coef": "0"}
    config = self_distillation(setting, **sft, loss__reference__coef="0", loss__golden__divergence="forward_kl")
    preflight.check_files(config)
    assert load(config)[1]["privileged_prompt_tokens"].to_pylist() == [encode("42+2=")]


def test_a_privileged_prompt_must_leave_room_for_a_response(setting: dict[str, str]) -> None:
    prompts(setting, [{"prompt": "2+2="}, {"prompt": "1" * 33}])
    rows = [{"prompt": "2+2=", "response": "4"}, {"prompt": "1" * 33, "response": "1" * 12}]
    as_text(setting, rows)
    message = refused(lambda: preflight.check_files(self_distillation(setting)))
    assert "row 2: with its golden solution, its 45 prompt tokens + rollout.max_response_tokens=20 are 65" in message
    preflight.check_files(self_distillation(setting, rollout__max_response_tokens="19"))


def test_a_privileged_golden_row_must_fit_where_the_teacher_scores_it(setting: dict[str, str]) -> None:
    prompts(setting, [{"prompt": "1" * 26}])
    as_text(setting, [{"prompt": "1" * 26, "response": "1" * 19}])
    load(self_distillation(setting))
    scored = self_distillation(setting, loss__golden__divergence="forward_kl")
    assert "are 65 tokens, more than the context of 64" in refused(lambda: load(scored))
