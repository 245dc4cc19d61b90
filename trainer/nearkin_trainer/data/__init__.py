"""Images with classes: reading the three layouts, holding the pixels, and changing them for training."""

from nearkin_trainer.data.augment import Augment, AugmentConfig
from nearkin_trainer.data.images import ImageSource, open_images, to_floats
from nearkin_trainer.data.read import read_data
from nearkin_trainer.data.values import DataSet, ImageList

__all__ = [
    "Augment",
    "AugmentConfig",
    "DataSet",
    "ImageList",
    "ImageSource",
    "open_images",
    "read_data",
    "to_floats",
]
