"""A signal ends a run within a step, whatever it is doing, saved; the same command then continues bit for bit."""

import dataclasses
import os
import signal
import time

import pytest

import tiny
from processes import distilled, finish, start
from runs import WARM, assert_same_run, at_steps, state_of, terminate
from wadi.distill import checkpoint_folders, preview, warm_start
from wadi.distill.loop import distill
from wadi.errors import Interrupted
from wadi.parallel.signals import stop_on_signals


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def signal_at(monkeypatch, module, name, call, number=signal.SIGTERM):
    """Send a signal at the ``call``-th call of a function; the list returned counts the calls."""
    plain, calls = getattr(module, name), []

    def act(*arguments, **named):
        calls.append(0)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return plain(*arguments, **named)

    monkeypatch.setattr(module, name, act)
    return calls


@pytest.fixture(scope="module")
def straight(sd_folder, prompts_path, tmp_path_factory):
    """``(config, folder)`` of a run of four steps that nothing interrupts, with a grid at step 2."""
    config = tiny.settings(
        sd_folder, prompts_path, tmp_path_factory.mktemp("straight") / "run", steps=4, sample_every=2, batch=3, warm_start=WARM
    )
    return config, distill(config)


# A run makes pairs, the teacher's grid (in many steps, then in one), and the student's grids at
# steps 0, 2 and 4. Each row: what is called for the n-th time when the signal comes, the step that is then saved, and how often
# it is called in all before the run has stopped.
MOMENTS = {
    "pairs": (warm_start, "many_steps", 1, 0, 1),
    "the teacher's grid": (preview, "many_steps", 1, 0, 1),
    "the teacher's images in one step": (preview, "few_steps", 1, 0, 1),
    "the student's first grid": (preview, "generate_few_steps", 2, 0, 2),
    "a grid on the way": (preview, "generate_few_steps", 3, 2, 3),
    "the last grid": (preview, "generate_few_steps", 4, 4, 4),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_stopped_while_images_are_generated(moment, straight, tmp_path, monkeypatch):
    module, name, call, step, calls = MOMENTS[moment]
    config = dataclasses.replace(straight[0], out=str(tmp_path / "run"))
    with monkeypatch.context() as patch:
        counted = signal_at(patch, module, name, call)
        with pytest.raises(Interrupted) as stopped:
            distill(config)
    assert (stopped.value.signal, len(counted)) == (signal.SIGTERM, calls)
    assert state_of(tmp_path / "run")[1]["step"] == step
    distill(config)
    assert_same_run(straight[1], tmp_path / "run")
    assert names_in(tmp_path / "run" / "samples") == names_in(straight[1] / "samples")


def test_a_stop_comes_before_the_next_step_of_the_sampler(sd_folder, prompts_path, tmp_path, monkeypatch):
    config = tiny.settings(sd_folder, prompts_path, tmp_path / "run", teacher_steps=50)
    with monkeypatch.context() as patch:
        from wadi import sampling

        counted = signal_at(patch, sampling, "predict_guided", 3, signal.SIGINT)
        with pytest.raises(Interrupted):
            distill(config)
    assert len(counted) == 3


def test_a_signal_during_the_last_step_is_not_lost(sd_folder, prompts_path, tmp_path, monkeypatch):
    """The run is finished, and yet the command says that it was stopped."""
    config = tiny.settings(sd_folder, prompts_path, tmp_path / "run", steps=2)
    with monkeypatch.context() as patch:
        at_steps(patch, [1], terminate)
        with pytest.raises(Interrupted):
            distill(config)
    assert state_of(tmp_path / "run")[1]["step"] == 2
    distill(config)
    with monkeypatch.context() as patch:
        signal_at(patch, checkpoint_folders, "latest", 1)
        with pytest.raises(Interrupted):
            distill(config)


def test_a_checkpoint_is_not_written_twice(sd_folder, prompts_path, tmp_path, monkeypatch):
    """A stop at a step that is saved already replaces nothing: for a moment there would be no checkpoint."""
    from wadi.distill import checkpoints

    config = tiny.settings(sd_folder, prompts_path, tmp_path / "run", steps=4, checkpoint_every=2, keep_checkpoints=1)
    saves, plain = [], checkpoints.save
    monkeypatch.setattr(checkpoints, "save", lambda *a: saves.append(a[1].step) or plain(*a))
    with monkeypatch.context() as patch:
        at_steps(patch, [1], terminate)
        with pytest.raises(Interrupted):
            distill(config)
    with monkeypatch.context() as patch:
        signal_at(patch, preview, "many_steps", 1)
        with pytest.raises(Interrupted):
            distill(config)
    assert saves == [2]


# --- signals ------------------------------------------------------------------------------------------------------------------


def test_a_hang_up_is_saved_too(sd_folder, prompts_path, tmp_path, monkeypatch):
    at_steps(monkeypatch, [1], lambda: os.kill(os.getpid(), signal.SIGHUP))
    before = signal.getsignal(signal.SIGHUP)
    with pytest.raises(Interrupted) as stopped:
        distill(tiny.settings(sd_folder, prompts_path, tmp_path / "run"))
    assert stopped.value.signal == signal.SIGHUP
    assert state_of(tmp_path / "run")[1]["step"] == 2
    assert signal.getsignal(signal.SIGHUP) == before


def test_what_is_ignored_stays_ignored():
    """``nohup`` ignores SIGHUP, a shell SIGINT for what it runs in the background."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGHUP, signal.SIGINT)}
    try:
        with stop_on_signals() as stop:
            for number in before:
                os.kill(os.getpid(), number)
            assert not stop.synchronise()
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.synchronise()
        assert all(signal.getsignal(number) == signal.SIG_IGN for number in before)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def on_a_terminal(config, terminal, index):
    """`distilled` as what runs in a terminal of its own."""
    import fcntl
    import termios

    os.setsid()
    stream = os.open(terminal, os.O_RDWR)
    fcntl.ioctl(stream, termios.TIOCSCTTY, 0)
    for number in (0, 1, 2):
        os.dup2(stream, number)
    return distilled(config, index)


def test_a_terminal_that_goes_away(sd_folder, prompts_path, tmp_path):
    """Writing to it fails from then on; the run is saved nevertheless, and ends with the signal's code."""
    import pty

    config = tiny.settings(sd_folder, prompts_path, tmp_path / "run", steps=100_000, batch=1)
    ours, theirs = pty.openpty()
    (process,) = start(1, on_a_terminal, config, os.ttyname(theirs), log=tmp_path / "log")
    os.close(theirs)
    os.set_blocking(ours, False)
    until, stats = time.monotonic() + 120, tmp_path / "run" / "stats.jsonl"
    while not (stats.exists() and len(stats.read_text().splitlines()) >= 2):
        assert process.is_alive()
        assert time.monotonic() < until
        try:
            os.read(ours, 65536)
        except BlockingIOError:
            time.sleep(0.02)
        except OSError:  # nobody has opened the other side yet
            time.sleep(0.02)
    os.close(ours)
    assert finish([process]) == [128 + signal.SIGHUP]
    assert state_of(tmp_path / "run")[1]["step"] == len(stats.read_text().splitlines())
