"""What a run trains on and is measured by: prompts, golden rollouts, held-out problems."""

from __future__ import annotations

from opd_ray.buffer.replay import GoldenSet
from opd_ray.config import Config
from opd_ray.data.files import read_prompts
from opd_ray.data.golden import is_privileged, load_solutions, pair
from opd_ray.data.prompts import PromptStream, Shuffled, prompt_stream
from opd_ray.messages import Entry
from opd_ray.placement import launch
from opd_ray.run.preflight import Preflight


class Materials:
    """The data of one run. Golden rollouts are loaded once, for all its attempts."""

    def __init__(self, config: Config, facts: Preflight) -> None:
        self._config, self._facts = config, facts
        self._golden: list[Entry] | None = None
        self.golden_report: dict[str, int] = {}
        """Rows of the golden file, used, and left out by kind of problem."""

    async def load(self) -> None:
        """Loads the golden rollouts into the object store, where that was not done yet."""
        if self._golden is not None or not self._config.loads_golden:
            return
        self._golden, report = await launch.load_golden_entries(self._config, self._facts.eos_token_ids)
        self.golden_report = report
        left_out = {kind: count for kind, count in report.items() if count and kind not in ("rows", "used")}
        if left_out:
            kinds = ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in left_out.items())
            print(f"golden: {report['used']} of {report['rows']} rows are used; left out: {kinds}", flush=True)

    def golden(self) -> GoldenSet:
        """The golden rollouts from the first on."""
        config, entries = self._config, self._golden or []
        order = Shuffled(len(entries), config.seed + 1)
        if config.buffer.golden_pairing != "prompt":
            return GoldenSet(entries, order)
        prompts = read_prompts(config.data.prompts, need_answer=False)
        return GoldenSet(entries, order, pair(prompts, [entry.meta for entry in entries]))

    def prompts(self, attempt: int) -> PromptStream:
        """The training prompts; their responses are sampled with other seeds in every ``attempt``."""
        config = self._config
        shown = load_solutions(config, self._facts.eos_token_ids) if is_privileged(config) else None
        responses = config.rollout.responses_per_prompt
        return prompt_stream(config, config.data.prompts, responses, shuffled=True, golden=shown, attempt=attempt)

    def problems(self) -> PromptStream:
        """The held-out problems in the order of their file."""
        return prompt_stream(self._config, self._config.data.evaluation, 1, shuffled=False)
