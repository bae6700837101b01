"""The report: one page that stands alone, from whatever a run left."""

import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest

from wadi.distill.report import plot, write_report
from wadi.distill.run_folder import read_stats
from wadi.errors import WadiError


@pytest.fixture
def run(finished_run, tmp_path):
    return shutil.copytree(finished_run, tmp_path / "a <run> & more")


def test_the_page_stands_alone_and_shows_what_was_run(run):
    page = write_report(run).read_text()
    assert "http://www.w3.org" in page  # the namespace of SVG, and otherwise no address
    assert set(re.findall(r"""(?:src|href)\s*=\s*["'](?!data:|#)([^"']*)""", page)) == set()
    assert len(re.findall(r'src="data:image/png;base64,[A-Za-z0-9+/=]{100,}"', page)) == len(list((run / "samples").iterdir()))
    assert "a &lt;run&gt; &amp; more" in page
    assert "<run>" not in page
    assert "timestep: 800" in page
    for title in ("Losses", "Angles", "Gradient norms", "Teacher-fake distance", "diversity", "Images per second"):
        assert title in page
    newest, oldest = page.index("step-0000003"), page.index("step-0000000")
    assert newest < oldest


def test_a_run_that_was_killed_in_the_middle(run):
    stats = run / "stats.jsonl"
    stats.write_text("".join(line + "\n" for line in stats.read_text().splitlines()[:2]) + '{"step": 3, "lo')
    shutil.rmtree(run / "samples")
    assert [line["step"] for line in read_stats(run / "stats.jsonl")] == [1, 2]
    assert "No sample grid" in write_report(run).read_text()


def test_the_last_value_of_each_figure_is_summed_up(run):
    line = {"step": 7, "seconds": 90.0, "skipped": 2, "images_per_second": 4.0, "teacher_ms_per_image": 300.0}
    later = {"step": 8, "seconds": 120.0, "skipped": 3, "student_ms_per_image": 10.0, "diversity_ratio": 0.5}
    (run / "stats.jsonl").write_text(json.dumps(line) + "\n" + json.dumps(later) + "\n")
    page = write_report(run).read_text()
    for text in ("2.0 min", "teacher 300 ms, student 10 ms (30.0x)", "50% of the teacher", "4.0 images/s"):
        assert text in page


def test_what_is_no_run(run, tmp_path):
    with pytest.raises(WadiError, match=r"is no run.*config\.yaml"):
        write_report(tmp_path / "nothing")
    (run / "stats.jsonl").unlink()
    with pytest.raises(WadiError, match="no statistics"):
        write_report(run)


@pytest.mark.parametrize("values", [[0.0, 0.0], [1e-9, 3.0], [5.0]])
def test_curves_are_whole_svg_even_where_a_logarithm_has_nothing_to_show(values, recwarn):
    svg = plot({"loss_fake": list(enumerate(values))}, logarithmic=True)
    assert ElementTree.fromstring(svg).tag.endswith("svg")
    assert [str(warning.message) for warning in recwarn if issubclass(warning.category, UserWarning)] == []


# --- what other commands leave in the run's folder --------------------------------------------------------------------------


def result(**metrics):
    rows = [
        {"name": "student <one>", "generator": {}, "images": 8, "metrics": metrics,
         "speed": {"latency_p50_ms": 12.5, "parameters": 9_000}},
        {"name": "teacher", "generator": {}, "images": 8, "metrics": {}, "speed": None},
    ]  # fmt: skip
    return json.dumps({"format": 1, "protocol_hash": "abcdef0123456789", "protocol": {"protocol": "zoo"}, "rows": rows})


def test_a_run_without_results_has_no_empty_chapters(run):
    page = write_report(run).read_text()
    assert "Measured" not in page
    assert "What changed" not in page


def test_results_of_eval_are_tables(run):
    (run / "eval").mkdir()
    number = {"value": 5.901, "std": 0.11, "low": None, "high": None}
    (run / "eval" / "zoo.json").write_text(result(**{"fd lite0": number, "top1": {**number, "value": 0.25, "std": None}}))
    (run / "eval" / "other.json").write_text("[1, 2")
    page = write_report(run).read_text()
    for text in (
        "Measured", "Frechet distance, lite0", "5.901 ± 0.11", "<td>0.25</td>", "student &lt;one&gt;", "latency p50, ms",
        "9,000", "zoo, protocol hash abcdef012345", "other.json is not a result",
    ):  # fmt: skip
        assert text in page


def test_an_analysis_in_the_run_is_shown_with_its_figures(run):
    from wadi.cli.main import main

    teacher = next(
        line.split(": ")[1] for line in (run / "config.yaml").read_text().splitlines() if line.startswith("teacher:")
    )
    before = write_report(run).read_text()
    assert main(["analyze", teacher.strip(), str(run), "--out", str(run / "analysis")]) == 0
    page = write_report(run).read_text()
    assert "What changed in the weights" in page
    assert page.count("data:image/png") == before.count("data:image/png") + 5
    assert "direction change" in page
    assert set(re.findall(r"""(?:src|href)\s*=\s*["'](?!data:|#)([^"']*)""", page)) == set()
    (run / "analysis" / "analysis.json").write_text("{")
    assert "What changed in the weights" not in write_report(run).read_text()


HOSTILE = """step-1"><img src=x onerror=alert(1)><b a='"""


def test_no_name_of_a_file_becomes_markup(run):
    """Names of samples, results and networks are text wherever they stand."""
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
    assert "is not a result" not in page
    for text in ("5.901 ± 0.11", "<td>81.25</td>", "<td>12</td>", "<td>9,000</td>"):
        assert text in page
