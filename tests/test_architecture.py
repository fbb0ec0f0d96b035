"""Who may import whom: the contracts of pyproject.toml, and what a contract on the import graph cannot see."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp
import pytest

from tests.paths import ROOT

PACKAGES = ("media", "model", "training", "service")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
PACKAGE_FILES = [path for path in SOURCES if path.name == "__init__.py"]


def test_import_contracts_hold() -> None:
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    # A configuration that is not found, or has no contract, must not pass for a clean one.
    assert " 0 broken" in done.stdout
    assert "Contracts: 0 kept" not in done.stdout


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("media", "torch triton model training service"),
        ("service.queue", "torch triton model training media fastapi"),
        (
            "service.client",
            "torch triton model training service.queue service.api redis fastapi pydantic PIL av",
        ),
        ("service.api.app", "torch triton model training service.worker"),
        ("service.cli.main", "torch triton model training fastapi redis"),
        ("model", "triton service training fastapi redis pydantic PIL av"),
        ("training", "service fastapi redis pydantic"),
    ],
)
def test_import_does_not_pull(module: str, absent: str) -> None:
    """Contracts do not see what a library of ours or a plugin imports: look at the process."""
    code = f"import sys, {module}; print([name for name in {absent.split()!r} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_model_takes_only_plain_records_from_media() -> None:
    taken = {(module, name) for module, name in _imports("model") if name.split(".")[0] == "media"}
    assert {name for _, name in taken} <= {"media.types"}, sorted(taken)


def test_only_worker_and_cli_import_the_model() -> None:
    importers = {module for module, name in _imports("service") if name.split(".")[0] == "model"}
    assert all(module.startswith(("service.worker", "service.cli")) for module in importers), sorted(importers)


def test_kernels_have_one_door() -> None:
    outside = {
        (module, name)
        for package in PACKAGES
        for module, name in _imports(package)
        if name.startswith("model.kernels.") and not module.startswith("model.kernels")
    }
    assert not outside, sorted(outside)


def test_triton_is_imported_only_in_kernels() -> None:
    importers = {module for package in PACKAGES for module, name in _imports(package) if name.split(".")[0] == "triton"}
    assert all(module.startswith("model.kernels") for module in importers), sorted(importers)


def test_only_settings_read_the_environment() -> None:
    """Spelled os.environ or os.getenv anywhere else, a knob would be one that nobody finds."""
    readers = {
        path.relative_to(ROOT).as_posix()
        for path in SOURCES
        for node in ast.walk(_parse(path))
        if isinstance(node, ast.Attribute) and node.attr in {"getenv", "environ"}
    }
    # A child process is given an environment, which is not reading a knob: those files hand one on or clear it.
    assert readers <= {"media/pool.py", "service/worker_process.py"}, sorted(readers)


def test_no_import_cycles() -> None:
    graph = grimp.build_graph(*PACKAGES, cache_dir=None)
    try:
        TopologicalSorter({name: graph.find_modules_directly_imported_by(name) for name in graph.modules}).prepare()
    except CycleError as error:
        pytest.fail("import cycle: " + " -> ".join(error.args[1]))


@pytest.mark.parametrize(
    "path", [path for path in SOURCES if path.name == "__init__.py"], ids=lambda path: path.parent.name
)
def test_package_files_only_re_export(path: Path) -> None:
    """A docstring, imports and __all__: whoever looks for code finds it in a file that is named for it."""
    for node in _parse(path).body:
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_all = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        is_import = isinstance(node, ast.Import | ast.ImportFrom)
        assert is_docstring or is_all or is_import, f"{path.parent.name}: {ast.unparse(node)}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_sources_are_plain_text(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.isascii(), "only ASCII in sources"
    assert not any(isinstance(node, ast.ImportFrom) and node.names[0].name == "*" for node in ast.walk(_parse(path)))


def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=path.name)


def _imports(package: str) -> Iterator[tuple[str, str]]:
    """Yield (module, name it imports) for all files of a package, lazy imports and imported modules included."""
    for path in (ROOT / package).rglob("*.py"):
        relative = path.relative_to(ROOT).with_suffix("")
        module = ".".join(relative.parts).removesuffix(".__init__")
        for node in ast.walk(_parse(path)):
            if isinstance(node, ast.Import):
                yield from ((module, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                # Relative imports are not used here; one would show up as a name without its package.
                assert node.level == 0, f"{module}: relative import"
                assert node.module
                yield module, node.module
                for alias in node.names:
                    candidate = ROOT.joinpath(*node.module.split("."), alias.name)
                    if candidate.with_suffix(".py").is_file() or candidate.is_dir():
                        yield module, f"{node.module}.{alias.name}"
