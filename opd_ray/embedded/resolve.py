"""From "embedded" in a configuration to the paths of the models and data that it stands for."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from opd_ray import config as configs
from opd_ray.config import Config
from opd_ray.data.golden import is_privileged
from opd_ray.data.rows import read_prompts
from opd_ray.embedded import prepare as embedded
from opd_ray.errors import InputError


def resolve(config: Config) -> Config:
    """Replaces what stands for the embedded models and data by their paths, building them where needed."""
    plain = configs.to_dict(without_foreign_golden(config))
    setting = config.student.path if config.student.path in configs.EMBEDDED_STUDENTS else configs.EMBEDDED
    student, data = plain["student"], plain["data"]
    golden, counted, count = str(data["golden"]).partition(":")
    if golden == configs.EMBEDDED and counted:
        embedded.check_count(count)
    held_out = [each.path for each in config.evaluation_sets.values()]
    of_package = configs.EMBEDDED in (data["prompts"], golden, *held_out)
    if student["path"] in configs.EMBEDDED_STUDENTS or of_package:
        for given in (config.data.prompts, *held_out):
            if given != configs.EMBEDDED:  # a mistyped name is told before a student is built
                read_prompts(given, need_answer=False, columns=config.data.columns)
        built = embedded.prepare(config.seed, setting)
        sets = [(each, "path", "test.jsonl") for each in plain["evaluation"]["sets"].values()]
        for section, field, name in (
            (student, "path", "student"),
            (data, "prompts", "prompts.jsonl"),
            *(sets or [(data, "evaluation", "test.jsonl")]),
        ):
            if section[field] in (configs.EMBEDDED, setting):
                section[field] = str(built / name)
        if golden == configs.EMBEDDED:
            data["golden"] = str(embedded.golden_file(config.seed, count, setting))
    for scorer in (plain["teacher"], plain["reference"], *plain["more_teachers"].values()):
        elsewhere = scorer["url"] and not config.buffer.has_teacher_write  # nothing but a tokenizer is needed here
        if scorer["path"] == configs.STUDENT or (scorer["path"] == configs.EMBEDDED and elsewhere):
            scorer["path"] = student["path"]
        elif scorer["path"] == configs.MISLED:
            scorer["path"] = str(_misled())
        elif scorer["path"] in configs.EMBEDDED_TEACHERS:
            scorer["path"] = str(embedded.teacher(setting, scorer["path"]))
    return configs.from_dict(plain)


def _misled() -> Path:
    from opd_ray.embedded import misled  # and torch with it

    return misled.teacher_dir()


def without_foreign_golden(config: Config) -> Config:
    """The embedded golden solutions answer the embedded prompts: never mixed into other data."""
    data = config.data
    if data.prompts == configs.EMBEDDED or str(data.golden).partition(":")[0] != configs.EMBEDDED:
        return config
    if config.buffer.uses_golden or is_privileged(config):
        raise InputError(
            f"data.prompts is {configs.written(data.prompts)}, but data.golden is the embedded one, of another task; "
            "give data.golden=FILE, or leave golden rollouts out: loss.golden.coef=0 buffer.golden_per_prompt=0"
        )
    return dataclasses.replace(config, data=dataclasses.replace(data, golden=None))
