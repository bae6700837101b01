"""Files and folders are written completely or not at all."""

import ast
import os
import signal
import socket
import stat
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from raising import raises_naming
from wadi.errors import WadiError
from wadi.io import files, temporary
from wadi.io.files import sha256, whole_folder, write_whole
from wadi.io.outputs import check_out, check_replaceable, check_writable
from wadi.io.regular import exists, is_dir, is_file, read_bytes, read_text, require_file


def everything_in(folder: Path) -> dict[str, bytes | None]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "deep" / "file"
    write_whole(path, b"old")
    write_whole(path, b"new")
    assert everything_in(tmp_path) == {"deep": None, "deep/file": b"new"}


def test_a_folder_is_replaced_with_all_it_held(tmp_path):
    for content in ("old", "new"):
        with whole_folder(tmp_path / "deep" / "run", known=("old",)) as folder:
            (folder / content).write_text(content)
            (folder / "sub").mkdir()
            (folder / "sub" / "x").write_text(content)
    assert everything_in(tmp_path) == {
        "deep": None, "deep/run": None, "deep/run/new": b"new", "deep/run/sub": None, "deep/run/sub/x": b"new",
    }  # fmt: skip


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_a_failing_block_leaves_the_old_folder(tmp_path, error):
    with whole_folder(tmp_path / "run") as folder:
        (folder / "a").write_text("old")
    before = everything_in(tmp_path)

    def fail():
        with whole_folder(tmp_path / "run") as folder:
            (folder / "a").write_text("new")
            raise error

    with pytest.raises(WadiError if error is OSError else error):
        fail()
    assert everything_in(tmp_path) == before


def test_the_old_folder_comes_back_if_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    with whole_folder(tmp_path / "run") as folder:
        (folder / "a").write_text("old")
    before, replace = everything_in(tmp_path), os.replace

    def second_fails(source, target):
        if str(source).endswith(".tmp"):
            raise OSError(5, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", second_fails)
    with raises_naming(tmp_path / "run", "Input/output error"), whole_folder(tmp_path / "run") as folder:
        (folder / "a").write_text("new")
    assert everything_in(tmp_path) == before


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch, error):
    write_whole(tmp_path / "file", b"old")

    def fail(_):
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises((WadiError, KeyboardInterrupt)):
        write_whole(tmp_path / "file", b"new")
    assert everything_in(tmp_path) == {"file": b"old"}


def test_leftovers_of_a_killed_process_are_cleared_away(tmp_path):
    (tmp_path / ".run.99999.tmp").mkdir()
    (tmp_path / ".run-2.99999.tmp").mkdir()
    with whole_folder(tmp_path / "run") as folder:
        (folder / "a").write_text("x")
    assert everything_in(tmp_path) == {"run": None, "run/a": b"x", ".run-2.99999.tmp": None}


def test_a_file_where_a_folder_should_be(tmp_path):
    """Root may write anywhere, so the place that cannot be written is a file."""
    (tmp_path / "taken").write_text("mine")
    with raises_naming(tmp_path / "taken" / "file"):
        write_whole(tmp_path / "taken" / "file", b"x")
    with raises_naming(tmp_path / "taken" / "run"), whole_folder(tmp_path / "taken" / "run"):
        pass
    with raises_naming(tmp_path / "taken"), whole_folder(tmp_path / "taken"):
        pass
    (tmp_path / "folder").mkdir()
    with raises_naming(tmp_path / "folder"):
        write_whole(tmp_path / "folder", b"x")
    assert everything_in(tmp_path) == {"taken": b"mine", "folder": None}


def test_a_full_disk(tmp_path, full_disk):
    import torch
    from safetensors.torch import save_file

    def file():
        write_whole(tmp_path / "file", bytes(200_000))

    def folder():
        with whole_folder(tmp_path / "run") as temporary:
            (temporary / "a").write_bytes(bytes(200_000))

    def folder_of_tensors():
        with whole_folder(tmp_path / "run") as temporary:
            save_file({"a": torch.zeros(50_000)}, temporary / "a")

    write_whole(tmp_path / "file", b"old")
    with whole_folder(tmp_path / "run") as old:
        (old / "a").write_text("old")
    before = everything_in(tmp_path)
    for attempt in (file, folder, folder_of_tensors):
        with full_disk(100_000), raises_naming(tmp_path, "File too large"):
            attempt()
    assert everything_in(tmp_path) == before


def test_sha256_of_a_known_text(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


# --- reading ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def special(tmp_path):
    """Paths that are not regular files, by kind. Reading one would block, never end, or fail with a traceback."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(tmp_path)  # the name of a socket may have 108 bytes
        server.bind("socket")
        (tmp_path / "link").symlink_to(tmp_path / "pipe")
        (tmp_path / "loop").symlink_to(tmp_path / "loop")
        yield {
            "pipe": tmp_path / "pipe", "folder": tmp_path / "folder", "socket": tmp_path / "socket", "link": tmp_path / "link",
            "loop": tmp_path / "loop", "device": Path("/dev/zero"), "missing": tmp_path / "missing",
            "below a file": tmp_path / "file" / "x", "long": tmp_path / ("x" * 5000), "deep": tmp_path / ("x/" * 2500),
            "nul": tmp_path / "a\0b", "surrogate": tmp_path / "a\ud800b",
        }  # fmt: skip


SPECIAL = (
    "pipe", "folder", "socket", "link", "loop", "device", "missing", "below a file", "long", "deep", "nul", "surrogate",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _back():
    """Some tests change the working folder."""
    before = os.getcwd()
    yield
    os.chdir(before)


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("read", [read_bytes, read_text, require_file, sha256], ids=lambda read: read.__name__)
def test_only_regular_files_are_read(special, kind, read):
    with pytest.raises(WadiError) as caught:
        read(special[kind])
    message = str(caught.value)
    assert len(message) < 800
    assert repr(str(special[kind]))[1:100] in message


@pytest.mark.parametrize("kind", SPECIAL)
def test_questions_about_any_path_have_an_answer(special, kind):
    path = special[kind]
    assert not is_file(path)
    assert is_dir(path) == (kind == "folder")
    assert exists(path) == (kind in ("pipe", "folder", "socket", "link", "device"))


def test_a_file_without_permission(tmp_path):
    (tmp_path / "secret").write_text("x")
    (tmp_path / "secret").chmod(0)
    if os.access(tmp_path / "secret", os.R_OK):
        pytest.skip("root reads everything")
    with pytest.raises(WadiError, match="secret"):
        read_bytes(tmp_path / "secret")


def test_the_limit_on_size(tmp_path):
    (tmp_path / "file").write_bytes(bytes(100))
    assert read_bytes(tmp_path / "file", limit=100) == bytes(100)
    for read in (read_bytes, read_text, require_file):
        with pytest.raises(WadiError, match=r"file.*99"):
            read(tmp_path / "file", limit=99)
    with pytest.raises(WadiError, match="status"):  # files below /proc say that they are empty
        read_bytes("/proc/self/status", limit=10)


def test_text_is_utf8_with_plain_line_ends(tmp_path):
    (tmp_path / "text").write_bytes("a\r\nü\rb\n".encode())
    assert read_text(tmp_path / "text") == "a\nü\nb\n"
    (tmp_path / "text").write_bytes("für".encode("latin-1"))
    with pytest.raises(WadiError, match=r"text.*0xfc"):
        read_text(tmp_path / "text")


# --- permissions ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_files_have_the_permissions_of_the_umask(tmp_path, umask, mode):
    import torch
    from safetensors.torch import save_file

    before = os.umask(umask)
    try:
        write_whole(tmp_path / "new" / "file", b"x")
        with whole_folder(tmp_path / "folder") as folder:
            (folder / "sub").mkdir()
            save_file({"a": torch.zeros(1)}, folder / "sub" / "a")  # writes 0600 whatever the umask
            (folder / "b").write_text("x")
            (folder / "script").write_text("x")
            (folder / "script").chmod(0o700)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*") if path.is_file()}
    assert modes == {"file": mode, "a": mode, "b": mode, "script": 0o700 | mode}
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*") if path.is_dir()} == {0o777 & ~umask}


# --- files of the user's ----------------------------------------------------------------------------------------------------


def fill(folder: Path, content: str, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


@pytest.mark.parametrize("foreign", ["notes.txt", "sub/notes.txt", "a.txt/b", "deep/er/a.txt", "c.png.bak", "sub/c.png"])
def test_a_folder_with_a_foreign_file_is_not_replaced(tmp_path, foreign):
    fill(tmp_path / "run", "mine", foreign)
    before = everything_in(tmp_path)
    with pytest.raises(WadiError) as early:
        check_replaceable(tmp_path / "run", ("a.txt", "*.png"))
    with (
        pytest.raises(WadiError) as late,
        whole_folder(tmp_path / "run", known=("*.png",) * (foreign != "c.png.bak")) as folder,
    ):
        fill(folder, "new", "a.txt")
    assert everything_in(tmp_path) == before
    assert repr(foreign) in str(early.value)
    assert repr(foreign) in str(late.value)


def test_a_link_of_the_users_is_not_replaced_and_what_it_names_stays(tmp_path):
    fill(tmp_path, "mine", "elsewhere/precious.txt")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "data").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(WadiError, match="data"), whole_folder(tmp_path / "run") as folder:
        fill(folder, "new", "a.txt")
    assert (tmp_path / "elsewhere" / "precious.txt").read_text() == "mine"


def test_what_we_wrote_is_replaced(tmp_path):
    fill(tmp_path / "run", "old", "a.txt", "figure.png", "sub/a.txt", ".DS_Store")
    with whole_folder(tmp_path / "run", known=("*.png",)) as folder:
        fill(folder, "new", "a.txt", "sub/a.txt")
    assert everything_in(tmp_path / "run") == {"a.txt": b"new", "sub": None, "sub/a.txt": b"new"}


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    fill(tmp_path / "disk" / "run", "old", "a.txt")
    (tmp_path / "run").symlink_to(tmp_path / "disk" / "run")
    with whole_folder(tmp_path / "run") as folder:
        fill(folder, "new", "a.txt")
    assert (tmp_path / "run").is_symlink()
    assert everything_in(tmp_path / "disk") == {"run": None, "run/a.txt": b"new"}


def test_a_pipe_folder_socket_link_or_device_is_not_replaced(special):
    for kind in ("pipe", "folder", "socket", "link", "device"):
        with raises_naming(special[kind]):
            write_whole(special[kind], b"x")
    assert stat.S_ISCHR(special["device"].stat().st_mode)
    assert stat.S_ISFIFO(special["pipe"].stat().st_mode)


# --- temporary names --------------------------------------------------------------------------------------------------------


def test_temporary_names_differ_and_are_created_anew(tmp_path, monkeypatch):
    """A temporary name that somebody has created as a link is an error."""
    opened, create = [], os.open
    monkeypatch.setattr(os, "open", lambda path, *args, **kwargs: (opened.append(str(path)), create(path, *args, **kwargs))[1])
    for _ in range(2):
        write_whole(tmp_path / "file", b"x")
    assert len({path for path in opened if path.endswith(".tmp")}) == 2
    monkeypatch.setattr(temporary.secrets, "token_hex", lambda count: "0" * 16)
    (tmp_path / "victim").write_text("mine")
    (tmp_path / ".file.0000000000000000.wadi.tmp").symlink_to(tmp_path / "victim")
    (tmp_path / ".run.0000000000000000.tmp").symlink_to(tmp_path)
    with pytest.raises(WadiError, match="file"):
        write_whole(tmp_path / "file", b"y")
    with pytest.raises(WadiError, match="run"), whole_folder(tmp_path / "run"):
        pass
    assert (tmp_path / "victim").read_text() == "mine"
    assert (tmp_path / "file").read_text() == "x"


KILLED = """
    import os, sys, time
    from pathlib import Path
    from wadi.io import files
    place = Path(sys.argv[1])
    def stop(*_):
        print("here", flush=True)
        time.sleep(100)
    if sys.argv[2] == "file":
        os.fsync = stop
        files.write_whole(place / "file", b"half")
    if sys.argv[2] == "old":
        replace = os.replace
        def once(source, target):
            replace(source, target)
            if str(target).endswith(".old"):
                stop()
        os.replace = once
    with files.whole_folder(place / "run") as folder:
        (folder / "a").write_text("half")
        if sys.argv[2] == "folder":
            stop()
"""


@pytest.mark.parametrize("what", ["file", "folder", "old"])
def test_leftovers_go_when_their_process_is_dead_and_not_before(tmp_path, what):
    fill(tmp_path, "old", "file", "run/a")
    before = everything_in(tmp_path)
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(KILLED), tmp_path, what], stdout=subprocess.PIPE, text=True
    )  # fmt: skip
    try:
        assert child.stdout.readline() == "here\n"
        during = everything_in(tmp_path)
        assert during != before
        if what == "file":
            write_whole(tmp_path / "other", b"x")  # sweeps
            (tmp_path / "other").unlink()
            assert everything_in(tmp_path) == during
        if what == "folder":
            with whole_folder(tmp_path / "run") as folder:
                (folder / "a").write_text("old")
            assert everything_in(tmp_path) == during
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
    temporary._swept.clear()  # as a new process
    write_whole(tmp_path / "file", b"old")
    if what != "file":
        with pytest.raises(RuntimeError), whole_folder(tmp_path / "run"):
            raise RuntimeError  # even a writer that fails brings the only copy back
    assert everything_in(tmp_path) == before


def test_leftovers_of_other_steps_and_of_earlier_versions_go(tmp_path):
    fill(tmp_path, "x", ".step-7.doomed/a", ".step-8.1f.doomed/a", ".step-9.123.tmp/a", ".step-3.123.old/a", "step-3/a")
    fill(tmp_path, "x", ".step-4.123.old/a", ".other.123.tmp/a", ".step-5.old/a", ".step-6.tmp/a", ".step-1.123.tmp")
    (tmp_path / ".step-2.123.tmp").symlink_to(tmp_path / ".other.123.tmp")
    temporary.sweep(tmp_path, "step-*")
    temporary.sweep(tmp_path / "missing", "step-*")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".other.123.tmp", ".step-1.123.tmp", ".step-2.123.tmp", ".step-5.old", ".step-6.tmp", "step-3", "step-4",
    ]  # fmt: skip
    assert (tmp_path / ".other.123.tmp" / "a").is_file()


def test_of_two_writers_one_wins_with_all_its_files(tmp_path):
    script = """
        import sys, time
        from pathlib import Path
        from wadi.io.files import whole_folder
        for _ in range(40):
            with whole_folder(Path(sys.argv[1]) / "run") as folder:
                for name in "abc":
                    (folder / name).write_text(sys.argv[2])
                    time.sleep(0.001)
    """
    children = [subprocess.Popen([sys.executable, "-c", textwrap.dedent(script), tmp_path, who]) for who in ("first", "second")]
    contents = set()
    while any(child.poll() is None for child in children):
        time.sleep(0.01)
    assert [child.returncode for child in children] == [0, 0]
    contents = {(tmp_path / "run" / name).read_text() for name in "abc"}
    assert len(contents) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


# --- checks before the work -------------------------------------------------------------------------------------------------


def test_a_writable_place_passes_and_stays_as_it_was(tmp_path):
    fill(tmp_path, "mine", "file.png", "folder/a")
    before = everything_in(tmp_path)
    check_writable(tmp_path / "new.PNG", (".png",))
    check_writable(tmp_path / "file.png", (".png",))
    check_writable(tmp_path / "deep" / "er" / "file")
    for name in ("folder", "new", "deep/er"):
        check_writable(tmp_path / name, folder=True)
    os.chdir(tmp_path)
    check_writable("relative.png")
    assert everything_in(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.jpg", {"suffixes": (".png",)}), ("a", {"suffixes": (".png",)}), ("folder", {}), ("file", {"folder": True}),
        ("file/x", {}), ("file/x/y", {"folder": True}), ("pipe", {}), ("x" * 300, {}), ("x" * 5000, {}),
        ("new/" + "x" * 300 + "/a", {}), ("a\0b", {}), ("a\ud800b", {"folder": True}),
    ],
)  # fmt: skip
def test_an_unwritable_place_is_named_before_the_work(tmp_path, name, options):
    fill(tmp_path, "mine", "file", "folder/a")
    os.mkfifo(tmp_path / "pipe")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(WadiError) as caught:
        check_writable(tmp_path / name, **options)
    assert repr(str(tmp_path / name))[1:100] in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["file", "folder", "link", "file/x", "x" * 300, "a\0b"])
def test_a_new_place_is_new_and_writable(tmp_path, name):
    fill(tmp_path, "mine", "file", "folder/a")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for folder in (True, False):
        check_out(tmp_path / "new", folder=folder)
        with pytest.raises(WadiError) as caught:
            check_out(tmp_path / name, folder=folder)
        assert repr(str(tmp_path / name))[1:100] in str(caught.value)
    with pytest.raises(WadiError):
        write_whole(tmp_path / "a\0b", b"x")
    with pytest.raises(WadiError), whole_folder(tmp_path / "a\0b"):
        pass


def test_an_error_of_the_caller_stays_its_own(tmp_path):
    def fail():
        with files.whole_file(tmp_path / "file") as stream:
            stream.write(b"half")
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine") as caught:
        fail()
    assert type(caught.value) is ValueError
    assert not list(tmp_path.iterdir())


def test_a_place_without_permission(tmp_path):
    place = Path("/proc/wadi/new") if os.geteuid() == 0 else tmp_path / "locked"  # root may write anywhere else
    if os.geteuid():
        place.mkdir(mode=0o500)
    with pytest.raises(WadiError, match=str(place)):
        check_writable(place / "file")
    with pytest.raises(WadiError, match=str(place)):
        write_whole(place / "file", b"x")
    with pytest.raises(WadiError, match=str(place)), whole_folder(place / "folder"):
        pass


def test_the_longest_name_can_be_written(tmp_path):
    name = "ä" * 127
    check_writable(tmp_path / name)
    write_whole(tmp_path / name, b"x")
    (tmp_path / name).unlink()
    with whole_folder(tmp_path / name) as folder:
        fill(folder, "new", "a")
    assert everything_in(tmp_path) == {name: None, f"{name}/a": b"new"}


def test_no_reader_opens_what_is_not_a_regular_file():
    """All code opens paths through `wadi.io.regular`: a test over the syntax trees."""
    import wadi

    allowed = {"/proc/cpuinfo", "/proc/self/status", "CARD"}
    found = []
    for path in sorted(Path(wadi.__file__).parent.rglob("*.py")):
        if path.parent.name == "runtime":  # copied into exports, where this package is missing
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name, target = ast.unparse(node.func), ast.unparse(node.args[0]) if node.args else ""
            if name.endswith((".read_text", ".read_bytes")):
                found += [f"{path.name}:{node.lineno} {name}"] * (not any(text in name for text in allowed))
            elif name in ("safe_open", "load_file") and "require_file(" not in target:
                found.append(f"{path.name}:{node.lineno} {name}({target})")
            elif name == "open" and not (len(node.args) > 1 and ast.unparse(node.args[1]) in ("'a'", "'ab'", "'w'", "'wb'")):
                found.append(f"{path.name}:{node.lineno} open({target})")
    assert found == []


def test_a_folder_that_somebody_else_locks_for_long_is_written(tmp_path, monkeypatch):
    """As in ``flock runs wadi distill --out runs/x``, and within another folder that is being written."""
    import fcntl

    monkeypatch.setattr(temporary, "PATIENCE", 0.05)
    held = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    try:
        for text in ("first", "second"):
            with whole_folder(tmp_path / "run") as outer, whole_folder(outer / "inner") as inner:
                (inner / "file").write_text(text)
    finally:
        os.close(held)
    assert (tmp_path / "run" / "inner" / "file").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_new_folder_that_is_taken_for_a_leftover_is_made_again(tmp_path):
    """Another process finds the folder between its creation and its lock, and holds the lock until it has removed it."""
    place = tmp_path / ".run.0.tmp"
    place.mkdir()
    with ThreadPoolExecutor(1) as pool, temporary._abandoned(place) as dead:
        assert dead
        kept = pool.submit(temporary._lock_new, os.open(place, os.O_RDONLY), place)
        time.sleep(0.05)
        assert not kept.done()
        place.rmdir()
    assert kept.result() is False
