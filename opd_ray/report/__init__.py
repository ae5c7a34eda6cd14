"""One self-contained HTML page about a run, or about a study of many: ``opd-ray report``.

:mod:`~opd_ray.report.runs` reads directories, with :mod:`~opd_ray.report.measurements`; :mod:`~opd_ray.report.arms`,
:mod:`~opd_ray.report.verdict`, :mod:`~opd_ray.report.crossing`, :mod:`~opd_ray.report.maps` and
:mod:`~opd_ray.report.golden` count, as sure as :mod:`~opd_ray.report.uncertainty` says, of
:mod:`~opd_ray.report.answers`; :mod:`~opd_ray.report.curves` and :mod:`~opd_ray.report.rollouts` choose what is shown,
and :mod:`~opd_ray.report.page` writes it. Nothing here needs Ray, a GPU, or a run that has finished.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from opd_ray.report.curves import ReferenceLine

if TYPE_CHECKING:
    from opd_ray.report.rollouts import Signals

__all__ = ["ReferenceLine", "default_output", "write_report"]


def write_report(
    run_dirs: Sequence[Path],
    output: Path,
    *,
    title: str | None = None,
    reference_lines: Mapping[str, ReferenceLine] | None = None,
    notes: Sequence[str] = (),
    order: Sequence[str] = (),
    signals: Signals | None = None,
) -> None:
    """Writes the page about the runs among and below ``run_dirs`` to ``output``, whole or not at all.

    ``reference_lines`` maps a metric to a level drawn across its chart; ``notes`` are paragraphs under the
    verdict. ``order`` lists arms by the names of their runs, as they are to be listed; without it the arms of a
    study stand as in its results.json, and others by accuracy. With ``signals`` the rollouts are those of their step,
    of the one run that there is. Raises InputError where there is nothing to report or ``output`` cannot be written.
    """
    from opd_ray.disk import whole
    from opd_ray.errors import InputError
    from opd_ray.report import page
    from opd_ray.report.runs import read_runs, study_order

    runs, left_out = read_runs(run_dirs)
    content = page.render(
        runs,
        title=title,
        lines=reference_lines or {},
        notes=[*notes, *left_out],
        order=order or study_order(run_dirs),
        signals=signals,
    )
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with whole(output) as partial:
            partial.write_bytes(content)
    except OSError as error:
        raise InputError(f"{output}: cannot be written ({error.strerror}); give another --output") from None


def default_output(run_dirs: Sequence[Path]) -> Path:
    """report.html in the one directory given, or in the one that the given ones have in common."""
    return Path(os.path.commonpath([path.absolute() for path in run_dirs])) / "report.html"
