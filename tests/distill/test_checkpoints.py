"""Which checkpoints are kept, found and cleared, in every order of saving, damage and being killed."""

import itertools
import json
import os
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from raising import raises_naming
from wadi import roles
from wadi.distill import checkpoint_folders, checkpoints
from wadi.distill.state import TrainState
from wadi.io.files import sha256
from wadi.io.temporary import sweep
from wadi.lorad import LoRaDConfig


def state_at(step):
    """A state without adapters: its checkpoint has all the files that decide about keeping it."""
    return TrainState(nn.Identity(), {}, {}, torch.Generator(), step=step)


def saved(folder, step, keep=100, keep_every=0):
    return checkpoints.save(folder, state_at(step), "teacher", keep, keep_every)


def spoil(path):
    (path / "training.safetensors").write_bytes(b"x")


def steps_in(folder, intact=True):
    return [
        n
        for n in range(10)
        if (path := checkpoint_folders.place(folder, n)).exists() and (checkpoint_folders.damage(path) is None) == intact
    ]


@pytest.mark.parametrize("keep", [1, 2, 3])
@pytest.mark.parametrize("keep_every", [0, 2])
@pytest.mark.parametrize(
    "damaged", list(itertools.product([False, True], repeat=4)), ids=lambda flags: "".join("ix"[f] for f in flags)
)
def test_intact_checkpoints_are_never_crowded_out_by_damaged_ones(damaged, keep, keep_every, tmp_path):
    """Steps 1 to 4 are there, some damaged. The run continues from the newest intact one, and at each step may be stopped."""
    for step in range(1, 5):
        saved(tmp_path, step)
    for step, bad in enumerate(damaged, 1):
        if bad:
            spoil(checkpoint_folders.place(tmp_path, step))
    if all(damaged):
        with raises_naming("step-0000004"):
            checkpoint_folders.latest(tmp_path)
        return
    found, complaints = checkpoint_folders.latest(tmp_path)
    start = checkpoint_folders.step_of(found)
    assert (start, len(complaints)) == (max(steps_in(tmp_path)), 4 - start)
    before = steps_in(tmp_path)
    for step in range(start + 1, start + 4):
        saved(tmp_path, step, keep, keep_every)
        newest, _ = checkpoint_folders.latest(tmp_path)
        assert checkpoint_folders.step_of(newest) == step  # the same command continues from what was just saved
        before = [*before, step]
        every = [n for n in before if keep_every and n % keep_every == 0]
        assert steps_in(tmp_path) == sorted({*before[-keep:], *every})
        before = steps_in(tmp_path)
    left = steps_in(tmp_path, intact=False)
    assert all(keep_every and n % keep_every == 0 for n in left if n < before[-keep:][0])  # damaged ones go as others do


EVENTS = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"}


def killed_at(operation, act):
    """``act()`` in a process that is killed before its ``operation``-th change of the file system; whether it was."""
    child = os.fork()
    if child == 0:
        count = itertools.count()

        def hook(event, arguments):
            if event in EVENTS and next(count) == operation:
                os._exit(9)

        sys.addaudithook(hook)
        code = 1
        try:
            act()
            code = 0
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 9


@pytest.mark.parametrize("damaged", [(), (3,), (2, 3)], ids=["intact", "newest damaged", "all but one damaged"])
@pytest.mark.parametrize("keep", [1, 2])
def test_killed_before_any_change_of_the_file_system_it_still_continues(damaged, keep, tmp_path):
    """The next run finds the checkpoint before or the new one, clears what was left, and saves."""
    operation, alive = 0, False
    while not alive:
        folder = tmp_path / str(operation)
        for step in (1, 2, 3):
            saved(folder, step)
        for step in damaged:
            spoil(checkpoint_folders.place(folder, step))
        start = max(steps_in(folder))
        alive = not killed_at(operation, lambda folder=folder, new=start + 1: saved(folder, new, keep))
        sweep(folder, "step-*")
        assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []
        found, _ = checkpoint_folders.latest(folder)
        assert checkpoint_folders.step_of(found) in (start, start + 1)
        saved(folder, start + 1, keep)
        assert checkpoint_folders.latest(folder)[0].name == f"step-000000{start + 1}"
        operation += 1
    assert operation > 3


def test_a_kill_between_two_renames_loses_no_checkpoint(tmp_path):
    """The old folder of a name stepped aside and the new one did not come: the old one returns."""
    saved(tmp_path, 1).rename(tmp_path / ".step-0000001.123.old")
    (tmp_path / ".step-0000002.7a.tmp").mkdir()
    (tmp_path / ".step-0000000.doomed").mkdir()
    (tmp_path / ".step-0000000.doomed" / "state.json").touch()
    (tmp_path / "notes.txt").touch()
    sweep(tmp_path, "step-*")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "step-0000001"]
    assert checkpoint_folders.latest(tmp_path)[0].name == "step-0000001"
    saved(tmp_path, 1).rename(tmp_path / ".step-0000001.456.old")
    saved(tmp_path, 1)
    sweep(tmp_path, "step-*")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "step-0000001"]


def rewrite(path, change):
    """Change a checkpoint and its manifest, as nobody but a person or a bug does."""
    change(path)
    files = [file for file in path.rglob("*") if file.is_file() and file.name != "manifest.json"]
    manifest = {file.relative_to(path).as_posix(): sha256(file) for file in files}
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("generator", lambda path: save_file({"ema.x": torch.tensor([1.0, float("nan")])}, path / "training.safetensors")),
        ("state.json", lambda path: (path / "state.json").write_text("[1]")),
        ("state.json", lambda path: (path / "state.json").write_text('{"step": 2}')),
        ("state.json", lambda path: (path / "state.json").write_text("[" * 100_000)),
        ("step", lambda path: (path / "state.json").write_text((path / "state.json").read_text().replace(": 2", ": 7"))),
        ("weights", lambda path: (path / "training.safetensors").write_bytes(b"PK\3\4")),
    ],
    ids=["NaN", "a list", "fields missing", "deep", "another step", "no safetensors"],
)  # fmt: skip
def test_what_cannot_be_continued_from_is_passed_over(what, change, tmp_path):
    saved(tmp_path, 1)
    rewrite(saved(tmp_path, 2), change)
    found, complaints = checkpoint_folders.latest(tmp_path)
    assert checkpoint_folders.step_of(found) == 1
    assert len(complaints) == 1
    assert "step-0000002" in complaints[0]


def test_a_state_that_is_not_finite_is_never_saved(tmp_path):
    network = nn.Sequential(nn.Linear(8, 8))
    roles.attach(network, "student", LoRaDConfig(r=2, target_modules="0"))
    optimizer = torch.optim.AdamW(roles.parameters(network, "student").values())
    state = TrainState(network, {"student": optimizer}, {"student": torch.amp.GradScaler(enabled=False)}, torch.Generator())
    checkpoints.save(tmp_path, state, "teacher", keep=1)
    state.step = 1
    with torch.no_grad():
        roles.parameters(network, "student")["0.lorad_A"][3, 1] = float("nan")
    with raises_naming("step 1", "student", "0.lorad_A"):
        checkpoints.save(tmp_path, state, "teacher", keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000000"]
    assert checkpoint_folders.latest(tmp_path)[1] == []
