"""Results of other commands in the report: ``wadi eval`` and ``wadi analyze`` write them into the run's folder."""

import json
import re
import shutil
from html.parser import HTMLParser

import pytest

from wadi.distill.report.page import write_report


@pytest.fixture
def run(finished_run, tmp_path):
    return shutil.copytree(finished_run, tmp_path / "run")


def headings(page):
    return re.findall(r"<h2>(.*?)</h2>", page)


def result(**metrics):
    rows = [
        {"name": "student <one>", "generator": {}, "images": 8, "metrics": metrics,
         "speed": {"latency_p50_ms": 12.5, "parameters": 9_000}},
        {"name": "teacher", "generator": {}, "images": 8, "metrics": {}, "speed": None},
    ]  # fmt: skip
    return json.dumps({"format": 1, "protocol_hash": "abcdef0123456789", "protocol": {"protocol": "zoo"}, "rows": rows})


def test_a_run_without_results_has_no_empty_sections(run):
    assert len(headings(write_report(run).read_text())) == 3  # sample grids, curves, configuration


def test_results_of_eval_are_tables(run):
    (run / "eval").mkdir()
    number = {"value": 5.901, "std": 0.11, "low": None, "high": None}
    (run / "eval" / "zoo.json").write_text(result(**{"fd lite0": number, "top1": {**number, "value": 0.25, "std": None}}))
    (run / "eval" / "other.json").write_text("[1, 2")
    page = write_report(run).read_text()
    for text in (
        "Frechet distance, lite0", "5.901 ± 0.11", "<td>0.25</td>", "student &lt;one&gt;", "latency p50, ms",
        "9,000", "zoo, protocol hash abcdef012345", "other.json",
    ):  # fmt: skip
        assert text in page
    assert len(headings(page)) == 4


def test_an_analysis_is_shown_with_its_figures(run):
    from wadi.cli.main import main

    teacher = next(
        line.split(": ")[1] for line in (run / "config.yaml").read_text().splitlines() if line.startswith("teacher:")
    )
    before = write_report(run).read_text()
    assert main(["analyze", teacher.strip(), str(run), "--out", str(run / "analysis")]) == 0
    page = write_report(run).read_text()
    assert len(headings(page)) == len(headings(before)) + 1
    assert page.count("data:image/png") == before.count("data:image/png") + 5
    assert "direction change" in page
    assert set(re.findall(r"""(?:src|href)\s*=\s*["'](?!data:|#)([^"']*)""", page)) == set()
    (run / "analysis" / "analysis.json").write_text("{")
    page = write_report(run).read_text()
    assert headings(page) == headings(before)
    assert "analysis.json" in page


HOSTILE = """step-1"><img src=x onerror=alert(1)><b a='"""


def test_no_file_name_becomes_markup(run):
    """Names of samples, results and networks are shown as text."""
    shutil.copy(run / "samples" / "step-0000000.png", run / "samples" / f"{HOSTILE}.png")
    (run / "eval").mkdir()
    name = HOSTILE.replace("step-1", "result")
    (run / "eval" / f"{name}.json").write_text(result(**{f"fd {HOSTILE}": {"value": 1.0, "std": None}}))
    (run / "eval" / f"{name}2.json").write_text("[1, 2")
    page = write_report(run).read_text()
    assert page.count("onerror") >= 5
    tags: list[tuple[str, dict[str, str | None]]] = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: tags.append((tag, dict(attributes)))
    parser.feed(page)
    assert not [tag for tag in tags if "onerror" in tag[1] or (tag[0] == "b" and tag[1])]
    assert HOSTILE in [attributes["alt"] for tag, attributes in tags if tag == "img"]


def test_a_result_with_speeds_is_shown_as_eval_writes_it(run):
    from wadi.evaluate.result import Number, Result, Row

    (run / "eval").mkdir()
    speed = {
        "name": "student, one step", "images_per_second": 81.25, "latency_p50_ms": 12, "latency_p95_ms": 13.5,
        "peak_memory_mib": None, "parameters": 9_000, "evaluations": 1.0, "repeats": 5, "batch": 8,
    }  # fmt: skip
    Result({"protocol": "zoo"}, [Row("student", {}, 8, {"fd": Number(5.901, 0.11)}, speed)]).save(run / "eval" / "zoo.json")
    page = write_report(run).read_text()
    assert "zoo.json" not in page  # only a file that could not be read is named
    for text in ("5.901 ± 0.11", "<td>81.25</td>", "<td>12</td>", "<td>9,000</td>"):
        assert text in page
