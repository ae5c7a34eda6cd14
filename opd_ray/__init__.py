"""opd_ray: on-policy distillation of language models on Ray, kept stable (StableOPD).

Rooms: generate (student generators) → score (teacher, reference) → buffer → learn, and weights
back to the generators. Start reading at :mod:`opd_ray.pipeline`.

    from opd_ray import Config, evaluate, train

    summary = train(Config.load("my.yaml", "learner.steps=100"), "runs/first")
    print(evaluate("runs/first/checkpoints/step-50"))
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opd_ray.config import Config
    from opd_ray.run.evaluate import evaluate
    from opd_ray.run.train import train

__version__ = "0.1.0"
__all__ = ["Config", "evaluate", "train"]

_MODULES = {"Config": "opd_ray.config", "evaluate": "opd_ray.run.evaluate", "train": "opd_ray.run.train"}


def __getattr__(name: str) -> Any:
    """Imported when asked for: ``import opd_ray`` brings neither Ray nor pydantic."""
    if name not in _MODULES:
        raise AttributeError(f"module 'opd_ray' has no attribute '{name}'")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
