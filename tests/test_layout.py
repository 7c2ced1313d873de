"""The shape of the project: imports point down, policies are pure, packaging knows every folder."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("node", "training", "dht", "protocol", "compression")
BELOW = {
    "node": {"node", "training", "dht", "protocol", "compression"},
    "training": {"training", "dht", "protocol", "compression"},
    "dht": {"dht", "protocol"},
    "protocol": {"protocol"},
    "compression": {"compression"},
}
PURE_POLICIES = (
    "dht/liveness.py",
    "dht/neighbours.py",
    "node/simulate/ideal.py",
    "node/view/verdict.py",
    "training/partition.py",
    "training/placement.py",
    "training/outer/policy.py",
    "training/pipeline/link_codec.py",
    "training/pipeline/routing.py",
    "training/pipeline/settlement.py",
    "training/pipeline/standing.py",
)
IMPURE = {"asyncio", "time", "torch", "socket", "os", "pathlib", "threading", "secrets", "grpc", "subprocess"}


def sources(folder: str) -> Iterator[Path]:
    yield from (path for path in (ROOT / folder).rglob("*.py") if "__pycache__" not in path.parts)


def imported(path: Path) -> Iterator[str]:
    """Full names of the modules that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_point_down(folder: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources(folder)
        for name in imported(path)
        if name.startswith("shoal.") and name.split(".")[1] not in BELOW[folder]
    ]
    assert not wrong


def test_hivemind_is_imported_by_the_directory_alone() -> None:
    users = {
        path.relative_to(ROOT).parts[0]
        for f in FOLDERS
        for path in sources(f)
        if "hivemind" in imported(path)
    }
    assert users <= {"dht"}


def test_compression_needs_torch_numpy_and_numba_only() -> None:
    import sys

    allowed = {"torch", "numpy", "numba", "shoal", "__future__"} | sys.stdlib_module_names
    wrong = {
        name
        for path in sources("compression")
        for name in imported(path)
        if name.split(".")[0] not in allowed
    }
    assert not wrong


@pytest.mark.parametrize("policy", PURE_POLICIES)
def test_policies_are_pure(policy: str) -> None:
    wrong = {name for name in imported(ROOT / policy) if name.split(".")[0] in IMPURE}
    assert not wrong


@pytest.mark.parametrize("folder", FOLDERS)
def test_nothing_pickles_or_asserts_on_input(folder: str) -> None:
    for path in sources(folder):
        assert not {"pickle", "marshal", "shelve", "dill"} & set(imported(path)), path
        for node in ast.walk(ast.parse(path.read_text())):
            assert not isinstance(node, ast.Assert), f"{path}:{node.lineno}: assert"
            assert not (isinstance(node, ast.ExceptHandler) and node.type is None), f"{path}:{node.lineno}"


def test_packaging_lists_every_folder_with_code() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {
        "shoal." + ".".join(path.parent.relative_to(ROOT).parts)
        for folder in FOLDERS
        for path in sources(folder)
    }
    found.add("shoal.compression")
    assert set(settings["packages"]) == found
    assert {name: f"shoal.{place.replace('/', '.')}" for name, place in settings["package-dir"].items()} == {
        name: name for name in found
    }


def test_compression_is_a_namespace_so_that_it_cannot_hide_the_standard_librarys() -> None:
    assert not (ROOT / "compression" / "__init__.py").exists()
    assert not (ROOT / "docker" / "__init__.py").exists()


def test_type_checker_links_resolve() -> None:
    for folder in FOLDERS:
        assert (ROOT / ".typing" / "shoal" / folder).resolve() == ROOT / folder
        assert (ROOT / folder / "py.typed").exists()


def test_top_level_is_fixed() -> None:
    allowed = {"pyproject.toml", "README.md", "constraints.txt", "LICENSE", "tests", "docker", *FOLDERS}
    seen = {p.name for p in ROOT.iterdir() if not p.name.startswith(".") and not p.name.endswith(".egg-info")}
    assert seen - {"build"} <= allowed
