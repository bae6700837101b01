"""Load ControlNets and T2I-Adapters from folders, the Hub and single files: every tensor, finite, and never from a pickle."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from wadi.backbones.weight_files import DIFFUSERS, component_weights, file_names, weight_copies
from wadi.errors import WadiError, first_line
from wadi.io.quiet import errors_only
from wadi.io.records import read_json
from wadi.io.tensors import PICKLE_REMEDY, PICKLE_SUFFIXES, open_tensors, read_tensors
from wadi.io.weight_checks import check_none_missing, check_stored_floats, load_complete, shapes, tensor_differences
from wadi.zoo.paths import NAME, embedded_path

KINDS = ("ControlNetModel", "SD3ControlNetModel", "FluxControlNetModel", "SanaControlNetModel", "T2IAdapter")
# Tensor names in the ControlNet authors' own code.
_ORIGINAL = re.compile(r"^control_model\.|^input_hint_block\.|^zero_convs\.")


def is_image_prompt(control: object) -> bool:
    """Return whether ``control`` is the safetensors file of an IP-Adapter, judged by the names of its tensors.

    Raises:
        WadiError: if it is a safetensors file that cannot be read.
    """
    if not isinstance(control, (str, Path)) or not str(control).endswith(".safetensors"):
        return False
    with open_tensors(Path(control), "Control") as stored:
        return any(name.startswith(("image_proj.", "ip_adapter.")) for name in stored.keys())  # noqa: SIM118


def load_control(control: str | Path, dtype: Any = None) -> Any:
    """Load a ControlNet or T2I-Adapter, of the class that its ``config.json`` names.

    Args:
        control: ``'zoo'``, a folder (also with ``*.fp16.safetensors`` only), a Hub id, or a safetensors file with its
            ``config.json`` next to it.
    Raises:
        WadiError: if it does not exist, its config names another class, it is a pickle, tensors are missing, or a value is
            NaN or infinite.
    """
    path = Path(embedded_path("controlnet")) if str(control) == NAME else Path(control)
    what = f"Control {str(control)!r}"
    try:
        if path.is_file():
            model = _load_file(path, what)
        elif path.is_dir():
            model = _load_folder(path, what)
        else:
            _check_hub_id(control)
            model = _load_hub(str(control), what)
    except WadiError:
        raise
    except Exception as error:  # diffusers, huggingface_hub and safetensors have exception classes of their own
        raise WadiError(
            f"{what} could not be loaded: {first_line(error)}. Give 'zoo', the folder or Hub id of a {' / '.join(KINDS)}, a "
            "ControlNet's .safetensors file with its config.json next to it, or an IP-Adapter's .safetensors file."
        ) from error
    if dtype is None:
        return model
    with errors_only():  # diffusers warns about every cast
        return model.to(dtype)


def _check_hub_id(path: str | Path) -> None:
    if str(path).startswith((".", "/", "~")) or str(path).count("/") != 1:
        raise WadiError(f"Control {str(path)!r} does not exist. Give a folder, a .safetensors file, or a Hub id 'owner/name'.")


def _model_class(config: Any) -> Any:
    """Return diffusers' class of a control from its config."""
    import diffusers

    kind = config.get("_class_name")
    if kind not in KINDS:
        raise ValueError(f"its config.json names {kind!r}")
    return getattr(diffusers, kind)


def _load_folder(path: Path, what: str) -> Any:
    model_class = _model_class(read_json(path / "config.json", dict[str, Any], "ControlNet config"))
    variant = variant_in(path, what)
    for file in component_weights(path, variant).files:
        with open_tensors(file, what) as stored:
            check_stored_floats(what, stored)
    return _load_class(model_class, str(path), what, variant=variant)


def _load_hub(name: str, what: str) -> Any:
    from diffusers import ControlNetModel

    model_class = _model_class(ControlNetModel.load_config(name))
    try:
        return _load_class(model_class, name, what)
    except OSError:  # there is no plain copy of the weights
        return _load_class(model_class, name, what, variant="fp16")


def _load_class(model_class: Any, source: str, what: str, **options: Any) -> Any:
    return load_complete(model_class, source, what, use_safetensors=True, **options)


def variant_in(folder: Path, what: str) -> str | None:
    """Return the variant of the weights in ``folder`` (``"fp16"``), or None if there is a plain copy.

    Raises:
        WadiError: if there are only pickles, or several variants and no plain copy.
    """
    names = file_names(folder)
    variants = weight_copies(names)
    if None in variants:
        return None
    if len(variants) == 1:
        return next(iter(variants))
    if variants:
        names_of_variants = ", ".join(sorted(str(variant) for variant in variants))
        raise WadiError(f"{what} has several variants of its weights: {names_of_variants}. Keep one of them in the folder.")
    if pickled := [name for name in names if name.endswith(PICKLE_SUFFIXES)]:
        raise WadiError(f"{what} has its weights only as {pickled[0]}. {PICKLE_REMEDY}")
    raise WadiError(f"{what} has no weights: {DIFFUSERS}.safetensors is missing in its folder. Download or save it again.")


def _load_file(path: Path, what: str) -> Any:
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise WadiError(
            f"{what} is a pickle ({path.suffix}). {PICKLE_REMEDY} Or use the folder of a ControlNet in diffusers' format."
        )
    with open_tensors(path, what) as stored:
        check_stored_floats(what, stored)
    tensors, _ = read_tensors(path, "Control")
    if any(_ORIGINAL.search(name) for name in tensors):
        raise WadiError(
            f"{what} has the tensor names of the ControlNet authors' own code. Convert it: "
            "diffusers.ControlNetModel.from_single_file(FILE).save_pretrained(FOLDER)."
        )
    config = path.parent / "config.json"
    if not config.is_file():
        raise WadiError(
            f"{what} has no config.json next to it, which describes the ControlNet's layers. Put the config.json of a "
            "ControlNet in diffusers' format for the same model into its folder."
        )
    model_class = _model_class(read_json(config, dict[str, Any], "ControlNet config"))
    model = model_class.from_config(model_class.load_config(str(path.parent)))
    own = model.state_dict()
    check_none_missing(what, own.keys() - tensors.keys())
    if differences := tensor_differences(shapes(own), shapes(tensors)):
        raise WadiError(f"{what} does not fit its config.json: tensors {differences}. Use the config.json that belongs to it.")
    model.load_state_dict(tensors)
    return model.eval()
