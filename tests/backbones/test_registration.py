"""Families from outside the package: registered in Python, by an installed package, or in a file that the user names."""

import hashlib
import json
import shutil
import sys
from pathlib import Path

import aura_flow
import pytest
import test_aura_flow

from raising import raises_naming
from wadi.backbones import Backbone, family, family_files, load_pipeline, register_family, registry
from wadi.cli.main import main
from wadi.distill.config_files import load_config
from wadi.errors import WadiError
from wadi.pipelines import load


@pytest.fixture(autouse=True)
def _apart(monkeypatch, tmp_path):
    """Tests start without AuraFlow, with a cache folder of their own and no file named, and leave nothing behind."""
    monkeypatch.setenv("WADI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(registry, "FAMILIES", {k: v for k, v in registry.FAMILIES.items() if k != "AuraFlowPipeline"})
    new_process(monkeypatch)


def new_process(monkeypatch):
    """Forget what this process has run, as a new one would."""
    for digest in family_files._loaded:
        sys.modules.pop(f"wadi_family_{digest[:16]}", None)
    monkeypatch.setattr(family_files, "_loaded", set())
    monkeypatch.setattr(family_files, "_named", set())
    registry.FAMILIES.pop("AuraFlowPipeline", None)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("aura_teacher")
    test_aura_flow.small_pipeline().save_pretrained(folder / "pipeline")
    return folder / "pipeline"


class Complete(aura_flow.AuraFlow):
    pass


class NoPredict(Backbone):
    student_targets = fake_targets = "x"

    def encode_with_gradient(self, prompts):
        raise NotImplementedError


class NoTargets(aura_flow.AuraFlow):
    fake_targets = None


class BadTargets(aura_flow.AuraFlow):
    student_targets = "(attn"


class OwnTargets(aura_flow.AuraFlow):
    student_targets = fake_targets = None

    @classmethod
    def default_targets(cls, config):
        return "a", "b"


def test_a_class_or_its_name_is_registered():
    register_family("OnePipeline", Complete)
    register_family("OtherPipeline", f"{__name__}:Complete")
    register_family("ThirdPipeline", OwnTargets)
    assert (family("OnePipeline"), family("OtherPipeline"), family("ThirdPipeline")) == (Complete, Complete, OwnTargets)


@pytest.mark.parametrize(
    ("backbone", "words"),
    [
        (NoPredict, ("NoPredict", "predict()")),
        (NoTargets, ("NoTargets", "fake_targets", "None")),
        (BadTargets, ("BadTargets", "student_targets", "'(attn'")),
        (object, ("object", "Backbone")),
        (3, ("3", "Backbone")),
        (f"{__name__}:Absent", ("Absent",)),
        ("no_such_module_at_all:Family", ("no_such_module_at_all",)),
        ("words without colon", ("words without colon", "module:class")),
    ],
)
def test_an_incomplete_family_is_refused_at_once_and_says_what_is_missing(backbone, words):
    with raises_naming("WrongPipeline", *words) as raised:
        register_family("WrongPipeline", backbone)
    assert "\n" not in str(raised.value)
    with raises_naming("WrongPipeline"):
        family("WrongPipeline")


def test_the_name_of_the_pipeline_must_be_one():
    with raises_naming("'my pipeline'"):
        register_family("my pipeline", Complete)


def install(folder, monkeypatch, value):
    """Put a package with an entry point for AuraFlow onto the path."""
    info = folder / "their_family-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-family\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[wadi.families]\nAuraFlowPipeline = {value}\n")
    monkeypatch.syspath_prepend(str(folder))


def test_the_family_of_an_installed_package_is_found_and_imported_on_use(tmp_path, monkeypatch, teacher):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "their_module.py").write_text(
        f"from aura_flow import AuraFlow\nclass Theirs(AuraFlow):\n    origin = {str(tmp_path)!r}\n"
    )
    install(tmp_path / "site", monkeypatch, "their_module:Theirs")
    with raises_naming("UnknownPipeline", "AuraFlowPipeline"):  # named among the supported, and not imported for that
        family("UnknownPipeline")
    assert "their_module" not in sys.modules
    assert family("AuraFlowPipeline").origin == str(tmp_path)
    assert type(load_pipeline(teacher)).__name__ == "AuraFlowPipeline"
    del sys.modules["their_module"]


def test_a_broken_family_of_an_installed_package_names_the_package(tmp_path, monkeypatch):
    install(tmp_path / "site", monkeypatch, "wadi.backbones.base:Backbone")
    with raises_naming("AuraFlowPipeline", "their-family", "encode_with_gradient()"):
        family("AuraFlowPipeline")


def test_the_class_of_the_pipeline_is_checked_before_weights_are_read(teacher, tmp_path):
    for file in teacher.rglob("*"):
        if file.is_file() and file.suffix != ".safetensors":
            (tmp_path / "t" / file.relative_to(teacher)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, tmp_path / "t" / file.relative_to(teacher))
    with raises_naming("AuraFlowPipeline"):
        load_pipeline(tmp_path / "t")


# --- files of families ------------------------------------------------------------------------------------------------------


def settings(teacher, tmp_path):
    (tmp_path / "prompts.txt").write_text("red apple\nblue car\n")
    return [
        "distill", "--teacher", str(teacher), "--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "run"),
        "--steps=1", "--batch=2", "--device=cpu", "--resolution=[16, 16]", "--student.rank=2", "--fake.rank=2",
        "--teacher-steps=2", "--sample-seeds=1",
    ]  # fmt: skip


@pytest.fixture
def file(tmp_path):
    """A family's file that notes each time that it is run."""
    path = tmp_path / "mine" / "family.py"
    path.parent.mkdir()
    noting = f"\nwith open({str(tmp_path / 'runs.txt')!r}, 'a') as note:\n    note.write('run ')\n"
    path.write_text(Path(aura_flow.__file__).read_text() + noting)
    return path


def times(tmp_path):
    note = tmp_path / "runs.txt"
    return len(note.read_text().split()) if note.exists() else 0


def test_a_run_remembers_the_file_and_later_commands_find_it(teacher, tmp_path, file, monkeypatch, capsys):
    monkeypatch.chdir(file.parent)
    assert main([*settings(teacher, tmp_path), "--family", "family.py"]) == 0
    assert load_config(tmp_path / "run" / "config.yaml").family == str(file)  # absolute: commands start anywhere
    assert times(tmp_path) == 1
    monkeypatch.chdir(tmp_path)
    for number, command in enumerate(
        (
            ["generate", "red apple", "--run", "run", "--out", "a.png"],
            ["export", "run", "--out", "exported", "--images", "1"],
            [*settings(teacher, tmp_path), "--config", "run/config.yaml", "--steps=2"],
        )
    ):
        new_process(monkeypatch)
        assert main(command) == 0, capsys.readouterr().err
        assert times(tmp_path) == number + 2
    new_process(monkeypatch)
    assert main(["generate", "red apple", "--run", "exported", "--out", "b.png"]) == 2  # a plain pipeline names no file
    assert "--family" in capsys.readouterr().err
    assert main(["generate", "red apple", "--run", "exported", "--out", "b.png", "--family", str(file)]) == 0


def test_what_a_folder_from_elsewhere_names_is_never_run(teacher, tmp_path, file, monkeypatch, capsys):
    """Nor a file that changed, nor what a configuration names, although its path lies in the run, near it or anywhere."""
    assert main([*settings(teacher, tmp_path), "--family", str(file)]) == 0
    monkeypatch.setenv("WADI_CACHE", str(tmp_path / "another user"))
    capsys.readouterr()
    inside = tmp_path / "run" / "family.py"
    shutil.copy(file, inside)
    text = (tmp_path / "run" / "config.yaml").read_text()
    for place in (file, inside):
        (tmp_path / "run" / "config.yaml").write_text(text.replace(str(file), str(place)))
        for command in (
            ["generate", "red apple", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "a.png")],
            ["export", str(tmp_path / "run"), "--out", str(tmp_path / "exported")],
            [*settings(teacher, tmp_path), "--config", str(tmp_path / "run" / "config.yaml")],
            ["plan", "--config", str(tmp_path / "run" / "config.yaml")],
        ):
            new_process(monkeypatch)
            assert main(command) == 2
            error = capsys.readouterr().err
            assert str(place) in error
            assert "--family" in error
            assert len(error.splitlines()) == 1
    with raises_naming(str(inside)):
        load.load(tmp_path / "run")
    assert times(tmp_path) == 1
    # Named once, it is run; changed, it is not.
    command = ["generate", "red apple", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "a.png")]
    assert main([*command, "--family", str(inside)]) == 0
    new_process(monkeypatch)
    assert main(command) == 0
    assert times(tmp_path) == 3
    with inside.open("a") as more:
        more.write("# changed\n")
    new_process(monkeypatch)
    assert main(command) == 2
    assert times(tmp_path) == 3


def test_a_run_needs_no_file_whose_family_the_command_line_gives(teacher, tmp_path, file, monkeypatch):
    assert main([*settings(teacher, tmp_path), "--family", str(file)]) == 0
    moved = file.rename(tmp_path / "moved.py")
    command = ["generate", "red apple", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "a.png")]
    new_process(monkeypatch)
    assert main(command) == 2
    assert main([*command, "--family", str(moved)]) == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ("register_family",)),
        ("1 / 0", ("ZeroDivisionError",)),
        ("def f(:", ("SyntaxError",)),
        ("from wadi.backbones import register_family\nregister_family('NewPipeline', object)", ("object", "Backbone")),
        (
            "import wadi.backbones as b\nb.register_family('FluxPipeline', b.family('SanaPipeline'))\n1 / 0",
            ("ZeroDivisionError",),
        ),
    ],
)
def test_a_file_that_fails_leaves_the_families_as_they_were(text, words, tmp_path):
    before = dict(registry.FAMILIES)
    (tmp_path / "bad.py").write_text(text)
    with raises_naming(str(tmp_path / "bad.py"), *words):
        family_files.name_family(tmp_path / "bad.py")
    assert {k: registry.FAMILIES[k] for k in before if k != "SanaPipeline"} == {
        k: before[k] for k in before if k != "SanaPipeline"
    }
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert not family_files._is_noted(digest)


def test_a_file_that_is_not_there_is_bad_input(tmp_path, capsys):
    assert main(["generate", "a", "--family", str(tmp_path / "absent.py")]) == 2
    assert "absent.py" in capsys.readouterr().err


def test_without_a_cache_folder_the_command_line_still_works(file, tmp_path, monkeypatch):
    (tmp_path / "cache file").write_text("")
    monkeypatch.setenv("WADI_CACHE", str(tmp_path / "cache file"))
    family_files.name_family(file)
    assert family("AuraFlowPipeline").__name__ == "AuraFlow"
    new_process(monkeypatch)
    with pytest.raises(WadiError):
        family_files.use_family(file, "The run")


def test_it_is_planned_from_its_file(teacher, file, capsys):
    words = ["plan", "--teacher", str(teacher), "--family", str(file), "--student.rank=2", "--fake.rank=2", "--json"]
    assert main([*words, "--resolution=[16, 16]", "--batch=1"]) == 0
    assert json.loads(capsys.readouterr().out)["student"]["rank"] == 2
