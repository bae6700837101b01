"""Who may import whom: lower ranks and one's own folder only, function-level and type-checking imports included."""

import ast
from pathlib import Path

import pytest

import wadi

ROOT = Path(wadi.__file__).parent

# Lowest first. A name is a module of the package or a folder with all that is in it; the longest name that fits a file counts.
RANKS = (
    {"errors", "_peft_hook"},
    {"io", "zoo.paths", "zoo.concepts"},
    {"parallel", "zoo.prompts"},
    {"lorad", "prompts", "diffusion"},
    {"backbones"},
    {"roles", "sampling", "zoo"},
    {"distill"},
    {"distill.plan", "zoo.recipe"},
    {"extras", "convert", "metrics", "analysis"},
    {"pipelines"},
    {"evaluate"},
    {"cli"},
    {"__main__"},
)
RANK = {name: rank for rank, names in enumerate(RANKS) for name in names}
# These talk to one another through files.
APART = {"extras", "analysis", "convert", "zoo.recipe"}


def place(path: Path) -> str:
    """The module or folder of the package that a file belongs to: the longest that has a rank."""
    return ranked(".".join(path.relative_to(ROOT).with_suffix("").parts))


def ranked(module: str) -> str:
    """The longest name of a module or of a folder around it that has a rank, or its first word."""
    words = module.split(".")
    names = [".".join(words[:length]) for length in range(len(words), 0, -1)]
    return next((name for name in names if name in RANK), words[0])


def imported(tree: ast.AST):
    """``(line, place)`` of everything a file imports from the package, wherever in the file the import stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative imports hide who imports whom"
            names = [f"{node.module}.{alias.name}" for alias in node.names]  # a name may be a module
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", None) == "import_module":
            names = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
        else:
            continue
        yield from ((node.lineno, place) for place in dict.fromkeys(ranked(n[5:]) for n in names if n.startswith("wadi.")))


def trespasses(path: Path, source: str) -> list[str]:
    own = place(path)
    found = []
    for line, other in imported(ast.parse(source)):
        if other == own or other == "__version__":
            continue
        if other not in RANK:
            found.append(f"{path.name}:{line} imports wadi.{other}, which has no rank")
        elif RANK[other] >= RANK[own]:
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
        ("roles.py", "from wadi.distill.step import train_step"),
        ("roles.py", "def f():\n    from wadi import distill"),
        ("diffusion/process.py", "import typing\nif typing.TYPE_CHECKING:\n    import wadi.backbones.sd"),
        ("lorad/layer.py", "from wadi.prompts import reading"),
        ("backbones/sd.py", "import importlib\nimportlib.import_module('wadi.sampling')"),
        ("zoo/recipe/teacher.py", "from wadi.extras import steps"),
        ("zoo/prompts.py", "from wadi.zoo.judge import Classifier"),
        ("zoo/judge.py", "from wadi.zoo.recipe import state"),
        ("io/files.py", "from wadi.novelty import anything"),
    ],
)
def test_a_trespass_is_seen(file, source):
    assert len(trespasses(ROOT / file, source)) == 1
