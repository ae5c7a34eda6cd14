"""A scorer's model that follows the student: renewed now and then, or an exponential average of its weights."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from opd_ray.config import ScorerConfig
from opd_ray.errors import RunError, WeightSyncError
from opd_ray.messages import TransferGroup, WeightManifest
from opd_ray.rooms import spans
from opd_ray.weights.beside import Memory, own_stream
from opd_ray.weights.manifest import check_fits, differing
from opd_ray.weights.transfer import WeightTransfer


class Follower:
    """Takes part in every broadcast, and writes into a model what its rule makes of it.

    "fixed"     nothing
    "periodic"  the weights of every version that is a multiple of update_every_steps
    "average"   w ← update_decay · w + (1 − update_decay) · w_student at every version

    It begins at version 0 with the weights that the model has, and so leaves version 0 alone. A version that it holds
    already (a run that goes on from a checkpoint sends it again) changes nothing. After a gap in the versions there is
    nothing to go on from, and both rules take the weights as they are.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], rule: ScorerConfig) -> None:
        """``parameters``: the model's, tied ones under each of their names."""
        self._transfer, self._memory = WeightTransfer(), Memory()
        self.follow(parameters, rule)

    def follow(self, parameters: Mapping[str, torch.nn.Parameter], rule: ScorerConfig) -> None:
        """Begins anew, at version 0 of a model."""
        self._parameters, self._rule = dict(parameters), rule
        self.version = 0
        self.whole = True
        """Are its weights those of one version? Not after an installation that failed half way, until one succeeds."""
        self._received: tuple[int, dict[str, torch.Tensor]] = 0, {}
        """A version, and the weights of it that count."""
        # Steps of an average are below the resolution of bfloat16, so it is kept in float32 beside such a model.
        self._averages = {
            name: parameter.data if parameter.dtype == torch.float32 else parameter.data.float()
            for name, parameter in self._own().items()
            if rule.update == "average"
        }

    def connect(self, group: TransferGroup) -> None:
        """Joins the group that weights are broadcast in."""
        self._transfer.connect(group)

    @torch.no_grad()
    def receive(self, manifest: WeightManifest) -> None:
        """Takes one broadcast in, beside the weights in use, in another thread: one that breaks off changes nothing.
        Raises WeightSyncError for another architecture's, or one older than what is held."""
        self._check(manifest)
        own, counts = self._own(), self._share_kept(manifest.version) != 1.0
        with own_stream(next(iter(own.values())).device):
            received = self._transfer.receive_whole(manifest, self._memory if counts else None)
            self._received = manifest.version, {name: each for name, each in received if counts and name in own}

    @spans.spanned("broadcast")
    @torch.no_grad()
    def install(self) -> None:
        """Does what the rule says with what was received last."""
        (version, weights), keep = self._received, self._share_kept(self._received[0])
        for name, tensor in weights.items():
            self.whole = False
            self._blend(name, tensor, keep)
        self.version, self.whole = version, self.whole or keep != 1.0

    @spans.spanned("snapshot")
    def snapshot(self) -> tuple[dict[str, int], dict[str, np.ndarray]]:
        """The version, and a copy of the weights (averages where it keeps them) in float32."""
        weights = {name: self._averages.get(name, parameter.data) for name, parameter in self._own().items()}
        # A copy: the next broadcast may come while these are still being sent.
        arrays = {name: tensor.to("cpu", torch.float32, copy=True).numpy() for name, tensor in weights.items()}
        return {"version": self.version}, arrays

    @spans.spanned("restore")
    @torch.no_grad()
    def restore(self, facts: Mapping[str, int], arrays: Mapping[str, np.ndarray]) -> None:
        """Goes on from what ``snapshot`` returned. Raises RunError when it does not fit the model."""
        own = self._own()
        ours, theirs = ({name: each.shape for name, each in weights.items()} for weights in (own, arrays))
        if wrong := differing(ours, theirs):
            raise RunError(
                f"weights: the snapshot of a scorer that follows the student is not its model's: {wrong}; resume with "
                "the scorers that wrote it"
            )
        self.whole = False
        for name in own:
            self._blend(name, torch.tensor(arrays[name]), 0.0)
        self.version, self.whole = int(facts["version"]), True

    def _own(self) -> dict[str, torch.nn.Parameter]:
        """Every parameter once: averaging a tied one under both names would do it twice."""
        names = {id(parameter): name for name, parameter in reversed(self._parameters.items())}
        return {name: self._parameters[name] for name in names.values()}

    def _share_kept(self, version: int) -> float:
        """Of the old weights, when this version comes: 1 changes nothing, 0 installs it as it is."""
        if self._rule.update == "fixed" or version == self.version:
            return 1.0
        if version > self.version + 1:
            return 0.0
        if self._rule.update == "average":
            return self._rule.update_decay
        return 0.0 if version % self._rule.update_every_steps == 0 else 1.0

    def _blend(self, name: str, tensor: torch.Tensor, keep: float) -> None:
        parameter = self._parameters[name]
        average = self._averages.get(name)
        if average is None:
            parameter.data.copy_(tensor)
            return
        average.lerp_(tensor.to(average.device, torch.float32), 1.0 - keep)
        if average.data_ptr() != parameter.data_ptr():
            parameter.data.copy_(average)

    def _check(self, manifest: WeightManifest) -> None:
        if self._rule.update == "fixed":
            return
        if manifest.version < self.version:
            raise WeightSyncError(
                f"weights: a scorer that follows the student holds version {self.version}, but version "
                f"{manifest.version} was sent; restore its weights before a run goes back"
            )
        check_fits(manifest, self._parameters, "a scorer that follows the student")
