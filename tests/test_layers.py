"""The layers of the package: a module imports from lower ranks and its own folder only, wherever the import is written."""

import ast
from pathlib import Path

import pytest

import wadi

ROOT = Path(wadi.__file__).parent

# Lowest first. A name is a module or a folder of the package. If several names fit a file, the longest counts.
RANKS = (
    {"errors", "_peft_hook", "runtime"},
    {"io", "zoo.paths", "zoo.concepts"},
    {"parallel", "zoo.prompts"},
    {"lorad", "prompts", "diffusion"},
    {"backbones", "full"},
    {"roles", "sampling", "zoo"},
    {"distill"},
    {"distill.plan", "zoo.recipe"},
    {"extras", "convert", "metrics", "analysis", "testing"},
    {"pipelines"},
    {"evaluate", "app"},
    {"study", "exports"},
    {"cli"},
    {"__main__"},
)
RANK = {name: rank for rank, names in enumerate(RANKS) for name in names}
# These exchange files only, and do not import one another.
APART = {"extras", "analysis", "convert", "zoo.recipe"}


def place(path: Path) -> str:
    """Return the module or folder with a rank that a file belongs to."""
    return ranked(".".join(path.relative_to(ROOT).with_suffix("").parts))


def ranked(module: str) -> str:
    """Return the longest name of a module, or of a folder around it, that has a rank; else its first word."""
    words = module.split(".")
    names = [".".join(words[:length]) for length in range(len(words), 0, -1)]
    return next((name for name in names if name in RANK), words[0])


def imported(tree: ast.AST):
    """Yield ``(line, place)`` of everything that a file imports from the package, inside functions too."""
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


def forbidden_imports(path: Path, source: str) -> list[str]:
    importer = place(path)
    lines = []
    for line, imported_place in imported(ast.parse(source)):
        if imported_place in (importer, "__version__"):
            continue
        if imported_place not in RANK:
            lines.append(f"{path.name}:{line} imports wadi.{imported_place}, which has no rank")
        elif RANK[imported_place] >= RANK[importer]:
            lines.append(f"{path.name}:{line} imports wadi.{imported_place} (rank {RANK[imported_place]})")
        elif {importer, imported_place} <= APART:
            lines.append(f"{path.name}:{line} imports wadi.{imported_place}: these two exchange files only")
    return lines


# The root names everything and loads it on use; the hook registers LoRaD after PEFT's own import.
FILES = sorted(path for path in ROOT.rglob("*.py") if path.name not in ("_peft_hook.py",) and path != ROOT / "__init__.py")


def test_every_module_has_a_rank():
    places = {place(path) for path in FILES} | {"_peft_hook"}
    assert places <= RANK.keys(), f"give a rank to {sorted(places - RANK.keys())}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_go_down(path):
    assert forbidden_imports(path, path.read_text()) == []


def test_the_root_imports_only_the_hook_and_the_error_at_import_time():
    tree = ast.parse((ROOT / "__init__.py").read_text())
    guarded = {id(node) for test in tree.body if isinstance(test, ast.If) for node in ast.walk(test)}
    plain = ast.Module([node for node in tree.body if id(node) not in guarded], [])
    assert {name for _, name in imported(plain)} == {"_peft_hook", "errors"}


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("roles/files.py", "from wadi.distill.step import train_step"),
        ("roles/files.py", "def f():\n    from wadi import distill"),
        ("diffusion/process.py", "import typing\nif typing.TYPE_CHECKING:\n    import wadi.backbones.sd"),
        ("lorad/layer.py", "from wadi.prompts import reading"),
        ("backbones/sd.py", "import importlib\nimportlib.import_module('wadi.sampling')"),
        ("zoo/recipe/teacher.py", "from wadi.extras import steps"),
        ("zoo/prompts.py", "from wadi.zoo.judge import Classifier"),
        ("zoo/judge.py", "from wadi.zoo.recipe import state"),
        ("io/files.py", "from wadi.novelty import anything"),
    ],
)
def test_a_forbidden_import_is_found(file, source):
    assert len(forbidden_imports(ROOT / file, source)) == 1


def adapter_names(source: str) -> list[int]:
    """Return the lines that use the names of LoRaD's parameters, docstrings left out."""
    tree = ast.parse(source)
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    lines = []
    for node in ast.walk(tree):
        attribute = isinstance(node, ast.Attribute) and node.attr in ("lorad_A", "lorad_B")
        text = isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings
        if attribute or (text and any(name in node.value for name in ("lorad_A", "lorad_B", ".lorad_"))):
            lines.append(node.lineno)
    return lines


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_only_lorad_and_its_analysis_know_the_names_of_its_parameters(path):
    """A role carries an adapter of any PEFT method."""
    if place(path) not in ("lorad", "analysis"):
        assert adapter_names(path.read_text()) == []


USES = ("layer.lorad_A", 'hasattr(layer, "lorad_B")', 'key.endswith(".lorad_A")', 'f"{key}.lorad_A"')


@pytest.mark.parametrize("source", USES)
def test_a_use_of_a_parameter_name_is_found(source):
    assert adapter_names(source) == [1]


def test_a_parameter_name_in_a_docstring_is_no_use():
    assert adapter_names('"""Return ``layer.lorad_A``."""') == []
