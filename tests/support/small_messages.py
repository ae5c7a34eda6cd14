"""Small messages for unit tests."""

from opd_ray.messages import Entry, RolloutMeta


def meta(slot: int = 0, **changes) -> RolloutMeta:
    values = {
        "rollout_id": f"{slot}-0",
        "slot": slot,
        "prompt_id": str(slot),
        "source": "student",
        "num_prompt_tokens": 4,
        "num_response_tokens": 8,
        "finish_reason": "stop",
        "correct": True,
        "repetitive": False,
        "oldest_version": 0,
        "mean_version": 0.0,
        "mean_behaviour_logprob": -1.0,
    }
    return RolloutMeta(**(values | changes))


def entry(slot: int = 0, row: int = 0, **changes) -> Entry:
    return Entry(meta(slot, **changes), row, rollouts=f"rollouts-{slot}", scores={})


def golden(index: int) -> Entry:
    return entry(-1, index, rollout_id=f"golden-{index}", source="golden", oldest_version=-1)
