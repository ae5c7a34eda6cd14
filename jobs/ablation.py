"""The study of jobs/ablation.yaml: every arm on every seed, and one report that compares them.

    python jobs/ablation.py [--seeds 10] [--arms NAME,...] [--study FILE] [--dir DIR] [--tune] [section.field=value ...]

Interrupted, it goes on where it stopped when it is called with the same --dir. Overrides hold for every arm.
--tune chooses each arm's learning rate instead, on seeds that are never reported; so does it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from opd_ray.errors import InputError, OpdError

if TYPE_CHECKING:
    from opd_ray.study.reading import Study

_HERE = Path(__file__).resolve().parent
_TABLE = (
    "sampled accuracy after",
    "greedy accuracy after",
    "best step",
    "best step above last",
    "truncated after",
    "highest truncation in training",
    "trained tokens",
)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--seeds", default="", metavar="N|A,B,...", help="How many of the study's seeds and beyond, or which; '7,' is one."
)
@click.option("--arms", default="", metavar="NAME,...", help="Only these arms, by directory or name, in that order.")
@click.option("--study", type=click.Path(path_type=Path), default=_HERE / "ablation.yaml", help="YAML of the arms.")
@click.option("--dir", "directory", type=click.Path(path_type=Path), default=Path("runs/study"), show_default=True)
@click.option("--tune", is_flag=True, help="Choose every arm's learning rate on the study's tuning seeds, and end.")
@click.argument("overrides", nargs=-1, metavar="[SECTION.FIELD=VALUE]...")
def main(seeds: str, arms: str, study: Path, directory: Path, tune: bool, overrides: tuple[str, ...]) -> None:
    """Run the arms of a study on several seeds, and compare them in one report."""
    from opd_ray.study.reading import read_study
    from opd_ray.study.study import run_study

    only = [name.strip() for name in arms.split(",") if name.strip()]
    read = read_study(study, overrides, only, tuned=not tune)
    began = time.monotonic()

    def say(line: str) -> None:
        minutes, rest = divmod(round(time.monotonic() - began), 60)
        click.echo(f"[{minutes:3d}:{rest:02d}] {line}")

    directory = directory.absolute()
    if tune:
        _tune(read, seeds, directory.with_name(f"{directory.name}-tuning"), say)
        return
    chosen = read.seeds(seeds)
    if read.untuned:
        say(f"no learning rate has been chosen (--tune) for {', '.join(read.untuned)}: they have the study file's")
    if read.chosen_otherwise:
        names = ", ".join(read.chosen_otherwise)
        say(f"the learning rates of {names} were chosen (--tune) with other settings of theirs than they have now")
    run_study(read.arms, chosen, directory, say)
    _compare(read, directory, say)


def _tune(read: Study, seeds: str, directory: Path, say: Callable[[str], None]) -> None:
    """Every arm at every rate on the tuning seeds, beyond them while the best is at the edge, and the file of what was
    chosen."""
    from opd_ray.study.study import run_study

    tuning = read.tuning
    if tuning is None:
        raise InputError("--tune: the study says no tuning; expected seeds, rates and chosen under tuning")
    if seeds:
        raise InputError(
            f"--tune --seeds {seeds}: the study's tuning seeds are {list(tuning.seeds)}; leave --seeds out"
        )
    todo = tuning.arms(read.arms)
    while todo:
        run_study(todo, tuning.seeds, directory, say)
        found = tuning.choose(read.arms, directory)
        todo = tuning.beyond(read.arms, found)
    for name, choice in found.items():
        edge = ", at the edge of the rates: one beyond may be better" if tuning.at_the_edge(choice) else ""
        say(f"{name}: {choice['lr']:g} of {choice['accuracies']}{edge}")
    say(f"chosen: {tuning.chosen}")


def _compare(read: Study, directory: Path, say: Callable[[str], None]) -> None:
    """Table, results, claims and the page of what has been run."""
    from opd_ray.report import ReferenceLine, write_report
    from opd_ray.report.arms import group, markdown, results
    from opd_ray.report.runs import read_runs
    from opd_ray.study.claims import judge
    from opd_ray.study.teacher_data import Rollouts

    names = [arm.name for arm in read.arms]
    found = [arm for arm in group(read_runs([directory])[0], names) if arm.label in names]
    judgements = judge(read.claims, found)
    sentences = [str(each) for each in judgements if each.verdict != "not judged"]
    table = markdown(found, _TABLE) + "\n\n" + "\n".join(f"- {each}" for each in sentences)
    (directory / "table.md").write_text(table + "\n")
    outcome = {"arms": results(found), "claims": [each.saved() for each in judgements]}
    (directory / "results.json").write_text(json.dumps(outcome, indent=2) + "\n")
    lines = {}
    for path in sorted(directory.glob("teacher-rollouts-*[0-9].parquet"))[-1:]:
        teacher = Rollouts(path)
        truncated = teacher.truncation_rate
        lines["rollouts/truncation_rate"] = ReferenceLine(truncated, f"the teacher's own at T = 1: {truncated:.3f}")
        say(f"the teacher's own rollouts: {teacher.accuracy:.3f} right, {truncated:.3f} truncated")
    write_report([directory], directory / "report.html", reference_lines=lines, notes=sentences, order=names)
    click.echo("\n" + table + "\n")
    if left := len(judgements) - len(sentences):
        say(f"{left} claims are about arms that have not been run")
    say(f"report: {directory / 'report.html'}")


if __name__ == "__main__":
    try:
        main()
    except OpdError as error:
        print(f"ablation: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(error.exit_code)
