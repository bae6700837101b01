"""LoRaD adapters on any ``nn.Module``: attach, switch roles, fuse, save, load.

One frozen network serves three roles: the teacher (no adapter), the student and the fake model (one adapter each). Every quirk
of PEFT and diffusers that this takes lives here. Two of them fail silently elsewhere: PEFT's ``set_adapter`` flips
``requires_grad`` of the adapter left behind, so a backward pass after it yields no gradient; and a backward pass outside the
role's context recomputes checkpointed layers with whatever adapter is active by then.
"""

from __future__ import annotations

import copy
import json
import re
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from wadi.errors import WadiError, first_line
from wadi.io.files import whole_folder
from wadi.io.records import Count, Record, Side, read_json
from wadi.io.tensors import open_tensors
from wadi.io.weight_checks import check_finite, check_floats

if TYPE_CHECKING:
    from wadi.lorad import LoRaDConfig

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
FILES = (WEIGHTS, CONFIG, "wadi.json")  # all that `save` writes
_PREFIX = "base_model.model."  # how PeftModel names what it wraps; with it, PeftModel.from_pretrained reads the folder too


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name, module


def refuse_adapted(model: nn.Module) -> None:
    """Raise `WadiError` if ``model`` already carries an adapter of any kind."""
    for name, _ in _layers(model):
        raise WadiError(
            f"The teacher already carries an adapter (at {name}). Expected plain weights: merge it first "
            "(pipeline.fuse_lora() and pipeline.unload_lora_weights()), save the pipeline and give that."
        )


def attach(model: nn.Module, name: str, config: LoRaDConfig) -> list[str]:
    """Freeze ``model`` and put a LoRaD adapter ``name`` on every layer that ``config.target_modules`` names.

    Angles are float32 whatever the dtype of ``model``, and zero: the output does not change. Adapters attached before keep
    their state.

    Returns:
        Names of the adapted layers.
    Raises:
        WadiError: if the name is taken, nothing matches, or LoRaD cannot apply to a layer.
    """
    from peft import inject_adapter_in_model

    if name in getattr(model, "peft_config", {}):
        raise WadiError(f"An adapter named {name!r} is attached already. Expected a name of its own for each role.")
    model.requires_grad_(False)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # two adapters are the point
            inject_adapter_in_model(_exact(config, model), model, adapter_name=name)
    except WadiError:
        raise
    except (ValueError, re.error) as error:
        raise WadiError(
            f"Adapter {name!r} could not be attached: {first_line(error)}. Expected target_modules to "
            "name Linear or Conv2d layers (a string is a regular expression that matches whole names): see print(network)."
        ) from error
    for _, layer in _layers(model):
        layer.requires_grad_(False)
    attached: Any = model.peft_config
    attached[name] = config  # with its patterns, which are what is saved
    for adapter in attached:  # injection froze the adapters that were there before
        for parameter in parameters(model, adapter).values():
            parameter.requires_grad_(True)
    return [layer for layer, module in _layers(model) if name in getattr(module, "lorad_A", {})]


PATTERN_SECONDS = 2.0


def _exact(config: LoRaDConfig, model: nn.Module) -> LoRaDConfig:
    """Return a copy of ``config`` that names the layers its regular expressions match.

    PEFT would match them without a limit of time, and a pattern in a file that someone made can take for ever.
    """
    names, exact = [name for name, _ in model.named_modules() if name], copy.copy(config)
    for setting in ("target_modules", "exclude_modules"):
        pattern = getattr(config, setting)
        if isinstance(pattern, str) and pattern != "all-linear":
            found = matched(pattern, names, setting)
            if not found and setting == "target_modules":
                raise WadiError(
                    f"target_modules is {pattern!r:.300}, which matches none of the {len(names)} layers. A regular expression "
                    "must match the whole name of a Linear or Conv2d layer: see print(network)."
                )
            setattr(exact, setting, "|".join(map(re.escape, found)) if found else None)
            names = found if setting == "target_modules" else sorted(set(names) - set(found))
    if config.rank_pattern:
        ranks: dict[str, int] = {}
        for pattern, rank in reversed(config.rank_pattern.items()):  # of several that match, the first counts
            ranks |= dict.fromkeys(matched(rf"(.*\.)?({pattern})", names, "rank_pattern"), rank)
        exact.rank_pattern = {re.escape(name): rank for name, rank in ranks.items()}
    return exact


def matched(pattern: str, names: Sequence[str], setting: str) -> list[str]:
    """Return the names that a regular expression matches as a whole.

    Args:
        setting: names the expression at the start of a message.
    Raises:
        WadiError: if it is not a regular expression, or takes longer than `PATTERN_SECONDS`.
    """
    import regex

    try:
        compiled, end = regex.compile(pattern), time.monotonic() + PATTERN_SECONDS
        return [name for name in names if compiled.fullmatch(name, timeout=max(1e-3, end - time.monotonic()))]
    except TimeoutError as error:
        raise WadiError(
            f"{setting} is {pattern!r:.300}, which takes more than {PATTERN_SECONDS:g} seconds to match against the "
            f"names of {len(names)} layers. Write it without nested repetitions such as (a+)+."
        ) from error
    except (regex.error, RecursionError) as error:
        raise WadiError(
            f"{setting} is {pattern!r:.300}, which is not a regular expression: {error}. It must match whole names of layers."
        ) from error


def parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """The angles ``A`` and ``B`` of adapter ``name``, by ``layer.lorad_A`` and ``layer.lorad_B``, in the model's order."""
    found = {}
    for layer_name, layer in _layers(model):
        for kind in ("lorad_A", "lorad_B"):
            if name in getattr(layer, kind, {}):
                found[f"{layer_name}.{kind}"] = getattr(layer, kind)[name]
    return found


def full_rank(model: nn.Module, target_modules: str) -> int | None:
    """The largest rank that the angles of any layer can have, ``min(out, fan_in // 2)``; nothing is attached.

    Args:
        target_modules: regular expression that matches whole names of layers.
    Returns:
        None if it names no layer, or is no regular expression: `attach` says so.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}
    try:
        names = set(matched(target_modules, list(layers), "target_modules"))
    except WadiError:
        return None
    found = []
    for name, module in layers.items():
        if name in names:
            out, fan_in = module.weight.flatten(1).shape
            if isinstance(module, nn.Linear):  # the weight of a quantized one has another shape
                out, fan_in = module.out_features, module.in_features
            found.append(min(out, fan_in // 2))
    return max(found, default=None)


@contextmanager
def active(model: nn.Module, role: str | None) -> Iterator[None]:
    """Within the block ``model`` speaks in ``role``: an adapter's name, or None for the teacher.

    Changes nothing but which adapter each layer applies, and restores it. ``backward()`` of what was computed in the block
    must run inside it when activations are checkpointed.

    Raises:
        WadiError: if no layer carries ``role``, which would silently speak as the teacher.
    """
    layers = [layer for _, layer in _layers(model)]
    if role is not None and not any(role in getattr(layer, "lorad_A", {}) for layer in layers):
        raise WadiError(
            f"There is no adapter {role!r} to switch to. Expected one of {sorted(getattr(model, 'peft_config', {}))}."
        )
    before = [layer._active_adapter for layer in layers]
    for layer in layers:
        layer._active_adapter = [role] if role else []
    try:
        yield
    finally:
        for layer, previous in zip(layers, before, strict=True):
            layer._active_adapter = previous


@torch.no_grad()
def angles(model: nn.Module, name: str) -> Iterator[tuple[str, Tensor]]:
    """``(layer, Theta)`` of each adapted layer, ``Theta = A @ B`` of shape ``(out, fan_in // 2)`` in radians, float32."""
    for layer_name, layer in _layers(model):
        if name in getattr(layer, "lorad_A", {}):
            yield layer_name, layer.lorad_A[name].float() @ layer.lorad_B[name].float()


def fuse(model: nn.Module, name: str) -> nn.Module:
    """Rotate the weights by adapter ``name`` for good and remove every adapter: what is left is the plain model.

    Raises:
        WadiError: if no layer carries ``name``.
    """
    if not parameters(model, name):
        raise WadiError(f"There is no adapter {name!r} to fuse. Expected one of {sorted(getattr(model, 'peft_config', {}))}.")
    for layer_name, layer in list(_layers(model)):
        if name in getattr(layer, "lorad_A", {}):
            layer.merge(adapter_names=[name])
        parent, _, child = layer_name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config
    return model


def state_dict(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Tensors of adapter ``name`` as an adapter folder names them; the live tensors, not copies."""
    return {_PREFIX + key: value.detach() for key, value in parameters(model, name).items()}


def write(model: nn.Module, name: str, folder: Path, tensors: dict[str, Tensor] | None = None) -> None:
    """Write adapter ``name`` into an existing ``folder`` as PEFT does; ``tensors`` (EMA, say) in place of the live ones."""
    from safetensors.torch import save_file

    live = tensors if tensors is not None else state_dict(model, name)
    save_file(
        {k: v.detach().cpu().contiguous() for k, v in live.items()},
        folder / WEIGHTS,
        metadata={"format": "pt"},
    )
    config: Any = model.peft_config  # by adapter name
    config[name].save_pretrained(folder)


def save(
    model: nn.Module,
    name: str,
    folder: Path,
    tensors: dict[str, Tensor] | None = None,
    extra: dict[str, Any] | None = None,
) -> None:
    """`write` to ``folder``, whole or not at all; ``extra`` goes beside it as ``wadi.json``."""
    with whole_folder(folder) as temporary:
        write(model, name, temporary, tensors)
        if extra is not None:
            (temporary / "wadi.json").write_text(json.dumps(extra, indent=2) + "\n")


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """``(config, tensors)`` of an adapter folder.

    Raises:
        WadiError: if it is not one, is damaged, contains another kind of adapter, or has values that are not finite
            floating-point numbers.
    """
    config = read_config(folder)
    with open_tensors(folder / WEIGHTS) as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    check_floats(f"Adapter {str(folder)!r}", tensors)
    check_finite(f"Adapter {str(folder)!r}", tensors)
    return config, tensors


def read_config(folder: Path) -> dict[str, Any]:
    """What an adapter folder's config says, the weights unread.

    Raises:
        WadiError: as `read`.
    """
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise WadiError(f"{str(folder)!r} is no adapter folder. Expected {CONFIG} and {WEIGHTS} in it.")
    config: dict[str, Any] = read_json(folder / CONFIG, dict[str, Any], "Adapter config")
    kind = config.get("peft_type")
    if kind != "LORAD":
        raise WadiError(f"Adapter {str(folder)!r} is of type {kind!r} by its {CONFIG}. Expected 'LORAD'.")
    return config


class About(Record):
    """``wadi.json`` of a student's adapter.

    Attributes:
        timestep: at which the student generates.
        resolution: ``(height, width)`` that it was trained at; None in adapters that do not say: the model's own.
        teacher: pipeline folder, Hub id or ``zoo``.
    """

    timestep: Count
    resolution: tuple[Side, Side] | None = None
    teacher: str = "zoo"


def read_about(folder: Path) -> About:
    """Read `About` from a student's adapter folder.

    Raises:
        WadiError: if the file is missing, damaged, or has no timestep.
    """
    return read_json(folder / "wadi.json", About, "The record of the student's timestep")


def restore(model: nn.Module, name: str, tensors: dict[str, Tensor], source: object = "the checkpoint") -> None:
    """Copy ``tensors`` into the attached adapter ``name``.

    Raises:
        WadiError: if names or shapes differ, naming the first ones that do.
    """
    own = state_dict(model, name)
    missing, unknown = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    reshaped = sorted(k for k in own.keys() & tensors.keys() if own[k].shape != tensors[k].shape)
    if missing or unknown or reshaped:
        told = [
            f"{len(keys)} {what} (first: {keys[0].removeprefix(_PREFIX)})"
            for keys, what in ((missing, "missing"), (unknown, "unknown"), (reshaped, "of another shape"))
            if keys
        ]
        raise WadiError(
            f"Adapter {name!r} from {source} does not fit this model: {', '.join(told)}. Expected an adapter of the same "
            "architecture, target layers and rank: give the teacher it was trained on."
        )
    for key, value in tensors.items():
        own[key].copy_(value)


def load(model: nn.Module, folder: Path, name: str) -> None:
    """Attach the adapter of ``folder`` to ``model`` as ``name``.

    Raises:
        WadiError: if the folder is damaged or the adapter belongs to another architecture (which keys).
    """
    from peft import PeftConfig

    _, tensors = read(folder)
    layers = {key.removeprefix(_PREFIX).rsplit(".lorad_", 1)[0] for key in tensors}
    if lost := sorted(layers - {layer for layer, _ in model.named_modules()}):
        raise WadiError(
            f"Adapter {str(folder)!r} is for another architecture: this model has no layer {lost[0]!r}"
            f"{f' and {len(lost) - 1} more' if len(lost) > 1 else ''}. Expected the teacher it was trained on."
        )
    try:
        config: Any = PeftConfig.from_pretrained(str(folder))
    except (TypeError, ValueError) as error:
        if isinstance(error, WadiError):
            raise WadiError(f"Adapter {str(folder)!r}: {error}") from error
        raise WadiError(
            f"Adapter {str(folder)!r} has a {CONFIG} that PEFT cannot read: {str(error).partition(chr(10))[0]:.300}. "
            "Restore the file as it was written."
        ) from error
    attach(model, name, config)
    restore(model, name, tensors, repr(str(folder)))
