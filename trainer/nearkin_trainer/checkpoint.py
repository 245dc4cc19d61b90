"""Checkpoints: one file, written whole or not at all, without pickle.

A checkpoint is an uncompressed NumPy archive. A tree of dicts, lists, numbers, strings and tensors is taken
apart into its arrays (`a0`, `a1`, ...) and one JSON text (`tree`) that says where they belong. bfloat16
tensors travel as their bits.
"""

import io
import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

FORMAT = "nearkin checkpoint 1"


def save(path: Path, tree: dict[str, Any]) -> None:
    """Writes `tree` to `path`: after a crash at any moment, `path` is either the old file or the new one.

    Raises:
        TypeError: something in the tree is not a dict, list, tuple, number, string, None or tensor.
    """
    arrays: dict[str, NDArray[Any]] = {}
    text = json.dumps({FORMAT: _take_apart(tree, arrays)})
    arrays["tree"] = np.frombuffer(text.encode(), dtype=np.uint8)
    with atomic_file(path) as file:
        np.savez(file, allow_pickle=False, **arrays)


def load(path: Path) -> dict[str, Any]:
    """Reads what `save` wrote; tensors are on the CPU, tuples have become lists.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not a checkpoint, or damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            content = json.loads(archive["tree"].tobytes())
            tree = _put_together(content[FORMAT], archive)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{path} is not a checkpoint that can be read: {error}") from error
    assert isinstance(tree, dict)
    return tree


class atomic_file:  # noqa: N801 - used like open()
    """A binary file that appears under its name only when the block ends well, and then safely on disk."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")

    def __enter__(self) -> io.BufferedWriter:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._temporary.open("wb")
        return self._file

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is not None:
            self._file.close()
            self._temporary.unlink(missing_ok=True)
            return
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._temporary.replace(self._path)
        _sync_directory(self._path.parent)


def _sync_directory(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _take_apart(node: Any, arrays: dict[str, NDArray[Any]]) -> Any:
    if isinstance(node, torch.Tensor):
        tensor = node.detach().cpu().contiguous()
        name = f"a{len(arrays)}"
        is_bfloat16 = tensor.dtype == torch.bfloat16
        arrays[name] = (tensor.view(torch.int16) if is_bfloat16 else tensor).numpy()
        return {"tensor": name, "dtype": str(tensor.dtype).removeprefix("torch.")}
    if isinstance(node, dict):
        # Pairs, because keys may be numbers (torch optimisers number their parameters), which JSON makes
        # strings.
        return {"dict": [[key, _take_apart(value, arrays)] for key, value in node.items()]}
    if isinstance(node, list | tuple):
        return {"list": [_take_apart(value, arrays) for value in node]}
    if node is None or isinstance(node, bool | int | float | str):
        return {"value": node}
    raise TypeError(f"a checkpoint cannot hold a {type(node).__name__}")


def _put_together(node: dict[str, Any], archive: Any) -> Any:
    if "tensor" in node:
        tensor = torch.from_numpy(archive[node["tensor"]])
        return tensor.view(torch.bfloat16) if node["dtype"] == "bfloat16" else tensor
    if "dict" in node:
        return {key: _put_together(value, archive) for key, value in node["dict"]}
    if "list" in node:
        return [_put_together(value, archive) for value in node["list"]]
    return node["value"]


def seed_everything(*seed: int) -> None:
    """Seeds the generators of Python, NumPy and torch from a few numbers.

    Seeded with (seed, epoch, rank) at each epoch, a job that resumes draws what it would have drawn without
    the interruption; no generator's state needs saving.
    """
    words = np.random.SeedSequence(seed).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))  # noqa: NPY002 - other people's backbones and losses may draw from it
    torch.manual_seed(int(words[2]))
