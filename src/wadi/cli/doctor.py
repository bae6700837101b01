"""``wadi doctor``: versions, devices, optional parts and folders of this installation."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wadi.errors import WadiError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from wadi.cli.parser import Arguments

GIB = 2**30


def add_options(parser: ArgumentParser) -> None:
    """Add the options of ``wadi doctor``."""
    parser.add_argument("--json", action="store_true", help="print JSON for programs")


def run(arguments: Arguments) -> int:
    """Print what was found. Return 0 if everything that the package needs works, otherwise 2."""
    found = examine()
    print(json.dumps(found, indent=1) if arguments.options.json else text_of(found))
    return 2 if found["problems"] else 0


def examine() -> dict[str, Any]:
    """Return versions, packages, devices, folders and problems, as plain JSON values."""
    from wadi import __version__
    from wadi.io.installation import read_installation

    found: dict[str, Any] = {
        "wadi": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "problems": [],
    }
    installation = read_installation()
    if installation is None:
        found["problems"].append(
            "wadi runs from a folder and is not installed, so its packages are not known: pip install -e FOLDER."
        )
        found |= {"packages": {}, "extras": {}}
    else:
        found["packages"] = {package.name: package.version for package in installation.required}
        found["extras"] = {
            name: {package.name: package.version for package in packages} for name, packages in installation.extras.items()
        }
        found["problems"] += [
            f"{package.name} is {package.version or 'not installed'}, and wadi needs {package.needed or 'it'}: pip install "
            f"'{package.name}{package.needed}'."
            for package in installation.required
            if not package.fits
        ]
    found |= {"devices": devices(), "folders": folders()}
    found["problems"] += [
        f"The folder of {name}, {place['path']!r}, cannot be written. Set {place['variable']} to one that can."
        for name, place in found["folders"].items()
        if not place["writable"]
    ]
    return found


def devices() -> list[dict[str, Any]]:
    """Return the CPU and the GPUs with their memory in GiB; None if the system does not say."""
    import torch

    from wadi.parallel.device import computes_with_bfloat16, memory_of

    places = [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        places.append(torch.device("mps"))
    return [
        {
            "device": str(place),
            "name": torch.cuda.get_device_name(place)
            if place.type == "cuda"
            else f"{os.cpu_count()} cores, {torch.get_num_threads()} threads",
            "memory_gib": None if (memory := memory_of(place)) is None else round(memory / GIB, 1),
            "bfloat16": computes_with_bfloat16(place),
        }
        for place in places
    ]


def folders() -> dict[str, dict[str, Any]]:
    """Return the folders of caches: path, the variable that moves it, whether it can be written, and free space in GiB."""
    from huggingface_hub.constants import HF_HUB_CACHE

    from wadi.io.user_cache import cache_folder

    places = {"the cache of wadi": (cache_folder(), "WADI_CACHE"), "models of the Hub": (Path(HF_HUB_CACHE), "HF_HUB_CACHE")}
    return {name: _folder(path) | {"variable": variable} for name, (path, variable) in places.items()}


def _folder(path: Path) -> dict[str, Any]:
    from wadi.io.outputs import check_writable

    existing = next(place for place in (path, *path.parents) if place.exists())
    try:
        check_writable(path, folder=True)
        writable = True
    except WadiError:
        writable = False
    return {"path": str(path), "writable": writable, "free_gib": round(shutil.disk_usage(existing).free / GIB, 1)}


def text_of(found: dict[str, Any]) -> str:
    """Return the findings for people."""
    lines = [f"wadi {found['wadi']}, Python {found['python']} ({sys.executable}), {found['system']}", "", "packages"]
    lines += [f"  {name:<16} {version or 'not installed'}" for name, version in found["packages"].items()]
    lines += ["", "devices"]
    for device in found["devices"]:
        memory = "" if device["memory_gib"] is None else f", {device['memory_gib']} GiB"
        half = {True: ", bfloat16", False: ", no bfloat16 instructions", None: ""}[device["bfloat16"]]
        lines.append(f"  {device['device']:<16} {device['name']}{memory}{half}")
    lines += ["", "optional parts"]
    for name, packages in found["extras"].items():
        missing = [package for package, version in packages.items() if version is None]
        state = f"missing {', '.join(missing)}: pip install 'wadi-onestep[{name}]'" if missing else "installed"
        lines.append(f"  {name:<16} {state}")
    lines += ["", "folders"]
    for name, place in found["folders"].items():
        state = "can be written" if place["writable"] else "CANNOT be written"
        lines.append(f"  {name:<18} {place['path']}: {state}, {place['free_gib']} GiB free ({place['variable']})")
    lines += ["", *(f"PROBLEM: {problem}" for problem in found["problems"])] if found["problems"] else ["", "No problem found."]
    return "\n".join(lines)
