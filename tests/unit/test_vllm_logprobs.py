"""The arrays that stand in the place of vLLM's lists of log-probs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from opd_ray.models.vllm import LogprobsAsArrays


def output(logprobs: Any, ids: Any, *, prompt: bool = False) -> SimpleNamespace:
    """vLLM's EngineCoreOutput, with what the sampler gave or what a prefill did."""
    both = SimpleNamespace(logprobs=logprobs, logprob_token_ids=ids)
    return SimpleNamespace(
        new_logprobs=None if prompt else both,
        new_prompt_logprobs_tensors=both if prompt else None,
        prompt_token_id_logprobs=None,
    )


def rows(number: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(number)
    return random.normal(size=(number, width)).astype(np.float32), random.integers(0, 2**31, (number, width), np.int32)


def test_what_steps_give_is_kept_in_their_order_however_much_it_is() -> None:
    logprobs, ids = rows(1000, 6)
    kept = LogprobsAsArrays(5, None)
    for start, end in [(0, 1), (1, 2), (2, 5), *((at, at + 1) for at in range(5, 600)), (600, 1000)]:
        kept.update_from_output(output(logprobs[start:end], ids[start:end]))
    assert kept.prompt_logprobs is None
    for found, expected in zip(kept.logprobs.last(1000), (logprobs, ids), strict=True):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(kept.logprobs.last(3)[1], ids[-3:])


def test_a_batch_with_a_request_that_wants_more_is_cut_to_ones_own() -> None:
    logprobs, ids = rows(4, 9)
    kept = LogprobsAsArrays(0, None)
    kept.update_from_output(output(logprobs, ids))
    np.testing.assert_array_equal(kept.logprobs.last(4)[0], logprobs[:, :1])


def test_prompts_come_as_tensors_in_one_part_or_several() -> None:
    logprobs, ids = rows(300, 3)
    kept = LogprobsAsArrays(None, 2)
    for part in (slice(0, 128), slice(128, 300)):
        tensors = torch.from_numpy(logprobs[part]), torch.from_numpy(ids[part]).long()
        kept.update_from_output(output(*tensors, prompt=True))
    assert kept.logprobs is None
    np.testing.assert_array_equal(kept.prompt_logprobs.last(200)[0], logprobs[100:])
    np.testing.assert_array_equal(kept.prompt_logprobs.last(300)[1], ids)


def test_log_probs_that_did_not_come_are_said_and_not_made_up() -> None:
    kept = LogprobsAsArrays(1, None)
    kept.update_from_output(output(*rows(3, 2)))
    with pytest.raises(RuntimeError, match="vLLM gave log-probs of 3 tokens, expected those of 4"):
        kept.logprobs.last(4)
