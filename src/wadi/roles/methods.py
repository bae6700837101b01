"""The adapters that a role can have: methods of PEFT, by the names of the setting ``student.adapter``.

    lorad         rotates the directions of weights (this project's own)
    lora, dora    low-rank change of weights; DoRA also learns the norm of each row
    dora-frozen   DoRA with the teacher's norms: its magnitude vector is in the file, and is not trained
    oft, boft     rotate the input of a layer by orthogonal blocks, or by a product of them
    hra           a chain of Householder reflections
    road          rotates pairs of outputs; Linear layers only
    full          the whole weight, as a difference to the frozen one (this project's own)

Only the options listed here are accepted. Others of PEFT would change the frozen weights (``init_lora_weights="pissa"``), or
import modules that they name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from wadi.errors import WadiError, first_line, short_repr
from wadi.io.bounds import RANK

Kinds = tuple[type, ...]
NUMBER: Kinds = (int, float)
LARGEST = 1_000_000  # of a number among the options


@dataclass(frozen=True)
class Method:
    """A method of adapters.

    Attributes:
        config: name of its class in PEFT.
        ranks: default rank of student and fake model; None for a method without a rank.
        fixed: settings that this name stands for.
        options: settings that the user may give, with their types.
        frozen: attributes of a layer with parameters that are not trained.
    """

    config: str
    ranks: Mapping[str, int] | None = None
    fixed: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Kinds] = field(default_factory=dict)
    frozen: tuple[str, ...] = ()


PATTERNS: Mapping[str, Kinds] = {"exclude_modules": (str, list), "rank_pattern": (dict,)}
LORA: Mapping[str, Kinds] = {**PATTERNS, "alpha_pattern": (dict,), "lora_alpha": (int,), "use_rslora": (bool,)}
SMALL = {"student": 64, "fake": 16}

METHODS: Mapping[str, Method] = {
    "lorad": Method("LoRaDConfig", {"student": 256, "fake": 32}, options={**PATTERNS, "pairing": (str,)}),
    "lora": Method("LoraConfig", SMALL, options=LORA),
    "dora": Method("LoraConfig", SMALL, {"use_dora": True}, LORA),
    "dora-frozen": Method("LoraConfig", SMALL, {"use_dora": True}, LORA, frozen=("lora_magnitude_vector",)),
    "oft": Method(
        "OFTConfig",
        options={
            "exclude_modules": (str, list), "r": (int,), "oft_block_size": (int,), "coft": (bool,), "eps": NUMBER,
            "block_share": (bool,), "use_cayley_neumann": (bool,), "num_cayley_neumann_terms": (int,),
        },
    ),
    "boft": Method(
        "BOFTConfig",
        options={
            "exclude_modules": (str, list), "boft_block_size": (int,), "boft_block_num": (int,),
            "boft_n_butterfly_factor": (int,),
        },
    ),
    "hra": Method("HRAConfig", {"student": 16, "fake": 8}, options={"exclude_modules": (str, list), "apply_GS": (bool,)}),
    "road": Method("RoadConfig", options={"variant": (str,), "group_size": (int,)}),
    "full": Method("FullConfig", options={"exclude_modules": (str, list)}),
}  # fmt: skip


def method(adapter: str) -> Method:
    """Return the method of this name.

    Raises:
        WadiError: if there is none.
    """
    if adapter not in METHODS:
        raise WadiError(f"There is no adapter {adapter!r}. Choose one of {', '.join(METHODS)}.")
    return METHODS[adapter]


def default_rank(adapter: str, role: str) -> int | None:
    """Return the rank that a role's adapter has by default; None for a method without a rank."""
    ranks = method(adapter).ranks
    return None if ranks is None else ranks[role]


def check_option(name: str, value: Any, kinds: Kinds) -> None:
    """Raise `WadiError` unless a setting of a method has one of these types, and its numbers are in range.

    Names are lists of text; the values of a mapping are ranks or the like, whole numbers from 1.
    """
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise WadiError(f"{name} is {short_repr(value)}. It must be of type {wanted}.")
    if isinstance(value, (list, tuple, set)) and not all(isinstance(item, str) for item in value):
        raise WadiError(f"{name} is {short_repr(value)}. It must be a list of names.")
    if isinstance(value, Mapping):
        for key, number in value.items():
            if not isinstance(key, str) or type(number) is not int or not 1 <= number <= RANK.high:
                raise WadiError(f"{name} has {key!r}: {short_repr(number)}. It must be a whole number from 1 to {RANK.high:,}.")
    if isinstance(value, (int, float)) and not isinstance(value, bool) and not -LARGEST <= value <= LARGEST:
        raise WadiError(f"{name} is {short_repr(value)}. It must be a finite number up to {LARGEST:,}.")


def adapter_config(
    adapter: str,
    role: str,
    rank: int | None,
    options: Mapping[str, Any],
    target_modules: str | list[str],
    recompute: bool = False,
) -> Any:
    """Return the PEFT config of an adapter. Which of its parameters are not trained is in ``method(adapter).frozen``.

    Args:
        role: ``"student"`` or ``"fake"``, for messages and the default rank.
        rank: None = the default; ignored by a method without a rank.
        options: further settings of the config class.
        recompute: LoRaD only: recompute the rotated weights in the backward pass.
    Raises:
        WadiError: if the adapter or an option is unknown, or an option has a wrong type or value.
    """
    found = method(adapter)
    for name, value in options.items():
        kinds = found.options.get(name)
        if kinds is None:
            raise WadiError(
                f"{role}.adapter_options has {name!r}, which adapter {adapter!r} does not support. It supports "
                f"{', '.join(found.options)}."
            )
        check_option(f"{role}.adapter_options.{name}", value, kinds)
    settings: dict[str, Any] = {"target_modules": target_modules, **found.fixed}
    if found.ranks is not None:
        settings["r"] = found.ranks[role] if rank is None else rank
    if found.config == "HRAConfig" and settings["r"] % 2:  # its reflections undo each other in pairs at the start
        raise WadiError(f"{role}.rank is {settings['r']}. Adapter {adapter!r} starts as the teacher only with an even rank.")
    if found.config == "LoraConfig":
        settings["lora_alpha"] = settings["r"]  # scale 1, whatever the rank
    if adapter == "lorad":
        settings["recompute"] = recompute
    return _built(_config_class(found), role, settings | dict(options))


def _config_class(found: Method) -> Any:
    import peft

    from wadi.full import FullConfig
    from wadi.lorad import LoRaDConfig

    own = {"LoRaDConfig": LoRaDConfig, "FullConfig": FullConfig}
    return own.get(found.config) or getattr(peft, found.config)


# Fields of adapter_config.json that do not affect what an adapter computes once its tensors are read.
BOOKKEEPING = frozenset(
    {"peft_type", "task_type", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "init_weights",
     "auto_mapping", "recompute"}
)  # fmt: skip
COMMON: Mapping[str, Kinds] = {
    "target_modules": (str, list), "exclude_modules": (str, list, type(None)), "r": (int,), "use_dora": (bool,)
}  # fmt: skip


def stored_config(values: Mapping[str, Any], source: str) -> Any:
    """Return the PEFT config that ``values``, read from an ``adapter_config.json``, describe.

    PEFT itself would import modules that some fields name, or change the frozen weights. So every field must be one that an
    option of this page can set, or have its default.

    Args:
        source: the adapter's folder, for messages.
    Raises:
        WadiError: if the method is unknown, or a field has a value that is not supported.
    """
    kind = str(values.get("peft_type"))
    found = next((entry for entry in METHODS.values() if entry.config.lower() == f"{kind.lower()}config"), None)
    if found is None:
        raise WadiError(f"Adapter {source} is of type {values.get('peft_type')!r}. It must be one of {', '.join(METHODS)}.")
    config_class = _config_class(found)
    defaults = config_class().to_dict()
    settings: dict[str, Any] = {}
    for name, value in values.items():
        kinds = COMMON.get(name) or found.options.get(name)
        if kinds is not None:
            if name in defaults:
                unset = value is None and defaults[name] is None and name != "target_modules"
                check_option(f"{name} in the config of adapter {source}", value, (type(None),) if unset else kinds)
                settings[name] = value
        elif name == "init_lora_weights" and value == "gaussian":
            continue
        elif name not in BOOKKEEPING and value and value != defaults.get(name):
            raise WadiError(
                f"Adapter {source} has {name!r}: {short_repr(value)} in its config. This setting is not supported: save the "
                "adapter without it."
            )
    return _checked(config_class, settings, f"Adapter {source} has a config that PEFT cannot read")


def _checked(config_class: Any, settings: dict[str, Any], what: str) -> Any:
    try:
        return config_class(**settings)
    except (ValueError, TypeError, AttributeError) as error:
        raise WadiError(f"{what}: {first_line(error)}. Restore the file as it was written.") from error


def _built(config_class: Any, role: str, settings: dict[str, Any]) -> Any:
    try:
        return config_class(**settings)
    except (ValueError, TypeError) as error:
        raise WadiError(
            f"The adapter of the {role} cannot have these options: {error}. Change {role}.adapter_options."
        ) from error
