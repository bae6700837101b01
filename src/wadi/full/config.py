"""The settings of one adapter that trains whole weights."""

from __future__ import annotations

from dataclasses import dataclass, field

from peft.config import PeftConfig

from wadi.lorad.registry import add_peft_type


@dataclass
class FullConfig(PeftConfig):
    """Settings of an adapter that trains the weights of its target layers. It has no rank.

    Args:
        target_modules: layers to train (``Linear``, ``Conv2d``): name endings, one regular expression over
            full names, or ``"all-linear"``.
        exclude_modules: layers to leave alone, written like ``target_modules``.
        init_weights: True starts at the base model; False at a small random difference.
    """

    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Layers to train: list of name endings, one regular expression, or 'all-linear'."},
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Layers to leave alone: list of name endings or one regular expression."}
    )
    init_weights: bool = field(
        default=True, metadata={"help": "True starts at the base model, False at a small random difference."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_peft_type("FULL")
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, list | tuple):
                setattr(self, name, set(value))
