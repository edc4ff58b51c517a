"""Allowed imports between the parts of the package, and no import cycles."""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import matfact

ROOT = Path(matfact.__file__).parent

#: Parts by floor, from the ground up. Each imports from lower floors and from itself alone.
FLOORS = (
    {"_checks", "_files", "_regular", "_text", "_threads", "backend"},
    {"_figures", "_html", "_json", "_parallel", "_tables", "kernels", "metrics"},
    {"_depth_chart", "_progress", "_safetensors"},
    {"_layers", "_safetensors_file"},
    {"_bitmasks", "_gguf", "calibration", "constraints", "operators"},
    {"_report_page"},
    {"report"},
    {"solvers"},
    {"factorizers", "transforms"},
    {"allocation", "checkpoint", "compare"},
    {"torch._warnings", "torch.kernels", "torch.running"},
    {"torch._attached"},
    {"torch.layers"},
    {"torch.pruning", "torch.training"},
    {"torch.calibration"},
    {"torch.checkpoint", "torch.compression", "torch.neurons", "torch.sensitivity"},
    {"torch.tensor_decomposition", "torch.speed"},
    {"transformers"},
    {"cli"},
)
FLOOR = {part: i for i, parts in enumerate(FLOORS) for part in parts}


def module_of(path: Path) -> str:
    names = ("matfact", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(names).removesuffix(".__init__")


MODULES = {module_of(path): path for path in ROOT.rglob("*.py")}


def imported_by(path: Path) -> Iterator[str]:
    """Yield the modules of the package that a file imports, also late or for types alone."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else str(node.module)


def part_of(module: str) -> str:
    names = module.split(".")[1:]
    return ".".join(names[: 2 if names[:1] == ["torch"] else 1])


IMPORTS = {module: set(imported_by(path)) - {module} for module, path in MODULES.items()}


def test_every_part_has_a_floor():
    parts = {part_of(module) for module in MODULES} - {"", "torch"}  # whose names are loaded late
    assert parts == FLOOR.keys()


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_lead_downward(module):
    part = part_of(module)
    for other in IMPORTS[module]:
        below = part_of(other)
        if below not in {"", part}:
            assert FLOOR[below] < FLOOR[part], f"{module} imports {other}, on a floor above"


def test_no_files_import_each_other():
    list(graphlib.TopologicalSorter(IMPORTS).static_order())  # raises where they do, naming them


def test_files_are_short():
    lengths = {name: len(path.read_text().splitlines()) for name, path in MODULES.items()}
    assert not {name: n for name, n in lengths.items() if n > 400}
