"""Reading images: every mode becomes the documented RGB or is an error; damaged files and mixed sizes are errors."""

import numpy as np
import pytest
import torch
from evaluate_toys import folder_of, noisy, picture
from PIL import Image

from raising import raises_naming
from wadi.evaluate.image_sets import batches, content_digest, files_in, fit, from_tensor, prepared
from wadi.io.images import read_image as read


def saved(image, path, **options):
    image.save(path, **options)
    return path


def test_files_are_sorted_by_path_and_others_ignored(tmp_path):
    for name in ("b.png", "a.JPG", "sub/c.webp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        picture(1).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / ".hidden.png").write_text("x")
    assert [path.relative_to(tmp_path).as_posix() for path in files_in(tmp_path)] == ["a.JPG", "b.png", "sub/c.webp"]


def test_numbers_in_names_count_as_numbers_and_linked_folders_are_entered(tmp_path):
    (tmp_path / "in" / "10").mkdir(parents=True)
    (tmp_path / "else").mkdir()
    for name in ("in/10.png", "in/9.png", "in/a2.png", "in/a10.png", "in/02.png", "in/2.png", "in/10/1.png", "else/7.png"):
        picture(0).save(tmp_path / name)
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "else")
    (tmp_path / "else" / "round").symlink_to(tmp_path / "in")  # a circle
    found = [path.relative_to(tmp_path / "in").as_posix() for path in files_in(tmp_path / "in")]
    assert found == ["02.png", "2.png", "9.png", "10.png", "10/1.png", "a2.png", "a10.png", "linked/7.png"]


@pytest.mark.parametrize("place", ["empty", "missing"])
def test_a_folder_without_images_is_named(tmp_path, place):
    (tmp_path / "empty").mkdir()
    with raises_naming(tmp_path / place):
        files_in(tmp_path / place)


def test_grey_palette_and_transparency_become_rgb(tmp_path):
    grey = read(saved(Image.new("L", (4, 4), 77), tmp_path / "grey.png"))
    assert grey.mode == "RGB"
    assert grey.getpixel((0, 0)) == (77, 77, 77)
    assert read(saved(Image.new("1", (4, 4), 1), tmp_path / "bit.png")).getpixel((0, 0)) == (255, 255, 255)
    coloured = picture(3).quantize(4)
    assert read(saved(coloured, tmp_path / "palette.png")).getpixel((0, 0)) == picture(3).getpixel((0, 0))
    clear = Image.new("RGBA", (4, 4), (200, 0, 0, 0))
    clear.putpixel((1, 0), (200, 0, 0, 255))
    found = read(saved(clear, tmp_path / "clear.png"))
    assert found.getpixel((0, 0)) == (255, 255, 255)  # transparent: white, not the hidden red
    assert found.getpixel((1, 0)) == (200, 0, 0)
    hidden = Image.new("P", (4, 4), 0)
    hidden.putpalette([10, 20, 30])
    assert read(saved(hidden, tmp_path / "hidden.png", transparency=0)).getpixel((0, 0)) == (255, 255, 255)


def test_a_damaged_file_is_named(tmp_path):
    whole = saved(noisy(0, 64), tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("no picture")
    with raises_naming(tmp_path / "cut.jpg"):
        read(tmp_path / "cut.jpg")
    with raises_naming(tmp_path / "text.png"):
        read(tmp_path / "text.png")
    with raises_naming(tmp_path / "gone.png"):
        read(tmp_path / "gone.png")


def test_mixed_sizes_need_a_size(tmp_path):
    picture(0, (16, 16)).save(tmp_path / "a.png")
    picture(1, (20, 12)).save(tmp_path / "b.png")
    with raises_naming("Image 1", "20 x 12", "16 x 16", "--size"):
        list(prepared(tmp_path, None))
    assert [image.size for image in prepared(tmp_path, 8)] == [(8, 8), (8, 8)]


def test_fit_takes_the_centre_and_leaves_what_fits():
    for size, box in (((30, 10), (10, 0, 20, 10)), ((10, 30), (0, 10, 10, 20))):
        long = Image.new("RGB", size, "black")
        long.paste((255, 255, 255), box)
        assert fit(long, 10).getcolors() == [(100, (255, 255, 255))]
    exact = noisy(1, 16)
    assert fit(exact, 16).tobytes() == exact.tobytes()
    assert fit(noisy(1, 32), 16).tobytes() == noisy(1, 32).resize((16, 16), Image.Resampling.LANCZOS).tobytes()


def test_tensors_paths_and_images_give_the_same_pixels(tmp_path):
    folder = folder_of(tmp_path / "set", 5)
    bytes_ = torch.stack([torch.from_numpy(np.asarray(noisy(i)).copy()).permute(2, 0, 1) for i in range(5)])
    sources = [
        folder,
        files_in(folder),
        bytes_,
        bytes_ / 255,
        iter(bytes_.split(2)),
        (noisy(i) for i in range(5)),
        list(bytes_),
    ]
    found = [[image.tobytes() for part in batches(source, None, 2) for image in part] for source in sources]
    assert all(one == found[0] for one in found)
    assert [len(part) for part in batches(folder, None, 2)] == [2, 2, 1]


def test_images_are_read_on_demand():
    def endless():
        index = 0
        while True:
            yield picture(index)
            index += 1

    assert len(next(batches(endless(), None, 3))) == 3


@pytest.mark.parametrize(
    ("bad", "value"),
    [
        (torch.zeros(1, 4, 4), (1, 4, 4)),
        (torch.full((3, 4, 4), 1.5), "[0, 1]"),
        (torch.full((3, 4, 4), torch.nan), "NaN"),
        (torch.zeros(3, 4, 4).long(), "torch.int64"),
        (7, "int"),
    ],
)
def test_the_problem_of_a_bad_image_is_named(bad, value):
    with raises_naming(value):
        list(prepared([bad], None))


def test_digest_is_of_content_and_order(tmp_path):
    one, other = folder_of(tmp_path / "one", 3), folder_of(tmp_path / "other", 3)
    assert content_digest(files_in(one)) == content_digest(files_in(other))
    assert content_digest(files_in(one)) != content_digest(reversed(files_in(one)))
    noisy(9).save(other / "001.png")
    assert content_digest(files_in(one)) != content_digest(files_in(other))


def test_floats_round_as_diffusers_rounds():
    assert from_tensor(torch.full((3, 1, 1), 0.5)).getpixel((0, 0)) == (128, 128, 128)
