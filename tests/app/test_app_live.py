"""A run watched from its folder: while it trains, when it ends, stops or vanishes, and whatever its files contain."""

import json
import os
import shutil
import socket

import pytest

from raising import raises_naming
from wadi.app import live
from wadi.app.live import LiveRun, Statistics, is_running, results_html, thinned


@pytest.fixture
def run(finished_run, tmp_path):
    return shutil.copytree(finished_run, tmp_path / "a <run> & more")


def hold(run, process=None, host=None):
    process, host = os.getpid() if process is None else process, socket.gethostname() if host is None else host
    (run / ".lock").write_text(f"process {process} on {host}\n")


def add(run, **stats):
    with open(run / "stats.jsonl", "a") as stream:
        stream.write(json.dumps(stats) + "\n")


def test_a_run_is_watched_from_its_start_to_its_end(run, monkeypatch):
    monkeypatch.setattr(live, "CHEAP", -1)  # draw at every look
    lines = (run / "stats.jsonl").read_text().splitlines(keepends=True)
    (run / "stats.jsonl").unlink()
    hold(run)
    watched, states, pages = LiveRun(run), [], []

    def look():
        status, html = watched.html()
        states.append((status.state, status.step, status.steps))
        pages.append(html)

    look()
    for number in range(3):
        with open(run / "stats.jsonl", "a") as stream:
            stream.write(lines[number][:20])
            stream.flush()
            look()  # a line that is half written does not count
            stream.write(lines[number][20:])
        look()
    (run / ".lock").unlink()
    look()
    assert states == [
        ("starting", 0, 3), ("starting", 0, 3), ("running", 1, 3), ("running", 1, 3), ("running", 2, 3), ("running", 2, 3),
        ("running", 3, 3), ("finished", 3, 3),
    ]  # fmt: skip
    assert "<svg" not in pages[1]
    assert all("<svg" in page for page in pages[2:])
    assert "data:image/png" in pages[-1]
    assert all("a &lt;run&gt; &amp; more" in page and "<run>" not in page for page in pages)


def test_the_time_left_follows_the_mean_step(run):
    add(run, step=30, seconds=60.0)
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("steps: 3\n", "steps: 100\n", 1))
    hold(run)
    status = LiveRun(run).status()
    assert (status.step, status.steps, status.seconds_left) == (30, 100, pytest.approx(140))
    assert [live.duration(seconds) for seconds in (5, 140, 9000)] == ["5 s", "2 min", "2.5 h"]


def test_a_killed_run_is_not_running_and_another_machine_counts_as_alive(run):
    add(run, step=2)  # not all of its steps
    for process, host, running in ((os.getpid(), None, True), (2**22 + 1, None, False), (1, "another-machine", True)):
        hold(run, process, host)
        assert is_running(run / ".lock") == running
        assert LiveRun(run).status().state == ("running" if running else "stopped")
    (run / ".lock").write_bytes(b"\xff\xfe")
    assert not is_running(run / ".lock")


def test_looking_never_takes_the_lock_of_a_run(run):
    hold(run)
    before = (run / ".lock").stat()
    LiveRun(run).html()
    after = (run / ".lock").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_only_what_was_added_is_read(run, monkeypatch):
    statistics, calls, plain = Statistics(run / "stats.jsonl"), [], live.parse_json
    monkeypatch.setattr(live, "parse_json", lambda *args: (calls.append(args), plain(*args))[1])
    assert [line["step"] for line in statistics.read()] == [1, 2, 3]
    add(run, step=4)
    assert [line["step"] for line in statistics.read()] == [1, 2, 3, 4]
    assert len(calls) == 4
    os.replace(shutil.copy(run / "stats.jsonl", run / "other"), run / "stats.jsonl")  # a continued run writes it again
    assert [line["step"] for line in statistics.read()] == [1, 2, 3, 4]
    (run / "stats.jsonl").write_text('{"step": 1}\n')
    assert [line["step"] for line in statistics.read()] == [1]


@pytest.mark.parametrize("text", ['{"step": "x"}\n', "[1]\n", '{"loss": 1}\n', '{"step": 1e999}\n'])
def test_damaged_statistics_are_a_line_on_the_page(run, text):
    (run / "stats.jsonl").write_text(text)
    with raises_naming("stats.jsonl"):
        Statistics(run / "stats.jsonl").read()
    status, html = LiveRun(run).html()
    assert (status.state, "stats.jsonl" in status.problem) == ("stopped", True)
    assert "wadi-warning" in html


def test_a_folder_that_vanishes_and_returns(run, tmp_path):
    watched = LiveRun(run)
    assert watched.status().state == "finished"
    shutil.move(run, tmp_path / "elsewhere")
    status, html = watched.html()
    assert status.state == "gone"
    assert "wadi-warning" in html
    assert "gone" in results_html(run)
    shutil.move(tmp_path / "elsewhere", run)
    assert watched.html()[0].state == "finished"


def test_warnings_are_those_of_the_training(run):
    add(run, step=4, diversity_ratio=0.2)
    status, html = LiveRun(run).html()
    assert len(status.warnings) == 1
    assert "20%" in status.warnings[0]
    assert "wadi-healthy" not in html


def test_one_drawing_serves_all_viewers(run, monkeypatch):
    drawings, plain = [], live.curves
    monkeypatch.setattr(live, "curves", lambda lines: (drawings.append(len(lines)), plain(lines))[1])
    watched = LiveRun(run)
    pages = {watched.html()[1] for _ in range(5)}
    assert (len(pages), drawings) == (1, [3])
    hold(run)
    watched.html()
    add(run, step=4)
    watched.html()  # too soon after the last drawing
    assert drawings == [3, 3]


def test_a_long_run_is_thinned_for_its_curves():
    lines = [{"step": step, **({"diversity_ratio": 1.0} if step % 997 == 0 else {})} for step in range(1, 100_001)]
    kept = thinned(lines)
    assert len(kept) <= 601
    assert kept[-1] is lines[-1]
    assert sum("diversity_ratio" in line for line in kept) >= 100
    assert thinned(lines[:100]) == lines[:100]


def test_results_of_other_commands_are_shown(run, tmp_path):
    assert results_html(run) == ""
    (run / "eval").mkdir()
    (run / "eval" / "damaged.json").write_text("{")
    assert "damaged" in results_html(run)


def test_the_embedded_student_has_an_analysis():
    from wadi.app.analysis import embedded_html

    html = embedded_html()
    assert html.count("data:image/png") >= 4
    assert embedded_html() is html
