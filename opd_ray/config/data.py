"""The configuration's sections about data: what is read, what is measured on it, and what is logged."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass

from opd_ray.config.binding import NOTHING
from opd_ray.config.method import STRICT
from opd_ray.errors import near

EMBEDDED = "embedded"
"""Value of a path that stands for the small models and data that the package makes itself."""
EMBEDDED_HARD = "embedded-hard"
"""Value of student.path that stands for a larger student of longer problems; "embedded" elsewhere then for theirs."""
EMBEDDED_STUDENTS = (EMBEDDED, EMBEDDED_HARD)
OTHER_END = "embedded-other-end"
"""Value of a teacher's path that stands for the embedded one, were its end token the one that it pads with."""
EMBEDDED_PAIRS = "embedded-pairs"
"""Value of a teacher's path that stands for one with another tokenizer, whose tokens are pairs of characters."""
MISLED = "embedded-misled"
"""Value of a teacher's path that stands for the embedded one, had it learnt some multiplications wrongly."""
OF_SHORT_CHAINS = (EMBEDDED_PAIRS, MISLED)
"""Teachers that student.path=embedded alone can have: they know nothing of the longer problems."""
EMBEDDED_TEACHERS = (EMBEDDED, OTHER_END, EMBEDDED_PAIRS, MISLED)
COLUMNS = ("id", "prompt", "answer", "response", "teacher", "messages")
"""Those of a row that data.columns may find under another name."""
_TAKEN = ("before", "others")
"""What a row has inside besides: no name for a column that a task of one's own gets."""
HELD_OUT = "held_out"
"""Name of the set that data.evaluation is, where there are no evaluation.sets."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SourceConfig:
    """One of several sources of rows."""

    source: str
    """A file, org/name:split of the Hugging Face Hub, or reasoning_gym:NAME."""
    weight: float | None = Field(None, gt=0)
    """Share of an epoch that is drawn from it, relative to the others'; by default every row once."""

    @property
    def made_up(self) -> bool:
        """Are its problems reasoning-gym's?"""
        return self.source.startswith("reasoning_gym:")


Sources = str | tuple[str | SourceConfig, ...]


def listed(sources: Sources) -> tuple[SourceConfig, ...]:
    """Each of them."""
    several = (sources,) if isinstance(sources, str) else sources
    return tuple(SourceConfig(source=each) if isinstance(each, str) else each for each in several)


def written(sources: Sources) -> str:
    """How messages name them."""
    return ", ".join(each.source for each in listed(sources))


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataConfig:
    """Prompts, golden solutions, held-out problems and the task that verifies answers."""

    task: str = ""
    """Asks the questions and verifies answers: math, chain, reasoning_gym or module:Class (a class of your own); by
    default reasoning_gym where prompts or problems are its, which need its verifiers, else math."""
    prompts: Sources = EMBEDDED
    """Training prompts, one per row (prompt, answer, optional id): a JSONL or Parquet file; of the Hugging Face Hub
    org/name[/config]:split[@revision]; reasoning_gym:NAME?size=2000&seed=1; or a list of such, with weights as
    {source: ..., weight: 2}."""
    golden: Sources | None = EMBEDDED
    """Prompts with a complete response each, as text or tokens, from such sources; null for none; embedded:N for
    another number of the embedded 128, embedded:prompts for solutions of the embedded prompts themselves."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Names of columns where they are other than ours, as {prompt: query}; problem, question, messages and OpenR1's
    generations are known. A task of your own gets further ones, as {tests: unit_tests}."""
    system_prompt: str | None = None
    """First turn of every conversation that has no system turn of its own."""
    prompt_template: str = "{prompt}"
    """The user's turn, with {prompt} where the problem stands."""
    template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """What the chat template is given besides, as {enable_thinking: false}."""
    prompt_problems: Literal["refuse", "skip"] = "refuse"
    """Prompts that leave no room for a response, are held-out problems or lack the golden solution that they need: end
    the run, or leave them out and say how many."""
    golden_filter: Literal["none", "correct"] = "none"
    """correct: the task's verifier has to agree with each golden response."""
    golden_problems: Literal["refuse", "skip"] = "refuse"
    """Golden rows without EOS, over length, repetitive (rep(o) of metrics.*), judged wrong or of held-out problems: end
    the run, or leave them out and say how many."""
    evaluation: Annotated[Sources, NOTHING] = EMBEDDED
    """Held-out problems, from such sources, where there are no evaluation.sets."""
    shuffle: bool = True
    """Visit prompts and golden rows in a new random order every epoch, not as they lie in their files."""

    def __post_init__(self) -> None:
        if "{prompt}" not in self.prompt_template:
            raise ValueError(f"prompt_template is {self.prompt_template!r}, without {{prompt}} for the problem")
        for name in ("prompts", "golden", "evaluation"):
            _check_sources(name, getattr(self, name))
        if ":" not in self.task and (unread := [name for name in self.columns if name not in COLUMNS]):
            raise ValueError(f"columns.{unread[0]} is no column that is read{near(unread[0], COLUMNS)}")
        if taken := [name for name in self.columns if name in _TAKEN]:
            raise ValueError(f"columns.{taken[0]} is a name that rows have for something else; choose another")


def _check_sources(name: str, sources: Sources | None) -> None:
    if any(each.source.strip().lower() in ("", "none", "null") for each in listed(sources or ())):
        instead = "null for none" if name == "golden" else "a file or another source"
        raise ValueError(f"{name}={written(sources)} names no source; give {instead}")
    if sources is None or isinstance(sources, str):
        return
    weighted = [each.weight is not None for each in listed(sources)]
    if not weighted:
        raise ValueError(f"{name} is an empty list; give a source")
    if stand_ins := [each.source for each in listed(sources) if each.source.partition(":")[0] == EMBEDDED]:
        raise ValueError(f"{name} has {stand_ins[0]} in a list, which stands alone; give files and other sources")
    held_out = name in ("evaluation", "path")
    if any(weighted) and (held_out or not all(weighted)):
        otherwise = "all of its problems count" if held_out else "give all of its sources one, or none"
        raise ValueError(f"{name} has a source with a weight; {otherwise}")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EvaluationSet:
    """A set of held-out problems, and how they are answered."""

    path: Sources = EMBEDDED
    """Its problems, from sources like those of data.prompts."""
    samples: int = Field(1, ge=1)
    """k: sampled answers to each problem, for avg@k and pass@k."""
    temperature: float | None = Field(None, gt=0)
    """Temperature of the sampled answers; by default evaluation.temperature."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus of the sampled answers; 1 samples from the whole distribution."""
    max_tokens: int | None = Field(None, ge=1)
    """Length budget of an answer; by default the run's longest, of rollout.max_response_tokens."""
    greedy: bool = False
    """Also answer each problem once at temperature 0."""
    num_problems: int | None = Field(None, ge=1)
    """Problems before and after, the first of the file; by default all of them."""

    def __post_init__(self) -> None:
        _check_sources("path", self.path)

    @property
    def sampled_plainly(self) -> bool:
        """May a teacher's view of the sampled answers be compared with the student's? At another temperature the
        student's is of another distribution."""
        return (self.temperature, self.top_p) == (1, 1)


def _named(sets: dict[str, EvaluationSet]) -> dict[str, EvaluationSet]:
    """A name is part of file names and of metrics, on a port that knows letters, digits and underscores."""
    for name in sets:
        if not re.fullmatch(r"[A-Za-z0-9_]+", name) or name == HELD_OUT:
            raise ValueError(f"a set's name has letters, digits and _, and is not {HELD_OUT}; got '{name}'")
    return sets


def set_field(name: str) -> str:
    """The field that has the file of a set's problems."""
    return "data.evaluation" if name == HELD_OUT else f"evaluation.sets.{name}.path"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EvaluationConfig:
    """Held-out accuracy of the student, before, during and after."""

    sets: Annotated[dict[str, EvaluationSet], AfterValidator(_named)] = Field(default_factory=dict)
    """Sets of problems by name, in place of data.evaluation: {NAME: {path, samples, temperature, top_p, max_tokens,
    greedy, num_problems}, ...}, of which path is needed."""
    num_problems: int = Field(512, ge=0)
    """Problems of data.evaluation before and after, the first of the file; 0 evaluates nothing, no sets either."""
    every_steps: int = Field(50, ge=0)
    """Evaluate during training every so many steps; 0 for never."""
    num_problems_during: int = Field(128, ge=1)
    """Problems of an evaluation during training, of each set at most."""
    temperature: float = Field(1.0, gt=0)
    """Temperature of the sampled answers (the greedy ones have none), where a set has no other."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MetricsConfig:
    """What is logged, and what counts as repetitive."""

    repetition_window_chars: int | None = Field(None, ge=1)
    """L of rep(o): the tail of a response that is compressed; by default two characters for each token of the length
    budget, about half of a truncated response, at most the paper's 10 000."""
    repetition_ratio: float | None = Field(None, gt=1)
    """τ of rep(o): repetitive when the tail shrinks by more than this factor; by default the paper's 10 at 10 000
    characters and less for shorter windows, of which zlib saves less."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ("tensorboard",)
    """Where curves, events and the summary go besides the run directory; projects and keys are those of their own
    environment variables (WANDB_API_KEY, MLFLOW_TRACKING_URI, ...)."""
    trace: bool = False
    """Write what every actor is at to trace.json, for Perfetto and the report: the newest 32 MB, and as much from
    before them in trace-before.json."""
    rollout_log_every_steps: int = Field(10, ge=0)
    """Write the rollouts of every n-th step, of the first and of those behind a checkpoint (what opd-ray replay can
    take again) to rollouts/*.parquet; 1 for all, 0 for none."""
    rollout_log_keep: int = Field(1000, ge=1)
    """Files of the rollout log, the newest, that are kept; older ones are deleted."""
