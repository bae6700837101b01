"""The page's HTTP interface, through Gradio's own client and through plain requests."""

import json
import shutil
import signal
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio", reason="the extra 'app' is not installed: pip install 'wadi-onestep[app]'")

from app_server import served
from gradio_client import Client, handle_file

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(finished_run, tmp_path_factory):
    return shutil.copytree(finished_run, tmp_path_factory.mktemp("watched") / "mine")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder in which the server runs, with a file that it must not serve."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "secret.txt").write_text("confidential")
    return folder


@pytest.fixture(scope="module")
def url(run, folder):
    with served("zoo", run, "--upload", "1", cwd=folder) as (address, process):
        yield address
        assert process.poll() is None, "".join(process.lines)


@pytest.fixture(scope="module")
def client(url):
    return Client(url, verbose=False)


def generate(client, prompt="red apple", **changes):
    """Return the images and the details of a request."""
    fields = {"model": "mine", "seed": 0, "count": 1, "teacher": False, **changes}
    _, student, teacher, details = client.predict(prompt, *arguments(fields), api_name="/generate")
    return [np.asarray(Image.open(item["image"])) for item in student], teacher, details


def arguments(changes):
    fields = {
        "model": "zoo", "seed": 0, "count": 1, "width": 0, "height": 0, "steps": 0, "teacher": False, "teacher_steps": 2,
        "init": None, "strength": 0.8, "control": "none", "condition": None, "condition_kind": "canny", "control_scale": 1,
    }  # fmt: skip
    return list({**fields, **changes}.values())


def failure(client, **changes):
    with pytest.raises(Exception) as caught:
        generate(client, **changes)
    return str(caught.value)


def expected(seeds, prompt="red apple", run=None):
    from wadi.pipelines.generate import Sampling, generate_images
    from wadi.pipelines.load import load

    return [np.asarray(image) for image in generate_images(load(run), [prompt] * len(seeds), seeds, Sampling(steps=1)).images]


def status_of(url, **options):
    """Return the status and the body of a request."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, **options), timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def plain_call(url, *data):
    """Return the events of a call without Gradio's client, which would upload the files that it finds in the arguments."""
    headers, place = {"Content-Type": "application/json"}, f"{url}/gradio_api/call/generate"
    _, body = status_of(place, data=json.dumps({"data": data}).encode(), headers=headers)
    return status_of(f"{place}/{json.loads(body)['event_id']}")[1].decode()


# --- what it returns ----------------------------------------------------------------------------------------------------------


def test_images_of_a_prompt_and_another_seed(client, run):
    images, teacher, details = generate(client, count=2, seed=5)
    assert all(np.array_equal(a, b) for a, b in zip(images, expected([5, 6], run=run), strict=True))
    assert (details["seeds"], details["student_steps"], teacher) == ([5, 6], 1, [])
    other, _, _ = generate(client, seed=7)
    assert not np.array_equal(other[0], images[0])
    assert np.array_equal(other[0], expected([7], run=run)[0])


def test_the_teacher_and_its_time(client):
    _, teacher, details = generate(client, model="zoo", teacher=True, teacher_steps=3)
    assert len(teacher) == 1
    assert details["teacher_steps"] == 3
    assert details["teacher_ms"] > details["student_ms"] > 0


def test_size_steps_start_image_and_control(client, tmp_path):
    Image.linear_gradient("L").save(tmp_path / "grey.png")
    upload = handle_file(str(tmp_path / "grey.png"))
    assert generate(client, width=32, height=16)[0][0].shape == (16, 32, 3)
    assert generate(client, steps=3)[2]["student_steps"] == 3
    plain = generate(client)[0][0]
    assert not np.array_equal(generate(client, init=upload, strength=0.3)[0][0], plain)
    zoo = generate(client, model="zoo")[0][0]
    assert not np.array_equal(generate(client, model="zoo", control="zoo", condition=upload)[0][0], zoo)
    assert np.array_equal(generate(client, model="zoo")[0][0], zoo)


def test_models_and_the_state_of_a_run(client):
    models = client.predict(api_name="/models")
    assert models["models"] == {"zoo": {"controls": ["zoo"], "run": False}, "mine": {"controls": [], "run": True}}
    assert models["limits"]["count"] == 8
    state = client.predict("mine", api_name="/run")
    assert (state["state"], state["step"], state["steps"]) == ("finished", 3, 3)
    assert "loss_student" in state["last"]
    with pytest.raises(Exception, match="mine"):
        client.predict("../mine", api_name="/run")


def test_a_prompt_is_never_markup(client):
    images, _, _ = generate(client, prompt="<img src=x onerror=alert(1)>")
    assert len(images) == 1
    from wadi.app.page import _call, _head
    from wadi.app.studio import Images
    from wadi.errors import WadiError

    def fail():
        raise WadiError("File '<b>.png' is missing.")

    with pytest.raises(Exception) as caught:
        _call(fail)
    assert "&lt;b&gt;" in caught.value.message
    assert "<b>.png" not in caught.value.message
    assert "<i>" not in _head([("<i>", Images([], [], 1, 1.0))])


def test_twenty_visitors_at_once_get_their_own_images(url, run):
    images = {seed: expected([seed], run=run)[0] for seed in range(20)}
    found, problems = {}, []

    def visit(seed):
        try:
            found[seed] = generate(Client(url, verbose=False), seed=seed)[0][0]
        except Exception as error:
            problems.append(error)

    visitors = [threading.Thread(target=visit, args=(seed,)) for seed in range(20)]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join(300)
    assert problems == []
    assert [seed for seed in images if not np.array_equal(found.get(seed), images[seed])] == []
    assert len({image.tobytes() for image in images.values()}) == 20


# --- bad input ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"prompt": ""}, "empty"), ({"prompt": "x" * 2**20}, "1,048,576"), ({"count": 10**9}, "1000000000"),
        ({"width": 10**6, "height": 10**6}, "1000000"), ({"width": 64, "height": 64}, "32"), ({"seed": -1}, "-1"),
        ({"seed": 2**60}, "Seed"), ({"steps": 10**9}, "1000000000"), ({"model": "../../etc"}, "../../etc"),
        ({"control": "zoo"}, "zoo"), ({"count": None}, "None"), ({"strength": 0}, "0"),
    ],
)  # fmt: skip
def test_bad_values_are_named(client, changes, named):
    message = failure(client, **changes)
    assert named in message
    assert "root:" not in message
    assert len(generate(client)[0]) == 1  # the server goes on


def test_uploads_that_are_no_images(client, tmp_path):
    for name, content in (("text.png", b"hello"), ("empty.png", b""), ("page.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n")):
        (tmp_path / name).write_bytes(content)
        assert name in failure(client, init=handle_file(str(tmp_path / name)))
    Image.new("1", (30_000, 30_000)).save(tmp_path / "bomb.png")
    assert "89,478,485" in failure(client, init=handle_file(str(tmp_path / "bomb.png")))
    (tmp_path / "large.png").write_bytes(bytes(2 * 2**20))
    failure(client, init=handle_file(str(tmp_path / "large.png")))
    assert len(generate(client)[0]) == 1


@pytest.mark.parametrize("path", ["/etc/passwd", "../../../etc/passwd", "secret.txt", "http://127.0.0.1:9/x.png"])
def test_an_upload_must_have_been_uploaded(url, path):
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    inline = {**file, "url": "data:image/png;base64,aGVsbG8="}
    assert '"seeds"' in plain_call(url, "red apple", *arguments({}))
    for data in (file, inline):
        for words in (("red apple", *arguments({"init": data})), (data, *arguments({}))):
            answer = plain_call(url, *words)
            assert "event: error" in answer
            assert "root:" not in answer
            assert "confidential" not in answer


def test_no_file_is_served_but_the_images(url, run, folder):
    for path in ("/etc/passwd", folder / "secret.txt", run / "config.yaml", run / "samples/step-0000003.png", "secret.txt"):
        for place in ("file=", "file/", "static/", "stream/", "proxy="):
            for shown in (str(path), str(path).replace("/", "%2f"), f"..%2f..%2f{path}", f"x/../../../../../../..{path}"):
                status, body = status_of(f"{url}/gradio_api/{place}{shown}")
                assert status >= 400, (place, shown)
                assert b"confidential" not in body
                assert b"root:" not in body
    for path in ("/static/../../etc/passwd", "/assets/..%2f..%2f..%2f..%2fetc%2fpasswd", "/theme.css/../../etc/passwd"):
        assert b"root:" not in status_of(url + path)[1]


def test_bodies_that_are_too_large_are_refused(url):
    body = json.dumps({"data": ["x" * (5 * 2**20)], "fn_index": 0, "session_hash": "a"}).encode()
    headers = {"Content-Type": "application/json"}
    for place, data in (("queue/join", body), ("upload", bytes(3 * 2**20))):
        try:
            assert status_of(f"{url}/gradio_api/{place}", data=data, headers=headers)[0] == 413
        except urllib.error.URLError as error:  # the server hung up before all was sent
            assert isinstance(error.reason, ConnectionError)  # noqa: PT017
    assert status_of(url)[0] == 200


def test_another_name_for_this_machine_is_refused(url):
    assert status_of(url)[0] == 200
    assert status_of(url, headers={"Host": "evil.example"})[0] == 400


def test_a_visitor_who_leaves_does_not_block_the_others(url):
    leaving = Client(url, verbose=False)
    job = leaving.submit("red apple", *arguments({"teacher": True, "teacher_steps": 50, "count": 8}), api_name="/generate")
    time.sleep(0.5)
    job.cancel()
    leaving.close()
    assert len(generate(Client(url, verbose=False))[0]) == 1


def test_a_run_that_vanishes_is_named_and_may_return(client, run, tmp_path):
    shutil.move(run, tmp_path / "elsewhere")
    try:
        assert "mine" in failure(client)
        assert client.predict("mine", api_name="/run")["state"] == "gone"
        assert len(generate(client, model="zoo")[0]) == 1
    finally:
        shutil.move(tmp_path / "elsewhere", run)
    assert len(generate(client)[0]) == 1


# --- the command --------------------------------------------------------------------------------------------------------------


def test_the_command_ends_on_a_signal_and_leaves_no_files(tmp_path):
    with served("--host", "127.0.0.1", cwd=tmp_path) as (url, process):
        assert any(tmp_path.glob("wadi-app-*"))
        port = url.rpartition(":")[2]
        with pytest.raises(AssertionError, match=port), served("--port", port, cwd=tmp_path):
            pass
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
    assert not any(tmp_path.glob("wadi-app-*"))
