"""The embedded settings, the default and a harder one: a teacher, a student built once per seed, and their data.

`prepare` returns a directory of ordinary files.  From there on nothing in the loop knows that the models are
small.  The student of a seed takes 10 to 20 seconds of one core (the harder one a minute) and is kept in the cache
(`OPD_RAY_CACHE`, else `~/.cache/opd_ray`), in a directory named after everything that decides its content, so that an
edited recipe or another torch never finds an old student.

    student/         Hugging Face checkpoint
    prompts.jsonl    8,192 train problems, drawn by the seed
    golden.jsonl     128 train problems with the concise solution, drawn by the seed
    test.jsonl       1,024 problems, the same for every seed

The default's teacher ships with the package.  The harder setting's learns from it, once for all seeds, and is kept in
the cache too; so is either of them with another end token.

How the problems look is in `opd_ray.tasks.chain`, how the models learn in `opd_ray.embedded.models`.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import random
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from opd_ray.config.data import EMBEDDED, EMBEDDED_HARD, EMBEDDED_PAIRS, OTHER_END
from opd_ray.disk import cache_root
from opd_ray.errors import InputError
from opd_ray.progress import terminal_progress
from opd_ray.tasks import chain
from opd_ray.tasks.chain import Chains, Problem

CHAINS = {EMBEDDED: chain.SHORT, EMBEDDED_HARD: chain.LONG}
"""Of the setting that a student's path says."""
TEACHER_DIR = Path(__file__).parent / "assets" / "chain_teacher"
PAIRS_SEED = 202
"""Of the teacher with another tokenizer; with this one the phase transitions come early."""
NUM_PROMPTS = 8192
NUM_GOLDEN = 128
MOST_GOLDEN = 8192
OF_THE_PROMPTS = "prompts"
"""In "embedded:prompts", a golden file."""
NUM_TEST = 1024

_SOURCES = (Path(__file__), Path(__file__).with_name("models.py"), Path(chain.__file__))
_PACKAGES = ("torch", "transformers", "tokenizers")


def prepare(seed: int, setting: str = EMBEDDED) -> Path:
    """The directory with the embedded student and data of ``seed``, built now if the cache does not hold it."""
    name = f"{_stem(setting)}-{cache_key(f'seed {seed}')}-seed{seed}"
    return cached(name, lambda directory: _build(seed, directory, CHAINS[setting]))


def teacher(setting: str = EMBEDDED, word: str = EMBEDDED) -> Path:
    """The checkpoint of the setting's teacher, made now if neither the package nor the cache holds it; of ``OTHER_END``
    the same with the end token and the one that pads exchanged; of ``EMBEDDED_PAIRS`` one whose tokens are pairs of
    characters, a minute of one core, as good as the shipped one by the same probes (jobs/build_embedded.py)."""
    if (setting, word) == (EMBEDDED, EMBEDDED):
        return TEACHER_DIR
    if word == EMBEDDED_PAIRS:
        if setting != EMBEDDED:
            raise InputError(
                f"teacher.path={word} is made for the problems of student.path={EMBEDDED}, not of {setting}; take that "
                "student, or another teacher"
            )
        return cached(f"{_stem(setting, word)}-{cache_key(f'seed {PAIRS_SEED}')}", _build_pairs_teacher)
    shipped = hashlib.sha256((TEACHER_DIR / "model.safetensors").read_bytes()).hexdigest()
    return cached(f"{_stem(setting, word)}-{cache_key(shipped)}", lambda directory: _teach(directory, setting, word))


def stands_for(word: str, path: Path, setting: str = EMBEDDED) -> bool:
    """May the word have been resolved to ``path``, in a run of ``setting``?"""
    if (setting, word) == (EMBEDDED, EMBEDDED) and path.parts[-4:] == TEACHER_DIR.parts[-4:]:
        return True  # the package may have lain elsewhere: in the copy that Ray made for an earlier job
    own = {word: (_stem(setting, word),) for word in (OTHER_END, EMBEDDED_PAIRS)}
    stems = own | {EMBEDDED: (_stem(setting), _stem(setting, EMBEDDED))}
    if not path.is_relative_to(cache_root()) or path == cache_root():
        return False
    name = path.relative_to(cache_root()).parts[0]
    return any(re.fullmatch(rf"{stem}-[0-9a-f]+(-seed\d+)?", name) for stem in stems.get(word, (_stem(word),)))


def _stem(setting: str, teacher: str = "") -> str:
    """How directories of the cache begin."""
    kind = {"": "", EMBEDDED: "-teacher", OTHER_END: "-teacher-other-end", EMBEDDED_PAIRS: "-teacher-pairs"}[teacher]
    return "chain" + setting.removeprefix(EMBEDDED) + kind


def cached(name: str, build: Callable[[Path], None]) -> Path:
    """The directory ``name`` of the cache.

    Two processes may make one at the same time: it appears in the cache complete or not at all, and the first one
    stays.
    """
    root = cache_root()
    final = root / name
    if not final.is_dir():
        try:
            root.mkdir(parents=True, exist_ok=True)
            temporary = tempfile.TemporaryDirectory(prefix=".building-", dir=root)
        except OSError as error:
            raise InputError(
                f"cannot write to the cache {root} ({error.strerror}); set OPD_RAY_CACHE to a writable directory"
            ) from error
        with temporary as directory:
            building = Path(directory) / final.name
            building.mkdir()  # the temporary one is private, and workers may run as another user
            build(building)
            try:
                building.rename(final)
            except OSError:
                if not final.is_dir():  # another process was first: its equal result stays
                    raise
    return final


def check_count(count: str) -> None:
    """Raises InputError for an "embedded:count" that is none, before a student is built."""
    if count != OF_THE_PROMPTS and not (count.isdecimal() and 0 < int(count) <= MOST_GOLDEN):
        raise InputError(
            f"data.golden={EMBEDDED}:{count}: expected {EMBEDDED}:N with N from 1 to {MOST_GOLDEN}, or "
            f"{EMBEDDED}:{OF_THE_PROMPTS}"
        )


def golden_file(seed: int, count: str, setting: str = EMBEDDED) -> Path:
    """The golden solutions of ``seed``: the 128 of "embedded" alone, the N of "embedded:N", drawn as those were, or one
    to each of the prompts; another ``count`` is for :func:`check_count` to refuse."""
    if not count:
        return prepare(seed, setting) / "golden.jsonl"
    directory, chains = prepare(seed, setting), CHAINS[setting]
    path = directory / f"golden-{count}.jsonl"
    if not path.exists():
        partial = directory / f".golden-{count}-{os.getpid()}"  # another run may make it at the same time
        if count == OF_THE_PROMPTS:
            problems = problem_sets(seed, chains)["prompts"]
        else:
            problems = chain.draw_distinct(random.Random(f"golden {seed}"), "train", int(count), chains)
        write_rows(partial, problems, with_solutions=True)
        partial.rename(path)
    return path


def is_embedded(path: str) -> bool:
    """Is it a checkpoint that this package made?"""
    return Path(path) == TEACHER_DIR or Path(path).is_relative_to(cache_root())


def cache_key(what: str) -> str:
    """Twelve hex digits over all that decides a student and its data, or a teacher: code, package versions and ``what``
    it comes from (the seed, the shipped teacher)."""
    digest = hashlib.sha256(what.encode())
    for source in _SOURCES:
        digest.update(source.read_bytes())
    for package in _PACKAGES:
        digest.update(f"{package} {importlib.metadata.version(package)}".encode())
    return digest.hexdigest()[:12]


def problem_sets(seed: int, chains: Chains = chain.SHORT) -> dict[str, list[Problem]]:
    """The problems of the JSONL files, by file name without suffix; no problem twice in a set."""
    return {
        "prompts": chain.draw_distinct(random.Random(f"prompts {seed}"), "train", NUM_PROMPTS, chains),
        "golden": chain.draw_distinct(random.Random(f"golden {seed}"), "train", NUM_GOLDEN, chains),
        # Not by the seed: runs of different seeds are compared on the same problems.
        "test": chain.draw_distinct(random.Random("test"), "test", NUM_TEST, chains),
    }


def _build(seed: int, directory: Path, chains: Chains) -> None:
    # Here, because torch and transformers take seconds to import, which whoever is refused need not wait for.
    from opd_ray.embedded import models as embedded_models

    for name, problems in problem_sets(seed, chains).items():
        write_rows(directory / f"{name}.jsonl", problems, with_solutions=name == "golden")
    with terminal_progress() as report:
        embedded_models.save(embedded_models.build_student(seed, report, chains), directory / "student", chains)


def _teach(directory: Path, setting: str, word: str) -> None:
    from opd_ray.embedded import models as embedded_models

    if word == OTHER_END:
        embedded_models.save_with_other_end(teacher(setting), directory)
        return
    with terminal_progress() as report:
        model = embedded_models.lengthen(embedded_models.load(TEACHER_DIR), report)
    embedded_models.save(model, directory, CHAINS[setting])


def _build_pairs_teacher(directory: Path) -> None:
    from opd_ray.embedded import models as embedded_models

    with terminal_progress() as report:
        model = embedded_models.build_teacher(PAIRS_SEED, report, embedded_models.PAIRS)
    embedded_models.save(model, directory, alphabet=embedded_models.PAIRS)


def write_rows(path: Path, problems: Sequence[Problem], *, with_solutions: bool = False) -> None:
    """One JSON object a line: id, prompt, answer, and the concise solution as response if asked for."""
    rows = (chain.to_row(problem, with_solution=with_solutions) for problem in problems)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
