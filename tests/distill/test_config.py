"""Settings: a file gives back the settings written, mistakes are named, and importing them is fast."""

import dataclasses
import math
import subprocess
import sys

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from raising import raises_naming
from wadi.distill import config_files
from wadi.distill.config import BOUNDS, DistillConfig, FakeConfig, StudentConfig, WarmStartConfig
from wadi.distill.config_files import changed_settings, from_dict, load_config, save_config, to_dict
from wadi.distill.presets import PRESETS, preset
from wadi.io.bounds import Number

text = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=20)
paths = text.filter(lambda name: not name.startswith("~"))  # which stands for the home folder in YAML
positive = st.floats(1e-12, 1e3)
scales = st.floats(-5, 20)

students = st.builds(
    StudentConfig,
    rank=st.integers(1, 512),
    target_modules=st.none() | text,
    adapter_options=st.dictionaries(text, st.integers() | text, max_size=2),
    timesteps=st.lists(st.integers(1, 999), max_size=3).map(tuple),
    lr=positive,
    ema=st.floats(0, 0.9999),
)
fakes = st.builds(
    FakeConfig,
    rank=st.integers(1, 64),
    lr=positive,
    guidance_scale=scales,
    updates=st.integers(1, 5),
    weighting=st.sampled_from(["alpha2", "none"]),
    null_probability=st.floats(0, 1),
)
warm_starts = st.builds(WarmStartConfig, pairs=st.integers(1, 9), steps=st.integers(0, 9), weight=st.floats(0, 1))
ranges = st.tuples(st.floats(0, 0.4), st.floats(0.5, 1))
runs = st.builds(
    DistillConfig,
    teacher=paths,
    prompts=paths,
    out=paths,
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    device=st.none() | text,
    student=students,
    fake=fakes,
    warm_start=warm_starts,
    guidance_scale=scales,
    t_range=ranges,
    sample_prompts=st.lists(text, max_size=3).map(tuple),
    gradient_checkpointing=st.booleans(),
    tracker=st.none() | text,
)


@settings(max_examples=40, deadline=None)
@given(config=runs)
def test_yaml_round_trip(config, tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    save_config(config, path)
    assert load_config(path) == config
    assert from_dict(to_dict(config)) == config
    assert changed_settings(config, load_config(path)) == []


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_survive_yaml(name):
    config = preset(name)
    assert from_dict(yaml.safe_load(yaml.safe_dump(to_dict(config)))) == config
    # whoever names a preset gets the run that reads 'null' and 'zoo', not somebody's folder
    assert config.teacher in ("", "zoo")


def test_an_unknown_preset_is_named_with_the_known_ones():
    with raises_naming("sd16", "sd15"):
        preset("sd16")


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"sead": 1}, ("'sead'", "'seed'")),
        ({"student": {"rnak": 8}}, ("'student.rnak'", "'student.rank'")),
        ({"warm_start": {"pears": 8}}, ("'warm_start.pears'", "'warm_start.pairs'")),
        ({5: 1}, ("'5'", "seed")),
        ({"student": {"rank": "8"}}, ("student.rank", "'8'", "int")),
        ({"student": {"rank": 8.0}}, ("student.rank", "8.0")),
        ({"student": {"rank": True}}, ("student.rank", "True")),
        ({"student": 8}, ("student", "8")),
        ({"fake": {"lr": "fast"}}, ("fake.lr", "fast", "float")),
        ({"dtype": "float8"}, ("dtype", "float8", "bfloat16")),
        ({"t_range": [0.1]}, ("t_range",)),
        ({"t_range": [0.1, "x"]}, ("t_range[1]",)),
        ({"sample_prompts": "apple"}, ("sample_prompts", "apple")),
        ({"gradient_checkpointing": 1}, ("gradient_checkpointing",)),
        ({"teacher": None}, ("teacher",)),
    ],
)
def test_mistakes_are_named(values, named):
    with raises_naming(*named):
        from_dict(values)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("student.rank", 0), ("student.rank", -4), ("fake.rank", 0), ("student.timesteps", [-1]), ("student.ema", 1.0),
        ("student.lr", 0.0), ("fake.lr", -1e-3), ("student.lr", float("nan")), ("fake.updates", 0),
        ("fake.null_probability", 1.5), ("steps", 0), ("batch", 0), ("seed", -1), ("seed", 2**32), ("betas", [0.9, 1.0]),
        ("betas", [-0.1, 0.9]), ("weight_decay", -1.0), ("t_range", [0.98, 0.02]), ("t_range", [0.5, 0.5]),
        ("t_range", [-0.1, 0.5]), ("t_range", [0.1, 1.1]), ("clip", 0.0), ("max_skipped", 0), ("sample_every", -1),
        ("sample_seeds", 0), ("teacher_steps", 0), ("checkpoint_every", -1), ("keep_checkpoints", 0), ("lr_warmup", -1),
        ("warm_start.pairs", -1), ("warm_start.sampler_steps", 0), ("warm_start.weight", -0.1), ("warm_start.steps", 5),
        ("warm_start.steps", -1), ("warm_start.fake_steps", -1),
    ],
)  # fmt: skip
def test_a_value_out_of_bounds_is_named(name, value):
    outer, _, inner = name.partition(".")
    with raises_naming(name, *(value if isinstance(value, list) else [value])):
        from_dict({outer: {inner: value} if inner else value})


def test_numbers_widen_and_yaml_exponents_are_numbers(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("clip: 2\nfake: {lr: 1e-4}\nt_range: [0, 1]\n")  # YAML 1.1 reads 1e-4 as a string
    config = load_config(path)
    assert (config.clip, config.fake.lr, config.t_range) == (2.0, 1e-4, (0.0, 1.0))
    assert all(isinstance(number, float) for number in (config.clip, config.fake.lr, *config.t_range))


@pytest.mark.parametrize("content", [b"- a\n- b\n", b"teacher: [unclosed", b"\xff\xfe\x00", b"", b"steps: 3\n  x: 4: 5"])
def test_a_file_that_is_not_a_mapping_is_named(content, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    with raises_naming(path):
        load_config(path)
    with raises_naming(tmp_path / "none.yaml"):
        load_config(tmp_path / "none.yaml")


def test_changed_settings_are_those_that_affect_the_result():
    old = DistillConfig(teacher="a", prompts="p", out="runs/a")
    same = dataclasses.replace(
        old, out="elsewhere", sample_every=7, checkpoint_every=9, keep_checkpoints=5, tracker="tensorboard", device="cuda:1"
    )
    assert changed_settings(old, same) == []
    other = dataclasses.replace(old, steps=5, student=dataclasses.replace(old.student, rank=7))
    assert changed_settings(old, other) == ["student.rank: None -> 7"]  # a run of constant rate may be lengthened
    old, other = (dataclasses.replace(config, lr_schedule="cosine") for config in (old, other))
    assert changed_settings(old, other) == ["steps: 10000 -> 5", "student.rank: None -> 7"]


def test_paths_are_compared_by_place_and_sources_may_be_left_out(tmp_path, monkeypatch):
    (tmp_path / "p.txt").write_text("a")
    monkeypatch.chdir(tmp_path)
    old = DistillConfig(teacher="a", prompts="p.txt", prompts_field="x")
    for new in ("./p.txt", str(tmp_path / "p.txt")):
        assert changed_settings(old, dataclasses.replace(old, prompts=new)) == []
    moved = dataclasses.replace(old, teacher="b", prompts="q.txt", prompts_field=None)
    assert len(changed_settings(old, moved)) == 3
    assert changed_settings(old, moved, sources=False) == []
    assert changed_settings(old, dataclasses.replace(moved, seed=1), sources=False) == ["seed: 0 -> 1"]


def test_the_home_folder_in_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / "c.yaml"
    path.write_text('teacher: ~/t\nprompts: "~/p*.txt"\nout: ~\ntracker: ~/x\n'.replace("out: ~", "out: ~/o"))
    config = load_config(path)
    assert (config.teacher, config.prompts, config.out) == (f"{tmp_path}/t", f"{tmp_path}/p*.txt", f"{tmp_path}/o")
    assert config.tracker == "~/x"  # not a path


FLOATS = [name for name, bounds in BOUNDS.items() if isinstance(bounds, Number)]


@pytest.mark.parametrize("name", [*FLOATS, "t_range", "betas"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_settings_are_finite(name, value):
    group, _, inner = name.rpartition(".")
    given = [0.5, value] if name in ("t_range", "betas") else value
    with raises_naming(name, value):
        from_dict({group: {inner: given}} if group else {name: given})


def test_every_number_has_bounds():
    """A number that a new setting adds needs some too."""
    flat = config_files.flat_settings(to_dict(DistillConfig()))
    numbers = {name for name, value in flat.items() if isinstance(value, (int, float)) and not isinstance(value, bool)}
    unset = {"student.rank", "fake.rank", "fake.guidance_scale", "fake.updates"}
    assert numbers | unset == set(BOUNDS)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("student.rank", 10**6), ("fake.rank", 10**30), ("batch", 10**9), ("teacher_steps", 1001), ("seed", 2**63),
        ("warm_start.sampler_steps", 1001), ("sample_seeds", 10**6), ("resolution", [16, 10**6]), ("resolution", [0, 16]),
        ("resolution", [16]), ("resolution", [-16, 16]), ("steps", 10**12), ("lr_warmup", 10**12), ("clip", 10**400),
    ],
)  # fmt: skip
def test_absurd_values_are_errors_with_a_short_message(name, value):
    group, _, inner = name.rpartition(".")
    with raises_naming(name) as error:
        from_dict({group: {inner: value}} if group else {name: value})
    assert len(str(error.value)) < 500


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        DistillConfig().steps = 3


def loaded_by(code: str) -> set[str]:
    """Top-level packages that a fresh interpreter holds after ``code``."""
    print_them = "import sys; print('\\n@' + ' '.join({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{print_them}"], capture_output=True, text=True, check=True)
    return set(done.stdout.rpartition("@")[2].split())


def test_import_and_help_are_light():
    heavy = {"torch", "diffusers", "transformers", "peft", "accelerate", "matplotlib", "numpy"}
    assert loaded_by("import wadi") & heavy == set()
    assert loaded_by("import wadi.distill.config, wadi.distill.presets") & heavy == set()
    shown = loaded_by("from wadi.cli.main import main; assert main(['--help']) == 0")
    assert shown & (heavy | {"jsonargparse", "yaml", "rich"}) == set()
    assert loaded_by("from wadi import WadiError, DistillConfig") & heavy == set()
