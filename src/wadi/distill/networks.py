"""The three roles of one frozen network, as functions: what the objectives evaluate."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from wadi import roles
from wadi.backbones import Backbone, Condition
from wadi.diffusion.process import Process
from wadi.sampling import predict_guided, predict_x0


@dataclass(frozen=True)
class RoleNetworks:
    """Teacher, student and fake model of a backbone. It implements `wadi.distill.objectives.base.Networks`.

    Attributes:
        null: condition of the null prompt, one row, for guidance.
    """

    backbone: Backbone
    null: Condition

    @property
    def process(self) -> Process:
        """The noising process of the backbone."""
        return self.backbone.process

    def teacher(self, x_t: Tensor, t: Tensor, condition: Condition, guidance_scale: float = 1.0) -> Tensor:
        """Return the teacher's guided prediction, ``(B, C, H, W)``."""
        return self._guided(None, x_t, t, condition, guidance_scale)

    def fake(self, x_t: Tensor, t: Tensor, condition: Condition, guidance_scale: float = 1.0) -> Tensor:
        """Return the fake model's guided prediction, ``(B, C, H, W)``."""
        return self._guided("fake", x_t, t, condition, guidance_scale)

    def fake_with_features(self, x_t: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        """Return the fake model's prediction and the features of its middle block, ``(B, tokens, width)``."""
        with roles.active(self.backbone.network, "fake"), self.backbone.captured_features() as features:
            prediction = self.backbone.predict(x_t, t, condition)
        return prediction, features[0]

    def student(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Return the image that the student predicts, ``(B, C, H, W)``."""
        with roles.active(self.backbone.network, "student"):
            return predict_x0(self.backbone, x_t, t, condition)

    def _guided(self, role: str | None, x_t: Tensor, t: Tensor, condition: Condition, guidance_scale: float) -> Tensor:
        with roles.active(self.backbone.network, role):
            return predict_guided(self.backbone, x_t, t, condition, self.null, guidance_scale)
