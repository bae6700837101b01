"""The settings of one LoRaD adapter."""

from __future__ import annotations

from dataclasses import dataclass, field

from peft.config import PeftConfig

from wadi.errors import WadiError
from wadi.lorad.pairing import NEIGHBOURS, PAIRINGS
from wadi.lorad.registry import NAME, add_peft_type

BIAS = ("none", "all", "lorad_only")
EXCESS_RANK = ("allow", "cap", "refuse")


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass
class LoRaDConfig(PeftConfig):
    """Settings of a LoRaD adapter (Low-rank Rotation of weight Direction, arXiv 2603.08258).

    Args:
        r: rank of the angle matrix ``theta = A B``; a layer trains ``r (out + fan_in // 2)`` numbers.
        target_modules: layers to rotate (``Linear``, ``Conv2d``): name endings, one regular expression over
            full names, or ``"all-linear"``.
        exclude_modules: layers to leave alone, written like ``target_modules``.
        rank_pattern: ``{name ending or regular expression: rank}`` for layers whose rank is not ``r``.
        layers_to_transform: index or indices of the blocks to adapt; needs a list in ``target_modules``.
        layers_pattern: name of the block list that those indices refer to, if PEFT does not find it.
        modules_to_save: modules that are fully trained and saved with the adapter.
        bias: biases to train: ``"none"``, ``"all"`` or ``"lorad_only"`` (the biases of rotated layers).
        init_weights: True starts at the base model (``A`` zero, ``B`` Xavier-uniform); False at random
            angles.
        pairing: which columns share an angle: ``"neighbours"`` (the paper), ``"halves"`` (column ``j`` and ``j + fan_in // 2``,
            as in rotary embeddings) or ``"random"`` (fixed pairs).
        recompute: False keeps the rotated weight for the backward pass, which takes the memory of one weight per
            layer. True keeps nothing of that size and rotates again.
        excess_rank: behaviour if ``r`` exceeds ``min(out, fan_in // 2)``, the rank of a full angle matrix.
            ``"allow"`` it (as in the paper: its rank 256 exceeds the 160 of SD 1.5's 320-wide layers), ``"cap"``
            it to that number (the same angles with fewer parameters), or raise an error (``"refuse"``).

    Raises:
        WadiError: if a rank is not positive; if a value is not one of the choices above; if
            ``layers_to_transform`` or ``layers_pattern`` is combined with a regular expression; if
            ``layers_pattern`` is set without ``layers_to_transform``; if ``recompute`` is combined with another pairing than
            neighbours.
    """

    r: int = field(default=8, metadata=_help("Rank of the angle matrix."))
    target_modules: list[str] | str | None = field(
        default=None,
        metadata=_help("Layers to rotate: list of name endings, one regular expression, or 'all-linear'."),
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata=_help("Layers to leave alone: list of name endings or one regular expression.")
    )
    rank_pattern: dict[str, int] | None = field(
        default_factory=dict, metadata=_help("Rank by name ending or regular expression, where it is not r.")
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata=_help("Index or indices of the blocks to adapt.")
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata=_help("Name of the block list that layers_to_transform refers to.")
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata=_help("Modules that are fully trained and saved with the adapter.")
    )
    bias: str = field(default="none", metadata=_help("Biases to train: 'none', 'all' or 'lorad_only'."))
    init_weights: bool = field(default=True, metadata=_help("True starts at the base model, False at random angles."))
    pairing: str = field(default=NEIGHBOURS, metadata=_help("Columns that share an angle: 'neighbours', 'halves' or 'random'."))
    recompute: bool = field(
        default=False, metadata=_help("Keep nothing of a weight's size for the backward pass; rotate again.")
    )
    excess_rank: str = field(
        default="allow",
        metadata=_help("Where r exceeds min(out, fan_in // 2): 'allow', 'cap' to it, or 'refuse'."),
    )

    def __post_init__(self) -> None:
        self._check_types()
        super().__post_init__()
        self.peft_type = add_peft_type(NAME)
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, list | tuple):
                setattr(self, name, set(value))
        self.rank_pattern = dict(self.rank_pattern or {})
        self._check_ranks()
        self._check_choices()
        self._check_layers()

    def _check_types(self) -> None:
        """Check types: anybody can write an ``adapter_config.json``, and PEFT does not check its values."""
        kinds = {"target_modules": str, "exclude_modules": str, "layers_pattern": str, "modules_to_save": str}
        for name, kind in (kinds | {"layers_to_transform": int}).items():
            value = getattr(self, name)
            several = isinstance(value, list | tuple | set)
            items = value if several else () if value is None else (value,)
            single = several or value is None or name != "modules_to_save"
            if not single or any(not isinstance(item, kind) or isinstance(item, bool) for item in items):
                raise WadiError(f"LoRaD: {name} is {value!r:.200}; give {kind.__name__} values, in a list if several.")
        if self.rank_pattern is not None and not isinstance(self.rank_pattern, dict):
            raise WadiError(f"LoRaD: rank_pattern is {self.rank_pattern!r:.200}; give ranks by name of layer.")

    def _check_ranks(self) -> None:
        for where, r in [
            ("r", self.r),
            *((f"rank_pattern[{k!r}]", r) for k, r in (self.rank_pattern or {}).items()),
        ]:
            if not isinstance(r, int) or isinstance(r, bool) or r <= 0:
                raise WadiError(f"LoRaD: {where} is {r!r}. A rank is a positive integer: try 16, or 256 as in the paper.")

    def _check_choices(self) -> None:
        for name, choices in (("bias", BIAS), ("excess_rank", EXCESS_RANK), ("pairing", PAIRINGS)):
            if getattr(self, name) not in choices:
                raise WadiError(f"LoRaD: {name} is {getattr(self, name)!r}; choose one of {', '.join(choices)}.")
        if self.recompute and self.pairing != NEIGHBOURS:
            raise WadiError(f"LoRaD: recompute works only with pairing 'neighbours', not {self.pairing!r}. Leave one out.")

    def _check_layers(self) -> None:
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise WadiError(
                        f"`{name}` cannot be used when `target_modules` is a str "
                        f"(got {self.target_modules!r}); give `target_modules` as a list of name endings."
                    )
        if self.layers_pattern and self.layers_to_transform is None:
            raise WadiError(
                "When `layers_pattern` is specified, `layers_to_transform` must also be specified: give the block indices."
            )
