"""Teachers with another tokenizer than the student: which they are, what they cannot be asked, and how they are asked.

Spans of text are all that two tokenizers have in common (:mod:`opd_ray.score.translation`), so that whatever compares
distributions over tokens is refused here. Each refusal is an InputError of one line.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from opd_ray.config import Config
from opd_ray.data.dataset import Dataset
from opd_ray.data.prompts import Prompts
from opd_ray.errors import InputError
from opd_ray.models.checkpoints import Difference, ModelFacts, disagreement
from opd_ray.models.texts import TokenTexts
from opd_ray.score.translation import Translation

_SAMPLE = 16
"""Prompts on which the two tokenizers are compared."""
_ROOM = 2.0
"""Times as many tokens as the prompts let expect are a response's room; what is beyond is not scored, and logged."""
_NO_LIMIT = 2**20
_OPEN, _TAIL_TOKENS = "<think>", 8


def others(config: Config, models: Mapping[str, ModelFacts]) -> dict[str, Difference]:
    """The teachers with another tokenizer, by role, and in what it differs."""
    student = models["student"]
    found = {role: disagreement(student, models[role]) for role in config.teachers.keys() & models.keys()}
    return {role: difference for role, difference in found.items() if difference}


def check(config: Config, models: Mapping[str, ModelFacts]) -> dict[str, Difference]:
    """``others``, none of which is asked for what only a teacher with the student's tokenizer could say."""
    found = others(config, models)
    for role, difference in found.items():
        if (problem := next(_problems(config, role), None)) is not None:
            raise InputError(
                f"{models[role].name}: has another tokenizer than the student ({difference}), and {problem}; or take a "
                "teacher with the student's"
            )
    return found


def _problems(config: Config, role: str) -> Iterator[str]:
    """What it could not say, and what to ask instead."""
    loss, teacher = config.loss, config.teachers[role]
    if config.buffer.has_teacher_write and role == "teacher":
        yield (
            "what it writes is in its own tokens: set buffer.teacher_per_prompt=0 and buffer.evidence=null, and give "
            "its answers as text in data.golden"
        )
    if config.needs_teacher("golden"):
        yield (f"loss.golden.divergence={loss.golden.divergence} compares tokens: golden rollouts take cross_entropy")
    if loss.teachers == "weighted" and len(config.teachers) > 1:
        yield "loss.teachers=weighted adds up several teachers' opinions on one token: set loss.teachers=routed"
    if not config.needs_teacher("student"):
        return
    if loss.student.divergence != "k1":
        yield (
            f"loss.student.divergence={loss.student.divergence} compares distributions over tokens: spans of text are "
            "compared with loss.student.divergence=k1 loss.advantage.policy=behaviour"
        )
    asked = {
        "loss.student.entropy_gate": loss.student.entropy_gate is not None,
        "loss.student.outliers": loss.student.outliers is not None,
        "loss.student.position_weight": loss.student.position_weight > 1,
        "loss.advantage.discount": loss.advantage.discount > 0,
    }
    for field, used in asked.items():
        if used:
            yield f"{field} looks at what it says of each token, where it has an opinion on spans alone: leave it out"
    if loss.advantage.policy != "behaviour":
        yield (
            f"loss.advantage.policy={loss.advantage.policy}, where a span is compared with the log-prob that it was "
            "sampled with: set loss.advantage.policy=behaviour"
        )
    if teacher.privileged:
        yield "it is shown solutions in the student's tokens: set privileged=false"
    if teacher.follows_student:
        yield f"update={teacher.update} gives it the student's weights: set update=fixed"


def prepare(config: Config, data: Dataset, models: Mapping[str, ModelFacts], found: Mapping[str, Difference]) -> None:
    """Renders the prompts for each of ``found`` as well, and says in a line that spans are compared. Raises InputError
    for tokenizers whose tokens are no pieces of a text."""
    if not found:
        return
    student = models["student"]
    data.translate({role: config.teachers[role].path for role in found})
    for role, difference in found.items():
        facts, prompts = models[role], data.translated[role]
        prompts.renderer.tokenizer = facts.tokenizer
        for each in (student, facts):
            _check_texts(each, prompts)
        _check_opening(student, facts, data.prompts, prompts)
        data.notes.append(
            f"{facts.name}: has another tokenizer than the student, so that the loss compares spans of text, not "
            f"tokens ({difference})"
        )


def translations(
    config: Config, data: Dataset, models: Mapping[str, ModelFacts], stop_token_ids: tuple[int, ...]
) -> dict[str, Translation]:
    """How each of them is asked, by role; behind ``prepare``. ``stop_token_ids``: the student's."""
    found = {}
    for role, prompts in data.translated.items():
        ours, theirs = (_size(each.tokenizer, prompts) for each in (models["student"], models[role]))
        room = prompts.longest()[0] + math.ceil(_ROOM * max(1.0, theirs / ours) * config.rollout.longest_response)
        found[role] = translation(config, role, models[role], stop_token_ids, room)
    return found


def translation(
    config: Config, role: str, facts: ModelFacts, stop_token_ids: tuple[int, ...], room: int | None = None
) -> Translation:
    """How one is asked, for at most ``room`` tokens, or as many as it takes."""
    own = config.teachers[role].eos_token_ids or facts.eos_token_ids
    if wrong := [id_ for id_ in own if not 0 <= id_ < facts.vocab_size]:
        raise InputError(f"{role}.eos_token_ids names token {wrong[0]}, which {facts.name} does not have; mend it")
    most = min(filter(None, (room, facts.context_tokens, _NO_LIMIT)))
    return Translation(config.student.path, config.teachers[role].path, stop_token_ids, own, most)


def _some(prompts: Prompts) -> range:
    return range(min(_SAMPLE, len(prompts)))


def _size(tokenizer: Any, prompts: Prompts) -> int:
    """Tokens of the texts of some prompts."""
    texts = [prompts.rows[index]["prompt"] for index in _some(prompts)]
    return sum(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"]))


def _check_texts(facts: ModelFacts, prompts: Prompts) -> None:
    mend = "give models whose tokenizers keep a text as it is"
    try:
        texts = TokenTexts(facts.tokenizer)
    except ValueError as error:
        raise InputError(f"{facts.name}: {error}, so that they cannot be laid beside another's; {mend}") from None
    for index in _some(prompts):
        if texts.differs(asked := prompts.rows[index]["prompt"]):
            raise InputError(
                f"{facts.name}: its tokens of {asked[:60]!r} ({prompts.where} row {prompts.numbers[index]}) stand for "
                f"another text, so that they cannot be laid beside another tokenizer's; {mend}"
            )


def _check_opening(student: ModelFacts, teacher: ModelFacts, ours: Prompts, theirs: Prompts) -> None:
    """A chat template may open the answer's thoughts: then the response is another one than after a bare prompt."""
    opens = [
        facts.tokenizer.decode(prompts[0][-_TAIL_TOKENS:].tolist()).rstrip().endswith(_OPEN)
        for facts, prompts in ((student, ours), (teacher, theirs))
    ]
    if opens[0] != opens[1]:
        who, other = (student, teacher) if opens[0] else (teacher, student)
        raise InputError(
            f"{theirs.where} row {theirs.numbers[0]}: the chat template of {who.name} opens {_OPEN} at the end of the "
            f"prompt, that of {other.name} does not: no response fits both; see data.template_kwargs"
        )
