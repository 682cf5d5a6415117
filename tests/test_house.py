"""The layout of the project: which module may import which, and what a wheel carries."""

import ast
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from zipfile import ZipFile

import pytest

from clipcacg.scripts.reporting.model_card import REQUIREMENTS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "scripts"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
MODULES = [*ROOT.glob("*.py"), *SCRIPTS.rglob("*.py")]
COMMANDS = {f"clipcacg.scripts.{path.stem}" for path in SCRIPTS.glob("*.py") if path.stem != "__init__"}
MODEL_FILES = {f"clipcacg.{path.stem}" for path in ROOT.glob("*_clipcacg.py")}
# The libraries that each library may import. Examples flow one way: data -> training -> reporting; a run writes its
# report when it ends, so training imports reporting and not the reverse.
MAY_IMPORT = {
    "data": set(),
    "reporting": {"data"},
    "training": {"data", "reporting"},
    "baselines": {"data"},
    "tables": {"data", "reporting", "training", "baselines"},
    "bench": {"data", "reporting", "training", "baselines"},
}


def name_of(path: Path) -> str:
    """Return the dotted name of a module of the package."""
    parts = ("clipcacg", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def imports(path: Path) -> set[str]:
    """Return the absolute names of everything that a module imports, inside functions too."""
    package = name_of(path) if path.stem == "__init__" else name_of(path).rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*parents, *([node.module] if node.module else [])])
            found |= {origin, *(f"{origin}.{name.name}" for name in node.names)}
    return found


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_module_imports_a_command(path: Path) -> None:
    assert not imports(path) & COMMANDS


@pytest.mark.parametrize("library", MAY_IMPORT)
def test_a_library_imports_only_those_below_it(library: str) -> None:
    others = {f"clipcacg.scripts.{name}" for name in MAY_IMPORT.keys() - MAY_IMPORT[library] - {library}}
    for path in (SCRIPTS / library).rglob("*.py"):
        assert not imports(path) & others, path


def test_every_folder_of_code_is_in_the_table_above() -> None:
    assert {path.parent.name for path in SCRIPTS.glob("*/__init__.py")} == MAY_IMPORT.keys()


@pytest.mark.parametrize("path", sorted(ROOT.glob("*_clipcacg.py")), ids=name_of)
def test_a_model_file_imports_only_the_others_and_relatively(path: Path) -> None:
    """The Hub's loader copies the relative imports and nothing else of the package."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    relative = {
        f"clipcacg.{node.module}" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level
    }
    assert relative <= MODEL_FILES
    own = {name for name in imports(path) if name.split(".")[0] == "clipcacg"}
    assert {".".join(name.split(".")[:2]) for name in own} == relative


def test_nothing_in_scripts_hides_a_library() -> None:
    """`accelerate launch scripts/train.py` puts scripts/ first on the path."""
    names = {path.stem for path in SCRIPTS.iterdir()} - {"__init__"}
    used = {name.split(".")[0] for path in MODULES for name in imports(path)}
    assert not names & (used | sys.stdlib_module_names)


def test_every_package_is_listed() -> None:
    listed = PYPROJECT["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(name_of(path) for path in MODULES if path.name == "__init__.py")


def test_the_model_card_asks_for_versions_that_ci_tests() -> None:
    assert set(REQUIREMENTS) <= set(PYPROJECT["project"]["dependencies"])


@pytest.mark.slow
def test_a_wheel_holds_what_the_folder_holds(tmp_path: Path) -> None:
    """It is built from a copy, so that no earlier build in the checkout can leave files in it."""
    leave = shutil.ignore_patterns(".*", "build", "outputs", "*.egg-info", "__pycache__", "tests")
    shutil.copytree(ROOT, tmp_path / "source", ignore=leave)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", tmp_path, tmp_path / "source"], check=True)
    (wheel,) = tmp_path.glob("clipcacg-*.whl")
    folders = [path.parent for path in SCRIPTS.glob("*/__init__.py")] + [SCRIPTS / "configs"]
    expected = {path for folder in folders for path in folder.rglob("*") if path.is_file()}
    expected |= {*ROOT.glob("*.py"), ROOT / "py.typed", *SCRIPTS.glob("*.py")}
    expected = {path for path in expected if "__pycache__" not in path.parts}
    names = {f"clipcacg/{path.relative_to(ROOT).as_posix()}" for path in expected}
    carried = {name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert carried == names


def test_the_tests_run_in_a_clone_of_any_name(tmp_path: Path) -> None:
    """README's name, clip-ca-cg, is no name of a package, but pytest imports packages around a test."""
    clone = tmp_path / "clip-ca-cg"
    for name in ("pyproject.toml", "__init__.py", "tests/conftest.py", "tests/inputs.py", "tests/data/test_errors.py"):
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, clone / name)
    subprocess.run([sys.executable, "-m", "pytest", "-p", "no:xdist"], cwd=clone, check=True, capture_output=True)
