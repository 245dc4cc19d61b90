"""Pixels out of whatever files people have."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from nearkin_trainer.data import Augment, AugmentConfig, open_images, to_floats
from nearkin_trainer.data.images import DecodedImages, ImageFiles, decode
from nearkin_trainer.distributed import World
from PIL import Image

from tests.trainer.pictures import draw

CPU = torch.device("cpu")
STILL = AugmentConfig(**dict.fromkeys((field.name for field in dataclasses.fields(AugmentConfig)), 0))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    image = draw(3, 0, (40, 30))
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    else:
        image = image.convert(mode)
    image.save(path)
    pixels = decode(path, 30, 40)
    assert pixels.shape == (3, 30, 40)
    assert pixels.dtype == np.uint8
    brightness = np.asarray(draw(3, 0, (40, 30)).convert("L")).mean()
    assert pixels.mean() == pytest.approx(brightness, abs=30)


@pytest.mark.parametrize(("value", "dtype"), [(0.5, np.float32), (70_000, np.int32), (-1, np.int32)])
def test_pixels_without_a_scale_are_refused(tmp_path: Path, value: float, dtype: type) -> None:
    Image.fromarray(np.full((1, 1), value, dtype)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=r"a\.tif .*8 or 16 bits"):
        decode(tmp_path / "a.tif", 1, 1)


def test_transparency_is_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.putpixel((0, 0), (255, 0, 0, 255))
    image.save(tmp_path / "a.png")
    pixels = decode(tmp_path / "a.png", 8, 8)
    assert pixels[:, 0, 0].tolist() == [255, 0, 0]
    assert (pixels[:, 1:, 1:] == 255).all()


def test_orientation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (20, 10), (255, 255, 255))
    image.paste((0, 0, 0), (0, 0, 10, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise to view
    image.save(tmp_path / "a.jpg", exif=exif, quality=95)
    pixels = decode(tmp_path / "a.jpg", 20, 10)
    assert pixels[:, :8].mean() < 20
    assert pixels[:, 12:].mean() > 235


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    draw(0, 0, (200, 200)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:300])
    (tmp_path / "text.jpg").write_text("hello")
    for name in ("cut.png", "text.jpg"):
        with pytest.raises(ValueError, match=f"{name} cannot be read as an image"):
            decode(tmp_path / name, 16, 16)


def test_memory_and_files_give_the_same_pixels(tmp_path: Path) -> None:
    paths = []
    for i in range(5):
        paths.append(tmp_path / f"{i}.png")
        draw(i, 0).save(paths[-1])
    kept = open_images(World(), paths, 16, 20)
    read = open_images(World(), paths, 16, 20, memory_bytes=100)
    assert isinstance(kept, DecodedImages)
    assert isinstance(read, ImageFiles)
    assert len(kept) == len(read) == 5
    numbers = np.array([3, 0, 3])
    assert torch.equal(kept.take(numbers), read.take(numbers))


def test_augmentation_keeps_shape_and_range_and_follows_the_seed() -> None:
    pixels = torch.randint(0, 256, (8, 3, 20, 12), dtype=torch.uint8)
    augment = Augment(AugmentConfig())
    torch.manual_seed(1)
    first = augment(pixels, CPU)
    torch.manual_seed(1)
    assert torch.equal(first, augment(pixels, CPU))
    assert first.shape == (8, 3, 20, 12)
    assert first.min() >= -1
    assert first.max() <= 1
    assert not torch.equal(first, augment(pixels, CPU))


def test_augmentation_switched_off_changes_nothing() -> None:
    pixels = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    assert torch.allclose(Augment(STILL)(pixels, CPU), to_floats(pixels, CPU))


def test_grey_takes_all_colour_away() -> None:
    pixels = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    images = Augment(dataclasses.replace(STILL, grey=1.0))(pixels, CPU)
    assert torch.allclose(images[:, 0], images[:, 1], atol=1e-5)
    assert torch.allclose(images[:, 0], images[:, 2], atol=1e-5)


def test_wrong_strengths_are_named() -> None:
    with pytest.raises(ValueError, match="flip=2 must be between 0 and 1"):
        AugmentConfig(flip=2)
    with pytest.raises(ValueError, match="hue=-1 must be at least 0"):
        AugmentConfig(hue=-1)
