"""What a loader gives is a function of image and epoch, for any number of workers."""

from __future__ import annotations

import pytest

from ikd_fast.mmdet.sampler import keyed_order
from tests.mmdet.conftest import IMAGES, stock_config

from mmdet.registry import DATASETS
from mmengine.config import Config
from mmengine.runner import Runner

pytestmark = pytest.mark.distributed

RANDOM = [dict(type="RandomFlip", prob=0.5), dict(type="CutOut", n_holes=(1, 4), cutout_shape=(12, 12))]
KEYED = [dict(type="KeyedRandomness", transforms=RANDOM, seed=1), dict(type="AdaptiveFreqAug")]


def train_loader(root, *, workers, sampler, extra, seed=0):
    config = stock_config(root, batch_size=5, pipeline_extra=extra)["train_dataloader"]
    config |= dict(num_workers=workers, persistent_workers=workers > 0, sampler=sampler)
    return Runner.build_dataloader(Config(config), seed=seed)


def rows(batch):
    return [
        (s.img_id, float(x.sum()), x.shape)
        for x, s in zip(batch["inputs"], batch["data_samples"], strict=True)
    ]


def two_epochs(loader):
    from ikd_fast.mmdet.hooks import _transforms

    seen = []
    for epoch in range(2):
        for transform in _transforms(loader.dataset):
            transform.set_epoch(epoch)
        loader.sampler.set_epoch(epoch)
        seen.append([row for batch in loader for row in rows(batch)])
    return seen


@pytest.mark.parametrize("kind", ["DefaultSampler", "KeyedSampler"])
def test_keyed_randomness_does_not_depend_on_the_workers(coco_root, kind):
    given = [
        two_epochs(train_loader(coco_root, workers=n, sampler=dict(type=kind, shuffle=True), extra=KEYED))
        for n in (0, 1, 2)
    ]
    assert given[0] == given[1] == given[2]
    first, second = (sorted(epoch) for epoch in given[0])
    assert [i for i, *_ in first] == [i for i, *_ in second] == list(range(IMAGES))
    assert sum(a != b for a, b in zip(first, second, strict=True)) > IMAGES / 2


class DropSome:
    """Half of the images make the data set look for another, as a failing filter does."""

    def __call__(self, results):
        return None if results["img_id"] % 2 else results


def test_substitutes_for_dropped_images_do_not_depend_on_the_workers(coco_root):
    given = []
    for workers in (0, 1, 2):
        loader = train_loader(coco_root, workers=workers, sampler=dict(type="KeyedSampler"), extra=RANDOM)
        loader.dataset.pipeline.transforms.insert(2, DropSome())
        given.append(two_epochs(loader))
    assert given[0] == given[1] == given[2]
    assert all(i % 2 == 0 for epoch in given[0] for i, *_ in epoch)


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_at_the_border_of_a_pass_have_their_own_epoch(coco_root, workers):
    """Batches of 5 of 12 images, without an end; workers are up to four batches ahead, and nobody sets the epoch anew."""
    loader = train_loader(
        coco_root,
        workers=workers,
        sampler=dict(type="KeyedSampler", infinite=True),
        extra=[dict(type="AdaptiveFreqAug")],
    )
    stream = iter(loader)
    seen = [row for _ in range(8) for row in rows(next(stream))]
    dataset = DATASETS.build(
        stock_config(coco_root, pipeline_extra=[dict(type="AdaptiveFreqAug")])["train_dataloader"]["dataset"]
    )
    (augment,) = [t for t in dataset.pipeline.transforms if hasattr(t, "set_epoch")]
    expected = []
    for epoch in range(4):
        augment.set_epoch(epoch)
        for i in keyed_order(IMAGES, epoch, 0).tolist():
            item = dataset[i]
            expected.append((item["data_samples"].img_id, float(item["inputs"].sum()), item["inputs"].shape))
    assert seen == expected[:40]
    assert len({row[1] for row in expected if row[0] == seen[0][0]}) > 1
