"""The reference of an evaluation: the images that generated images are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wadi.errors import WadiError
from wadi.evaluate import generated
from wadi.evaluate.generators import Generator
from wadi.evaluate.image_sets import content_digest, files_in
from wadi.evaluate.protocols import Protocol


@dataclass(frozen=True)
class Reference:
    """The images to compare with: files, or a teacher that generates them. ``about`` goes into the hash."""

    about: dict[str, Any]
    files: Sequence[Path] | None = None
    teacher: Generator | None = None


def folder_reference(folder: str | Path, protocol: Protocol | None = None) -> Reference:
    """Return a folder of images as a reference.

    Raises:
        WadiError: if it is empty, or was generated for another protocol.
    """
    require_same_prompts(Path(folder), protocol, "Reference")
    files = files_in(folder)
    return Reference({"kind": "folder", "count": len(files), "sha256": content_digest(files)}, files)


def protocol_reference(protocol: Protocol) -> Reference:
    """Return the reference that belongs to a protocol, such as the images of COCO.

    Raises:
        WadiError: if the protocol has none.
    """
    if protocol.reference is None:
        raise WadiError(f"Protocol {protocol.name!r} has no reference of its own. Add --reference with a folder of images.")
    return Reference({}, protocol.reference)


def teacher_reference(teacher: Generator, protocol: Protocol) -> Reference:
    """Return a teacher's many-step images of the same prompts, from other noise (set 0)."""
    about = {"kind": "drawn", "count": len(protocol.prompts), "set": 0, "generator": teacher.about}
    return Reference(about, teacher=teacher)


def require_same_prompts(folder: Path, protocol: Protocol | None, what: str) -> None:
    """Raise `WadiError` if the folder's images were generated for other prompts than the protocol's."""
    about = generated.read_about(folder) if folder.is_dir() else None
    if protocol is None or about is None:
        return
    folder_prompts, protocol_prompts = (
        about.get("prompts"),
        {"count": len(protocol.prompts), "sha256": generated.prompts_digest(protocol.prompts)},
    )
    if folder_prompts != protocol_prompts:
        changes = "; ".join(generated.differences({"prompts": folder_prompts}, {"prompts": protocol_prompts}))
        raise WadiError(
            f"{what} {str(folder)!r} was generated for another protocol: {changes}. Generate images of the prompts of "
            f"{protocol.name!r} in another folder."
        )
