"""The student as it was before a step: of a checkpoint, or as it began, with the logged steps since taken again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from opd_ray.config import Config
from opd_ray.errors import InputError
from opd_ray.learn.adapters import Adapters
from opd_ray.learn.heads import ResponseModel
from opd_ray.learn.microbatch import lr_factor
from opd_ray.learn.student import load_student
from opd_ray.models import hub
from opd_ray.models.adapters import adapted_layers

Backward = Callable[[], object]
"""Leaves a step's gradient in the parameters."""


class Student:
    """One process's copy, with the optimizer that the learner has."""

    def __init__(self, config: Config) -> None:
        """As the run began with it. Raises InputError for a model that cannot be used."""
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._learner = config.learner
        self.path = hub.local_directory(config.student.path)
        torch.manual_seed(config.seed)  # of which new adapters are made
        model = load_student(self.path, config.learner, 0, self.device)
        self.adapters = None
        if config.student.lora is not None:
            layers = adapted_layers(f"student.path={config.student.path}", self.path, config.student.lora)
            self.adapters = Adapters(model, layers, config.student.lora)
        self.module = ResponseModel(model, packing=config.learner.packing)
        own = self.adapters.weights() if self.adapters else model.named_parameters()
        self.parameters = dict(own)
        self._position = 0
        self._optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=config.learner.lr,
            betas=config.learner.adam_betas,
            weight_decay=config.learner.weight_decay,
            fused=True,
        )

    @torch.no_grad()
    def restore(self, facts: Mapping[str, Any], parts: Sequence[Mapping[str, np.ndarray]], where: str) -> None:
        """Goes on from a checkpoint's weights and moments (see opd_ray.learn.state); InputError where it is another
        model's."""
        found: dict[str, dict[str, torch.Tensor]] = {}
        for part in parts:
            for key, array in part.items():
                kind, _, name = key.partition("/")
                if not kind.startswith("rng"):
                    found.setdefault(kind, {})[name] = torch.tensor(array, device=self.device)
        if missing := sorted(found.get("weight", {}).keys() ^ self.parameters.keys()):
            raise InputError(
                f"replay: {where} is not of the model in {self.path}: they differ in {len(missing)} parameters, as "
                f"{missing[0]}"
            )
        for name, parameter in self.parameters.items():
            parameter.copy_(found["weight"][name])
            if facts["steps"]:
                self._optimizer.state[parameter] = {
                    "step": torch.tensor(float(facts["steps"]), device=self.device),
                    **{kind: found[kind][name] for kind in ("exp_avg", "exp_avg_sq")},
                }
        self._position = facts["lr_step"]

    def take(self, backward: Backward) -> None:
        """One optimizer step, as the learner takes it; one whose gradient is not finite changes nothing."""
        self._optimizer.zero_grad()
        backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self._learner.gradient_clip)
        if not torch.isfinite(norm):
            return
        for group in self._optimizer.param_groups:
            group["lr"] = self._learner.lr * lr_factor(self._learner, self._position)
        self._optimizer.step()
        self._position += 1
