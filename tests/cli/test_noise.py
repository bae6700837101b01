"""Commands print their own lines, and nothing that the libraries print."""

import json
import os
import re
import shutil
import subprocess
import sys
import warnings

import pytest
from PIL import Image

from wadi.backbones import load_pipeline
from wadi.io.quiet import quiet_libraries

# "distilling 2/3  loss 0.1  1 s, 2 s left"
PROGRESS = re.compile(r"[a-z' ]+ \d+/\d+ .* left|")
OURS = re.compile(r"(wadi: |Resuming|Prompts|Continuing|Stopped).*")
FOREIGN = re.compile(r"it/s|warning|deprecat|shards|float32: \[\]|\[transformers\]|\[diffusers\]|torchvision", re.I)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, sd_folder):
    """A pipeline imported by an earlier version, exemplars, a subject and prompts."""
    from diffusers import DDIMScheduler
    from safetensors.torch import save_file

    place = tmp_path_factory.mktemp("noise")
    pipeline = load_pipeline(sd_folder)
    save_file(pipeline.unet.state_dict(), place / "rotated_unet.safetensors")
    pipeline.scheduler = DDIMScheduler(trained_betas=[0.0] * 999 + [0.9953], timestep_spacing="trailing", steps_offset=0)
    pipeline.save_pretrained(place / "old")
    (place / "subject").mkdir()
    (place / "exemplars").mkdir()
    for i in range(2):
        Image.new("RGB", (16, 16), (80 * i, 90, 20)).save(place / "subject" / f"{i}.png")
        Image.new("RGB", (16, 16), (80 * i, 90, 20)).save(place / "exemplars" / f"{i}.png")
    rows = [json.dumps({"file": f"{i}.png", "text": f"a <R> {i}"}) for i in range(2)]
    (place / "exemplars" / "descriptions.jsonl").write_text("\n".join(rows))
    (place / "prompts.txt").write_text("red apple\nblue car\n")
    return place


DISTILL = (
    "distill --teacher SD --prompts FOLDER/prompts.txt --steps 2 --batch 2 --student.rank 2 --fake.rank 2 --sample_seeds 1 "
    '--teacher_steps 1 --sample_prompts ["red"] --device cpu'
)
COMMANDS = {
    "distill": f"{DISTILL} --out TMP/run",
    "distill a missing folder": f"{DISTILL} --teacher TMP/none --out TMP/run",
    "plan": "plan --teacher SD --student.rank 2 --fake.rank 2",
    "embed": "embed --teacher SD --prompts FOLDER/prompts.txt --out TMP/cache --device cpu",
    "generate": "generate apple --run RUN --out TMP/a.png --device cpu --count 3 --batch 1",
    "generate from an old import": "generate apple --run FOLDER/old --out TMP/a.png --device cpu",
    "generate in half precision": (
        "generate apple --run RUN --out TMP/a.png --device cpu --dtype bfloat16 --compare --teacher_steps 2"
    ),
    "export": "export --run RUN --out TMP/export",
    "extract": "extract SD SD --rank 2 --out TMP/adapter --timestep 800",
    "import-authors": "import-authors FOLDER/rotated_unet.safetensors --base SD --out TMP/pipeline",
    "analyze": "analyze SD RUN --out TMP/analysis",
    "swap": "swap SD RUN --take direction --out TMP/swapped",
    "invert-relation": (
        "invert-relation --exemplars FOLDER/exemplars --teacher SD --init a --words [\"b\"] --steps 1 --batch 2 "
        "--out TMP/R.safetensors --device cpu"
    ),
    "dreambooth": (
        "dreambooth --subject FOLDER/subject --prompt apple --teacher SD --steps 2 --rank 2 --prior_steps 2 --out TMP/apple "
        "--device cpu --carry RUN"
    ),
    "dreambooth, all weights": (
        "dreambooth --subject FOLDER/subject --prompt apple --teacher SD --steps 2 --method full --prior_steps 2 "
        "--out TMP/apple --device cpu"
    ),
    "report": "report RUN",
}  # fmt: skip


# One process for all: what a library prints at its import or once is then in the part of some command.
SCRIPT = """
import json, sys
from wadi.cli.main import main
for number, argv in enumerate(json.loads(sys.argv[1])):
    code = main(argv)
    for stream in (sys.stdout, sys.stderr):
        print(f"=== {number} {code}", file=stream, flush=True)
"""


@pytest.fixture(scope="module")
def printed(folder, sd_folder, finished_run, tmp_path_factory):
    """``(exit code, lines on stdout, lines on stderr)`` of each command."""
    run = folder / "run"  # a copy: a report is written into it
    shutil.copytree(finished_run, run)
    places = {"FOLDER": folder, "SD": sd_folder, "RUN": run}
    lines = []
    for text in COMMANDS.values():
        here = {**places, "TMP": tmp_path_factory.mktemp("out")}
        words = [re.sub(r"\b(FOLDER|SD|RUN|TMP)\b", lambda name, here=here: str(here[name[0]]), w) for w in text.split()]
        lines.append(words)
    done = subprocess.run([sys.executable, "-c", SCRIPT, json.dumps(lines)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    parts = [re.split(r"=== \d+ (-?\d+)\n", stream) for stream in (done.stdout, done.stderr)]
    return {
        name: (int(parts[0][2 * i + 1]), parts[0][2 * i].splitlines(), parts[1][2 * i].splitlines())
        for i, name in enumerate(COMMANDS)
    }


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_prints_only_its_own_lines(name, printed):
    code, out, err = printed[name]
    assert code == (2 if "missing" in name else 0), err
    assert [line for line in out + err if FOREIGN.search(line)] == []
    assert [line for line in err if not (PROGRESS.fullmatch(line) or OURS.fullmatch(line))] == []


def test_no_home_is_needed(finished_run, tmp_path):
    """Containers often have no home folder, or one that cannot be written."""
    caches = {"HF_HOME", "XDG_CACHE_HOME", "HF_HUB_CACHE", "TORCH_HOME", "MPLCONFIGDIR"}
    environment = {name: value for name, value in os.environ.items() if name not in caches} | {"HOME": "/dev/null/none"}
    argv = [sys.executable, "-m", "wadi", "generate", "apple", "--run", finished_run, "--out", tmp_path / "a.png"]
    done = subprocess.run([str(word) for word in argv], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert Image.open(tmp_path / "a.png").size == (16, 16)


def test_python_s_warning_options_turn_warnings_on(monkeypatch):
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        monkeypatch.setattr(sys, "warnoptions", ["default"])
        quiet_libraries()
        warnings.warn("turned on", stacklevel=1)
        monkeypatch.setattr(sys, "warnoptions", [])
        quiet_libraries()
        warnings.warn("off", stacklevel=1)
    assert [str(warning.message) for warning in shown] == ["turned on"]
