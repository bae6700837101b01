"""One image reader: every command gets the same pixels, and a hostile file is one error."""

import ast
import os
import socket
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import wadi
from raising import raises_naming
from wadi.errors import WadiError
from wadi.evaluate import image_sets
from wadi.extras import image_to_image
from wadi.extras.control import conditions
from wadi.extras.control.arguments import _open
from wadi.extras.control.condition_images import as_rgb
from wadi.extras.dreambooth.subject import read_subject
from wadi.extras.relation.exemplars import read_exemplar_image
from wadi.io import images
from wadi.io.images import is_transparent, open_image, read_image, to_rgb

SIDE = 12


def scene() -> np.ndarray:
    """``(SIDE, SIDE, 3)``, another one after any turn or mirroring."""
    values = np.zeros((SIDE, SIDE, 3), np.uint8)
    values[:6, :6, 0], values[:6, 6:, 1], values[6:, :6, 2], values[8:, 8:] = 250, 200, 150, 90
    return values


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, rows: bytes, depth=8, colour=0, *more: bytes) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def turned(path: Path, orientation: int) -> None:
    """The scene as a rotated camera stores it."""
    turn = Image.Transpose
    back = {
        1: None, 2: turn.FLIP_LEFT_RIGHT, 3: turn.ROTATE_180, 4: turn.FLIP_TOP_BOTTOM,
        5: turn.TRANSPOSE, 6: turn.ROTATE_90, 7: turn.TRANSVERSE, 8: turn.ROTATE_270,
    }[orientation]  # fmt: skip
    stored = Image.fromarray(scene())
    stored = stored if back is None else stored.transpose(back)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(path, exif=exif)


def write_all(folder: Path) -> dict[str, np.ndarray]:
    """Files of every kind and the pixels that each must give, ``(SIDE, SIDE, 3)``."""
    rgb, expected = Image.fromarray(scene()), {}

    def add(name, picture, pixels, **options):
        if picture is not None:
            picture.save(folder / name, **options)
        expected[name] = pixels

    for orientation in range(1, 9):
        turned(folder / f"turned{orientation}.png", orientation)
        expected[f"turned{orientation}.png"] = scene()
    alpha = np.full((SIDE, SIDE), 255, np.uint8)
    alpha[:3], alpha[3:5] = 0, 128
    share = alpha[..., None] / 255
    on_white = scene() * share + 255 * (1 - share)
    add("clear.png", Image.fromarray(np.dstack([scene(), alpha])), on_white)
    add("clear.webp", Image.fromarray(np.dstack([scene(), alpha])), on_white, lossless=True)
    grey = scene()[..., 0] // 2 + 40
    add("grey.png", Image.fromarray(grey), np.dstack([grey] * 3))
    add("grey-clear.png", Image.fromarray(np.dstack([grey, alpha])), np.dstack([grey] * 3) * share + 255 * (1 - share))
    add("bits.png", Image.fromarray(grey > 100), np.dstack([(grey > 100) * 255] * 3))
    palette = rgb.quantize(8)
    assert (np.asarray(palette.convert("RGB")) == scene()).all()
    add("palette.png", palette, scene())
    add("palette.gif", palette, scene())
    clear = palette.getpixel((0, 0))
    holes = scene().copy()
    holes[np.asarray(palette) == clear] = 255
    add("palette-clear.png", palette, holes, transparency=clear)
    add("cmyk.tif", rgb.convert("CMYK"), scene())
    add("frames.gif", palette, scene(), save_all=True, append_images=[Image.new("RGB", (SIDE, SIDE), "red")])
    add("frames.png", rgb, scene(), save_all=True, append_images=[Image.new("RGB", (SIDE, SIDE), "red")])
    add("pages.tif", rgb, scene(), save_all=True, append_images=[Image.new("RGB", (5, 5), "red")])
    deep = np.linspace(0, 65535, SIDE * SIDE).round().astype(np.uint16).reshape(SIDE, SIDE)
    scaled = np.dstack([(deep / 257).round()] * 3)
    add("deep.png", Image.fromarray(deep), scaled)
    add("deep.tif", Image.fromarray(deep), scaled)
    (folder / "deep.pgm").write_bytes(b"P5 12 12 65535\n" + deep.astype(">u2").tobytes())
    expected["deep.pgm"] = scaled
    colour = (scene().astype(np.uint16) * 257).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in colour)
    (folder / "deep-colour.png").write_bytes(png(SIDE, SIDE, rows, 16, 2))
    expected["deep-colour.png"] = scene()
    hidden = np.where(deep == deep[0, 5], 255, scaled[..., 0])
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep)
    (folder / "deep-clear.png").write_bytes(png(SIDE, SIDE, rows, 16, 0, chunk(b"tRNS", struct.pack(">H", deep[0, 5]))))
    expected["deep-clear.png"] = np.dstack([hidden] * 3)
    (folder / "name.png").write_bytes((folder / "clear.webp").read_bytes())  # its name lies
    expected["name.png"] = on_white
    bad = Image.Exif()
    bad[0x0112] = 99
    rgb.save(folder / "odd-exif.png", exif=bad)
    (folder / "bad-exif.png").write_bytes(
        png(SIDE, SIDE, b"".join(b"\0" + row.tobytes() for row in scene()), 8, 2, chunk(b"eXIf", b"MM\0*\xff\xff\xff\xff"))
    )
    expected |= {"odd-exif.png": scene(), "bad-exif.png": scene()}
    return expected


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    return folder, write_all(folder)


def test_every_kind_of_file_gives_its_colours(files):
    folder, expected = files
    for name, pixels in expected.items():
        found = read_image(folder / name)
        assert found.mode == "RGB", name
        assert np.abs(np.asarray(found).astype(float) - pixels).max() <= 1, name


def in_bytes(tensor: torch.Tensor) -> np.ndarray:
    return (tensor.reshape(3, SIDE, SIDE) * 255).round().byte().permute(1, 2, 0).numpy()


def readers(path: Path, folder: Path):
    """Every entry point of the package that takes an image file, as pixels of 0..255."""
    size = (SIDE, SIDE)
    (folder / "alone").mkdir(exist_ok=True)
    alone = folder / "alone" / f"a{path.suffix.replace('.tif', '.png').replace('.pgm', '.png').replace('.gif', '.png')}"
    alone.write_bytes(path.read_bytes())
    try:
        yield "--init", in_bytes(image_to_image.read_init(path, size) / 2 + 0.5)
        yield "--condition", np.asarray(read_image(path, "Condition image"))
        yield "the picture of a control", np.asarray(as_rgb(_open(path)))
        yield "dreambooth", in_bytes(read_subject(alone.parent, size)[0])
        yield "invert-relation", in_bytes(read_exemplar_image(path, size))
        yield "eval", np.asarray(next(image_sets.prepared([path], None)))
        yield "eval of a folder", np.asarray(next(image_sets.prepared(alone.parent, SIDE)))
    finally:
        alone.unlink()


def test_every_command_reads_the_same_pixels(files, tmp_path):
    folder, expected = files
    for name in expected:
        first = np.asarray(read_image(folder / name))
        for entry, found in readers(folder / name, tmp_path):
            assert (found == first).all(), (entry, name)


def test_images_are_opened_in_one_file_only():
    """`Image.open` and its like appear in the reader alone; a test over the syntax trees."""
    root = Path(wadi.__file__).parent
    openers = {
        f"{path.relative_to(root)}:{node.lineno}"
        for path in [*root.rglob("*.py"), *(root.parents[1] / "examples").glob("*.py")]
        for node in ast.walk(ast.parse(path.read_text()))
        if (isinstance(node, ast.Attribute) and node.attr == "open" and ast.unparse(node.value).endswith("Image"))
        or (isinstance(node, (ast.ImportFrom, ast.Import)) and any(a.name.startswith(("imageio", "cv2")) for a in node.names))
        or (isinstance(node, ast.Name) and node.id in ("load_image", "imread", "decode_image"))
    }  # fmt: skip
    assert {place.rpartition(":")[0] for place in openers} == {"io/images.py"}, openers


def test_whether_an_image_is_transparent(files):
    folder, expected = files
    transparent = {"clear.png", "clear.webp", "grey-clear.png", "palette-clear.png", "name.png"}
    found = {name for name in expected if name != "deep-clear.png" and is_transparent(open_image(folder / name))}
    assert found == transparent


@pytest.mark.parametrize("mode", ["RGBa", "La", "PA", "HSV", "YCbCr"])
def test_images_in_memory_of_rare_modes(mode):
    rgb = Image.fromarray(scene())
    steps = {"RGBa": ("RGBA",), "La": ("LA",), "PA": ("P",), "HSV": (), "YCbCr": ()}[mode]
    for step in (*steps, mode):
        rgb = rgb.convert(step)
    expected = np.dstack([np.asarray(Image.fromarray(scene()).convert("L"))] * 3) if mode == "La" else scene()
    assert np.abs(np.asarray(to_rgb(rgb)).astype(int) - expected).max() <= (60 if mode == "PA" else 4)


@pytest.mark.parametrize("mode", ["F", "I"])
def test_numbers_without_a_known_range_are_errors(tmp_path, mode):
    values = {"F": np.ones((4, 4), np.float32), "I": np.full((4, 4), 70_000, np.int32)}
    picture = Image.fromarray(values[mode])
    picture.save(tmp_path / "odd.tif")
    with pytest.raises(WadiError, match=rf"odd\.tif.*'{mode}"):
        read_image(tmp_path / "odd.tif")


def test_an_image_of_one_pixel(tmp_path):
    Image.new("LA", (1, 1), (100, 255)).save(tmp_path / "one.png")
    assert read_image(tmp_path / "one.png").getpixel((0, 0)) == (100, 100, 100)
    for kind in ("canny", "scribble"):
        assert conditions.condition(kind, read_image(tmp_path / "one.png")).size == (1, 1)


def hostile(folder: Path) -> dict[str, Path]:
    """Files that must give one error, quickly and without much memory."""
    whole = folder / "whole.jpg"
    Image.effect_noise((64, 64), 90).save(whole)
    data = {
        "cut.jpg": whole.read_bytes()[:-200], "cut.png": png(64, 64, bytes(300)), "empty.png": b"", "text.png": b"an image",
        "huge.png": png(12_000, 12_000, b"\0" * 12_001), "bomb.png": png(60_000, 60_000, b"\0" * 60_001),
        "wide.png": png(2**31 - 1, 1, b""), "none.png": png(0, 0, b""),
        "words.png": png(1, 1, b"\0\0", 8, 0, chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(80_000_000)))),
        "script.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n", "photo.heic": b"\0\0\0\x18ftypheic",
        "header.png": b"\x89PNG\r\n\x1a\n" + bytes(60), "header.gif": b"GIF89a" + bytes(7),
        "header.tif": b"II*\0\xff\xff\xff\xff", "header.webp": b"RIFF\xff\0\0\0WEBPVP8 " + bytes(40),
    }  # fmt: skip
    for name, content in data.items():
        (folder / name).write_bytes(content)
    os.mkfifo(folder / "pipe.png")
    (folder / "folder.png").mkdir()
    (folder / "device.png").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        before = os.getcwd()
        os.chdir(folder)  # the name of a socket may have 108 bytes
        server.bind("socket.png")
        os.chdir(before)
    odd = ("pipe.png", "folder.png", "device.png", "socket.png", "missing.png", "x" * 5000 + ".png", "a\0b.png", "a\ud800.png")
    return {name: folder / name for name in (*data, *odd)}


def test_hostile_files_end_in_one_error_that_names_them(tmp_path, recwarn):
    for name, path in hostile(tmp_path).items():
        with pytest.raises(WadiError) as caught:
            read_image(path, "Condition image")
        assert repr(str(path))[1:100] in str(caught.value), name
        assert len(str(caught.value)) < 1000, name
        for entry in (image_to_image.read_init, read_exemplar_image):
            with pytest.raises(WadiError):
                entry(path, (16, 16))
        with pytest.raises(WadiError):
            list(image_sets.prepared([path], 16))
    assert not list(recwarn)


@pytest.mark.parametrize("kind", ["EPS", "PCX", "TGA"])
def test_formats_outside_the_list_are_not_opened(tmp_path, kind, monkeypatch):
    """Pillow reads them. It passes EPS to Ghostscript, which would run the file as a program."""
    Image.fromarray(scene()).save(tmp_path / "a.png", format=kind)
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("a program was started"))
    with raises_naming("a.png"):
        read_image(tmp_path / "a.png")


def test_large_images_are_an_error_before_they_are_decoded(tmp_path, monkeypatch):
    (tmp_path / "huge.png").write_bytes(png(12_000, 12_000, b""))
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    with raises_naming("huge.png", "12000 x 12000", "144,000,000"):
        read_image(tmp_path / "huge.png")
    monkeypatch.setattr(images, "BYTES", 10)
    with pytest.raises(WadiError, match=r"huge\.png.*10"):
        read_image(tmp_path / "huge.png")


def test_a_finished_condition_is_not_transparent(tmp_path):
    """White lines on nothing would become all white without a word."""
    clear = Image.new("RGBA", (4, 4), (255, 255, 255, 0))
    with pytest.raises(WadiError, match="transparent"):
        conditions.condition("none", clear)
    assert conditions.condition("none", Image.new("RGBA", (4, 4), "red")).getpixel((0, 0)) == (255, 0, 0)
    assert as_rgb(clear).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("brand", ["heic", "heix", "mif1"])
def test_heic_is_named(tmp_path, brand):
    (tmp_path / "photo.jpg").write_bytes(b"\0\0\0\x18ftyp" + brand.encode() + bytes(16))
    with raises_naming("photo.jpg", "HEIC"):
        read_image(tmp_path / "photo.jpg")
