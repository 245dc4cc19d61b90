"""No file needs, directly or through others, one that needs it: not even by an import inside a function."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import nearkin_client
import nearkin_service
import nearkin_trainer
import pytest


@pytest.mark.parametrize(
    "package", [nearkin_client, nearkin_service, nearkin_trainer], ids=lambda p: p.__name__
)
def test_no_imports_run_in_a_circle(package: object) -> None:
    root = Path(str(package.__file__)).parent  # type: ignore[attr-defined]
    files = {
        ".".join(path.relative_to(root.parent).with_suffix("").parts): path for path in root.rglob("*.py")
    }
    assert len(files) > 20
    TopologicalSorter({name: set(needed(name, path, files)) for name, path in files.items()}).prepare()


def needed(name: str, path: Path, files: dict[str, Path]) -> Iterator[str]:
    """The files of this package that one imports; a package's own is needed for the names that it defines."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            candidates = [[alias.name] for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            candidates = [[f"{node.module}.{alias.name}", node.module] for alias in node.names]
        else:
            continue
        for modules in candidates:
            known = [file for module in modules for file in (module, f"{module}.__init__") if file in files]
            if known and known[0] != name:
                yield known[0]
