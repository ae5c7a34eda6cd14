"""The study of jobs/ablation.yaml: every arm on every seed, and one report that compares them.

    python jobs/ablation.py [--seeds 5] [--arms NAME,...] [--study FILE] [--dir DIR] [section.field=value ...]

Interrupted, it goes on where it stopped when it is called with the same --dir. Overrides hold for every arm.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import click

from opd_ray.errors import InputError, OpdError

_HERE = Path(__file__).resolve().parent
_TABLE = (
    "sampled accuracy after",
    "greedy accuracy after",
    "truncated after",
    "highest truncation in training",
    "trained tokens",
)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--seeds", default="5", metavar="N|A,B,...", help="How many seeds, from 0 on, or which.  [default: 5]")
@click.option("--arms", default="", metavar="NAME,...", help="Only these arms, by name or directory.")
@click.option("--study", type=click.Path(path_type=Path), default=_HERE / "ablation.yaml", help="YAML of the arms.")
@click.option("--dir", "directory", type=click.Path(path_type=Path), default=Path("runs/study"), show_default=True)
@click.argument("overrides", nargs=-1, metavar="[SECTION.FIELD=VALUE]...")
def main(seeds: str, arms: str, study: Path, directory: Path, overrides: tuple[str, ...]) -> None:
    """Run the arms of a study on several seeds, and compare them in one report."""
    from opd_ray.report import ReferenceLine, write_report
    from opd_ray.report.arms import group, markdown, results
    from opd_ray.report.runs import read_runs
    from opd_ray.study import study as studies
    from opd_ray.study.claims import judge
    from opd_ray.study.teacher_data import Rollouts

    read = studies.read_study(study, overrides, [name.strip() for name in arms.split(",") if name.strip()])
    numbers = _seeds(seeds)
    began = time.monotonic()

    def say(line: str) -> None:
        minutes, rest = divmod(round(time.monotonic() - began), 60)
        click.echo(f"[{minutes:3d}:{rest:02d}] {line}")

    directory = directory.absolute()
    studies.run_study(read.arms, numbers, directory, say)
    names = [arm.name for arm in read.arms]
    arms_found = [arm for arm in group(read_runs([directory])[0], names) if arm.label in names]
    verdicts = judge(read.claims, arms_found)
    table = markdown(arms_found, _TABLE)
    (directory / "table.md").write_text(table + "\n")
    (directory / "results.json").write_text(json.dumps(results(arms_found), indent=2) + "\n")
    lines = {}
    for path in sorted(directory.glob("teacher-rollouts-*[0-9].parquet"))[-1:]:
        teacher = Rollouts(path)
        truncated = teacher.truncation_rate
        lines["rollouts/truncation_rate"] = ReferenceLine(truncated, f"the teacher's own at T = 1: {truncated:.3f}")
        say(f"the teacher's own rollouts: {teacher.accuracy:.3f} right, {truncated:.3f} truncated")
    write_report([directory], directory / "report.html", reference_lines=lines, notes=verdicts, order=names)
    click.echo("\n" + table + "\n")
    for verdict in verdicts:
        say(verdict)
    say(f"report: {directory / 'report.html'}")


def _seeds(text: str) -> list[int]:
    """A number of seeds from 0 on, or the ones listed; "7," is the one seed 7."""
    parts = [part.strip() for part in text.split(",")]
    listed = [part for part in parts if part]
    if not listed or not all(part.isdigit() for part in listed) or text.strip() == "0":
        raise InputError(f"--seeds {text}: expected a number of seeds, or seeds as 0,3,7")
    return [int(part) for part in listed] if len(parts) > 1 else list(range(int(text)))


if __name__ == "__main__":
    try:
        main()
    except OpdError as error:
        print(f"ablation: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(error.exit_code)
