"""Objectives: the losses of student and fake model, one file each. They know nothing about adapters, optimisers or files.

`base.py` has the contract, and `vsd.py` the paper's objective: start there. `docs/add-an-objective.md` adds another one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from wadi.distill.config import DistillConfig
from wadi.errors import WadiError
from wadi.io.imports import imported
from wadi.roles.methods import default_rank

if TYPE_CHECKING:
    from wadi.distill.objectives.base import Objective

OBJECTIVES = {
    "vsd": "wadi.distill.objectives.vsd:VSD",
    "dmd": "wadi.distill.objectives.dmd:DMD",
    "dmd2": "wadi.distill.objectives.dmd2:DMD2",
    "sid": "wadi.distill.objectives.sid:SiD",
    "consistency": "wadi.distill.objectives.consistency:Consistency",
}


def objective_class(name: str) -> type[Objective]:
    """Return the class of an objective.

    Raises:
        WadiError: if there is none of this name.
    """
    if name not in OBJECTIVES:
        raise WadiError(f"There is no objective {name!r}. Choose one of {', '.join(OBJECTIVES)}: set --objective.")
    found: type[Objective] = imported(OBJECTIVES[name])
    return found


def with_defaults(config: DistillConfig) -> DistillConfig:
    """Return ``config`` with all defaults that depend on other settings: ranks, and those of the fake model.

    Raises:
        WadiError: if there is no such objective or adapter.
    """
    config = replace(config, student=_with_rank(config.student, "student"), fake=_with_rank(config.fake, "fake"))
    defaults = objective_class(config.objective).fake_defaults
    if defaults is None:
        return config
    values: dict[str, Any] = {
        "guidance_scale": config.guidance_scale if defaults.guidance_scale is None else defaults.guidance_scale,
        "updates": defaults.updates,
        "weighting": defaults.weighting,
    }
    unset = {name: value for name, value in values.items() if getattr(config.fake, name) is None}
    return replace(config, fake=replace(config.fake, **unset))


def _with_rank(settings: Any, role: str) -> Any:
    """Return the settings of a role with the rank of its adapter; None for an adapter without a rank."""
    default = default_rank(settings.adapter, role)
    return replace(settings, rank=None if default is None else settings.rank or default)


def make_objective(config: DistillConfig) -> Objective:
    """Return the objective of a run, without its modules (`Objective.build`).

    Raises:
        WadiError: if there is no such objective, or it has no such option.
    """
    from wadi.distill.config_files import from_dict

    found = objective_class(config.objective)
    return found(with_defaults(config), from_dict(config.objective_options, found.Options, "objective_options."))
