"""What the demo keeps of the emoji artwork, on drawings made up here and on the real files."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from examples.demo.emoji import (
    VENDORS,
    Drawing,
    artwork,
    characters,
    name,
    read_drawings,
    split,
    without_repeats,
)

DOG, CAT, FOX, OWL = "\U0001f436", "\U0001f431", "\U0001f98a", "\U0001f989"


def drawing(emoji: str, vendor: str, shade: int) -> Drawing:
    return Drawing(emoji, vendor, np.full((4, 4, 3), shade, np.uint8))


def paint(folder: Path, vendor: str, code: str, colour: tuple[int, int, int, int]) -> None:
    (folder / vendor).mkdir(exist_ok=True)
    Image.new("RGBA", (6, 6), colour).save(folder / vendor / f"{code}.png")


def test_no_copy_of_a_repeated_picture_is_kept() -> None:
    across = [drawing(DOG, "Apple", 1), drawing(DOG, "Meta", 1)]
    within = [drawing(CAT, "Apple", 2), drawing(FOX, "Apple", 2)]
    single = [drawing(CAT, "Meta", 3)]
    assert without_repeats([*across, *within, *single]) == single


def test_transparent_pixels_are_white_whatever_colour_they_hide(tmp_path: Path) -> None:
    paint(tmp_path, "Appl", "U+1F436", (255, 0, 0, 0))
    paint(tmp_path, "FB", "U+1F436", (0, 0, 255, 0))
    drawings = list(read_drawings(tmp_path, 4))
    assert [int(each.pixels.min()) for each in drawings] == [255, 255]
    assert without_repeats(drawings) == []


def test_skin_tones_are_left_out(tmp_path: Path) -> None:
    paint(tmp_path, "Appl", "U+1F44D", (9, 9, 9, 255))
    paint(tmp_path, "Appl", "U+1F44D-U+1F3FE", (8, 8, 8, 255))
    assert [each.emoji for each in read_drawings(tmp_path, 4)] == ["\U0001f44d"]


def test_unseen_emoji_are_drawn_by_the_probe_and_never_trained_on() -> None:
    vendors = ("Apple", "Google", "Windows")
    drawings = [drawing(e, v, 0) for e in (DOG, CAT, FOX, OWL) for v in vendors]
    chosen = split(drawings, probe="Windows", unseen=2)
    assert {d.vendor for d in chosen.queries} == {"Windows"}
    assert {d.vendor for d in (*chosen.train, *chosen.gallery)} == {"Apple", "Google"}
    assert len(chosen.queries) == 2
    assert _emoji(chosen.train).isdisjoint(_emoji(chosen.queries))
    assert _emoji(chosen.gallery) == _emoji(chosen.queries)
    assert split(drawings, probe="Windows", unseen=2) == chosen


def test_too_few_emoji_for_the_split_are_refused() -> None:
    with pytest.raises(ValueError, match="unseen=2"):
        split([drawing(DOG, v, 0) for v in ("Apple", "Google", "Windows")], probe="Windows", unseen=2)


def test_names_say_what_is_drawn() -> None:
    assert name(characters("U+1F436")) == "dog face"
    assert name(characters("U+2764-U+FE0F")) == "heavy black heart"
    assert name(characters("U+1F1E9-U+1F1EA")) == "flag DE"


def test_the_real_artwork_has_repeats_and_enough_left(tmp_path: Path) -> None:
    try:
        folder = artwork()
    except ValueError as missing:
        pytest.skip(str(missing))
    for code in VENDORS:  # a part of it: all of it takes seconds
        (tmp_path / code).mkdir()
        for path in (folder / code).glob("U+1F6[0-4]?*.png"):
            (tmp_path / code / path.name).symlink_to(path)
    drawings = list(read_drawings(tmp_path, 16))
    once = without_repeats(drawings)
    assert len(drawings) > len(once) > 300
    chosen = split(once, probe="Windows", unseen=20)
    kept = (*chosen.train, *chosen.queries, *chosen.gallery)
    assert len({each.fingerprint for each in kept}) == len(kept)


def _emoji(drawings: tuple[Drawing, ...]) -> set[str]:
    return {each.emoji for each in drawings}
