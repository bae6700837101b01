"""Register this project's methods with PEFT.

PEFT has a public function to register a method, but the names of its methods are a closed enum. So one member
is added to the enum first. After that, everything that uses PEFT (diffusers, transformers, PEFT's own status and
errors) treats LoRaD like PEFT's own methods. A PEFT that has its own method of the same name is not changed.
"""

from __future__ import annotations

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import register_peft_method

NAME = "LORAD"


def add_peft_type(name: str) -> PeftType:
    """Return the member ``name`` of ``PeftType``; add it if it is missing. As a string it equals its name."""
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


def register(config_cls: type, model_cls: type, name: str = NAME) -> None:
    """Register a method with PEFT under the type ``name``, in capitals. Does nothing if there is one already."""
    if name in PEFT_TYPE_TO_TUNER_MAPPING:
        return
    add_peft_type(name)
    register_peft_method(name=name.lower(), config_cls=config_cls, model_cls=model_cls, prefix=f"{name.lower()}_")
