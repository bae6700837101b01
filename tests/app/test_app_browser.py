"""The page in a real browser, at the widths of a desktop and of a phone."""

import json
import os
import shutil
import socket

import pytest
from app_server import served

pytest.importorskip("gradio", reason="the extra 'app' is not installed: pip install 'wadi-onestep[app]'")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium")]
WIDTHS = {"desktop": (1280, 900), "phone": (390, 844)}
PATIENCE = 90_000  # milliseconds


@pytest.fixture(scope="module")
def run(finished_run, tmp_path_factory):
    return shutil.copytree(finished_run, tmp_path_factory.mktemp("watched") / "mine")


@pytest.fixture(scope="module")
def url(run, tmp_path_factory):
    with served("zoo", run, cwd=tmp_path_factory.mktemp("served")) as (address, _):
        yield address


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=WIDTHS)
def page(request, browser, url):
    """A new visitor. The test fails if the page asked another server for anything, or ran into an error of its own."""
    width, height = WIDTHS[request.param]
    context = browser.new_context(viewport={"width": width, "height": height})
    page, foreign, errors = context.new_page(), [], []
    page.set_default_timeout(PATIENCE)
    page.on("request", lambda sent: foreign.append(sent.url) if not sent.url.startswith((url, "data:", "blob:")) else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("dialog", lambda dialog: errors.append("dialog"))
    page.goto(url)
    page.wait_for_selector("#generate")
    yield page
    assert (foreign, errors) == ([], [])
    context.close()


def images(page, name="student", count=1):
    """Return the bytes of the images in a gallery, once there are ``count`` that are loaded."""
    loaded = f"Array.from(document.querySelectorAll('#{name} img')).filter(i => i.complete && i.naturalWidth).length"
    page.wait_for_function(f"{loaded} == {count}")
    addresses = page.eval_on_selector_all(f"#{name} img", "found => found.map(image => image.src)")
    return [page.request.get(address).body() for address in addresses]


def fill(page, **values):
    for name, value in values.items():
        page.fill(f"#{name} textarea, #{name} input", str(value))


def generate(page, prompt="red apple", **values):
    fill(page, prompt=prompt, **values)
    page.click("#generate")


def times(page, text):
    page.wait_for_function(f"document.querySelector('#times').innerText.includes({json.dumps(text)})")
    return page.inner_text("#times")


def test_generate_with_the_teacher_beside_then_with_another_seed(page):
    generate(page, prompt="fox, noto style", count=2)
    first = images(page, "student", 2)
    assert len(images(page, "teacher", 2)) == 2
    assert "times as fast" in times(page, "Teacher: 25 steps")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert page.is_visible("text=seed 1")
    page.uncheck("#beside input")
    generate(page, prompt="fox, noto style", count=1, seed=1)
    assert images(page) == first[1:]
    assert not page.is_visible("#teacher")
    page.click("#new-seed")
    page.wait_for_function("document.querySelector('#seed input').value != '1'")
    seed = page.input_value("#seed input")
    page.wait_for_selector(f"text=seed {seed}")
    assert images(page) != first[1:]


def test_a_bad_prompt_and_bad_numbers_are_explained(page):
    page.uncheck("#beside input")
    for values, shown in (({"prompt": " "}, "The prompt is empty"), ({"count": 10**9}, "1000000000"), ({"seed": -1}, "-1")):
        generate(page, **values)
        page.wait_for_selector(f".toast-wrap >> text={shown}")
        fill(page, count=1, seed=0)
    generate(page, prompt="red apple")
    assert len(images(page)) == 1


def test_a_prompt_of_markup_is_text(page):
    page.uncheck("#beside input")
    generate(page, prompt="<img src=x onerror=alert(1)><script>alert(2)</script>", count=1)
    assert len(images(page)) == 1  # `page` fails on a dialog


def test_a_run_that_finishes_while_it_is_watched(page, run):
    lines = (run / "stats.jsonl").read_text().splitlines(keepends=True)
    (run / "stats.jsonl").write_text("".join(lines[:2]))
    (run / ".lock").write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
    page.get_by_role("tab", name="Training").click()
    page.wait_for_selector("#live >> text=running")
    page.wait_for_selector("#live >> text=step 2 of 3")
    with open(run / "stats.jsonl", "a") as stream:
        stream.write(lines[2])
    (run / ".lock").unlink()
    page.wait_for_selector("#live >> text=finished")
    page.wait_for_selector("#live >> text=step 3 of 3")
    page.wait_for_selector("#live svg")
    assert page.locator("#live img").count() == 1
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_the_analysis_of_the_embedded_student(page):
    page.get_by_role("tab", name="Analysis").click()
    page.wait_for_selector("#results img")
    assert page.locator("#results img").count() >= 4


def test_a_start_image_is_uploaded_and_a_bad_one_explained(page, tmp_path):
    from PIL import Image

    Image.linear_gradient("L").save(tmp_path / "grey.png")
    (tmp_path / "text.png").write_bytes(b"not an image")
    generate(page, count=1)
    images(page, "teacher")  # a click before the end of a request has no effect
    plain = images(page)
    page.click("#image-to-image >> text=Start from an image")
    page.set_input_files("#init input[type=file]", tmp_path / "grey.png")
    page.wait_for_selector("#init img")
    page.wait_for_function("!document.querySelector('#beside input').checked")
    page.click("#generate")
    page.wait_for_function("!document.querySelector('#times').innerText.includes('Teacher')")
    assert images(page) != plain
    page.click("#init button[aria-label='Clear'], #init button[aria-label='Remove Image']")
    page.set_input_files("#init input[type=file]", tmp_path / "text.png")
    page.wait_for_selector("#init img", state="attached")
    page.click("#generate")
    page.wait_for_selector(".toast-wrap >> text=text.png")


def test_two_tabs_and_one_that_is_closed_while_it_generates(page, url):
    page.uncheck("#beside input")
    other, closed = page.context.new_page(), page.context.new_page()
    for tab in (other, closed):
        tab.set_default_timeout(PATIENCE)
        tab.goto(url)
        tab.wait_for_selector("#generate")
    generate(closed, count=8)  # with the teacher, many seconds
    closed.wait_for_timeout(300)
    closed.close()
    other.uncheck("#beside input")
    generate(page, count=1, seed=1)
    generate(other, count=1, seed=2)
    one, two = images(page), images(other)
    assert one != two
    page.wait_for_selector("text=seed 1")
    other.wait_for_selector("text=seed 2")
