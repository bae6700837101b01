"""Locate the LoRA that a path means: a file, or a folder as diffusers or PEFT write it."""

from __future__ import annotations

from pathlib import Path

from wadi.errors import WadiError
from wadi.extras.lora.file import LORA_FILE, PEFT_CONFIG, PEFT_FILE, read_peft_type
from wadi.extras.lora.other_formats import MERGE
from wadi.io.tensors import PICKLE_REMEDY, PICKLE_SUFFIXES

PEFT_TYPES = ("LORA", "LOHA", "LOKR")


def locate_lora(file: str | Path) -> Path:
    """Return the path of the LoRA's ``.safetensors`` file, or the folder of a LoRaD adapter.

    Raises:
        WadiError: if there is no such file or folder, or it contains something else.
    """
    path = Path(file)
    if path.is_dir():
        return _locate_in_folder(path)
    if not path.is_file():
        raise WadiError(f"LoRA {str(path)!r} does not exist. Give a .safetensors file or an adapter's folder.")
    if path.suffix.lower() != ".safetensors":
        raise WadiError(
            f"LoRA {str(path)!r} is not a .safetensors file. {PICKLE_REMEDY if path.suffix in PICKLE_SUFFIXES else ''}".rstrip()
        )
    return path


def _locate_in_folder(folder: Path) -> Path:
    if (folder / LORA_FILE).is_file():
        return folder / LORA_FILE
    if (folder / PEFT_CONFIG).is_file():
        peft_type = read_peft_type(folder)
        if peft_type == "LORAD":
            return folder
        if peft_type not in PEFT_TYPES:
            raise WadiError(
                f"{str(folder)!r} contains a PEFT adapter of type {peft_type!r}. --lora takes {', '.join(PEFT_TYPES)} and "
                f"LORAD. {MERGE}"
            )
    files = sorted(folder.glob("*.safetensors"))
    if (folder / PEFT_FILE).is_file() or len(files) == 1:
        return folder / PEFT_FILE if (folder / PEFT_FILE).is_file() else files[0]
    if files:
        raise WadiError(f"{str(folder)!r} contains {len(files)} .safetensors files. Name one of them, such as {files[0].name}.")
    if pickles := [file.name for file in sorted(folder.iterdir()) if file.suffix in PICKLE_SUFFIXES]:
        raise WadiError(f"{str(folder)!r} contains its adapter only as {pickles[0]}. {PICKLE_REMEDY}")
    raise WadiError(
        f"{str(folder)!r} contains no adapter. Give a folder with {LORA_FILE} or {PEFT_FILE}, or the file of the LoRA itself."
    )
