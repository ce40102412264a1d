"""Loader transforms for mmdet pipelines whose draws are a function of the image and the epoch."""

from ikd_fast.mmdet.transforms.keyed_crop import CropDraw, KeyedRandomCrop
from ikd_fast.mmdet.transforms.keyed_randomness import KeyedRandomness
from ikd_fast.mmdet.transforms.load_adversarial import LoadAdversarialImage

__all__ = ["CropDraw", "KeyedRandomCrop", "KeyedRandomness", "LoadAdversarialImage"]
