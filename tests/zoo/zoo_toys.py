"""Icon sets made on the spot: a coloured square or disc for every candidate concept and a few other icons."""

import io
import json
import tarfile

from wadi.zoo.concepts import CANDIDATES, STYLES

OTHERS = [f"thing-{i}" for i in range(20)]


def icon(name, number):
    colour = f"#{(number * 2654435761) % 0xFFFFFF:06x}"
    shape = f'<circle cx="8" cy="8" r="6" fill="{colour}"/>' if number % 2 else f'<path fill="{colour}" d="M2 4h12v8H2z"/>'
    return {"body": shape}


def write_tarball(folder, icon_set, icons, categories=None, aliases=None):
    path = folder / f"iconify-json-{icon_set}-1.0.0.tgz"
    categories = categories or {"Objects": list(icons)}
    files = {
        "icons.json": {"icons": icons, "aliases": aliases or {}, "width": 16, "height": 16},
        "metadata.json": {"categories": categories},
    }
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            data = json.dumps(content).encode()
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_tarballs(folder):
    names = [*CANDIDATES.values(), *OTHERS]
    for shift, icon_set in enumerate(STYLES.values()):
        write_tarball(folder, icon_set, {name: icon(name, i + 7 * shift) for i, name in enumerate(names)})
    return folder
