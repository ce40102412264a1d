"""output="torch": images, targets and plans of loops in plain PyTorch, against the core's own augmentation of cv2's images."""

from __future__ import annotations

import sys

import cv2
import numpy as np
import pytest
import torch

pytest.importorskip("nvidia.dali", reason="needs NVIDIA DALI: pip install 'ikd_fast[dali]'")

from ikd_fast.augment import AdaptiveFreqAug, AugPlan, Branch
from ikd_fast.dali import CocoImages, DALIDetLoader, KeyedShardSampler, steps
from ikd_fast.dali.coco import keep_ratio_size
from ikd_fast.kernels import augment_batch
from ikd_fast.order import image_key
from tests.dali.made import IMAGES, size_of, write_set

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
RESIZE = (90, 60)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("plain"))


def loader(
    root,
    workers: int = 0,
    shard: tuple[int, int] = (0, 1),
    augment=None,
    masks=False,
    sampler=None,
    **options,
):
    images = CocoImages(
        root / "ann.json", root / "images", resize=RESIZE, augment=augment, masks=masks, min_size=1
    )
    sampler_options = dict(seed=3, shard_id=shard[0], num_shards=shard[1])
    batches = KeyedShardSampler(images, 4, **sampler_options | (sampler or {}))
    settings = dict(device="cpu", threads=1) | options
    return DALIDetLoader(images, output="torch", batch_sampler=batches, num_workers=workers, **settings)


def ids(batches) -> list[int]:
    return [target["image_id"] for _, targets, _ in batches for target in targets]


def adaptive(**changes) -> AdaptiveFreqAug:
    return AdaptiveFreqAug(**dict(area_threshold=500, noise_prob=0.6, hflip_prob=0.5, seed=4) | changes)


def resized(root, i: int) -> np.ndarray:
    """uint8 HWC RGB as mmdet's Resize makes it."""
    image = cv2.imread(str(root / "images" / f"{i}.jpg"))[..., ::-1]
    height, width = keep_ratio_size(size_of(i), RESIZE)
    return cv2.resize(np.ascontiguousarray(image), (width, height), interpolation=cv2.INTER_LINEAR)


def of_the_core(root, data: CocoImages, augment: AdaptiveFreqAug, targets: list[dict], epoch: int):
    """Plan, normalised stack and targets of the same images, by ``plan`` and ``augment_batch`` on cv2's pixels."""
    images, given, keys = [], [], []
    for target in targets:
        (record,) = [r for r in data.records if r.image_id == target["image_id"]]
        image = resized(root, record.image_id)
        height, width = image.shape[:2]
        boxes = torch.from_numpy(record.boxes) * torch.tensor([*target["scale"]] * 2)
        boxes[:, 0::2].clamp_(0, width)
        boxes[:, 1::2].clamp_(0, height)
        images.append(torch.from_numpy(image))
        given.append(
            dict(boxes=boxes, labels=torch.from_numpy(record.labels), ignore=torch.from_numpy(record.crowd))
        )
        keys.append(image_key(record.path, record.image_id))
    plan = augment.plan(
        [t["boxes"] for t in given], [i.shape[:2] for i in images], keys, epoch,
        scale=[t["scale"] for t in targets], ignore=[t["ignore"] for t in given],
    )  # fmt: skip
    stack = augment_batch(images, **plan.kernel_args(), mean=MEAN, std=STD, divisor=32)
    return plan, stack, augment.apply_to_targets(images, given, plan)


@pytest.mark.parametrize(
    ("pixels", "resizer"),
    [("augment_batch", "cv2"), ("augment_batch", "dali"), ("dali", "cv2"), ("dali", "dali")],
)
def test_plan_targets_and_pixels_are_the_cores(root, pixels: str, resizer: str) -> None:
    augment = adaptive()
    made = loader(root, augment=augment, pixels=pixels, resizer=resizer)
    branches, flips = set(), set()
    for epoch in range(2):
        made.batch_sampler.set_epoch(epoch)
        for images, targets, plan in made:
            expected_plan, stack, moved = of_the_core(root, made.dataset, augment, targets, epoch)
            assert plan == expected_plan
            for mine, theirs in zip(targets, moved, strict=True):
                assert torch.equal(mine["boxes"], theirs["boxes"])
                assert torch.equal(mine["labels"], theirs["labels"])
                assert torch.equal(mine["iscrowd"], theirs["ignore"])
                assert mine["size"] == theirs["size"]
            assert images.shape == stack.shape
            assert images.dtype == torch.float32
            levels = (images - stack).abs() * torch.tensor(STD).view(1, 3, 1, 1)
            for row, (height, width), branch in zip(levels, plan.out_sizes, plan.branch, strict=True):
                inside = row[:, :height, :width]
                branches.add(int(branch))
                if (pixels, resizer) == ("augment_batch", "cv2"):
                    assert not inside.any()
                if pixels == "dali" and branch == Branch.NOISE:
                    # Two independent draws of 20.4 levels: their absolute difference is 2 * 20.4 / sqrt(pi) = 23 in the mean,
                    # less where the clip to 0..255 holds it.
                    assert 12 < inside.mean() < 25
                else:
                    assert inside.mean() <= 2
                    # A level from the resize, one more where noise is rounded on top of it.
                    assert inside.max() <= 2.01
                assert not row[:, height:].any()
                assert not row[:, :, width:].any()
            flips.update(plan.flip.tolist())
    assert branches >= {Branch.CROP, Branch.NOISE}
    assert flips == {True, False}


def test_both_ways_give_the_same_geometry(root) -> None:
    augment = adaptive(noise_prob=0)
    a, b = (list(loader(root, augment=augment, pixels=p, masks=True)) for p in ("augment_batch", "dali"))
    for (x, targets, plan), (y, others, same) in zip(a, b, strict=True):
        assert plan == same
        # The same values normalised in another order of operations; 1e-5 is some ten roundings of numbers up to 2.6.
        assert (x - y).abs().max() < 1e-5
        for target, other in zip(targets, others, strict=True):
            assert target.keys() == other.keys()
            assert all(torch.equal(target[k], other[k]) for k in ("boxes", "labels", "masks", "area"))
            assert target["masks"].shape == (len(target["boxes"]), *target["size"])


@pytest.mark.parametrize("workers", [0, 2])
def test_every_image_once_an_epoch_in_the_keyed_order(root, workers: int) -> None:
    made = loader(root, workers, augment=adaptive())
    orders = []
    for epoch in range(2):
        made.batch_sampler.set_epoch(epoch)
        batches = list(made)
        assert [len(images) for images, _, _ in batches] == [4, 4, 3]
        assert len(made) == 3
        expected = [made.dataset.records[i].image_id for batch in made.batch_sampler for i in batch]
        assert ids(batches) == expected
        assert sorted(expected) == list(range(IMAGES))
        assert all(plan.epoch == epoch for _, _, plan in batches)
        orders.append(expected)
    assert orders[0] != orders[1]


def test_workers_change_nothing(root) -> None:
    augment = adaptive()
    a, b = (list(loader(root, n, augment=augment)) for n in (0, 2))
    for (x, targets, plan), (y, others, same) in zip(a, b, strict=True):
        assert torch.equal(x, y)
        assert plan == same
        assert all(torch.equal(t["boxes"], o["boxes"]) for t, o in zip(targets, others, strict=True))


def test_two_shards_are_disjoint_and_complete(root) -> None:
    parts = [ids(loader(root, shard=(i, 2))) for i in range(2)]
    assert sorted(parts[0] + parts[1]) == list(range(IMAGES))
    assert [len(part) for part in parts] == [6, 5]
    even = [ids(loader(root, shard=(i, 2), sampler=dict(even=True))) for i in range(2)]
    assert [len(part) for part in even] == [6, 6]
    assert set(even[0] + even[1]) == set(range(IMAGES))
    assert len(ids(loader(root, sampler=dict(drop_last=True)))) == 8


@pytest.mark.parametrize("workers", [0, 1])
def test_an_epoch_goes_on_with_the_next_image(root, workers: int) -> None:
    augment = adaptive()
    whole = list(loader(root, augment=augment))
    rest = loader(root, workers, augment=augment)
    rest.batch_sampler.start_at(1)
    for (x, _, plan), (y, _, same) in zip(rest, whole[1:], strict=True):
        assert torch.equal(x, y)
        assert plan == same


@pytest.mark.parametrize("pixels", ["augment_batch", "dali"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_numbers_of_the_stack(root, dtype: torch.dtype, pixels: str) -> None:
    settings = dict(mean=(0.0, 0.0, 0.0), std=(1.0, 2.0, 4.0), divisor=64, dtype=dtype, pixels=pixels)
    images, targets, plan = next(iter(loader(root, channel_order="bgr", **settings)))
    assert images.dtype == dtype
    assert images.shape[2] % 64 == images.shape[3] % 64 == 0
    for image, target in zip(images, targets, strict=True):
        expected = torch.from_numpy(resized(root, target["image_id"])[..., ::-1].copy()).permute(2, 0, 1) / torch.tensor(
            [1.0, 2, 4]
        ).view(3, 1, 1)  # fmt: skip
        height, width = target["size"]
        # A grey level of the resize and half a unit in the last place of values up to 255: half a level in bfloat16.
        assert (image[:, :height, :width].float() - expected).abs().max() <= 2
    assert isinstance(plan, AugPlan)


def test_images_stay_valid_while_the_loader_goes_on(root) -> None:
    """Outputs are DALI's own memory; it may not be written again while somebody holds it."""
    held = [(images, images.clone()) for images, _, _ in loader(root, pixels="dali", prefetch=1)]
    assert len(held) == 3
    assert all(torch.equal(a, b) for a, b in held)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(device="tpu"), "device must be 'cpu', 'gpu' or None, got 'tpu'"),
        (dict(on_error="ignore"), "on_error must be one of 'raise', 'skip', got 'ignore'"),
        (dict(channel_order="gbr"), "channel_order must be one of 'bgr', 'rgb', got 'gbr'"),
        (dict(resizer="pillow"), "resizer must be one of 'cv2', 'dali', got 'pillow'"),
        (dict(device="cuda"), r"must be 'cpu', 'gpu' or None, got 'cuda' \(torch's 'cuda' is DALI's 'gpu'\)"),
        (dict(device="cpu", device_id=1), "device_id is of a GPU, got 1 for a CPU"),
        (dict(mean=1), "expected three means and three std > 0, got mean=1"),
        (dict(threads=0), "threads must be a whole number >= 1, got 0"),
        (dict(threads=1.5), "threads must be a whole number >= 1, got 1.5"),
        (dict(prefetch=True), "prefetch must be a whole number >= 1, got True"),
        (dict(pixels="numpy"), "pixels must be one of 'augment_batch', 'dali', got 'numpy'"),
        (dict(collate_fn=list), "makes its batches itself: leave collate_fn out"),
    ],
)
def test_settings_that_cannot_be(root, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loader(root, **options)


def test_outputs_and_data_sets_that_do_not_fit(root) -> None:
    images = CocoImages(root / "ann.json", root / "images")
    with pytest.raises(ValueError, match="output must be 'mmdet' or 'torch', got 'numpy'"):
        DALIDetLoader(images, output="numpy")
    with pytest.raises(TypeError, match=r"output='torch'\) expects ikd_fast.dali.CocoImages, got list"):
        DALIDetLoader([1], output="torch")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (dict(batch_size=2, shuffle=True), "got batch_size=2, shuffle=True"),
        ({}, "got none"),
        (dict(sampler=[0]), "got sampler"),
    ],
)
def test_the_order_is_asked_for(root, settings: dict, told: str) -> None:
    images = CocoImages(root / "ann.json", root / "images")
    with pytest.raises(
        ValueError, match=rf"batch_sampler=ikd_fast.dali.KeyedShardSampler\(images, batch_size\); {told}"
    ):
        DALIDetLoader(images, output="torch", device="cpu", **settings)


def test_names_that_are_misspelt(root) -> None:
    with pytest.raises(TypeError, match="has no setting 'thread' here.*Did you mean 'threads'"):
        loader(root, thread=2)
    with pytest.raises(TypeError, match="has no setting 'num_worker' here.*Did you mean 'num_workers'"):
        loader(root, num_worker=2)


def test_a_failure_of_the_machine_is_no_files(root, monkeypatch) -> None:
    """No file is blamed, nothing is tried for ever; what could be made before it comes first."""
    whole, calls = steps.run, []

    def tired(*given):
        calls.append(1)
        if len(calls) > 4:
            raise MemoryError("no more")
        return whole(*given)

    monkeypatch.setattr(steps, "run", tired)
    seen = []

    def read() -> None:
        for images, _, _ in loader(root, on_error="skip", prefetch=1):
            seen.append(len(images))

    with pytest.raises(RuntimeError, match="MemoryError: no more"):
        read()
    assert seen == [4]
    assert len(calls) < 30


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is at hand")
def test_a_gpu_where_there_is_none(root) -> None:
    with pytest.raises(ValueError, match="torch sees no CUDA device; write device='cpu'"):
        loader(root, device="gpu")
    assert loader(root, device=None).device == "cpu"


def test_cv2_is_for_a_cpus_images(root, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="resizer='cv2' works on a CPU's images.*on a GPU expected 'dali'"):
        loader(root, device="gpu", device_id=0, resizer="cv2")
    assert loader(root, device="gpu", device_id=0).resizer == "dali"
    assert loader(root, device="cpu").resizer == "cv2"


def test_without_cv2_an_error_names_the_package_and_the_way_round(root, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ImportError, match="needs OpenCV.*opencv-python-headless, or write resizer='dali'"):
        loader(root)
    assert sum(len(images) for images, _, _ in loader(root, resizer="dali")) == IMAGES
