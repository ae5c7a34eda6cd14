"""``opd-ray export``, and what ``opd-ray evaluate`` takes for a checkpoint: a run's student as it was at a step."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from opd_ray import config as configs
from opd_ray.embedded.resolve import resolve
from opd_ray.errors import InputError, refusing
from opd_ray.models import hub
from opd_ray.models.adapters import adapted_layers
from opd_ray.models.checkpoints import locate_models
from opd_ray.run import preflight
from opd_ray.run.card import write_card
from opd_ray.snapshots import Shelf, Storage, read_arrays
from opd_ray.snapshots.calls import FileCalls

_CONFIG = "config.yaml"


def run_of(place: Path) -> Path | None:
    """The run that ``place`` is the directory or a checkpoint of; None where it is neither."""
    return _run_and_step(place)[0]


@contextlib.contextmanager
def student_in(checkpoint: str) -> Iterator[str]:
    """Where a student is, as long as the block lasts: ``checkpoint`` itself (a directory, or a name on the hub), or the
    student of the run or of the checkpoint of a run that it names."""
    run_dir, step = _run_and_step(Path(checkpoint))
    if run_dir is None:
        yield checkpoint
    elif step is None and (run_dir / "student" / "config.json").is_file():
        yield str(run_dir / "student")
    else:
        with tempfile.TemporaryDirectory() as directory:
            export(run_dir, step, Path(directory) / "student")
            yield str(Path(directory) / "student")


def export(run_dir: Path, step: int | None, output: Path | None = None) -> Path:
    """Writes the student after ``step`` (None: of the newest checkpoint) in Hugging Face format; returns where.

    By default that is ``run_dir``/student-step-N. Of a run that trains adapters it is merged with them, which lie in
    "adapter" beside it. Raises InputError where there is no run, no such checkpoint, or
    something in the way. Needs no Ray.
    """
    if not (run_dir / _CONFIG).is_file():
        raise InputError(f"{run_dir}: is no run directory (it has no {_CONFIG}); give the --run-dir of a run")
    asked = configs.load(run_dir / _CONFIG)
    storage = Storage(asked.checkpoint.location(run_dir.absolute()))
    shelf = Shelf(storage, FileCalls(local=True, deadline_s=asked.deadlines.train_s))
    with refusing("export"):
        checkpoint = shelf.at(step)
    output = output or run_dir / f"student-step-{checkpoint.step}"
    if output.exists():
        raise InputError(f"export: {output} is there already; give another --output, or delete it")
    config = resolve(asked)
    preflight.check_peft(config)
    config = hub.pinned(config, locate_models(config))
    models = preflight.inspect_run(config)

    import torch  # behind every refusal that needs none

    from opd_ray.learn.export import write_trained
    from opd_ray.models.checkpoints import load_causal_lm
    from opd_ray.weights.adapters import adapter_names

    lora, source = config.student.lora, hub.local_directory(config.student.path)
    model = load_causal_lm(source, dtype="auto")
    dtype = getattr(torch, config.learner.dtype) if lora else model.dtype
    parameters = {}
    for part in checkpoint.snapshot.learner_parts:
        for key, array in read_arrays(storage, checkpoint.files[part], "take another step").items():
            kind, _, name = key.partition("/")
            if kind == "weight":
                parameters[name] = torch.tensor(array).to(dtype)
    if lora:
        names = adapter_names(adapted_layers(models["student"].name, source, lora))
    else:
        names = [name for name, _ in model.named_parameters()]
    if missing := sorted({*names} ^ parameters.keys()):
        raise InputError(
            f"export: {checkpoint.where} is not of the model in {source}: they differ in {len(missing)} parameters, as "
            f"{missing[0]}"
        )
    output.mkdir(parents=True)
    stops = preflight.stop_token_ids(config, models)
    write_trained(output, model, parameters, source, stops, base=config.student.path, lora=lora)
    write_card(output, run_dir, checkpoint.step)
    return output


def _run_and_step(place: Path) -> tuple[Path | None, int | None]:
    """Run directory, and the step of a checkpoint in it; None for that of its student."""
    if (place / _CONFIG).is_file():
        return place, None
    if place.name == "student" and (place.absolute().parent / _CONFIG).is_file():
        return place.absolute().parent, None
    name, run_dir = place.name, place.absolute().parent.parent
    if name.startswith("step-") and name[5:].isdigit() and (run_dir / _CONFIG).is_file():
        return run_dir, int(name[5:])
    return None, None
