"""The data of one run: every file read, every row made into tokens and every golden row verified once."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from opd_ray.config import Config, Sources, schedule, set_field, written
from opd_ray.data.golden import Golden, check_golden, is_privileged
from opd_ray.data.prompts import DEFAULT_TEACHER, Prompts, PromptStream
from opd_ray.data.rendering import Renderer
from opd_ray.data.rows import read_golden, read_prompts
from opd_ray.errors import InputError
from opd_ray.models.checkpoints import ModelFacts
from opd_ray.tasks import get_task
from opd_ray.tasks.judge import Judge


@contextlib.contextmanager
def _of(field: str) -> Iterator[None]:
    """Names the field that a refused source is of."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{field} {error}") from error


class Dataset:
    """What a run trains on and is measured by. Preflight makes it and looks at it; the run takes from it what it needs,
    in every attempt."""

    def __init__(self, config: Config, *, evaluation_only: bool = False) -> None:
        """Reads prompts and problems, for which no tokenizer is needed. Raises InputError."""
        self._config = config
        self._columns: set[str] = set()
        self.renderer = Renderer(get_task(config.data.task), config.student.path, config.data)
        self.prompts = None if evaluation_only else self._read("data.prompts", config.data.prompts, need_answer=False)
        self.problems = {
            name: self._read(set_field(name), each.path, need_answer=True)
            for name, each in config.evaluation_sets.items()
        }
        """The held-out problems, by set."""
        self._left_out = Counter(dict.fromkeys(("held_out", "over_length", "unsolved"), 0))
        self.notes: list[str] = []
        """What checks found that is no reason to refuse."""
        self.golden: Golden | None = None
        self.shown: Prompts | None = None
        """The prompts with their golden solutions in them, where a privileged teacher is shown those."""
        self.translated: dict[str, Prompts] = {}
        """The prompts in the tokens and the chat template of each teacher with another tokenizer, by name."""

    def _read(self, field: str, sources: Sources, *, need_answer: bool) -> Prompts:
        with _of(field):
            rows = read_prompts(sources, need_answer, self._config.data.columns)
        self._columns |= rows.columns
        return Prompts(f"{field} {written(sources)}", rows, self.renderer)

    def read_golden(self, models: Mapping[str, ModelFacts], eos_token_ids: Sequence[int], judge: Judge) -> None:
        """Reads and checks the golden solutions, where the run needs any. Raises InputError."""
        config = self._config
        if not (config.loads_golden or is_privileged(config)):
            if config.data.golden is None:
                self._check_columns()
            return
        with _of("data.golden"):
            rows = read_golden(config.data.golden, config.data.columns)
        self._columns |= rows.columns
        self._check_columns()
        held_out = list(self.problems.values())
        self.golden = golden = check_golden(config, rows, models, eos_token_ids, self.prompts, held_out, judge)
        if golden.pairs is not None:
            unsolved = [index for index, row in enumerate(self.prompts.rows) if row["id"] not in golden.pairs]
            if not self._config.buffer.evidence:
                self.leave_out("unsolved", unsolved)
            elif unsolved:
                self.notes.append(
                    f"golden: {len(unsolved)} of {len(self.prompts)} prompts have no solution: only the teacher or "
                    "the reward can teach them"
                )
        if is_privileged(config) and config.buffer.prompts_per_step:
            rows = self.prompts.rows
            texts = [golden.solutions[golden.pairs[row["id"]]].text for row in rows]
            self.shown = Prompts(self.prompts.where, rows, self.renderer, texts, self.prompts.numbers)

    def _check_columns(self) -> None:
        """Every source was read: refuses what data.columns names and none of them has."""
        for ours, theirs in self._config.data.columns.items():
            if theirs not in self._columns:
                there = ", ".join(sorted(self._columns))
                raise InputError(
                    f"data.columns.{ours}: no source has a column '{theirs}' (they have: {there}); mend it"
                )

    def leave_out(self, kind: str, indices: Sequence[int]) -> None:
        """Trains on the other prompts alone, and says so. Raises InputError where none is left."""
        if len(indices) == len(self.prompts):
            last = f"the last {len(indices)} of {self.report['rows']} are out as {kind.replace('_', ' ')}"
            raise InputError(f"{self.prompts.where}: no prompt is left to train on; {last}")
        self._left_out[kind] += len(indices)
        self.prompts = self.prompts.without(indices)
        self.prompts.order(self._config.seed, self._config.data.shuffle)  # refuses a source without rows
        if self.shown:
            self.shown = self.shown.without(indices)
        self.translated = {name: prompts.without(indices) for name, prompts in self.translated.items()}

    def translate(self, paths: Mapping[str, str]) -> None:
        """Renders the prompts for teachers with another tokenizer, too: by name, where it is."""
        self.translated = {name: self._translation(self.prompts, path) for name, path in paths.items()}

    def _translation(self, prompts: Prompts, path: str) -> Prompts:
        return Prompts(prompts.where, prompts.rows, self.renderer.of_model(path), numbers=prompts.numbers)

    @property
    def report(self) -> dict[str, int]:
        """Rows of the prompts' sources, used, and left out by kind of problem."""
        used = len(self.prompts or ())
        return {"rows": used + self._left_out.total(), "used": used, **self._left_out}

    def _unused(self) -> Iterator[str]:
        """A line for the prompts and for the golden rows, where some are not used."""
        reports = {"prompts": self.report} | ({"golden": self.golden.report} if self.golden else {})
        for name, report in reports.items():
            left_out = {kind: count for kind, count in report.items() if count and kind not in ("rows", "used")}
            if left_out:
                kinds = ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in left_out.items())
                yield f"{name}: {report['used']} of {report['rows']} rows are used; left out: {kinds}"

    def remarks(self) -> Iterator[str]:
        """What is used as it is, but may not be what was meant: a line each."""
        yield from self._unused()
        buffer, golden = self._config.buffer, self.golden
        of_a_step = {"prompts": (len(self.prompts or ()), buffer.prompts_per_step)}
        if golden and buffer.golden_pairing == "shuffled":
            of_prompts = schedule.highest(buffer.golden_per_prompt) * buffer.prompts_per_step
            of_a_step["golden"] = (golden.report["used"], round(of_prompts) + buffer.golden_per_step)
        for name, (there, asked) in of_a_step.items():
            if there < asked:
                yield f"{name}: a step takes {asked}, but there are {there} rows: some are in it more than once"
        for name, problems in self.problems.items():
            asked = self._config.evaluation_sets[name].num_problems
            if asked and len(problems) < asked:
                yield f"{problems.where}: has {len(problems)} problems, fewer than num_problems={asked}; all are used"
        yield from self.notes

    def prompt_stream(self, attempt: int) -> PromptStream:
        """The training prompts; their responses are sampled with other seeds in every ``attempt``."""
        config = self._config
        return PromptStream(
            self.prompts,
            order=self.prompts.order(config.seed, config.data.shuffle),
            num_responses=config.rollout.responses_per_prompt,
            seed=config.seed + 1_000_003 * attempt,
            shown=self.shown,
            translated=self.translated,
        )

    def problem_streams(self) -> dict[str, PromptStream]:
        """The held-out problems of each set, in the order of its file."""
        first = self.translated.get(DEFAULT_TEACHER)  # who looks at the answers
        return {
            name: PromptStream(problems, shown=first and self._translation(problems, first.renderer.path))
            for name, problems in self.problems.items()
        }
