"""The command line: ``opd-ray init | train | status | ...``, the same as ``python -m opd_ray``.

Exit codes: 0 done; 1 a failure while running; 2 refused input or configuration; 3 stopped by the guard; 143 ended by
a signal. Refusals and explained failures are one line on stderr (``--debug`` adds the traceback); anything else keeps
its traceback.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import click

from opd_ray import config as configs
from opd_ray.config import Config
from opd_ray.config.help import EVALUATES, ConfiguredCommand
from opd_ray.config.help import FilePath as _Path
from opd_ray.errors import InputError, OpdError

_DEBUG_VARIABLE = "OPD_RAY_DEBUG"


_config_option = click.option(
    "--config", "config_file", type=_Path(path_type=Path), metavar="FILE", help="YAML file of sections and fields."
)
_debug_option = click.option(
    "--debug",
    is_flag=True,
    expose_value=False,
    callback=lambda _context, _option, debug: os.environ.update({_DEBUG_VARIABLE: "1"} if debug else {}),
    help="Show the traceback of a failure that is explained.",
)
_overrides_argument = click.argument("overrides", nargs=-1, metavar="[SECTION.FIELD=VALUE]...")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="opd_ray")
def cli() -> None:
    """On-policy distillation on Ray, kept stable (StableOPD)."""


@cli.command()
@click.argument("recipe", required=False)
@click.option("--out", type=_Path(path_type=Path), metavar="FILE", help="By default RECIPE.yaml.")
@click.option("--force", is_flag=True, help="Write over files that are there.")
@_debug_option
def init(recipe: str | None, out: Path | None, force: bool) -> None:
    """Write the configuration of RECIPE with a sentence on every field; without RECIPE, list the recipes."""
    from opd_ray import recipes

    if recipe is None:
        for name, purpose in recipes.purposes().items():
            click.echo(f"{name:<22} {purpose}")
        return
    out = out or Path(f"{recipe}.yaml")
    recipes.write(recipe, out, force=force)
    click.echo(f"wrote {out}; edit it, then: opd-ray train --config {out}")


@cli.command(cls=ConfiguredCommand)
@_config_option
@click.option(
    "--run-dir",
    type=_Path(path_type=Path),
    metavar="DIR",
    help="Results; by default a new one in runs/. A job of `ray job submit` needs an absolute path.",
)
@click.option(
    "--resume", is_flag=True, help="Continue the run in --run-dir, with its configuration unless --config is given."
)
@click.option(
    "--auto-resume",
    is_flag=True,
    help="Continue the run in --run-dir if there is one, else start it: for jobs that "
    "are submitted again by themselves.",
)
@click.option("--trace", is_flag=True, help="Write what every actor is at to trace.json (metrics.trace).")
@_debug_option
@_overrides_argument
def train(
    config_file: Path | None,
    run_dir: Path | None,
    resume: bool,
    auto_resume: bool,
    trace: bool,
    overrides: tuple[str, ...],
) -> None:
    """Train a student; without arguments, the small embedded one.

    Connects to the cluster of `ray job submit` or of RAY_ADDRESS, or starts Ray on this machine.
    """
    if (resume or auto_resume) and run_dir is None:
        raise InputError("--resume needs --run-dir DIR: which run to continue")
    resume = resume or (auto_resume and (run_dir / "config.yaml").is_file())
    overrides += ("metrics.trace=true",) if trace else ()
    config = _load(config_file, overrides, run_dir if resume else None)
    new = Path("runs") / f"{config.method}-seed{config.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    run_dir = (run_dir or new).absolute()
    from opd_ray.run import resuming

    resuming.check_run_dir(run_dir, config, resume)
    from opd_ray.run import train as running

    summary = running.train(config, run_dir, resume=resume, auto_resume=auto_resume)
    from opd_ray.run.summary import outcome

    click.echo(f"done: {summary['steps']} steps, {outcome(summary)}; results in {run_dir}")


@cli.command(name="status")
@click.argument("run", required=False, metavar="[RUN_DIR|URI]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.option(
    "--watch", is_flag=True, help="Print it every 2 s until the run has ended, or Ctrl-C; wait for its start."
)
@_debug_option
def status_(run: str | None, as_json: bool, watch: bool) -> None:
    """Where the run in RUN_DIR stands, and why it waits; without RUN_DIR, all runs in runs/.

    Of a run elsewhere: the URI of its checkpoints, beside which the driver writes where it stands.
    """
    from opd_ray.status import table
    from opd_ray.status.state import WRITE_EVERY_S

    if run is None and watch:
        raise InputError("--watch needs a run: opd-ray status RUN_DIR --watch")
    if run is None:
        table.list_runs(Path("runs"), as_json=as_json)
    elif not watch:
        table.show(run, as_json=as_json)
    else:
        with contextlib.suppress(KeyboardInterrupt):
            table.watch(run, WRITE_EVERY_S, as_json=as_json)


@cli.command(cls=ConfiguredCommand)
@_config_option
@click.option("--run-dir", type=_Path(path_type=Path), metavar="DIR", help="Check this run directory as well.")
@click.option("--resume", is_flag=True, help="Check that the run in --run-dir can be continued.")
@_debug_option
@_overrides_argument
def preflight(config_file: Path | None, run_dir: Path | None, resume: bool, overrides: tuple[str, ...]) -> None:
    """Check everything a training run needs, without loading a model."""
    config = _load(config_file, overrides, run_dir if resume else None)
    from opd_ray.run import preflight as checks
    from opd_ray.run import resuming

    if run_dir is not None:
        config = resuming.check_run_dir(run_dir, config, resume)
    from opd_ray.placement.session import cluster
    from opd_ray.run.train import checked, find_start

    asked, config, facts = checked(config)
    with cluster():
        from opd_ray.placement.capacity import check_fits
        from opd_ray.placement.nodes import nodes
        from opd_ray.plan.snapshots import with_room

        check_fits(checks.check_resources, config)
        config, said = with_room(config, facts, nodes())
        if run_dir is not None:
            find_start(asked, run_dir, resume=resume, hold=False)
    found = {name: value for name, value in vars(facts).items() if name not in ("data", "sizes", "commits")}
    from opd_ray.plan.outlook import outlook
    from opd_ray.plan.show import short

    for line in (*(f"{name} is {its}" for name, its in facts.commits.items()), *facts.data.remarks()):
        click.echo(line)
    click.echo(short(outlook(config, facts)))
    if said:
        click.echo(said)
    _print_table("preflight: nothing to object to", found)


@cli.command(cls=ConfiguredCommand)
@_config_option
@click.option("--probe", is_flag=True, help="Measure two minutes of the run's steps, in its rooms.")
@click.option(
    "--price-per-gpu-hour",
    "price",
    type=click.FloatRange(min=0),
    metavar="X",
    help="What the hours that --probe predicts cost; of a node where no GPU is asked for.",
)
@_debug_option
@_overrides_argument
def plan(config_file: Path | None, probe: bool, price: float | None, overrides: tuple[str, ...]) -> None:
    """Memory, bytes and tokens of a training run, against what there is; ends with 1 where it does not fit.

    Of the cluster that RAY_ADDRESS names, or of this machine. With --probe also tokens per second, hours and money,
    and the split of workers that balances.
    """
    if price is not None and not probe:
        raise InputError("--price-per-gpu-hour needs --probe, which measures how long the run takes")
    if price is not None and not math.isfinite(price):
        raise InputError(f"--price-per-gpu-hour is {price}, expected a price")
    config = _load(config_file, overrides)
    from opd_ray.run import plan as planning

    if not planning.plan(config, measure=probe, price=price):
        sys.exit(1)


@cli.command(cls=ConfiguredCommand)
@_config_option
@click.option(
    "--run-dir", type=_Path(path_type=Path), default=Path("runs"), metavar="DIR", help="For results; by default runs/."
)
@_debug_option
@_overrides_argument
def doctor(config_file: Path | None, run_dir: Path, overrides: tuple[str, ...]) -> None:
    """Is a cluster fit for a run? A line for each check: ok, or what to do; ends with 1 where there is something.

    Drivers, packages, clocks and limits of every node; object store, broadcasts between nodes, disk; engines. Of the
    cluster that RAY_ADDRESS names, or of this machine.
    """
    config = _load(config_file, overrides)
    from opd_ray.run import doctor as examination

    if not examination.doctor(config, run_dir):
        sys.exit(1)


@cli.command(cls=ConfiguredCommand, sections=EVALUATES)
@click.argument("checkpoint")
@_config_option
@click.option(
    "--against",
    metavar="OTHER",
    help="Another checkpoint, or verdicts (a run's evaluations/step-N): print the difference, paired by problem.",
)
@click.option("--verdicts", "keep", type=_Path(path_type=Path), metavar="DIR", help="Write each set's verdicts there.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@_debug_option
@_overrides_argument
def evaluate(
    checkpoint: str,
    config_file: Path | None,
    against: str | None,
    keep: Path | None,
    as_json: bool,
    overrides: tuple[str, ...],
) -> None:
    """Accuracy, truncation, repetition and length of CHECKPOINT on held-out problems.

    CHECKPOINT is a model in Hugging Face format (a directory, or org/name[@REVISION] of its Hub), or a run directory or
    one of its checkpoints/step-N, which stand for their student. Of a run, problems and settings are the run's, unless
    --config or overrides say otherwise.
    """
    from opd_ray.evaluation import table, verdicts
    from opd_ray.run import evaluate as evaluation

    config, differences = evaluation.settings(checkpoint, config_file, overrides), {}
    if against is None:
        (found,) = evaluation.measured([checkpoint], config)
    else:
        found, differences = evaluation.compared(checkpoint, against, config)
    if keep is not None:
        verdicts.write(keep, found.verdicts)
    if not as_json:
        table.show(f"{checkpoint}, task {config.data.task}", found, differences, against or "")
        return
    compared = {"against": {name: dataclasses.asdict(each) for name, each in differences.items()}} if against else {}
    click.echo(json.dumps(found.saved() | compared, indent=2))


@cli.command()
@click.argument("run_dir", metavar="RUN", type=_Path(path_type=Path))
@click.option("--step", type=click.IntRange(min=0), metavar="N", help="Of which checkpoint; by default the newest.")
@click.option("--output", type=_Path(path_type=Path), metavar="DIR", help="By default RUN/student-step-N.")
@_debug_option
def export(run_dir: Path, step: int | None, output: Path | None) -> None:
    """Write the student of a checkpoint of RUN in Hugging Face format."""
    from opd_ray.run import export as exporting

    click.echo(f"student: {exporting.export(run_dir, step, output)}")


@cli.command()
@click.argument("checkpoint", metavar="RUN")
@click.argument("repository", metavar="ORG/NAME")
@click.option("--private", is_flag=True, help="Make the repository a private one, where it is not there yet.")
@_debug_option
def push(checkpoint: str, repository: str, private: bool) -> None:
    """Upload the student of RUN (or of one of its checkpoints/step-N) to the Hugging Face Hub, with its model card."""
    from opd_ray.run import push as pushing

    click.echo(f"pushed: {pushing.push(checkpoint, repository, private=private)}")


@cli.command(cls=ConfiguredCommand, sections=("loss", "guard"))
@click.argument("run_dir", metavar="RUN", type=_Path(path_type=Path))
@click.option("--rollout", metavar="ID", help="Which to print; by default the student's with the largest gradient.")
@click.option("--output", type=_Path(path_type=Path), metavar="FILE", help="By default RUN/replay-step-N.html.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables, and write no page.")
@_debug_option
@click.argument("arguments", nargs=-1, required=True, metavar="step=N [SECTION.FIELD=VALUE]...")
def replay(run_dir: Path, rollout: str | None, output: Path | None, as_json: bool, arguments: tuple[str, ...]) -> None:
    """Step N of RUN again, as it was and under another loss.* or guard.*: loss, gradient and advantage token by token.

    From the rollout log, the weights before the step (a checkpoint's, or those that the logged steps since make of
    them) and the models that scored it. Without Ray; nothing of the run is changed.
    """
    from opd_ray.run import replay as replaying

    found = replaying.replay(run_dir, arguments, rollout)
    from opd_ray.replay import show

    if as_json:
        click.echo(json.dumps(show.plain(found, rollout), indent=2))
        return
    show.show(found, rollout)
    output = output or run_dir / f"replay-step-{found.step}.html"
    show.write_page(found, output)
    click.echo(f"wrote {output} ({output.stat().st_size / 1e6:.1f} MB)")


@cli.command(name="report")
@click.argument("runs", nargs=-1, required=True, type=_Path(path_type=Path), metavar="RUN...")
@click.option(
    "--output",
    type=_Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="By default report.html in RUN, or in the directory that several have in common.",
)
@click.option("--title", help="Heading of the page; by default what was run.")
@_debug_option
def report_(runs: tuple[Path, ...], output: Path | None, title: str | None) -> None:
    """One self-contained HTML page about each RUN, or about all runs below a directory."""
    from opd_ray import report

    output = output or report.default_output(runs)
    report.write_report(runs, output, title=title)
    click.echo(f"wrote {output} ({output.stat().st_size / 1e6:.1f} MB)")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point of ``opd-ray`` and of jobs/stableopd.py: runs the command and exits with its code."""
    try:
        cli.main(args=arguments, prog_name="opd-ray", standalone_mode=False)
    except click.Abort:
        _end("interrupted", 130)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        sys.exit(2)
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        _end(f"{error.format_message()} (see {context.command_path if context else 'opd-ray'} --help)", 2)
    except Exception as error:
        # Ray re-raises a worker's error as a child of its class whose text is the remote traceback.
        explained = getattr(error, "cause", None) or error
        if not isinstance(explained, OpdError):
            raise
        if os.environ.get(_DEBUG_VARIABLE):
            traceback.print_exception(error)
        _end(str(explained), explained.exit_code)
    sys.exit(0)


def main_train() -> None:
    """``opd-ray train`` with the arguments of this process."""
    main(["train", *sys.argv[1:]])


def _end(message: str, exit_code: int) -> NoReturn:
    click.echo(f"opd-ray: {' '.join(message.split())}", err=True)
    sys.exit(exit_code)


def _load(config_file: Path | None, overrides: Sequence[str], resumed: Path | None = None) -> Config:
    """The configuration; a resumed run starts from its own unless another file is given."""
    if config_file is None and resumed is not None and (resumed / "config.yaml").is_file():
        config_file = resumed / "config.yaml"
    return configs.load(config_file, overrides)


def _print_table(title: str, values: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False)
    for name, value in values.items():
        table.add_row(name.replace("_", " "), f"{value:.3f}" if isinstance(value, float) else str(value))
    console = Console(soft_wrap=True)
    console.print(title, markup=False, highlight=False)
    console.print(table)


if __name__ == "__main__":
    main()
