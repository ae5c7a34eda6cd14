"""Rollouts of a teacher, sampled once and kept as a file: golden data for sequence-level distillation.

The file is Parquet of ROLLOUT_SCHEMA, as the rollout log is, and data.golden takes it as it is.
"""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from opd_ray.config import Config
from opd_ray.data.prompts import Prompts, PromptStream
from opd_ray.disk import whole
from opd_ray.evaluation.evaluate import chunked
from opd_ray.messages import SamplingSettings
from opd_ray.placement import launch
from opd_ray.rooms.together import together
from opd_ray.run.preflight import Preflight


@dataclasses.dataclass(frozen=True)
class Rollouts:
    """A file of teacher rollouts, raw: neither verified nor filtered."""

    path: Path

    @property
    def truncation_rate(self) -> float:
        """Share of them that did not end by themselves: what a perfect imitation would truncate."""
        return pc.mean(pc.not_equal(pq.read_table(self.path)["finish_reason"], "stop")).as_py()

    @property
    def accuracy(self) -> float:
        """Share of them that the task's verifier accepts."""
        return pc.mean(pq.read_table(self.path)["correct"]).as_py()

    def subset(self, count: int) -> Path:
        """A file of the first ``count`` of them, beside this one."""
        path = self.path.with_name(f"{self.path.stem}-{count}.parquet")
        if not path.exists():
            with whole(path) as partial:
                pq.write_table(pq.read_table(self.path).slice(0, count), partial)
        return path


async def sample(config: Config, facts: Preflight, path: Path, count: int) -> None:
    """One response of the teacher to each of the first ``count`` prompts of ``data.prompts``, into ``path``."""
    as_student = dataclasses.replace(config, student=dataclasses.replace(config.student, path=config.teacher.path))
    pool = launch.start_generators(as_student, facts.max_context_tokens, alone=True)
    settings = SamplingSettings(
        temperature=config.rollout.teacher_temperature,
        top_p=1.0,
        max_response_tokens=config.rollout.longest_response,
        stop_token_ids=facts.eos_token_ids,
        repetition_rule=config.rollout.repetition_rule,
    )
    asked = facts.data.prompts
    renderer = asked.renderer.of_model(config.teacher.path)
    prompts = PromptStream(Prompts(asked.where, asked.rows[:count], renderer), seed=config.seed + 2)
    try:
        await pool.up(config.deadlines.start_s)
        chunks = chunked([prompts[slot] for slot in range(len(prompts))], pool, config.rollout.max_num_seqs)
        answers = await together(*(pool.call("generate", chunk, settings) for chunk in chunks))
        tables = await asyncio.gather(*(payload for _, payload in answers))
    finally:
        pool.stop()
    with whole(path) as partial:
        pq.write_table(pa.Table.from_batches(tables), partial)
