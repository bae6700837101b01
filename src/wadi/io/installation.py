"""What is installed: required packages and optional parts, as the metadata of this package declares them."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, metadata
from importlib.util import find_spec

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from wadi.errors import WadiError
from wadi.io.versions import installed_versions

PACKAGE = "wadi-onestep"


@dataclass(frozen=True)
class Installed:
    """A required package.

    Attributes:
        needed: the versions that work, such as ``>=2.6``.
        version: the installed version; None = it is not installed.
    """

    name: str
    needed: str
    version: str | None

    @property
    def fits(self) -> bool:
        """Whether a version that works is installed."""
        return self.version is not None and Requirement(f"x{self.needed}").specifier.contains(self.version, prereleases=True)


@dataclass(frozen=True)
class Installation:
    """The packages of this environment.

    Attributes:
        required: the packages that everything needs.
        extras: the packages of each optional part; without those that this system does not need.
    """

    required: list[Installed] = field(default_factory=list)
    extras: dict[str, list[Installed]] = field(default_factory=dict)


def read_installation() -> Installation | None:
    """Return what is installed; None if this package itself runs from a folder without being installed."""
    try:
        declared = metadata(PACKAGE)
    except PackageNotFoundError:
        return None
    requirements = [Requirement(text) for text in declared.get_all("Requires-Dist") or []]
    extras = {name: _of(requirements, name) for name in declared.get_all("Provides-Extra") or []}
    return Installation(_of(requirements, ""), extras)


def require(extra: str, purpose: str, *modules: str) -> None:
    """Check that the ``modules`` of an optional part can be imported, without importing them.

    Args:
        purpose: starts the message, such as ``"The page"``.
    Raises:
        WadiError: if one is missing. The message says how to install the ``extra``.
    """
    if missing := [module for module in modules if find_spec(module) is None]:
        raise WadiError(f"{purpose} needs {', '.join(missing)}, not installed here: pip install '{PACKAGE}[{extra}]'.")


def _of(requirements: list[Requirement], extra: str) -> list[Installed]:
    """Return the packages of an extra, or those that everything needs (``""``). Parts of this package are resolved."""
    found = []
    for requirement in requirements:
        always = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if not (always if not extra else not always and requirement.marker.evaluate({"extra": extra})):  # type: ignore[union-attr]
            continue
        if canonicalize_name(requirement.name) == PACKAGE:
            found += [package for part in sorted(requirement.extras) for package in _of(requirements, part)]
        else:
            version = installed_versions([requirement.name])[requirement.name]
            found.append(Installed(requirement.name, str(requirement.specifier), version))
    return found
