"""Make LoRaD one of PEFT's methods.

PEFT registers methods by a public function but keeps their names in a closed enum, so one member has to be
added first. With the member in place everything that knows PEFT (diffusers, transformers, PEFT's status,
errors) treats LoRaD as its own. A PEFT that brings its own LoRaD is left alone.
"""

from __future__ import annotations

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import register_peft_method

NAME = "LORAD"


def add_peft_type(name: str) -> PeftType:
    """The member ``name`` of ``PeftType``, added if it is missing; equal to its own name as a string."""
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member.__objclass__ = PeftType  # type: ignore[attr-defined]
    member._sort_order_ = len(PeftType._member_names_)  # type: ignore[attr-defined]
    type.__setattr__(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    return member


def register(config_cls: type, model_cls: type) -> None:
    """Register LoRaD with PEFT once; a second call, or a PEFT that has it, changes nothing."""
    if NAME in PEFT_TYPE_TO_TUNER_MAPPING:
        return
    add_peft_type(NAME)
    register_peft_method(name=NAME.lower(), config_cls=config_cls, model_cls=model_cls, prefix="lorad_")
