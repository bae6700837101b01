"""The guide to adding a family: its files are those that are tested, and its commands do what it says."""

import re
import shlex
import shutil
from pathlib import Path

import aura_flow
import pytest
import test_aura_flow
import torch
from diffusers import DiffusionPipeline
from PIL import Image

import wadi
from wadi.backbones import Backbone, from_pipeline, load_pipeline
from wadi.cli.main import main
from wadi.distill.config import DistillConfig, FakeConfig, StudentConfig
from wadi.distill.loop import distill
from wadi.distill.plan.architecture import read_architecture
from wadi.distill.plan.plan import plan_run
from wadi.pipelines import generate, load

PAGE = (Path(__file__).parents[2] / "docs" / "add-a-family.md").read_text()


def blocks(language, text=PAGE):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_the_page_shows_the_files_that_are_tested():
    family, test = blocks("python")[:2]
    assert family.strip() == Path(aura_flow.__file__).read_text().split('"""', 2)[2].strip()
    assert test.strip() == Path(test_aura_flow.__file__).read_text().strip()


def test_the_second_example_is_the_familys_own_code():
    code = (Path(wadi.__file__).parent / "backbones" / "z_image.py").read_text()
    shown = blocks("python", PAGE.partition("## A second example")[2])
    assert len(shown) > 2
    for block in shown:
        assert block in re.sub(r'\n +"""See [^"]*"""', "", code), block


def test_every_attribute_of_the_page_exists():
    table = PAGE.partition("| attribute | default |")[2].partition("\n\n")[0]
    names = {name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert len(names) > 15
    assert {name for name in names if not hasattr(Backbone, name)} == set()


def test_the_commands_end_in_a_plain_call_that_equals_wadi(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WADI_CACHE", str(tmp_path / "cache"))
    shutil.copy(aura_flow.__file__, tmp_path)
    section = PAGE.partition("## From the file to a plain call")[2]
    (commands,), (plain,) = blocks("bash", section), blocks("python", section.partition("\n## ")[0])
    lines = commands.splitlines()
    assert [shlex.split(line)[:2] for line in lines] == [
        ["python", "test_aura_flow.py"],
        *(["wadi", name] for name in ("plan", "distill", "generate", "export")),
    ]
    test_aura_flow.small_pipeline().save_pretrained("small")
    for line in lines[1:]:
        assert main(shlex.split(line)[1:]) == 0, capsys.readouterr().err
    assert "guidance_scale=0.0, height=16, width=16" in capsys.readouterr().out  # the call that the page repeats
    exec(plain, {})
    other = DiffusionPipeline.from_pretrained("small")
    image = other("red apple", num_inference_steps=1, guidance_scale=0.0, height=16, width=16, generator=torch.manual_seed(5))
    image.images[0].save("wadi.png")
    with pytest.raises(AssertionError):  # the teacher's image is another one
        exec(plain, {})
    assert Image.open("wadi.png").size == (16, 16)


def test_it_is_planned_distilled_and_drawn_like_ours(tmp_path):
    teacher = tmp_path / "teacher"
    test_aura_flow.small_pipeline().save_pretrained(teacher)
    (tmp_path / "prompts.txt").write_text("red apple\nblue car\n")
    config = DistillConfig(
        teacher=str(teacher), prompts=str(tmp_path / "prompts.txt"), out=str(tmp_path / "run"), steps=2, batch=2, device="cpu",
        resolution=(24, 16), student=StudentConfig(rank=2), fake=FakeConfig(rank=2), teacher_steps=2, sample_seeds=2,
    )  # fmt: skip
    assert plan_run(config, read_architecture(str(teacher))).student.rank == 2
    run = distill(config)
    student = load.load(run)
    drawn = generate.generate_images(student, ["red apple"], [5]).images[0]
    assert drawn.size == (16, 24)
    student.save_pretrained(tmp_path / "exported")
    again = load_pipeline(tmp_path / "exported")
    assert from_pipeline(again).resolution == (24, 16)
    assert list(generate.generate_images(again, ["red apple"], [5]).images[0].getdata()) == list(drawn.getdata())
