"""A stand-in for a pipeline that has no weights, for `wadi plan`; and defaults of a pipeline's call."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any


class Outline(SimpleNamespace):
    """The parts of a pipeline that a backbone needs to predict, without text encoders and autoencoder.

    Attributes: ``pipeline_class`` (its name), ``scheduler``, ``vae_scale_factor``, ``config`` (a dictionary), and the network
    under the family's `Backbone.component`.
    """

    pipeline_class: str


def default_argument(pipeline: Any, name: str) -> Any:
    """Return the default of an argument of a pipeline's call. Training uses it too, so that it matches a plain call."""
    if isinstance(pipeline, Outline):
        import diffusers

        pipeline_class = getattr(diffusers, pipeline.pipeline_class)
    else:
        pipeline_class = type(pipeline)
    return inspect.signature(pipeline_class.__call__).parameters[name].default
