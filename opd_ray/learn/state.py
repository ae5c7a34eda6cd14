"""The state of a learner, as whole parameters under their names: the same for every number of ranks and ZeRO stage.

Only what is trained is part of it: of a student with adapters, these alone. An array is float32 (the master weights
where the model is bfloat16) and is called "weight/NAME", "exp_avg/NAME" or "exp_avg_sq/NAME"; a tied parameter has one
name. Adam has no moments before its first step, and then neither has the
state. The learning rate is not part of it: it follows from the configuration and the schedule's position.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from opd_ray.errors import RunError
from opd_ray.weights.manifest import differing, shape_of

_MOMENTS = ("exp_avg", "exp_avg_sq")


class LearnerState:
    """Reads and writes the state behind one rank's DeepSpeed engine, whose optimizer is torch's AdamW.

    Reading is collective; writing is not, as every rank takes its part out of whole parameters.
    """

    def __init__(
        self, engine: Any, parameters: Mapping[str, torch.nn.Parameter], *, zero_stage: int, seed: int
    ) -> None:
        """``parameters``: those that are trained, each under one name."""
        self._engine, self._stage, self._seed = engine, zero_stage, seed
        self._parameters = dict(parameters)
        self._adam = engine.basic_optimizer
        self._rank, self._num_ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()

    def facts(self) -> dict[str, Any]:
        """All that is not an array, for JSON."""
        return {
            "steps": int(next(iter(self._adam.state.values()))["step"]) if self._adam.state else 0,
            "lr_step": self._engine.lr_scheduler.last_epoch,
            "global_steps": self._engine.global_steps,
            "skipped_steps": self._engine.skipped_steps,
            "num_ranks": self._num_ranks,
            "zero_stage": self._stage,
            "shapes": {name: list(shape_of(parameter)) for name, parameter in self._parameters.items()},
        }

    def arrays(self) -> dict[str, np.ndarray]:
        """This rank's share of the parameters, and its random generators' state ("rng/RANK", uint8)."""
        share = {f"rng/{self._rank}": torch.get_rng_state().numpy()}
        if torch.cuda.is_initialized():
            share[f"rng_cuda/{self._rank}"] = torch.cuda.get_rng_state().numpy()
        kinds = ("weight", *_MOMENTS) if self._adam.state else ("weight",)
        for (name, parameter), owner in zip(self._parameters.items(), self._owners(), strict=True):
            for kind in kinds:
                whole = self._whole(kind, parameter)
                if owner == self._rank:
                    share[f"{kind}/{name}"] = whole.detach().to("cpu", torch.float32, copy=True).numpy()
        return share

    @torch.no_grad()
    def restore(self, facts: Mapping[str, Any], arrays: Iterable[tuple[str, np.ndarray]]) -> None:
        """Takes over what ``facts`` and all ranks' ``arrays``, one after another, say.

        Raises RunError when they are not this model's: before anything is changed where the shapes tell, after where
        an array is missing.
        """
        if wrong := differing({name: shape_of(each) for name, each in self._parameters.items()}, facts["shapes"]):
            raise RunError(
                f"the saved learner state is not this model's: {wrong}; restore it with the student.path that wrote it"
            )
        self._begin_adam(facts["steps"])
        kinds = ("weight", *_MOMENTS) if facts["steps"] else ("weight",)
        missing = {f"{kind}/{name}" for kind in kinds for name in self._parameters}
        rng: dict[str, torch.Tensor] = {}
        for key, array in arrays:
            kind, _, name = key.partition("/")
            if kind.startswith("rng"):
                rng[key] = torch.tensor(array)
            elif key in missing:
                self._assign(kind, self._parameters[name], torch.tensor(array))
                missing.remove(key)
        if missing:
            raise RunError(
                f"the saved learner state lacks {len(missing)} of its arrays, as {min(missing)}; it has to be the "
                "parts of all ranks that wrote it: restore another checkpoint"
            )
        self._restore_position(facts)
        self._restore_rng(facts["num_ranks"], rng)

    def _owners(self) -> Iterator[int]:
        """The rank that hands each parameter out: so that all ranks hand out about as much."""
        load = [0] * self._num_ranks
        for parameter in self._parameters.values():
            owner = load.index(min(load))
            load[owner] += shape_of(parameter).numel()
            yield owner

    def _whole(self, kind: str, parameter: torch.nn.Parameter) -> torch.Tensor:
        """A parameter or one of its moments, whole on every rank."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if self._stage == 0:
            return parameter if kind == "weight" else self._adam.state[parameter][kind]
        if kind == "weight":
            return safe_get_full_fp32_param(parameter)
        return safe_get_full_optimizer_state(parameter, kind)

    def _assign(self, kind: str, parameter: torch.nn.Parameter, whole: torch.Tensor) -> None:
        """Writes this rank's part of ``whole``; a weight into the model as well as into the optimizer."""
        import deepspeed.utils as fragments

        if self._stage == 0:
            self._whole(kind, parameter).copy_(whole)
            return
        if kind == "weight" and parameter.numel():  # under ZeRO-3 only a small one that stays gathered
            parameter.copy_(whole)
        if self._stage < 3 and kind == "weight":
            fragments.safe_set_full_fp32_param(parameter, whole)
        elif self._stage < 3:
            fragments.safe_set_full_optimizer_state(parameter, whole, kind)
        else:
            size = parameter.ds_tensor.numel()  # the last rank's is padded, and so must be what it gets
            flat = torch.nn.functional.pad(whole.flatten(), (0, size * self._num_ranks - whole.numel()))
            shard = flat[self._rank * size : (self._rank + 1) * size]
            if kind == "weight":
                fragments.safe_set_local_fp32_param(parameter, shard)
                parameter.ds_tensor.copy_(shard)
            else:
                fragments.safe_set_local_optimizer_state(parameter, shard, kind)

    def _begin_adam(self, steps: int) -> None:
        """Gives AdamW, which has no state before its first step, that of ``steps`` steps with moments of 0."""
        if self._stage == 3:
            held = self._engine.optimizer.fp32_partitioned_groups_flat
        else:  # without ZeRO the parameters themselves, else this rank's part of all of them, flat
            held = [parameter for group in self._adam.param_groups for parameter in group["params"]]
        for parameter in held:
            state = self._adam.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                state |= {kind: torch.zeros_like(parameter) for kind in _MOMENTS}
            for value in state.values():
                value.zero_()
            state["step"].fill_(steps)
        if self._stage in (1, 2):
            # What DeepSpeed does after its first step; the fragments cannot be set without.
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _restore_position(self, facts: Mapping[str, Any]) -> None:
        self._engine.global_steps = facts["global_steps"]
        self._engine.skipped_steps = facts["skipped_steps"]
        schedule, position = self._engine.lr_scheduler, facts["lr_step"]
        rates = [base * factor(position) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
        schedule.load_state_dict(
            schedule.state_dict() | {"last_epoch": position, "_step_count": position + 1, "_last_lr": rates}
        )
        for group, rate in zip(self._adam.param_groups, rates, strict=True):
            group["lr"] = rate

    def _restore_rng(self, num_ranks: int, states: Mapping[str, torch.Tensor]) -> None:
        if num_ranks != self._num_ranks or f"rng/{self._rank}" not in states:
            torch.manual_seed(int(np.random.SeedSequence((self._seed, self._rank)).generate_state(1)[0]))
            return
        torch.set_rng_state(states[f"rng/{self._rank}"])
        if torch.cuda.is_initialized() and f"rng_cuda/{self._rank}" in states:
            torch.cuda.set_rng_state(states[f"rng_cuda/{self._rank}"])
