"""The data of a run is read, made into tokens and verified once, however often it is needed."""

from __future__ import annotations

import math
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from driven_run import SMALL, cast_of, drive
from opd_ray.data import dataset, files
from opd_ray.data.rendering import Renderer
from opd_ray.run import preflight
from opd_ray.tasks.chain import ChainTask
from tiny_checkpoints import configured, make_setting, write_jsonl

PROMPTS = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(4)]
GOLDEN = [{**row, "response": f"#{row['answer']}"} for row in PROMPTS]
PROBLEMS = [{"prompt": f"{i}+2=", "answer": str(i + 2)} for i in range(3)]
METHOD = {
    "loss": SMALL["loss"] | {"golden": {"coef": 1, "divergence": "forward_kl"}},
    "buffer": SMALL["buffer"] | {"golden_per_prompt": 1, "golden_pairing": "prompt"},
    "rollout": {"max_response_tokens": 20, "engine": "torch"},
    "guard": {"level": "rollback"},
    "evaluation": {"num_problems": 3, "every_steps": 2},
}


class Counting(ChainTask):
    """Counts what it is asked about each text."""

    def __init__(self, asked: Counter[tuple[str, str]]) -> None:
        self.asked = asked

    def verify(self, response: str, row: Any) -> bool:
        self.asked["verdict", response] += 1
        return super().verify(response, row)


@pytest.mark.slow
def test_from_preflight_to_the_last_attempt_everything_is_done_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bug: preflight, a task that loaded the golden rollouts, and each attempt read the files for themselves."""
    setting = make_setting(tmp_path)
    rows = {"data.prompts": PROMPTS, "data.golden": GOLDEN, "data.evaluation": PROBLEMS}
    for name in rows:
        write_jsonl(Path(setting[name]), rows[name])
    cast = cast_of(
        **METHOD,
        data={name.removeprefix("data."): setting[name] for name in rows}
        | {"task": "chain", "golden_filter": "correct"},
        student={"path": setting["student.path"]},
        teacher={"path": setting["teacher.path"], "privileged": True},
    )
    monkeypatch.setattr("opd_ray.watch.guard._MOST_NON_FINITE", 1)
    cast.learner_metrics[3] = [{"loss": math.nan}, {}]
    asked: Counter[tuple[str, str]] = Counter()
    read, call = files.read, PreTrainedTokenizerBase.__call__
    monkeypatch.setattr(dataset, "get_task", lambda _: Counting(asked))
    monkeypatch.setattr(files, "read", lambda path, columns: asked.update([("file", str(path))]) or read(path, columns))

    def counted(tokenizer: Any, text: Any, **options: Any) -> Any:
        asked.update(("tokens", each) for each in text if isinstance(text, list))
        return call(tokenizer, text, **options)

    monkeypatch.setattr(PreTrainedTokenizerBase, "__call__", counted)
    tokens = Renderer.tokens

    def rendered(renderer: Renderer, turns: Any) -> list[int]:
        if turns[-1]["content"] != "x":  # what is around a prompt
            asked["prompt", turns[-1]["content"]] += 1
        return tokens(renderer, turns)

    monkeypatch.setattr(Renderer, "tokens", rendered)
    summary, _ = drive(tmp_path / "run", cast, facts=preflight.check_files(cast.config))
    assert [event["level"] for event in summary["guard_events"]] == ["rollback"]
    assert summary["golden"]["used"] == len(GOLDEN)
    # Golden rows are rows of their own: their prompts, bare and privileged, are made beside those of data.prompts.
    assert asked == {
        **{("file", setting[name]): 1 for name in rows},
        **{("prompt", ChainTask().prompt(row)): 2 for row in PROMPTS},
        **{("prompt", ChainTask().privileged_prompt(row, row["response"])): 2 for row in GOLDEN},
        **{("prompt", ChainTask().prompt(row)): 1 for row in PROBLEMS},
        **{(kind, row["response"]): 1 for row in GOLDEN for kind in ("tokens", "verdict")},
    }


def test_what_another_process_has_looked_at_serves_here(tmp_path: Path) -> None:
    config = configured(make_setting(tmp_path))
    facts = preflight.check_files(config)
    sent = pickle.loads(pickle.dumps(facts))
    assert sent == facts
    streams = [(each.data.prompt_stream(attempt=1), each.data.problem_streams()["held_out"]) for each in (facts, sent)]
    for ours, theirs in zip(*streams, strict=True):
        assert [ours[slot] for slot in range(len(ours))] == [theirs[slot] for slot in range(len(theirs))]
    (metas, batch), (other_metas, other_batch) = (each.data.golden.hand_over() for each in (facts, sent))
    assert repr(metas) == repr(other_metas) and batch.equals(other_batch)
