"""Who may import whom: lower ranks and one's own folder only, function-level and type-checking imports included."""

import ast
from pathlib import Path

import pytest

import wadi

ROOT = Path(wadi.__file__).parent

# Lowest first. A name is a module of the package or a folder with all that is in it.
RANKS = (
    {"errors", "_peft_hook"},
    {"io", "bounds"},
    {"files", "device", "ranks"},
    {"process", "config", "embedded", "images", "progress", "figures", "pretrained"},
    {"image_folder", "presets", "lorad", "data", "digests"},
    {"adapters"},
    {"backbones"},
    {"objectives"},
    {"sampling", "health", "checkpoint", "run"},
    {"optimizers", "validation", "warm_start", "rehearsal", "embed"},
    {"draws"},
    {"train", "generate", "report", "metrics", "analysis", "downstream"},
    {"zoo", "plan", "extract", "authors"},
    {"evaluate", "fitting"},
    {
        "cli",
        "cli_guard",
        "cli_zoo",
        "cli_control",
        "cli_embed",
        "cli_dreambooth",
        "cli_eval",
        "cli_generate",
        "cli_analysis",
        "cli_invert",
        "cli_quiet",
        "app",
        "__main__",
    },
)
RANK = {name: rank for rank, names in enumerate(RANKS) for name in names}
# Of rank 6 in the design, each talks to the others through files; the measures are pure functions on tensors.
APART = {"train", "generate", "report", "analysis", "downstream", "zoo"}


def place(path: Path) -> str:
    """The module or folder of the package that a file belongs to."""
    inside = path.relative_to(ROOT)
    return inside.parts[0] if len(inside.parts) > 1 else inside.stem


def imported(tree: ast.AST):
    """``(line, place)`` of everything a file imports from the package, wherever in the file the import stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative imports hide who imports whom"
            names = [node.module] if node.module != "wadi" else [f"wadi.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", None) == "import_module":
            names = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
        else:
            continue
        yield from ((node.lineno, name.split(".")[1]) for name in names if name.startswith("wadi."))


def trespasses(path: Path, source: str) -> list[str]:
    own = place(path)
    found = []
    for line, other in imported(ast.parse(source)):
        if other == own or (own == "cli" and other == "__version__"):
            continue
        if other not in RANK:
            found.append(f"{path.name}:{line} imports wadi.{other}, which has no rank")
        elif RANK[other] >= RANK[own] and not {own, other} <= RANKS[-1]:  # the files of the command line are one
            found.append(f"{path.name}:{line} imports wadi.{other} (rank {RANK[other]}) from rank {RANK[own]}")
        elif {own, other} <= APART:
            found.append(f"{path.name}:{line} imports wadi.{other}: these two talk through files")
    return found


# The root names everything and loads it on use; the hook registers LoRaD after PEFT's own import.
FILES = sorted(path for path in ROOT.rglob("*.py") if path.name not in ("_peft_hook.py",) and path != ROOT / "__init__.py")


def test_every_module_has_a_rank():
    places = {place(path) for path in FILES} | {"_peft_hook"}
    assert places <= RANK.keys(), f"give a rank to {sorted(places - RANK.keys())}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_go_down(path):
    assert trespasses(path, path.read_text()) == []


def test_the_root_imports_only_the_hook_and_the_error_at_import_time():
    tree = ast.parse((ROOT / "__init__.py").read_text())
    guarded = {id(node) for test in tree.body if isinstance(test, ast.If) for node in ast.walk(test)}
    plain = ast.Module([node for node in tree.body if id(node) not in guarded], [])
    assert {name for _, name in imported(plain)} == {"_peft_hook", "errors"}


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("adapters.py", "from wadi.sampling import one_step"),
        ("adapters.py", "def f():\n    from wadi import train"),
        ("adapters.py", "import typing\nif typing.TYPE_CHECKING:\n    import wadi.backbones.sd"),
        ("lorad/layer.py", "from wadi.data import prompts"),
        ("objectives/vsd.py", "import importlib\nimportlib.import_module('wadi.sampling')"),
        ("zoo/teacher.py", "from wadi.train import distill"),
        ("generate.py", "from wadi.zoo.prompts import caption"),
        ("files.py", "from wadi.novelty import anything"),
    ],
)
def test_a_trespass_is_seen(file, source):
    assert len(trespasses(ROOT / file, source)) == 1
