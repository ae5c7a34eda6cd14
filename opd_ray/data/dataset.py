"""The data of one run: every file read, every row made into tokens and every golden row verified once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from opd_ray.config import Config, set_field
from opd_ray.data.golden import Golden, check_golden, is_privileged
from opd_ray.data.prompts import Prompts, PromptStream, Shuffled
from opd_ray.data.rendering import Renderer
from opd_ray.data.rows import read_prompts
from opd_ray.models.checkpoints import ModelFacts
from opd_ray.tasks import get_task
from opd_ray.tasks.judge import Judge


class Dataset:
    """What a run trains on and is measured by. Preflight makes it and looks at it; the run takes from it what it needs,
    in every attempt."""

    def __init__(self, config: Config, *, evaluation_only: bool = False) -> None:
        """Reads prompts and problems, for which no tokenizer is needed. Raises InputError."""
        self._config = config
        self.renderer = Renderer(get_task(config.data.task), config.student.path, config.data)
        self.prompts = None if evaluation_only else self._read("data.prompts", config.data.prompts, need_answer=False)
        self.problems = {
            name: self._read(set_field(name), each.path, need_answer=True)
            for name, each in config.evaluation_sets.items()
        }
        """The held-out problems, by set."""
        self.golden: Golden | None = None
        self.shown: Prompts | None = None
        """The prompts with their golden solutions in them, where a privileged teacher is shown those."""

    def _read(self, field: str, path: str, *, need_answer: bool) -> Prompts:
        return Prompts(f"{field} {path}", read_prompts(path, need_answer, self._config.data.columns), self.renderer)

    def read_golden(self, models: Mapping[str, ModelFacts], eos_token_ids: Sequence[int], judge: Judge) -> None:
        """Reads and checks the golden solutions, where the run needs any. Raises InputError."""
        config = self._config
        if not (config.loads_golden or is_privileged(config)):
            return
        self.golden = golden = check_golden(config, models, eos_token_ids, self.prompts, judge)
        if is_privileged(config) and config.buffer.prompts_per_step:
            rows = self.prompts.rows
            texts = [golden.solutions[golden.pairs[row["id"]]].text for row in rows]
            self.shown = Prompts(self.prompts.where, rows, self.renderer, texts)

    def prompt_stream(self, attempt: int) -> PromptStream:
        """The training prompts; their responses are sampled with other seeds in every ``attempt``."""
        config = self._config
        return PromptStream(
            self.prompts,
            order=Shuffled(len(self.prompts), config.seed, config.data.shuffle),
            num_responses=config.rollout.responses_per_prompt,
            seed=config.seed + 1_000_003 * attempt,
            shown=self.shown,
        )

    def problem_streams(self) -> dict[str, PromptStream]:
        """The held-out problems of each set, in the order of its file."""
        return {name: PromptStream(problems) for name, problems in self.problems.items()}
