"""Makes what steps train on: rollouts sampled by generators, scored by teachers and reference.

Payloads stay where they were made; one that is gone with its node before it was trained on is made again.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from opd_ray.buffer.evidence import Evidence
from opd_ray.buffer.mixture import Mixture
from opd_ray.buffer.replay import ReplayBuffer
from opd_ray.config import Config
from opd_ray.data.prompts import PromptStream
from opd_ray.messages import Entry, PromptGroup, RolloutMeta, SamplingSettings, Source, Strength
from opd_ray.rooms import Rooms
from opd_ray.rooms.pool import Pool
from opd_ray.rooms.together import together, until_whole
from opd_ray.score.requests import roles_of, score_requests
from opd_ray.status.state import Place


class Filling:
    """Asks the rooms for the rollouts of slots, and for the scores of golden ones."""

    def __init__(
        self,
        config: Config,
        rooms: Rooms,
        prompts: PromptStream,
        mixture: Mixture,
        stop_token_ids: tuple[int, ...],
        lost: Callable[[str], None],
        horizon: Callable[[int], float] = lambda step: 1.0,
        evidence: Evidence | None = None,
    ) -> None:
        """``lost(what)`` is told of payloads that are gone and made again; ``horizon(step)`` is the share of the
        configured one that rollouts of a 0-based step get. ``evidence`` has the teacher's responses judged."""
        self._config, self._rooms, self._prompts, self._mixture = config, rooms, prompts, mixture
        self._stop_token_ids = stop_token_ids
        self._requests = score_requests(config, stop_token_ids)
        self.places: dict[int, Place] = {}
        """Where the slots are that are being filled."""
        self._lost, self._horizon, self._evidence = lost, horizon, evidence
        self._ahead: dict[int, tuple[list[Entry], asyncio.Task[list[Entry]]]] = {}
        """Golden rollouts that are scored ahead of their step, by step."""

    async def of(self, slots: Sequence[int]) -> list[Entry]:
        """Every rollout of some slots of one step, scored."""
        config = self._config
        per_step = config.buffer.prompts_per_step
        step, mix = slots[0] // per_step, self._mixture.at(slots[0] // per_step)
        prompts = [self._prompts[slot] for slot in slots]
        budget = SamplingSettings(
            temperature=config.rollout.temperature,
            top_p=config.rollout.top_p,
            max_response_tokens=config.rollout.budget(step),
            stop_token_ids=self._stop_token_ids,
            top_k=config.student_top_k,
            repetition_rule=config.rollout.repetition_rule,
        )
        writing = dataclasses.replace(budget, temperature=config.rollout.teacher_temperature, top_p=1.0, top_k=0)
        calls = []
        # Prompts of one teacher go together, so that a payload has one route.
        for name in sorted({prompt.teacher for prompt in prompts}):
            routed = [prompt for prompt in prompts if prompt.teacher == name]
            if sampled := self._up_to_the_horizon(_asking(routed, lambda _: mix.student_per_prompt), step):
                calls.append(self._sample(self._rooms.generators, "student", sampled, budget))
            written = {each.slot: mix.teacher_written(each.slot % per_step, per_step) for each in routed}
            # Only the first teacher writes; what it would write for another one's prompts is not that one's.
            if name == "teacher" or config.loss.teachers == "weighted":
                calls.append(self._by_the_teacher(routed, written, writing))
        rollouts = await together(*calls)
        for slot in slots:
            self.places.pop(slot, None)
        return [entry for entries in rollouts for entry in entries]

    async def _by_the_teacher(
        self, prompts: Sequence[PromptGroup], written: Mapping[int, int], sampling: SamplingSettings
    ) -> list[Entry]:
        """What the teacher is to have ``written`` for each slot, if wanted; with evidence also what is only judged."""
        wanted, found = self._config.buffer.teacher_filter, dict[int, list[Entry]]()

        def fits(meta: RolloutMeta) -> bool:
            right = meta.correct if wanted == "correct" else not meta.truncated
            return wanted == "none" or (right and not meta.repetitive)

        def due(prompt: PromptGroup) -> int:
            seen = [entry.meta for entry in found.get(prompt.slot, ())]
            left = 0 if seen else written[prompt.slot]
            return max(left, self._evidence.probes(prompt.prompt_id, seen)) if self._evidence else left

        for _ in range(2 if self._evidence else 1):  # again where the first ones leave it open
            first = [replace(each, first_response=len(found.get(each.slot, ()))) for each in prompts]
            if asked := _asking(first, due):
                for entry in await self._sample(self._rooms.teacher_generators, "teacher", asked, sampling):
                    found.setdefault(entry.meta.slot, []).append(entry)
        if self._evidence is None:
            return [entry for own in found.values() for entry in own if fits(entry.meta)]
        return [
            entry if at < written[slot] and fits(entry.meta) else replace(entry, taught_by="nothing")
            for slot, own in found.items()
            for at, entry in enumerate(own)
        ]

    def _up_to_the_horizon(self, prompts: list[PromptGroup], step: int) -> list[PromptGroup]:
        """The student's prompts of a step; the first of the step are the probes."""
        rollout, per_step = self._config.rollout, self._config.buffer.prompts_per_step
        horizon = rollout.horizon_at(step, self._horizon(step))
        if horizon is None:
            return prompts
        probes = rollout.num_probes(per_step)
        return [
            dataclasses.replace(prompt, horizon=horizon, probe=prompt.slot % per_step < probes) for prompt in prompts
        ]

    def golden(self, step: int, buffer: ReplayBuffer, strength: Strength) -> list[Entry]:
        """The step's golden rollouts, which are taken from the buffer's."""
        return buffer.golden.take(*self._golden_of(step, buffer, strength))

    def score_ahead(self, step: int, buffer: ReplayBuffer, strength: Strength, tasks: asyncio.TaskGroup) -> None:
        """Begins with the scores of the golden rollouts that the next step has unless the guard asks for others.

        Not where one of the scorers follows the student: it answers by the weights of the step.
        """
        roles = self._requests.get("golden", {})
        if not roles or roles.keys() & self._rooms.followers.keys():
            return
        if golden := buffer.golden.next(*self._golden_of(step, buffer, strength)):
            what = f"golden rollouts of step {step}"
            scored = until_whole(what, lambda: self._scored(golden), self._lost)
            self._ahead[step] = golden, tasks.create_task(scored, name=what)

    async def with_scores(self, step: int, golden: Sequence[Entry]) -> list[Entry]:
        """A step's golden rollouts with the scores that their loss compares with, if it does: those that were made
        ahead, the first time."""
        ahead, scored = self._ahead.pop(step, (None, None))
        if scored is not None:
            if ahead == golden:
                return await scored
            scored.cancel()
        return await self._scored(golden)

    def _golden_of(self, step: int, buffer: ReplayBuffer, strength: Strength) -> tuple[int, list[str]]:
        """How many a step has, and the prompts that they belong to where they are paired."""
        paired = self._config.buffer.golden_pairing == "prompt"
        prompt_ids = [self._prompts[slot].prompt_id for slot in buffer.slots_of(step)] if paired else []
        return self._mixture.at(step, strength).num_golden if len(buffer.golden) else 0, prompt_ids

    async def _scored(self, golden: Sequence[Entry]) -> list[Entry]:
        if not self._requests.get("golden"):
            return list(golden)
        scored: list[Entry] = []
        for name in sorted({entry.meta.teacher for entry in golden}):
            routed = [entry for entry in golden if entry.meta.teacher == name]
            blocks = {block: at for at, block in enumerate(dict.fromkeys(entry.rollouts for entry in routed))}
            rows = [(blocks[entry.rollouts], entry.row) for entry in routed]
            _, rollouts = await self._rooms.recorder.call("select", rows, *blocks)
            scores = await self._score("golden", name, rollouts)
            scored += [Entry(entry.meta, row, rollouts, scores) for row, entry in enumerate(routed)]
        return scored

    async def _sample(
        self, pool: Pool, source: Source, groups: Sequence[PromptGroup], sampling: SamplingSettings
    ) -> list[Entry]:
        """Scored rollouts of some prompts of one teacher, by one source."""
        slots = [group.slot for group in groups]

        async def scored() -> list[Entry]:
            self.places |= dict.fromkeys(slots, "generate")
            metas, rollouts = await pool.call("generate", groups, sampling)
            self.places |= dict.fromkeys(slots, "score")
            scores = await self._score(source, groups[0].teacher, rollouts)
            return [Entry(meta, row, rollouts, scores) for row, meta in enumerate(metas)]

        return await until_whole(f"rollouts of slots {slots}", scored, self._lost)

    async def _score(self, source: Source, teacher: str, rollouts: Any) -> dict[str, Any]:
        """Role to scores of a payload, from all that the source's loss compares with, at once."""
        requests = roles_of(self._config, self._requests.get(source, {}), teacher)
        answers = await together(
            *(self._rooms.scorers[role].call("score", rollouts, request) for role, request in requests.items())
        )
        return {role: scores for role, (_, scores) in zip(requests, answers, strict=True)}


def _asking(prompts: Sequence[PromptGroup], responses: Any) -> list[PromptGroup]:
    """The prompts that get a response at all, with as many as ``responses(prompt)``."""
    asked = [dataclasses.replace(prompt, num_responses=responses(prompt)) for prompt in prompts]
    return [prompt for prompt in asked if prompt.num_responses]
