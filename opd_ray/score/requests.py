"""What each scorer is asked about the rollouts of each source: the objective decides, the pipeline sends it."""

from __future__ import annotations

from opd_ray.config import Config
from opd_ray.messages import REFERENCE, ScoreRequest, Source


def score_requests(config: Config, stop_token_ids: tuple[int, ...]) -> dict[Source, dict[str, ScoreRequest]]:
    """Source to role to request; a source whose loss compares with nobody has no roles.

    Golden rollouts that are only kept at hand for the guard count: it may mix them in at any step.
    """
    sources = (*config.sources, *(("golden",) if config.loads_golden and not config.buffer.uses_golden else ()))
    return {source: _requests(config, source, stop_token_ids) for source in sources}


def roles_of(config: Config, requests: dict[str, ScoreRequest], teacher: str) -> dict[str, ScoreRequest]:
    """The roles that score rollouts whose row names ``teacher``: that one only, or every teacher when weighted."""
    if config.loss.teachers == "weighted":
        return requests
    return {role: request for role, request in requests.items() if role in (teacher, REFERENCE)}


def _requests(config: Config, source: Source, stop_token_ids: tuple[int, ...]) -> dict[str, ScoreRequest]:
    requests = {}
    if config.needs_teacher(source):
        term = config.loss.terms[source]
        # The teacher's own top-k also goes beside the student's, to see how far the two overlap.
        on_top_k = term.on_distributions and term.support != "full"
        for name, teacher in config.teachers.items():
            requests[name] = ScoreRequest(
                top_k=term.top_k if on_top_k else 0,
                given=on_top_k and term.support == "student_top_k",
                hidden=term.on_distributions and term.support == "full",
                stop_token_ids=stop_token_ids,
                privileged=teacher.privileged,
            )
    if config.needs_reference(source) and REFERENCE in config.scorers:
        requests[REFERENCE] = reference_request(config, stop_token_ids)
    return requests


def reference_request(config: Config, stop_token_ids: tuple[int, ...]) -> ScoreRequest:
    """What the KL to the reference needs of it."""
    term = config.loss.reference
    return ScoreRequest(
        top_k=term.top_k if term.estimator == "top_k" else 0,
        hidden=term.estimator == "full",
        stop_token_ids=stop_token_ids,
    )
