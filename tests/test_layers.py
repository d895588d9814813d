"""Imports follow the layers in CONTRIBUTING; packages have few modules and short chains of imports."""

import ast
import functools
import re
from collections import defaultdict
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"
LAYERS = [
    {"cli"},
    {"evaluation", "serving"},
    {"student"},
    {"data"},
    {"report", "metrics", "models", "command"},
    {"run"},
    {"config"},
    {"records", "text", "urls", "devices", "extensions", "errors"},
]
MOST_ROOMS = 17
DEEPEST = 8
REPEATED = {
    *("log", "main", "GROUPS"),  # of a module, a command, its help
    *("ENGINE", "_load", "_preflight", "_suits"),  # of an engine
    *("Item", "Result", "Done"),  # type variables
    *("_MESSAGES", "_TOLERANCE", "_EVERY_SECONDS"),  # the limit of a reader, of a check, of a loop
}
"""Names that several modules may define."""
PACKAGES = sorted(
    ".".join(path.relative_to(SOURCE).parent.parts) for path in (SOURCE / "scaledown").rglob("__init__.py")
)


@functools.cache
def imports() -> dict[str, set[str]]:
    """The modules of the package that each module imports, anywhere in its file."""
    found = {}
    for path in SOURCE.rglob("*.py"):
        if path.name == "__main__.py":
            continue  # it only calls the command line
        module = ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")
        names = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                assert node.level == 0, f"{path}: relative import"
                names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        found[module] = names - {"scaledown", module}
    return {module: {name for name in names if name in found} for module, names in found.items()}


def layer(module: str) -> int | None:
    parts = module.split(".")
    if len(parts) == 1:
        return None  # the package itself: its version
    return next(number for number, names in enumerate(LAYERS) if parts[1] in names)


def rooms(package: str) -> dict[str, set[str]]:
    """The modules and packages in a package, each with those that it imports."""

    def room(module: str) -> str:
        return module.removeprefix(f"{package}.").split(".")[0] if module.startswith(f"{package}.") else ""

    found: dict[str, set[str]] = defaultdict(set)
    for module, names in imports().items():
        if own := room(module):
            found[own] |= {room(name) for name in names} - {own, ""}
    return found


def test_modules_import_only_from_their_own_layer_or_below() -> None:
    for module, names in imports().items():
        for name in names:
            above, below = layer(module), layer(name)
            if above is not None and below is not None:
                assert above <= below, f"{module} imports {name}, which lies above it"


def test_imports_have_no_cycles() -> None:
    assert list(TopologicalSorter(imports()).static_order())


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_have_few_modules_and_no_cycles(package: str) -> None:
    own = rooms(package)
    depth: dict[str, int] = {}
    for room in TopologicalSorter(own).static_order():
        depth[room] = 1 + max((depth[name] for name in own[room]), default=0)
    assert len(own) <= MOST_ROOMS
    assert max(depth.values(), default=0) <= DEEPEST


def test_modules_that_contributing_names_exist() -> None:
    """Its table of packages, and its table of the modules of 0.6.0."""
    page = (SOURCE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = [line.split("|") for line in page.splitlines() if line.startswith("| `")]
    packages = {*(path.name for path in (SOURCE / "scaledown").iterdir())}
    named = [name for row in rows for cell in row for name in re.findall(r"`([\w/]+/(?:\w+\.py)?)`", cell)]
    named = [name for name in named if name.partition("/")[0] in packages]
    assert len(named) > 60
    for name in named:
        assert (SOURCE / "scaledown" / name).exists(), name


def test_a_name_is_defined_in_one_module() -> None:
    where = defaultdict(set)
    for path in SOURCE.rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                where[node.name].add(path.relative_to(SOURCE))
            for target in node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]:
                if isinstance(target, ast.Name) and not target.id.startswith("__"):
                    where[target.id].add(path.relative_to(SOURCE))
    assert {name for name, paths in where.items() if len(paths) > 1} == REPEATED
