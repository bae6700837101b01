"""Images, a COCO folder and a feature network, small enough to know every number."""

import json
import struct
import zlib

import torch
from PIL import Image


def picture(index, size=(16, 16)):
    """A plain colour that tells its index."""
    return Image.new("RGB", size, (index * 37 % 256, index * 91 % 256, index * 53 % 256))


def noisy(index, side=16):
    generator = torch.Generator().manual_seed(index)
    return Image.fromarray(torch.randint(0, 256, (side, side, 3), generator=generator, dtype=torch.uint8).numpy())


def folder_of(folder, count, first=0, side=16):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        noisy(first + i, side).save(folder / f"{i:03d}.png")
    return folder


def png_of_16_bits(path, side=4):
    """Pillow reads 16-bit RGB but cannot write it."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    line = b"\0" + struct.pack(f">{side * 3}H", *([65535, 32768, 255] * side))
    head = struct.pack(">IIBBBBB", side, side, 16, 2, 0, 0, 0)
    data = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(line * side)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    return path


def coco(root, split="val2017", images=6, captions_each=2):
    """A split with images of two sizes; ids neither start at 0 nor are in order."""
    (root / "annotations").mkdir(parents=True)
    (root / split).mkdir()
    listed, annotations = [], []
    for i in reversed(range(images)):
        number = 100 + 7 * i
        noisy(i, 16 if i % 2 else 24).crop((0, 0, 16, 12)).save(root / split / f"{number:012d}.jpg")
        listed.append({"id": number, "file_name": f"{number:012d}.jpg"})
        for j in range(captions_each):
            annotations.append({"id": 9000 - 10 * i + j, "image_id": number, "caption": f" thing {i}\n view {j} "})
    path = root / "annotations" / f"captions_{split}.json"
    path.write_text(json.dumps({"images": listed, "annotations": annotations}))
    return root


def network(name="corners", value=None):
    """Features that are 12 pixels of an image, or ``value`` everywhere. It has no weights, so it is fast."""
    from wadi.metrics.features import Extractor

    def corners(x):
        found = x[:, :, ::7, ::7].flatten(1)[:, :12] / 255
        return found if value is None else torch.full_like(found, value)

    return Extractor(name, "0" * 64, 8, 12, "clean", corners)


def clip_folder(folder):
    """A CLIP of transformers with random weights."""
    from transformers import CLIPConfig, CLIPModel

    import tiny

    torch.manual_seed(0)
    words = tiny.tokenizer(folder)
    shared = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config=shared | {"vocab_size": len(words), "max_position_embeddings": 16, "eos_token_id": len(words) - 1},
        vision_config=shared | {"image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    CLIPModel(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder
