"""Imports go one way: rooms stand on those before them, as ARCHITECTURE.md lists them, and files not on each other."""

from __future__ import annotations

import ast
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("rootstock_client", "rootstockd")
FILES = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py") if "embedded" not in path.parts]


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path) for path in FILES}


def imports(node: ast.AST, *, at_once: bool) -> Iterator[str]:
    """The modules of ours that are imported in there, but for what is there for mypy alone.

    Args:
        node: a part of a module.
        at_once: only what is when it is itself imported.
    """
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return
    if at_once and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return
    names: list[str] = []
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.module:
        names = [inner if (inner := f"{node.module}.{alias.name}") in MODULES else node.module for alias in node.names]
    yield from (name for name in names if name in MODULES)
    for child in ast.iter_child_nodes(node):
        yield from imports(child, at_once=at_once)


def room_of(module: str) -> str:
    package, _, rest = module.partition(".")
    return rest.partition(".")[0] if package == "rootstockd" else package


def test_rooms_stand_on_those_before_them() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    table = text.split("is the daemon, a room for each subject:")[1].split("\n\n")[1]
    listed = re.findall(r"^\| `([a-z_]+)(?:/|\.py)`", table, re.MULTILINE)
    order = ["", "rootstock_client", "worker", *listed, "__main__"]  # "" is the version
    assert {room_of(module) for module in MODULES} == set(order)
    upwards = [
        f"{module_of(path)} imports {name}"
        for path in FILES
        for name in imports(ast.parse(path.read_text()), at_once=False)
        if order.index(room_of(name)) > order.index(room_of(module_of(path)))
    ]
    assert upwards == []


def test_workers_import_nothing_of_the_daemons() -> None:
    for path in (ROOT / "rootstockd/worker").rglob("*.py"):
        others = {room_of(name) for name in imports(ast.parse(path.read_text()), at_once=False)} - {"worker", ""}
        assert not others, path


def test_no_two_files_import_each_other() -> None:
    graph = {module_of(path): set(imports(ast.parse(path.read_text()), at_once=True)) for path in FILES}
    for module, names in graph.items():
        names -= {module}
    tuple(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError
