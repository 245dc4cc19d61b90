"""Wire, catalogue, store and engines know each other only through frozen values."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import nearkin_service
import pytest

ROOT = Path(nearkin_service.__file__).parent

MAY_NOT_IMPORT = {
    "store": ("grpc", "faiss", "asyncio", "wire", "catalogue", "operations", "engines", "prometheus_client"),
    "catalogue": ("grpc", "faiss", "os", "pathlib", "wire", "store", "operations", "engines"),
    "wire": ("faiss", "store", "catalogue", "engines"),
    "operations": ("grpc", "faiss", "wire", "engines"),
    "engines": ("grpc", "asyncio", "wire", "store", "catalogue", "operations"),
}


def imports(path: Path) -> Iterator[str]:
    """Dotted names, those of this package without its name; the engines' contract is a set of values."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] if node.module != "nearkin_service" else [a.name for a in node.names]
        for name in names:
            inside = name.removeprefix("nearkin_service.")
            if inside != "engines.contract":
                yield inside


@pytest.mark.parametrize("house", MAY_NOT_IMPORT)
def test_houses_do_not_reach_into_each_other(house: str) -> None:
    files = sorted((ROOT / house).rglob("*.py"))
    assert files
    found = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files
        for name in imports(path)
        if name.partition(".")[0] in MAY_NOT_IMPORT[house]
    ]
    assert not found


def test_nothing_is_ever_unpickled() -> None:
    for path in ROOT.rglob("*.py"):
        assert not {"pickle", "shelve", "marshal"} & {n.partition(".")[0] for n in imports(path)}, path


def test_no_file_has_grown_beyond_its_purpose() -> None:
    sizes = {path.relative_to(ROOT): len(path.read_text().splitlines()) for path in ROOT.rglob("*.py")}
    assert max(sizes.values()) < 400, max(sizes, key=lambda path: sizes[path])
