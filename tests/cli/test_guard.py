"""Every failure of a command is one line and an exit code."""

import os
import signal
import subprocess
import sys
import time

import pytest

from wadi.cli import guard
from wadi.cli.main import main
from wadi.errors import Interrupted, WadiError


@pytest.fixture
def ending(monkeypatch, capsys):
    """``(code, lines on stderr)`` of a command whose work is ``act``."""

    def run(act, *argv):
        monkeypatch.setattr("wadi.cli.report.run", act)
        code = main(["report", *(argv or ["run"])])
        return code, capsys.readouterr().err.splitlines()

    return run


def raising(error):
    def act(arguments):
        raise error

    return act


def deep(arguments):
    return deep(arguments)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("a\nb\n" * 1000),
        KeyError("x"),
        type("Own", (Exception,), {})("of a library"),
        UnicodeError("x"),
    ],
)
def test_an_unexpected_failure_names_the_command_and_the_function(error, ending):
    code, lines = ending(raising(error))
    assert code == 1
    assert len(lines) == 1
    assert all(word in lines[0] for word in ("wadi report", "wadi.", type(error).__name__, "--debug"))
    assert len(lines[0]) < 800


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory")]
)
def test_out_of_memory_is_bad_input_and_suggests_a_smaller_batch(error, ending):
    code, (line,) = ending(raising(error))
    assert code == 2
    assert all(word in line for word in ("wadi report", "out of memory", "batch"))


def test_endless_recursion_is_one_line(ending):
    code, lines = ending(deep)
    assert code == 1
    assert len(lines) == 1
    assert "RecursionError" in lines[0]


@pytest.mark.parametrize("argv", [("run", "--debug"), ("--debug", "run")])
def test_debug_prints_the_traceback(argv, ending):
    received = []

    def act(arguments):
        received.extend(arguments.words)
        raise KeyError("deep inside")

    code, lines = ending(act, *argv)
    assert code == 1
    assert lines[0].startswith("Traceback")
    assert lines[-1].startswith("wadi: wadi report failed")
    assert received == ["run"]


def test_the_environment_can_turn_the_traceback_on(ending, monkeypatch):
    monkeypatch.setenv("WADI_DEBUG", "1")
    assert ending(raising(WadiError("bad")))[1][0].startswith("Traceback")
    monkeypatch.setenv("WADI_DEBUG", "0")
    assert ending(raising(WadiError("bad")))[1] == ["wadi: bad"]


def test_after_two_dashes_debug_is_an_ordinary_word():
    assert guard.split_debug(["generate", "--debug", "--", "--debug"]) == (["generate", "--", "--debug"], True)
    assert guard.split_debug(["generate", "--", "--debug"]) == (["generate", "--", "--debug"], False)


def test_the_parser_may_end_the_program(ending):
    with pytest.raises(SystemExit):
        ending(raising(SystemExit(0)))


def test_a_path_that_is_too_long_is_bad_input(ending):
    code, lines = ending(lambda arguments: len(open("x" * 5000).read()))  # noqa: SIM115
    assert code == 2
    assert len(lines) == 1
    assert "x" * 50 in lines[0]


def test_an_interrupt_is_one_line_and_never_0(ending):
    def swallowed(arguments):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(100_000):
                pass
        except KeyboardInterrupt:  # as libraries do while they are imported
            pass
        return 0

    before = signal.getsignal(signal.SIGINT)
    assert ending(raising(KeyboardInterrupt())) == (130, ["wadi: interrupted."])
    assert ending(swallowed) == (130, ["wadi: interrupted."])
    assert ending(lambda arguments: 0) == (0, [])
    assert signal.getsignal(signal.SIGINT) is before


def test_an_interrupt_during_the_import_is_one_line(monkeypatch, capsys):
    from wadi.__main__ import run

    class Interrupting:
        def find_spec(self, name, path=None, target=None):
            if name == "wadi.cli.main":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "wadi.cli.main")
    monkeypatch.setattr(sys, "meta_path", [Interrupting(), *sys.meta_path])
    with pytest.raises(SystemExit) as done:
        run()
    assert done.value.code == 130
    assert capsys.readouterr().err == "wadi: interrupted.\n"


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_closed_pipe_ends_the_command_silently(unbuffered):
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "wadi", "zoo", "prompts"], stdout=writing, stderr=subprocess.PIPE, check=False,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
    )  # fmt: skip
    os.close(writing)
    assert done.returncode == 141
    assert done.stderr == b""


@pytest.mark.parametrize("argv", [[b"caf\xe9"], [b"generate", b"caf\xe9"], [b"report", b"/tmp/\xff\xfe"]])
def test_an_argument_that_is_not_utf_8_is_bad_input(argv):
    done = subprocess.run(
        [sys.executable, "-m", "wadi", *argv], capture_output=True, check=False, env={**os.environ, "PYTHONUTF8": "1"}
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert b"UTF-8" in done.stderr
    assert b"\\xff" in done.stderr or b"\\xe9" in done.stderr


def test_output_that_the_terminal_cannot_show_is_escaped():
    done = subprocess.run(
        [sys.executable, "-c", "from wadi.cli import main; main.COMMANDS['x'] = '\u00e9'; main.main(['--help'])"],
        capture_output=True, check=True, env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert b"\\xe9" in done.stdout


def test_an_interrupt_that_a_destructor_drops_still_ends_the_command(capsys):
    """Python goes on after it; the command ends all the same, and soon."""

    class Library:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)
            time.sleep(0)  # where the handler runs

    def act():
        thing = Library()
        del thing
        until = time.monotonic() + 30
        while time.monotonic() < until:
            time.sleep(0.01)
        return 0

    begun, hook = time.monotonic(), sys.unraisablehook
    assert guard.guard("wadi distill", act) == 130
    assert time.monotonic() - begun < 10
    assert sys.unraisablehook is hook
    assert capsys.readouterr().err.count("interrupted") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stop_by_a_signal_prints_its_message(number, ending):
    assert ending(raising(Interrupted(number, "Stopped at step 3."))) == (128 + number, ["wadi: Stopped at step 3."])
