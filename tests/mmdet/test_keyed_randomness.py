"""KeyedRandomness: draws of numpy, random and torch by image and epoch, and generators left as they were."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from ikd_fast.mmdet import KeyedRandomness
from ikd_fast.mmdet.hooks import _transforms


class Draw:
    def __call__(self, results):
        results["drawn"] = (random.random(), float(np.random.rand()), float(torch.rand(())))  # noqa: NPY002
        return results


class Fail:
    def __call__(self, results):
        np.random.rand()  # noqa: NPY002
        raise RuntimeError("a broken image")


def drawn(transform, image_id, epoch):
    transform.set_epoch(epoch)
    return transform(dict(img_id=image_id, img_path="set/a.png"))["drawn"]


def test_draws_are_of_seed_image_and_epoch_alone():
    a, b = KeyedRandomness([Draw()], seed=3), KeyedRandomness([Draw()], seed=3)
    first = drawn(a, 1, 0)
    others = [drawn(a, 2, 0), drawn(a, 1, 1), drawn(KeyedRandomness([Draw()], seed=4), 1, 0)]
    np.random.rand()  # noqa: NPY002
    assert drawn(b, 1, 0) == first == drawn(a, 1, 0)
    values = [x for row in (first, *others) for x in row]
    assert len(set(values)) == len(values)


@pytest.mark.parametrize("inner", [Draw, Fail])
def test_generators_are_put_back(inner):
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    transform = KeyedRandomness([inner()])
    transform.set_epoch(0)
    if inner is Fail:
        with pytest.raises(RuntimeError, match="a broken image"):
            transform(dict(img_id=1))
    else:
        transform(dict(img_id=1))
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # noqa: NPY002


def test_keyed_transforms_inside_are_found_in_any_nesting():
    """Also below mmcv's wrappers, which keep a Compose instead of a list."""
    crop = dict(type="KeyedRandomCrop", size=8)
    outer = KeyedRandomness(
        [dict(type="RandomApply", transforms=[crop]), dict(type="RandomChoice", transforms=[[crop], [crop]])]
    )
    found = list(_transforms(type("D", (), dict(pipeline=[outer]))()))
    assert [type(t).__name__ for t in found] == ["KeyedRandomness"] + ["KeyedRandomCrop"] * 3


def test_errors_name_the_remedy():
    with pytest.raises(
        TypeError, match=r"write dict\(type='KeyedRandomness', transforms=\[...\]\), got dict"
    ):
        KeyedRandomness(dict(type="RandomFlip"))
    with pytest.raises(
        RuntimeError, match="KeyedRandomness draws keyed numbers and nobody has told it the epoch"
    ):
        KeyedRandomness([Draw()])(dict(img_id=1))
