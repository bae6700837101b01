"""A stand-in for a pipeline that has no weights, for `wadi plan`; and defaults of a pipeline's call."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

from wadi.errors import WadiError


class Outline(SimpleNamespace):
    """The parts of a pipeline that a backbone needs to predict, without text encoders and autoencoder.

    Attributes: ``pipeline_class`` (its name), ``scheduler``, ``vae_scale_factor``, ``config`` (a dictionary), and the network
    under the family's `Backbone.component`. Static methods of the pipeline's class are there too.

    Anything else raises `NotInOutline`: methods of a family that the plan uses must not need it. These are the constructor,
    `default_targets`, `patch`, `native_resolution`, `latent_channels`, `condition_shapes` and `predict`.
    """

    pipeline_class: str

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("__") and "pipeline_class" in vars(self):
            found = inspect.getattr_static(_diffusers_class(self.pipeline_class), name, None)
            if isinstance(found, staticmethod):
                return found.__func__
        raise NotInOutline(
            f"The family needs pipeline.{name}, but `wadi plan` has no pipeline: it works from configs alone. Take what you "
            "need from self.network.config, or a default of the call from wadi.backbones.outline.default_argument."
        )


class NotInOutline(WadiError, AttributeError):
    """A family needs a part of the pipeline that `wadi plan` does not have."""


def default_argument(pipeline: Any, name: str) -> Any:
    """Return the default of an argument of a pipeline's call. Training uses it too, so that it matches a plain call."""
    pipeline_class = _diffusers_class(pipeline.pipeline_class) if isinstance(pipeline, Outline) else type(pipeline)
    return inspect.signature(pipeline_class.__call__).parameters[name].default


def _diffusers_class(name: str) -> Any:
    import diffusers

    if not hasattr(diffusers, name):
        raise WadiError(f"diffusers has no class {name!r}, so `wadi plan` cannot look up the defaults of its call.")
    return getattr(diffusers, name)
