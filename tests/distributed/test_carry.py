"""Perturbations that are kept, in two processes: where each image stays with its rank, they are those of one process."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ikd_fast import OnlineDIFGSM
from ikd_fast.attack.memory import View
from ikd_fast.distill import StepBatch
from ikd_fast.kernels.reference.philox import Stream, draw
from ikd_fast.mmdet.samples import to_targets
from tests.distributed import work
from tests.mmdet.detectors import batch, distiller, small

from mmengine.dist import get_dist_info

pytestmark = pytest.mark.distributed

IDS = list(range(8))
EPOCHS = 4
SIDE = 24


def waves(images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """An objective [N] whose gradient at a pixel is that pixel's alone: the same bits in any batch."""
    return (images * 7 + targets[:, None, None, None]).sin().flatten(1).sum(1)


def view_of(image_id: int, epoch: int) -> tuple[View, tuple[int, int, int, int], bool]:
    """Crop and flip of this image in this epoch."""
    a, b, c, d = draw(5, image_id, epoch, Stream.CROP)
    x0, y0 = int(4 * a), int(4 * b)
    window = (x0, y0, x0 + 16 + int(4 * c), y0 + 18)
    return View.identity((SIDE, SIDE)).crop(window).flip(d < 0.5), window, d < 0.5


def pixels(image_id: int) -> torch.Tensor:
    return torch.rand(3, SIDE, SIDE, generator=torch.Generator().manual_seed(image_id))


def batches(ids: list[int], size: int, epoch: int) -> list[list[int]]:
    """Other partners in every epoch."""
    order = sorted(ids, key=lambda i: draw(1, i, epoch, Stream.ORDER)[0])
    return [order[k : k + size] for k in range(0, len(order), size)]


def visit(attack: OnlineDIFGSM, part: list[int], epoch: int) -> None:
    """Attack a batch of these images, each in its own crop and flip."""
    images, views = torch.zeros(len(part), 3, SIDE, SIDE), []
    for k, i in enumerate(part):
        view, (x0, y0, x1, y1), flip = view_of(i, epoch)
        image = pixels(i)[:, y0:y1, x0:x1]
        images[k, :, : view.size[0], : view.size[1]] = image.flip(-1) if flip else image
        views.append(view)
    attack(
        lambda x: x, images, torch.tensor(part).float(), image_ids=part, epoch=epoch, sizes=[v.size for v in views], views=views
    )  # fmt: skip


def carried(ids: list[int], size: int, **attack) -> dict[int, tuple[bytes, int, bytes | None]]:
    """What is kept of this rank's images after all epochs: packed perturbation, visits, velocity."""
    attack = OnlineDIFGSM(
        "carry", value_range=(0, 1), objective=lambda images, b: waves(images[0], b.targets), **attack
    )
    mine = work.mine(ids)
    for epoch in range(EPOCHS):
        for part in batches(mine, size, epoch):
            visit(attack, part, epoch)
    return records(attack.memory, mine)


def records(memory, ids):
    found = [memory.store.get(int(i), torch.device("cpu")) for i in ids]
    return {
        i: (r.delta.numpy().tobytes(), r.visits, None if r.velocity is None else r.velocity.numpy().tobytes())
        for i, r in zip(ids, found, strict=True)
    }


@pytest.mark.parametrize(
    "attack",
    [
        {},
        dict(memory=dict(stride=2)),
        dict(momentum=0.9),
        dict(refresh=2),
        dict(fraction=0.5),
        dict(memory=dict(bits=2)),
    ],
    ids=lambda a: " ".join(a) or "plain",
)
def test_what_is_kept_does_not_depend_on_ranks_or_partners(pair, attack):
    """Image i is of rank i % 2 in every epoch. Bit for bit, whatever the batches."""
    two = {i: record for rank in pair.run(carried, IDS, 2, **attack) for i, record in rank.items()}
    whole, singles = carried(IDS, 8, **attack), carried(IDS, 1, **attack)
    assert sorted(two) == IDS
    assert two == whole == singles
    assert len({delta for delta, _, _ in whole.values()}) == len(IDS)
    if "fraction" not in attack:
        assert {visits for _, visits, _ in whole.values()} == {min(EPOCHS, attack.get("refresh", EPOCHS))}


def detector(name: str):
    levels = [0, 1, 2, 3] if name == "faster_rcnn" else None
    flips = dict(type="AdaptiveFreqAug", crop_prob=0.0, noise_prob=0.0, hflip_prob=0.5)
    adv = dict(
        beta=1e-5,
        attack=dict(type="OnlineDIFGSM", mode="carry"),
        loss=dict(type="AdvFeatureLoss", levels=levels),
    )
    return distiller(small(name), small(name), levels, augment=flips, adv=adv)


def of_a_detector(name: str, ids: list[int]) -> dict[int, np.ndarray]:
    """The codes that are kept of this rank's images after three visits, one batch an epoch."""
    model, mine = detector(name), work.mine(ids)
    memory = model.ikd.attack.memory
    flips = set()
    for epoch in range(3):
        model.set_progress(epoch, epoch)
        data = batch(model, mine)
        targets = to_targets(data["data_samples"])
        keys = data["image_keys"]
        sizes = [t["size"] for t in targets]
        flips |= {view.scale[1] < 0 for view in data["views"]}
        model.ikd.craft(
            StepBatch(data["inputs"], data["geo"], targets, sizes, keys, epoch, epoch, views=data["views"])
        )
    assert flips == {True, False}
    kept = [memory.store.get(int(key), torch.device("cpu")) for key in keys]
    return {i: memory.codes.unpack(r.delta, (3, *r.size)).numpy() for i, r in zip(mine, kept, strict=True)}


@pytest.mark.parametrize("name", ["fcos", "faster_rcnn"])
def test_of_detectors_too(pair, name):
    """Bit for bit in the same batches. Among other partners a convolution may add in another order, and FCOS divides by another number
    of positives, which turns the sign of a gradient of nearly 0; other draws would turn a third of the pixels."""
    assert get_dist_info() == (0, 1)
    ids = IDS[:4]
    two = {i: codes for rank in pair.run(of_a_detector, name, ids) for i, codes in rank.items()}
    halves = of_a_detector(name, ids[0::2]) | of_a_detector(name, ids[1::2])
    whole = of_a_detector(name, ids)
    assert sorted(two) == sorted(halves) == sorted(whole) == ids
    for i, codes in two.items():
        assert np.array_equal(codes, halves[i]), i
        assert (codes != whole[i]).mean() < 0.02, i
        assert len(np.unique(codes)) > 3
