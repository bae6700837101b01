"""The images that the zoo learns from: emoji sets from npm, rendered once as RGBA sprites.

A sprite is ``uint8 (4, SIDE, SIDE)``, with colours premultiplied by alpha, cropped to its content and centred so that the
longer side fills the square. It is rendered at ``OVERSAMPLE`` times the size and averaged, which gives soft edges. The three
sets contain about 3,000 usable sprites. People, flags and symbols are left out.
"""

from __future__ import annotations

import io
import re
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wadi.errors import WadiError, first_line
from wadi.io.records import parse_json
from wadi.zoo.concepts import CANDIDATES, CONCEPTS, STYLES

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

SIDE = 96
OVERSAMPLE = 4
_LEFT_OUT = ("People & Body", "Flags", "Symbols")
_SKIN = re.compile(r"(light|medium|dark)-skin-tone|-skin-tone")


@dataclass(frozen=True)
class Sprites:
    """``pixels`` uint8 ``(N, 4, SIDE, SIDE)`` premultiplied RGBA; ``icons[i]`` and ``styles[i]`` name sprite ``i``."""

    pixels: Tensor
    icons: list[str]
    styles: list[str]

    def of_concepts(self) -> Tensor:
        """Return the index ``(len(CONCEPTS), len(STYLES))`` of each concept's sprite in each style."""
        import torch

        index_of = {(icon, style): i for i, (icon, style) in enumerate(zip(self.icons, self.styles, strict=True))}
        missing = [(i, s) for i in CONCEPTS.values() for s in STYLES if (i, s) not in index_of]
        if missing:
            raise WadiError(f"The icon sets lack {missing[:5]}. Get the versions that the card names.")
        return torch.tensor([[index_of[icon, style] for style in STYLES] for icon in CONCEPTS.values()])


def fetch(icon_set: str, folder: Path) -> Path:
    """Return the path of ``icon_set``'s npm tarball in ``folder``. ``npm pack`` downloads it if it is missing."""
    tarballs = sorted(folder.glob(f"iconify-json-{icon_set}-[0-9]*.tgz"))
    if tarballs:
        return tarballs[-1]
    folder.mkdir(parents=True, exist_ok=True)
    command = ["npm", "pack", f"@iconify-json/{icon_set}", "--silent", "--pack-destination", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except OSError:
        raise WadiError(
            f"npm cannot be run, and {folder} contains no iconify-json-{icon_set}-*.tgz. Install Node.js, or put the tarball "
            f"of @iconify-json/{icon_set} there."
        ) from None
    except subprocess.CalledProcessError as error:
        last = (error.stderr or error.stdout or "no output").strip().splitlines()[-1]
        raise WadiError(f"npm could not download @iconify-json/{icon_set}: {last}. Check the connection.") from None
    return sorted(folder.glob(f"iconify-json-{icon_set}-[0-9]*.tgz"))[-1]


def read_icons(tarball: Path) -> dict[str, str]:
    """Return name -> SVG text of every usable icon of one set."""
    try:
        with tarfile.open(tarball) as tar:
            texts = {name: _open(tar, name).read() for name in ("icons.json", "metadata.json")}
    except (tarfile.TarError, KeyError, EOFError) as error:
        raise WadiError(f"{tarball} is not an iconify-json tarball ({first_line(error)}). Delete it and run again.") from None
    files = {name: parse_json(text, dict[str, Any], f"{name} in {str(tarball)!r}") for name, text in texts.items()}
    icons = files["icons.json"]
    category = {name: c for c, names in files["metadata.json"]["categories"].items() for name in names}
    names = [n for n in icons["icons"] if _usable(n, category.get(n))] + [
        n for n in icons.get("aliases", {}) if n in set(CANDIDATES.values())
    ]
    return {name: _svg(icons, name) for name in dict.fromkeys(names)}


def _open(tar: tarfile.TarFile, name: str) -> Any:
    return tar.extractfile(f"package/{name}") or io.BytesIO()


def _usable(name: str, category: str | None) -> bool:
    if category is None or category in _LEFT_OUT or _SKIN.search(name):
        return False
    return name in set(CANDIDATES.values()) or not re.search(r"(oclock|thirty)$", name)


def _svg(icons: dict[str, Any], name: str) -> str:
    while name in icons.get("aliases", {}) and name not in icons["icons"]:
        name = icons["aliases"][name]["parent"]
    icon = icons["icons"][name]
    box = [icon.get(key, icons.get(key, default)) for key, default in _BOX]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{box[0]} {box[1]} {box[2]} {box[3]}" width="{box[2]}" height="{box[3]}">{icon["body"]}</svg>'
    )


_BOX = (("left", 0), ("top", 0), ("width", 16), ("height", 16))


def rasterise(svg: str) -> np.ndarray | None:
    """Return one sprite ``uint8 (4, SIDE, SIDE)``, or None if the icon is empty."""
    import numpy as np
    import resvg_py
    from PIL import Image

    from wadi.io.images import open_image

    side = SIDE * OVERSAMPLE
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side))
    image = open_image(png).convert("RGBA").convert("RGBa")  # RGBa: premultiplied
    box = image.getchannel("a").point(lambda a: 255 * (a > 8)).getbbox()
    if box is None:
        return None
    image = image.crop(box)
    scale = SIDE / max(image.size)
    width, height = (max(1, round(length * scale)) for length in image.size)
    small = image.resize((width, height), Image.Resampling.BOX)
    square = Image.new("RGBa", (SIDE, SIDE))
    square.paste(small, ((SIDE - width) // 2, (SIDE - height) // 2))
    return np.asarray(square).transpose(2, 0, 1).copy()


def make_sprites(tarballs: Path) -> Sprites:
    """Render every usable icon of the three sets. Missing tarballs are downloaded to ``tarballs``."""
    import numpy as np
    import torch

    pixels, icons, styles = [], [], []
    for style, icon_set in STYLES.items():
        for name, svg in read_icons(fetch(icon_set, tarballs)).items():
            sprite = rasterise(svg)
            if sprite is not None:
                pixels.append(sprite)
                icons.append(name)
                styles.append(style)
    return Sprites(torch.from_numpy(np.stack(pixels)), icons, styles)


def save_sprites(path: Path, sprites: Sprites) -> None:
    """Write the sprites to a safetensors file."""
    from wadi.zoo.recipe.state import save_tensors

    save_tensors(path, {"pixels": sprites.pixels}, {"icons": sprites.icons, "styles": sprites.styles})


def load_sprites(path: Path) -> Sprites:
    """Read what `save_sprites` wrote."""
    from wadi.zoo.recipe.state import load_tensors

    tensors, note = load_tensors(path)
    return Sprites(tensors["pixels"], note["icons"], note["styles"])
