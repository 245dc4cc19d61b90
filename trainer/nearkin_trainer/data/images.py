"""Pixels: decoded once into memory that the processes of a machine share, or read again for every batch.

Images become uint8 `[3, height, width]`, stretched to one size. Transparency is put on white; grey, palette
and 16-bit images become RGB; the EXIF orientation is applied.
"""

import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from nearkin_trainer.distributed import World, fail_together
from nearkin_trainer.node import node_array

logger = logging.getLogger("nearkin.trainer.data")

Bytes = NDArray[np.uint8]


class ImageSource(Protocol):
    """Images by number."""

    def __len__(self) -> int:
        """How many there are."""
        ...

    def take(self, numbers: NDArray[np.int64]) -> torch.Tensor:
        """uint8 `[B, 3, height, width]`."""
        ...


def open_images(
    world: World, paths: Sequence[Path], height: int, width: int, *, memory_bytes: int = 4 * 2**30
) -> ImageSource:
    """The images of some files.

    Args:
        world: the job; the processes of one machine decode a part each and share the result.
        paths: the files.
        height: what every image is stretched to.
        width: likewise.
        memory_bytes: images that need more than this, once decoded, are read again for every batch.

    Raises:
        ValueError: a file is not an image that Pillow can read.
        OtherProcessFailed: another process has found one.
    """
    needed = len(paths) * 3 * height * width
    if needed > memory_bytes:
        logger.info(
            "%d images would take %.1f GiB: reading them again for every batch", len(paths), needed / 2**30
        )
        return ImageFiles(paths, height, width)
    pixels = node_array(world, (len(paths), 3, height, width), np.uint8)
    mine, error = slice(world.local_rank, None, world.local_size), None
    try:
        _decode_all(paths[mine], pixels[mine])
    except ValueError as unreadable:
        error = unreadable
    fail_together(world, error)  # also waits for the other processes of the machine
    logger.info("decoded %d images of %dx%d into memory, %.0f MiB", len(paths), width, height, needed / 2**20)
    return DecodedImages(pixels)


class DecodedImages:
    """Images in memory."""

    def __init__(self, pixels: Bytes) -> None:
        self._pixels = pixels

    def __len__(self) -> int:
        return len(self._pixels)

    def take(self, numbers: NDArray[np.int64]) -> torch.Tensor:
        """See `ImageSource`."""
        return torch.from_numpy(self._pixels[numbers])


class ImageFiles:
    """Images on disk, decoded by a few threads; Pillow lets them run side by side."""

    def __init__(self, paths: Sequence[Path], height: int, width: int) -> None:
        self._paths, self._height, self._width = paths, height, width
        self._pool = ThreadPoolExecutor(_workers(), thread_name_prefix="decode")

    def __len__(self) -> int:
        return len(self._paths)

    def take(self, numbers: NDArray[np.int64]) -> torch.Tensor:
        """See `ImageSource`."""
        jobs = [self._pool.submit(decode, self._paths[i], self._height, self._width) for i in numbers]
        return torch.from_numpy(np.stack([job.result() for job in jobs]))


def decode(path: Path, height: int, width: int) -> Bytes:
    """One image as uint8 `[3, height, width]`.

    Raises:
        ValueError: the file is not an image that Pillow can read.
    """
    try:
        with Image.open(path) as image:
            image.draft("RGB", (width, height))  # lets a JPEG be decoded at a fraction of its size
            upright = ImageOps.exif_transpose(image)
            resized = _to_rgb(upright).resize((width, height), Image.Resampling.BILINEAR)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error
    return np.ascontiguousarray(np.asarray(resized).transpose(2, 0, 1))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or (image.mode == "I" and not _has_16_bits(image)):
        raise ValueError("it does not say which of its numbers is white; store pixels of 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        # 16 bits per pixel: Pillow's own conversion would clip everything above 255 to white.
        return Image.fromarray((np.asarray(image, dtype=np.uint32) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in {"RGBA", "LA", "PA", "RGBa", "La"} or "transparency" in image.info:
        layered = image.convert("RGBA")
        white = Image.new("RGBA", layered.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layered).convert("RGB")
    return image.convert("RGB")


def _has_16_bits(image: Image.Image) -> bool:
    lowest, highest = np.asarray(image).min(), np.asarray(image).max()
    return bool(lowest >= 0 and highest < 1 << 16)


def to_floats(pixels: torch.Tensor, device: torch.device) -> torch.Tensor:
    """uint8 0..255 to float32 -1..1, what backbones are given."""
    return pixels.to(device, non_blocking=True).float().mul_(2 / 255).sub_(1)


def _decode_all(paths: Sequence[Path], pixels: Bytes) -> None:
    height, width = pixels.shape[2:]
    with ThreadPoolExecutor(_workers()) as pool:
        for row, decoded in zip(pixels, pool.map(lambda p: decode(p, height, width), paths), strict=True):
            row[:] = decoded


def _workers() -> int:
    return min(16, os.cpu_count() or 1)
