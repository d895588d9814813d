"""Imports only go down the layers of docs/design (and within a layer have no cycles)."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src"
LAYERS = [
    {"__main__"},
    {"cli"},
    {"evaluation", "serving"},
    {"student"},
    {"data"},
    {"overview", "prometheus"},
    {"report", "metrics", "status", "live", "progress", "executor", "ray_pool", "models", "gpus", "flags"},
    {
        "config",
        "shared_config",
        "options",
        "outputs",
        "logs",
        "stage",
        "store",
        "leases",
        "mirror",
        "hub",
        "places",
        "storage",
        "urls",
        "pulse",
        "atomic",
        "records",
        "errors",
    },
]


def imports() -> dict[str, set[str]]:
    """Module -> modules of the package that it imports, wherever in the file."""
    found = {}
    for path in SOURCE.rglob("*.py"):
        module = ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")
        names = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                assert node.level == 0, f"{path}: relative import"
                names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        found[module] = names
    return {module: {name for name in names if name in found} for module, names in found.items()}


def layer(module: str) -> int | None:
    parts = module.split(".")
    if len(parts) == 1:
        return None  # the package itself: its version
    return next(number for number, names in enumerate(LAYERS) if parts[1] in names)


def test_imports_go_down() -> None:
    for module, names in imports().items():
        for name in names:
            above, below = layer(module), layer(name)
            if above is not None and below is not None:
                assert above <= below, f"{module} imports {name}, which lies above it"


def test_no_cycles() -> None:
    graph = {module: {n for n in names if n != "scaledown"} for module, names in imports().items()}
    assert list(TopologicalSorter(graph).static_order())
