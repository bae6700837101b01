"""The report: one page that contains all it shows, from whatever files a run has."""

import html
import json
import re
import shutil
import xml.etree.ElementTree as ElementTree

import pytest

from raising import raises_naming
from wadi.distill.report.curves import PLOTS, plot_svg
from wadi.distill.report.page import write_report
from wadi.distill.run_folder import read_stats


@pytest.fixture
def run(finished_run, tmp_path):
    return shutil.copytree(finished_run, tmp_path / "a <run> & more")


def test_the_page_contains_its_images_and_the_configuration(run):
    page = write_report(run).read_text()
    assert "http://www.w3.org" in page  # the namespace of SVG, and otherwise no address
    assert set(re.findall(r"""(?:src|href)\s*=\s*["'](?!data:|#)([^"']*)""", page)) == set()
    assert len(re.findall(r'src="data:image/png;base64,[A-Za-z0-9+/=]{100,}"', page)) == len(list((run / "samples").iterdir()))
    assert "a &lt;run&gt; &amp; more" in page
    assert "<run>" not in page
    assert "timesteps:" in page
    titles = [html.escape(plot.title) for plot in PLOTS]
    assert re.findall(r"<figure><b>(.*?)</b><svg", page) == titles
    newest, oldest = page.index("step-0000003"), page.index("step-0000000")
    assert newest < oldest


def test_a_run_that_was_killed_in_the_middle(run):
    stats = run / "stats.jsonl"
    stats.write_text("".join(line + "\n" for line in stats.read_text().splitlines()[:2]) + '{"step": 3, "lo')
    shutil.rmtree(run / "samples")
    assert [line["step"] for line in read_stats(run / "stats.jsonl")] == [1, 2]
    assert "<img" not in write_report(run).read_text()


def test_the_summary_has_the_last_value_of_each_statistic(run):
    line = {"step": 7, "seconds": 90.0, "skipped": 2, "images_per_second": 4.0, "teacher_ms_per_image": 300.0}
    later = {"step": 8, "seconds": 120.0, "skipped": 3, "student_ms_per_image": 10.0, "diversity_ratio": 0.5}
    (run / "stats.jsonl").write_text(json.dumps(line) + "\n" + json.dumps(later) + "\n")
    page = write_report(run).read_text()
    for text in ("2.0 min", "teacher 300 ms, student 10 ms (30.0x)", "50% of the teacher", "4.0 images/s"):
        assert text in page


def test_a_folder_without_config_or_statistics_gets_no_report(run, tmp_path):
    with raises_naming(tmp_path / "nothing", "config.yaml"):
        write_report(tmp_path / "nothing")
    (run / "stats.jsonl").unlink()
    with raises_naming(run):
        write_report(run)
    assert not (run / "report.html").exists()


@pytest.mark.parametrize("values", [[0.0, 0.0], [1e-9, 3.0], [5.0]])
def test_curves_are_complete_svg_even_if_a_logarithmic_axis_can_show_nothing(values, recwarn):
    svg = plot_svg({"loss_fake": list(enumerate(values))}, logarithmic=True)
    assert ElementTree.fromstring(svg).tag.endswith("svg")
    assert [str(warning.message) for warning in recwarn if issubclass(warning.category, UserWarning)] == []
