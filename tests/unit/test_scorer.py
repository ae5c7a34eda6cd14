"""The scorer around an engine: which columns it reads, what it refuses, what goes first, what another run changes."""

import asyncio
import threading
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch

from opd_ray.config import ScorerConfig
from opd_ray.errors import EngineFailed, RunError, WeightSyncError
from opd_ray.messages import ROLLOUT_SCHEMA, SCORE_SCHEMA, ScoreRequest, WeightManifest, score_schema
from opd_ray.score.engine import Scores
from opd_ray.score.scorer import Scorer
from uniform_scores import UniformScores

CONFIG = ScorerConfig(path="first")
NOTHING = WeightManifest(0, (), (), ())


class Recording(UniformScores):
    """Keeps what it was asked."""

    def __init__(self):
        super().__init__()
        self.sequences = []

    def score(self, sequences, request):
        self.sequences.append(sequences)
        return super().score(sequences, request)


def make(engine=None, scorer=CONFIG, member=False):
    engine = engine or Recording()
    return Scorer(make_engine=lambda: engine, scorer=scorer, member=member), engine


def rollouts(*sizes, top_k=0, privileged=True):
    """A row for each (prompt, response) size."""
    rows = [
        {
            "rollout_id": f"{index}-0",
            "slot": index,
            "prompt_id": str(index),
            "source": "student",
            "prompt_tokens": list(range(1, 1 + prompt)),
            "response_tokens": list(range(10, 10 + response)),
            "behaviour_logprobs": [-1.0] * response,
            "weight_versions": [0] * response,
            "topk_ids": [token + k for token in range(response) for k in range(top_k)],
            "privileged_prompt_tokens": [30, 31] if privileged else [],
            "finish_reason": "stop",
            "correct": True,
            "text": "",
        }
        for index, (prompt, response) in enumerate(sizes)
    ]
    return pa.RecordBatch.from_pylist(rows, schema=ROLLOUT_SCHEMA)


def score(scorer, batch, **request):
    return asyncio.run(scorer.score(batch, ScoreRequest(**request)))


def test_what_was_not_asked_for_is_empty():
    scorer, _ = make()
    tokens, scores = score(scorer, rollouts((2, 3), (4, 5)))
    assert tokens == 8
    assert scores.schema == SCORE_SCHEMA
    assert scores["rollout_id"].to_pylist() == ["0-0", "1-0"]
    lengths = {name: scores[name].value_lengths().to_pylist() for name in SCORE_SCHEMA.names[1:]}
    empty = [0, 0]
    assert lengths == dict.fromkeys(SCORE_SCHEMA.names[1:], empty) | {"logprobs": [3, 5]}


def test_everything_at_once_is_position_major():
    scorer, engine = make()
    _, scores = score(scorer, rollouts((2, 3), top_k=4), top_k=2, given=True, hidden=True, stop_token_ids=(1, 2))
    lengths = {name: scores[name].value_lengths().to_pylist() for name in SCORE_SCHEMA.names[1:]}
    expected = {
        "logprobs": 3,
        "topk_ids": 6,
        "topk_logprobs": 6,
        "given_logprobs": 12,
        "stop_logprobs": 3,
        "hidden": 12,
        "spans": 0,  # no engine's
    }
    assert lengths == {name: [length] for name, length in expected.items()}
    assert engine.sequences[0][0].given_ids.tolist() == [[0, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 5]]


def test_half_precision_states_stay_in_half_precision():
    class Half(Recording):
        def score(self, sequences, request):
            return [replace(each, hidden=each.hidden.astype(np.float16)) for each in super().score(sequences, request)]

    scorer, _ = make(Half())
    _, scores = score(scorer, rollouts((2, 3)), hidden=True)
    assert scores.schema == score_schema(pa.float16())
    _, scores = score(scorer, rollouts((2, 3)))
    assert scores.schema == SCORE_SCHEMA


def test_states_beyond_half_precision_are_reported():
    class Overflowing(Recording):
        def score(self, sequences, request):
            return [
                replace(each, hidden=each.hidden.astype(np.float16) + np.inf)
                for each in super().score(sequences, request)
            ]

    scorer, _ = make(Overflowing())
    with pytest.raises(RunError, match="rollout 0-0: its hidden states are not finite in float16; score with dtype"):
        score(scorer, rollouts((2, 3)), hidden=True)


def test_a_batch_larger_than_a_column_is_refused(monkeypatch):
    monkeypatch.setattr("opd_ray.score.scorer.MOST_VALUES", 7)
    scorer, _ = make()
    with pytest.raises(RunError, match="2 rollouts have 8 values of logprobs.*lower rollout.prompts_per_call"):
        score(scorer, rollouts((2, 3), (4, 5)))


def test_a_privileged_scorer_reads_the_prompt_with_the_solution():
    scorer, engine = make()
    score(scorer, rollouts((4, 5)), privileged=True)
    assert engine.sequences[0][0].prompt_tokens.tolist() == [30, 31]
    assert engine.sequences[0][0].response_tokens.tolist() == [10, 11, 12, 13, 14]


def test_rollouts_without_what_is_needed_are_named():
    scorer, _ = make()
    with pytest.raises(RunError, match="rollout 0-0 has no privileged_prompt_tokens"):
        score(scorer, rollouts((4, 5), privileged=False), privileged=True)
    with pytest.raises(RunError, match="rollout 0-0 carries no topk_ids"):
        score(scorer, rollouts((4, 5)), given=True)


def test_an_error_of_the_engine_reaches_its_caller_and_the_next_call_works():
    class Picky(Recording):
        def score(self, sequences, request):
            if request.hidden:
                raise ValueError("no hidden states here")
            return super().score(sequences, request)

    scorer, _ = make(Picky())
    with pytest.raises(ValueError, match="no hidden states here"):
        score(scorer, rollouts((2, 3)), hidden=True)
    assert score(scorer, rollouts((2, 3)))[0] == 3


def test_new_weights_come_in_beside_a_batch_and_are_installed_ahead_of_those_that_wait():
    order, busy, may_go_on = [], threading.Event(), threading.Event()

    class Slow(Recording):
        def score(self, sequences, request):
            order.append(f"score {len(order)}")
            busy.set()
            assert may_go_on.wait(timeout=10)
            return super().score(sequences, request)

    async def scenario():
        scorer, _ = make(Slow(), replace(CONFIG, update="periodic"), member=True)
        scorer._follower.receive = lambda manifest: order.append(f"receive {manifest.version}")
        scorer._follower.install = lambda: order.append("install")
        batches = [asyncio.create_task(scorer.score(rollouts((2, 3)), ScoreRequest())) for _ in range(3)]
        assert await asyncio.to_thread(busy.wait, 10)
        update = asyncio.create_task(scorer.update_weights(NOTHING))
        async with asyncio.timeout(10):
            while not scorer._worker._num_urgent:  # it came in, and waits for the batch
                await asyncio.sleep(0.001)
        may_go_on.set()
        await asyncio.gather(update, *batches)

    asyncio.run(scenario())
    assert order == ["score 0", "receive 0", "install", "score 3", "score 4"]


class TestHalfUpdated:
    """The bug: after an update that broke off, a scorer scored with weights of which a part were the next ones."""

    WEIGHTS = WeightManifest(1, ("a", "b"), ("float32", "float32"), ((2,), (2,)))

    def scorer(self):
        """One that follows two parameters; the first broadcast brings only one, the second is installed half."""
        parameters = {name: torch.nn.Parameter(torch.zeros(2)) for name in "ab"}
        receives, installs = [True, False, False], [True, False]

        class Follows(Recording):
            def parameters(self):
                return parameters

            def score(self, sequences, request):
                seen.append([each[0].item() for each in parameters.values()])
                return super().score(sequences, request)

        def receive(manifest, memory=None):
            yield "a", torch.ones(2)
            if receives.pop(0):
                raise WeightSyncError("no sign of life")
            yield "b", torch.ones(2)

        def blend(name, tensor, keep):
            if name == "b" and installs.pop(0):
                raise RuntimeError("out of memory")
            parameters[name].data.copy_(tensor)

        seen = []
        scorer, engine = make(Follows(), replace(CONFIG, update="periodic", update_every_steps=1), member=True)
        scorer._follower._transfer.receive, scorer._follower._blend = receive, blend
        return scorer, engine, seen

    async def broken(self, scorer):
        for error in WeightSyncError, RuntimeError:
            with pytest.raises(error):
                await scorer.update_weights(self.WEIGHTS)

    def test_a_broadcast_that_broke_off_changes_nothing(self):
        async def scenario():
            scorer, _, seen = self.scorer()
            with pytest.raises(WeightSyncError):
                await scorer.update_weights(self.WEIGHTS)
            await asyncio.wait_for(scorer.score(rollouts((2, 3)), ScoreRequest()), 10)
            assert seen == [[0.0, 0.0]]

        asyncio.run(scenario())

    def test_batches_wait_until_an_update_succeeds(self):
        async def scenario():
            scorer, _, seen = self.scorer()
            await self.broken(scorer)
            batches = [asyncio.create_task(scorer.score(rollouts((2, 3)), ScoreRequest())) for _ in range(2)]
            await asyncio.sleep(0.05)
            assert seen == []
            await scorer.update_weights(self.WEIGHTS)
            await asyncio.wait_for(asyncio.gather(*batches), 10)
            assert seen == [[1.0, 1.0]] * 2

        asyncio.run(scenario())

    def test_another_run_begins_with_the_checkpoint(self):
        async def scenario():
            scorer, engine, _ = self.scorer()
            await self.broken(scorer)
            await asyncio.wait_for(scorer.begin(scorer._scorer), 10)
            assert engine.loaded == ["first"]
            assert (await asyncio.wait_for(scorer.score(rollouts((2, 3)), ScoreRequest()), 10))[0] == 3

        asyncio.run(scenario())


def test_a_fixed_scorer_has_no_weights_to_update():
    scorer, _ = make()
    with pytest.raises(RunError, match="no member of the weight-transfer group"):
        asyncio.run(scorer.update_weights(NOTHING))


class TestAnotherRun:
    def test_the_same_checkpoint_is_not_loaded_again(self):
        scorer, engine = make()
        asyncio.run(scorer.begin(CONFIG))
        assert engine.loaded == []

    def test_another_checkpoint_is(self):
        scorer, engine = make()
        asyncio.run(scorer.begin(replace(CONFIG, path="second")))
        asyncio.run(scorer.begin(replace(CONFIG, path="second")))
        assert engine.loaded == ["second"]

    def test_one_that_followed_a_student_begins_again_from_its_checkpoint(self):
        following = replace(CONFIG, update="average")
        scorer, engine = make(scorer=following, member=True)
        asyncio.run(scorer.begin(following))
        assert engine.loaded == []
        scorer._follower.version = 7
        asyncio.run(scorer.begin(following))
        assert engine.loaded == ["first"]
        assert scorer._follower.version == 0


def test_scores_of_no_rollouts_have_no_rows():
    scorer, _ = make()
    tokens, scores = score(scorer, rollouts(), top_k=3, hidden=True)
    assert (tokens, len(scores)) == (0, 0)
    assert isinstance(scores, pa.RecordBatch)
    assert Scores.__dataclass_fields__.keys() == set(SCORE_SCHEMA.names) - {"rollout_id"}


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        # The bug: an error of the device ended the run, although another worker might have answered.
        (RuntimeError("device-side assert"), (EngineFailed, "RuntimeError: device-side assert")),
        (ValueError("longer than the model's context"), (ValueError, "longer than")),
    ],
)
def test_an_engine_that_breaks_costs_the_worker_and_one_that_refuses_a_rollout_does_not(raised, expected):
    class Failing(Recording):
        def score(self, sequences, request):
            raise raised

    scorer, _ = make(Failing())
    with pytest.raises(expected[0], match=expected[1]):
        score(scorer, rollouts((2, 3)))
