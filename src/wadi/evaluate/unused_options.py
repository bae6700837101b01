"""Options of ``wadi eval`` that would have no effect. They are errors, because a user who gives one expects an effect."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from wadi.errors import WadiError
from wadi.evaluate.metric_table import METRICS
from wadi.evaluate.protocols import COCO


@dataclass(frozen=True)
class Request:
    """The options and sources of one command.

    Attributes:
        given: names of the options with a value other than the default.
        metrics: of the command or its protocol.
        protocol: of the command line; None = none.
        kinds: of the measured sources: 'folder', 'student', 'pipeline'.
        teachers: whether a teacher generates images (as a row, or as the reference).
        weights: names before the ``=`` of ``--weights``.
        features: of the command line or its protocol.
    """

    given: Collection[str]
    metrics: Collection[str]
    protocol: str | None
    kinds: Collection[str]
    teachers: bool
    weights: Collection[str] = ()
    features: str | None = None


def check_options_have_effect(request: Request) -> None:
    """Raise `WadiError` for the first option that has no effect on this request, with the reason."""
    generators = {"student", "pipeline"} & set(request.kinds)
    networks = {METRICS[name].network for name in request.metrics if name in METRICS}
    needs_teacher = "student" in request.kinds or request.teachers
    has_reference = any(METRICS[name].reference for name in request.metrics if name in METRICS)
    rules = (
        (("reference",), has_reference or request.protocol in COCO, "no metric compares with a reference"),
        (("prompts", "pairs"), "folder" in request.kinds, "only image folders need the prompts of their images"),
        (("ids", "coco_seed"), request.protocol in COCO, f"only {' and '.join(COCO)} choose captions"),
        (("count", "coco_seed"), "ids" not in request.given, "--ids names the captions"),
        (("count",), request.protocol is not None, "it takes fewer prompts of a --protocol"),
        (("set",), request.protocol is not None, "it names the seeds of a --protocol"),
        (("steps", "guidance_scale", "beside_teacher", "speed"), bool(generators), "only image folders are measured"),
        (("teacher",), needs_teacher, "a pipeline needs no teacher without --beside-teacher or --reference teacher"),
        (("teacher_steps", "teacher_guidance_scale"), request.teachers, "no teacher generates images: add --beside-teacher"),
        (("k",), "pr" in request.metrics, "only the metric pr has nearest neighbours"),
        (("inception", "download"), "inception" in networks or request.features == "inception", "no metric uses that network"),
        (("features",), "features" in networks, "only fd, kd, pr and diversity use it"),
        (("resize",), bool({"features", "inception"} & networks), "no metric uses a feature network"),
    )  # fmt: skip
    for options, has_effect, reason in rules:
        for option in options:
            if option in request.given and not has_effect:
                raise WadiError(f"--{option.replace('_', '-')} has no effect here: {reason}. Leave it out.")
    for name in request.weights:
        scorer = name.partition(".")[0]
        if scorer not in networks and scorer in METRICS:
            raise WadiError(f"--weights {name}=... has no effect, because the metric {scorer!r} is not measured. Leave it out.")
