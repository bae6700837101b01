"""``wadi analyze`` and ``wadi swap``: the files they write, and one line for bad input."""

import csv
import json
import shutil
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from wadi.analysis.swap import matching
from wadi.backbones import from_pipeline, load_pipeline
from wadi.cli.main import main
from wadi.io import figures
from wadi.roles.change import compare_rows

FIGURES = ("figure-1a", "figure-1b", "by-kind", "by-block", "angles")


@pytest.fixture
def refused(capsys):
    def run(*argv):
        assert main([str(word) for word in argv]) == 2
        out, err = capsys.readouterr()
        (line,) = err.splitlines()
        assert out == ""
        return line

    return run


@pytest.fixture(scope="module")
def analysed(finished_run, sd_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("analysed") / "analysis"
    assert main(["analyze", str(sd_folder), str(finished_run), "--out", str(out)]) == 0
    return out


def test_the_folder_holds_numbers_tables_and_figures(analysed):
    found = json.loads((analysed / "analysis.json").read_text())
    with open(analysed / "layers.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["name"] for row in rows] == [layer["name"] for layer in found["layers"]]
    assert float(rows[-1]["direction_mean"]) == pytest.approx(found["layers"][-1]["direction_mean"], rel=1e-5)
    means = [layer["direction_mean"] for layer in found["layers"]]
    assert found["summary"]["direction_mean"] == pytest.approx(sum(means) / len(means))
    assert sum(row["layers"] for row in found["by_kind"]) == sum(row["layers"] for row in found["by_block"]) == len(rows)
    angles = sum(layer["shape"][0] * (layer["shape"][1] // 2) for layer in found["layers"] if layer["angles"])
    assert sum(found["angles"]["counts"]) == angles
    assert "| direction change |" in (analysed / "analysis.md").read_text()
    assert {path.stem for path in analysed.glob("*.svg")} == set(FIGURES)


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_saved_in_two_formats_with_its_data(name, analysed):
    assert ElementTree.fromstring((analysed / f"{name}.svg").read_bytes()).tag.endswith("svg")
    picture = Image.open(analysed / f"{name}.png")
    assert min(picture.size) > 100
    assert len(picture.convert("L").getcolors()) > 5
    with open(analysed / f"{name}.csv", newline="") as stream:
        assert len(list(csv.DictReader(stream))) > 1


def test_the_same_again_replaces_the_folder_with_the_same(analysed, finished_run, sd_folder, tmp_path):
    before = {path.name: path.read_bytes() for path in analysed.iterdir()}
    assert main(["analyze", str(sd_folder), str(finished_run), "--out", str(analysed)]) == 0
    assert {path.name: path.read_bytes() for path in analysed.iterdir()} == before


def test_two_equal_networks_have_figures_too(sd_folder, tmp_path, capsys):
    assert main(["analyze", str(sd_folder), str(sd_folder), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "figure-1b.png").is_file()
    assert not (tmp_path / "out" / "angles.svg").exists()
    assert "Norms changed by rounding at most." in capsys.readouterr().out


@pytest.mark.parametrize(("take", "kept", "given"), [("norm", "direction", "norm"), ("direction", "norm", "direction")])
def test_a_hybrid_is_a_pipeline_with_the_teachers_part(take, kept, given, sd_folder, tmp_path):
    student, out = student_of(sd_folder, tmp_path), tmp_path / "hybrid"
    assert main(["swap", str(sd_folder), str(student), "--take", take, "--layers", "up_blocks.*", "--out", str(out)]) == 0
    teacher, before, after = (weights(path) for path in (sd_folder, student, out))
    for name, tensor in after.items():
        if name.startswith("up_blocks") and name.endswith(".weight") and tensor.ndim > 1:
            assert getattr(compare_rows(teacher[name], tensor), given).max() < 1e-6
            assert getattr(compare_rows(before[name], tensor), kept).max() < 1e-6
            assert getattr(compare_rows(before[name], tensor), given).max() > 1e-3
        else:
            assert torch.equal(tensor, before[name])
    pipeline = load_pipeline(out)
    assert dict(pipeline.scheduler.config) == dict(load_pipeline(student).scheduler.config)
    drawn = pipeline("red apple", num_inference_steps=1, output_type="np", **from_pipeline(pipeline).call).images
    assert drawn.shape == (1, 16, 16, 3)


def weights(pipeline):
    return load_file(pipeline / "unet" / "diffusion_pytorch_model.safetensors")


def student_of(teacher, folder):
    """A one-step pipeline whose weights differ from the teacher's in norm and direction both."""
    from wadi.diffusion.schedulers import one_step_scheduler

    pipeline = load_pipeline(teacher)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in pipeline.unet.parameters():
            parameter.add_(0.2 * parameter.std() * torch.randn_like(parameter) if parameter.numel() > 1 else 0)
    pipeline.scheduler = one_step_scheduler(pipeline.scheduler, 700)
    pipeline.save_pretrained(folder / "student")
    return folder / "student"


def test_layers_are_named_whole():
    assert matching("conv_(in|out)")("conv_in")
    assert not matching("conv")("conv_in")


def test_a_run_is_swapped_with_its_own_scheduler(finished_run, sd_folder, tmp_path, capsys):
    out = tmp_path / "hybrid"
    assert main(["swap", str(sd_folder), str(finished_run), "--take", "direction", "--out", str(out)]) == 0
    assert "layers with the teacher's directions" in capsys.readouterr().out
    after, teacher = weights(out), weights(sd_folder)
    for name, tensor in after.items():  # LoRaD keeps norms: with the teacher's directions it is the teacher
        torch.testing.assert_close(tensor, teacher[name], rtol=0, atol=1e-6)
    assert load_pipeline(out).scheduler.config["timestep_spacing"] == "trailing"


# --- bad input --------------------------------------------------------------------------------------------------------------


def test_bad_input_is_named_in_one_line(sd_folder, finished_run, tmp_path, refused):
    state = tmp_path / "student.safetensors"
    save_file(weights(sd_folder), state)
    out, common = tmp_path / "out", ("--out", tmp_path / "out")
    for argv, word in (
        (("swap", sd_folder, finished_run, *common), "take"),
        (("swap", sd_folder, finished_run, "--take", "both", *common), "'both'"),
        (("swap", sd_folder, finished_run, "--take", "norm", "--layers", "[", *common), "'['"),
        (("swap", sd_folder, finished_run, "--take", "norm", "--layers", "nothing", *common), "--layers"),
        (("swap", sd_folder, state, "--take", "norm", *common), state.name),
        (("swap", sd_folder, tmp_path / "nowhere", "--take", "norm", *common), "nowhere"),
        (("swap", tmp_path / "nowhere", finished_run, "--take", "norm", *common), "nowhere"),
        (("swap", sd_folder, finished_run, "--take", "norm", "--dtype", "int8", *common), "int8"),
        (("swap", sd_folder, finished_run, "--take", "norm", "--out", sd_folder), sd_folder.name),
        (("analyze", sd_folder, tmp_path / "nowhere", *common), "nowhere"),
        (("analyze", sd_folder, finished_run, "--device", "toaster", *common), "toaster"),
        (("analyze", sd_folder), "student"),
    ):
        assert word in refused(*argv), argv
    assert not out.exists()


def test_a_folder_with_other_files_is_not_replaced(sd_folder, finished_run, tmp_path, refused):
    (tmp_path / "mine.txt").write_text("mine")
    assert "mine.txt" in refused("analyze", sd_folder, finished_run, "--out", tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_notes_next_to_an_earlier_analysis_are_not_deleted(analysed, sd_folder, finished_run, tmp_path, refused):
    shutil.copytree(analysed, tmp_path / "out")
    (tmp_path / "out" / "notes.md").write_text("mine")
    assert "notes.md" in refused("analyze", sd_folder, finished_run, "--out", tmp_path / "out")
    assert (tmp_path / "out" / "notes.md").read_text() == "mine"
    (tmp_path / "out" / "notes.md").unlink()
    assert main(["analyze", str(sd_folder), str(finished_run), "--out", str(tmp_path / "out")]) == 0


# --- house style ------------------------------------------------------------------------------------------------------------


def test_series_can_be_distinguished_in_grey_and_without_colour():
    def lightness(colour):
        red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
        return 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2

    pairs = list(zip(figures.LOOKS, figures.LOOKS[1:], strict=False))
    assert all(abs(lightness(one.colour) - lightness(two.colour)) > 0.1 for one, two in pairs)
    for column in zip(*figures.LOOKS, strict=True):
        assert len(set(map(str, column))) == len(figures.LOOKS)


@pytest.mark.parametrize("limits", [(1e-5, 1e3), (2e-3, 4e-3)])
def test_labels_of_logarithmic_axes_are_plain_text(limits):
    """A dollar in a name is a dollar, so nothing else may be written between two of them."""

    @figures.styled
    def labels():
        figure, (axes,) = figures.canvas()
        axes.set_yscale("log")
        figures.plain_labels(axes.yaxis)
        axes.set_ylim(limits)
        axes.set_title("$HOME and $1")
        figures.figure_png(figure)
        return [label.get_text() for label in (*axes.yaxis.get_majorticklabels(), *axes.yaxis.get_minorticklabels())]

    texts = [text for text in labels() if text]
    assert texts
    assert all(float(text.replace("\N{MINUS SIGN}", "-")) > 0 for text in texts)


def test_style_stays_inside():
    import matplotlib

    before = dict(matplotlib.rcParams)
    figures.styled(lambda: figures.canvas(2))()
    assert dict(matplotlib.rcParams) == before


def test_data_tables_have_no_numbers_that_are_none(tmp_path):
    assert figures.csv_table([{"a": 1.0, "b": None}, {"a": float("nan"), "b": "x, y"}]) == b'a,b\n1,\n,"x, y"\n'
    assert figures.csv_table([]) == b"\n"


# --- hybrids, drawn and measured --------------------------------------------------------------------------------------------


def test_swap_eval_measures_student_and_hybrids_alike(finished_run, sd_folder, prompts_path, tmp_path):
    from wadi.evaluate.result import read_result

    out, page = tmp_path / "out", tmp_path / "page.md"
    page.write_text("before\n<!-- wadi analyze: begin -->old<!-- wadi analyze: end -->\nafter\n")
    command = [
        "analyze", str(sd_folder), str(finished_run), "--out", str(out), "--swap-eval", "--by-kind",
        "--prompts", str(prompts_path), "--metrics", "fd-zoo", "--steps", "2", "--page", str(page),
        "--pictures", str(tmp_path / "pictures"),
    ]  # fmt: skip
    assert main(command) == 0
    rows = {row.name: row for row in read_result(out / "swap.json").rows}
    (figure,) = rows["student"].metrics
    values = {name: row.metrics[figure].value for name, row in rows.items()}
    assert list(rows)[:3] == ["student", "teacher's norms, put back", "teacher's directions, put back"]
    assert values["teacher's norms, put back"] == pytest.approx(values["student"], rel=1e-2)  # LoRaD changed no norm
    norms, directions = (abs(values[f"teacher's {what}, put back"] - values["student"]) for what in ("norms", "directions"))
    assert directions > 0.5 + 20 * norms
    assert values["directions back in convolution"] == pytest.approx(values["student"], rel=1e-2)  # no angles there
    assert {row.images for row in rows.values()} == {4}
    for name in ("figure-1c.svg", "figure-1d.png", "swap-by-kind.csv"):
        assert (out / name).is_file()
    told = page.read_text()
    assert told.startswith("before\n<!-- wadi analyze: begin -->\n`wadi analyze ")
    assert told.endswith("<!-- wadi analyze: end -->\nafter\n")
    assert "old" not in told
    assert (tmp_path / "images" / "analysis-figure-1d.png").is_file()
    assert "](images/analysis-figure-1a.png)" in told


def test_bad_input_of_swap_eval_is_named_in_one_line(sd_folder, finished_run, prompts_path, tmp_path, refused):
    out = ("--out", tmp_path / "out")
    assert "--prompts" in refused("analyze", sd_folder, finished_run, "--swap-eval", *out)
    assert "nowhere.md" in refused("analyze", sd_folder, finished_run, "--page", tmp_path / "nowhere.md", *out)
    save_file(weights(sd_folder), tmp_path / "student.safetensors")
    argv = ("analyze", sd_folder, tmp_path / "student.safetensors", "--swap-eval", "--prompts", prompts_path)
    assert "student.safetensors" in refused(*argv, *out)
    assert not (tmp_path / "out").exists()
