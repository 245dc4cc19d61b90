"""Changing training images at random: position, colour and holes, for whole batches at once.

With few images per class the network memorises them unless these changes are strong; the defaults are.

Legend: B images, H x W pixels.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from nearkin_trainer.data.images import to_floats

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, what "grey" means for RGB


@dataclass(frozen=True)
class AugmentConfig:
    """How strongly. Every change is drawn anew for each image; 0 switches one off.

    Args:
        flip: probability of mirroring left and right.
        rotate: degrees, up to this much either way.
        zoom: up to this factor larger or smaller, as a share: 0.3 is 1/1.3 to 1.3 times.
        stretch: the same for width against height.
        shift: share of the side, up to this much in each direction.
        shear: up to this much.
        brightness: added to all pixels, share of the full range.
        contrast: up to this share more or less difference from the image's mean.
        saturation: up to this share more or less difference from grey.
        hue: turns of the colour circle, up to this much either way.
        grey: probability of losing all colour.
        any_hue: probability of turning the colour circle by any amount.
        gamma: exponent of brightness, up to this factor either way, as a share.
        invert: probability of a negative.
        blur: probability of blurring, by a random amount.
        noise: standard deviation of noise, share of the full range.
        erase: probability of each hole.
        holes: how many holes may be erased.
        erase_area: largest share of the image that one hole takes.
    """

    flip: float = 0.5
    rotate: float = 15.0
    zoom: float = 0.3
    stretch: float = 0.2
    shift: float = 0.1
    shear: float = 0.15
    brightness: float = 0.25
    contrast: float = 0.4
    saturation: float = 0.6
    hue: float = 0.08
    grey: float = 0.15
    any_hue: float = 0.1
    gamma: float = 0.5
    invert: float = 0.05
    blur: float = 0.3
    noise: float = 0.02
    erase: float = 0.5
    holes: int = 2
    erase_area: float = 0.2

    def __post_init__(self) -> None:
        for name in ("flip", "grey", "any_hue", "invert", "blur", "erase", "erase_area"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be between 0 and 1")
        others = (
            "rotate",
            "zoom",
            "stretch",
            "shift",
            "shear",
            "brightness",
            "contrast",
            "saturation",
            "hue",
            "gamma",
            "noise",
            "holes",
        )
        for name in others:
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0")


class Augment:
    """Draws from torch's global generator, so that seeding that one decides everything."""

    def __init__(self, config: AugmentConfig) -> None:
        self.config = config

    def __call__(self, pixels: torch.Tensor, device: torch.device) -> torch.Tensor:
        """uint8 `[B, 3, H, W]` to changed float32 `[B, 3, H, W]` in -1..1, on `device`."""
        images = to_floats(pixels, device)
        images = self._moved(images)
        images = self._recoloured(images)
        images = self._retoned(images.clamp(-1, 1))
        return self._erased(images)

    def _moved(self, images: torch.Tensor) -> torch.Tensor:
        c = self.config
        if not any((c.flip, c.rotate, c.zoom, c.stretch, c.shift, c.shear)):
            return images
        count, device = len(images), images.device
        angle = _either_way(count, device) * math.radians(c.rotate)
        zoom = (1 + c.zoom) ** _either_way(count, device)
        stretch = (1 + c.stretch) ** (_either_way(count, device) / 2)
        mirror = 1 - 2 * (torch.rand(count, device=device) < c.flip).float()
        shear = _either_way(count, device) * c.shear
        cos, sin = angle.cos(), angle.sin()
        across = torch.stack([cos * zoom * stretch * mirror, (shear * cos - sin) * zoom / stretch], 1)
        down = torch.stack([sin * zoom * stretch * mirror, (shear * sin + cos) * zoom / stretch], 1)
        shift = 2 * c.shift * torch.stack([_either_way(count, device), _either_way(count, device)], 1)
        matrix = torch.cat([torch.stack([across, down], 1), shift[:, :, None]], 2)
        grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)

    def _recoloured(self, images: torch.Tensor) -> torch.Tensor:
        """One 3x3 matrix and one offset per image: saturation, hue and contrast are linear in the colours."""
        c = self.config
        if not any((c.brightness, c.contrast, c.saturation, c.hue, c.any_hue, c.grey)):
            return images
        count, device = len(images), images.device
        saturation = 1 + _either_way(count, device) * c.saturation
        saturation = torch.where(torch.rand(count, device=device) < c.grey, 0.0, saturation.clamp_min(0))
        contrast = (1 + _either_way(count, device) * c.contrast).clamp_min(0)
        turns = torch.where(torch.rand(count, device=device) < c.any_hue, 0.5, c.hue)
        matrix = _hue_matrices(_either_way(count, device) * 2 * math.pi * turns)
        grey = torch.tensor(_LUMA, device=device).expand(3, 3)
        keep = saturation.view(-1, 1, 1)
        matrix = contrast.view(-1, 1, 1) * torch.matmul(
            keep * torch.eye(3, device=device) + (1 - keep) * grey, matrix
        )
        middle = images.mean(dim=(2, 3), keepdim=True).mean(dim=1)[:, :, 0]
        offset = 2 * c.brightness * _either_way(count, device)[:, None] + (1 - contrast)[:, None] * middle
        flat = torch.baddbmm(offset[:, :, None].expand(-1, 3, 1), matrix, images.flatten(2))
        return flat.view_as(images)

    def _retoned(self, images: torch.Tensor) -> torch.Tensor:
        """Changes that are not linear in the colours, or that look at neighbouring pixels."""
        c = self.config
        count, device = len(images), images.device

        if c.gamma:
            exponent = ((1 + c.gamma) ** _either_way(count, device)).view(-1, 1, 1, 1)
            images = 2 * ((images + 1) / 2).clamp_min(1e-3) ** exponent - 1
        if c.invert:
            signs = 1 - 2 * (torch.rand(count, 1, 1, 1, device=device) < c.invert).float()
            images = signs * images
        if c.blur:
            some = torch.nonzero(torch.rand(count, device=device) < c.blur).flatten()
            amount = torch.rand(len(some), 1, 1, 1, device=device)
            images = images.index_copy(0, some, torch.lerp(images[some], _smoothed(images[some]), amount))
        if c.noise:
            images = images + 2 * c.noise * torch.randn_like(images)
        return images.clamp(-1, 1)

    def _erased(self, images: torch.Tensor) -> torch.Tensor:
        """Rectangles of one random colour each."""
        c = self.config
        count, _, height, width = images.shape
        device = images.device
        rows = (torch.arange(height, device=device) + 0.5).view(1, -1, 1) / height
        columns = (torch.arange(width, device=device) + 0.5).view(1, 1, -1) / width
        for _ in range(c.holes if c.erase and c.erase_area else 0):
            area = torch.rand(count, device=device) * c.erase_area
            aspect = 3 ** _either_way(count, device)
            tall, wide = (area * aspect).sqrt().clamp_max(1), (area / aspect).sqrt().clamp_max(1)
            top, left = (
                torch.rand(count, device=device) * (1 - tall),
                torch.rand(count, device=device) * (1 - wide),
            )
            inside = _between(rows, top, tall) & _between(columns, left, wide)
            inside &= (torch.rand(count, device=device) < c.erase).view(-1, 1, 1)
            colour = 2 * torch.rand(count, 3, 1, 1, device=device) - 1
            images = torch.where(inside[:, None], colour, images)
        return images


def _smoothed(images: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(images, 3, 1, 1, count_include_pad=False)


def _either_way(count: int, device: torch.device) -> torch.Tensor:
    """Uniform in -1..1, one for each image."""
    return 2 * torch.rand(count, device=device) - 1


def _between(places: torch.Tensor, start: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    start, length = start.view(-1, 1, 1), length.view(-1, 1, 1)
    return (places >= start) & (places < start + length)


def _hue_matrices(angles: torch.Tensor) -> torch.Tensor:
    """Rotations of the RGB cube around its grey diagonal (Rodrigues' formula), `[B, 3, 3]`."""
    axis = 1 / math.sqrt(3)
    cross = axis * torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]], device=angles.device)
    cos, sin = angles.cos().view(-1, 1, 1), angles.sin().view(-1, 1, 1)
    return cos * torch.eye(3, device=angles.device) + (1 - cos) / 3 + sin * cross
