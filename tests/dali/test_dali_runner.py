"""DALIDetLoader as ``train_dataloader`` of mmengine's Runner: order, shards, resuming, and what it refuses."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

pytest.importorskip("nvidia.dali", reason="needs NVIDIA DALI: pip install 'ikd_fast[dali]'")
pytest.importorskip("mmengine", reason="needs the mmdet extra: pip install 'ikd_fast[mmdet]'")

import ikd_fast.mmdet  # noqa: F401  (before anything imports mmdet)
from ikd_fast.augment import AdaptiveFreqAug, Branch
from ikd_fast.dali import DALIDetLoader
from ikd_fast.mmdet import sampler as samplers
from ikd_fast.mmdet.samples import image_key
from tests.dali.made import IMAGES, dataset, write_set
from tests.distributed.test_resume import assert_bitwise, train
from tests.mmdet.conftest import stock_config, with_ikd

from mmdet.registry import DATASETS
from mmengine.config import Config
from mmengine.runner import Runner

RESIZE = dict(type="Resize", scale=(90, 60), keep_ratio=True)
ADAPTIVE = dict(type="AdaptiveFreqAug", area_threshold=500, noise_prob=0.6, hflip_prob=0.5, seed=4)
FLIP = dict(type="RandomFlip", prob=0.5)
DALI = dict(type="DALIDetLoader", device="cpu", threads=1)


@pytest.fixture(autouse=True)
def _quick(monkeypatch) -> None:
    """mmengine lays every config out with yapf, and waits two seconds at each end of a finite loader."""
    monkeypatch.setattr("mmengine.config.config.FormatCode", lambda text, **_: (text, True))
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(0 if seconds == 2 else seconds))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("runner"))


def build(root, transforms=(RESIZE,), workers=0, masks=False, **changes):
    config = dict(
        batch_size=4, num_workers=workers, dataset=dataset(root, list(transforms), masks),
        sampler=dict(type="KeyedSampler", seed=1),
    ) | DALI | changes  # fmt: skip
    return Runner.build_dataloader(Config(config), seed=0)


def epoch_of(loader, epoch: int) -> list[dict]:
    loader.batch_sampler.sampler.set_epoch(epoch)
    return list(loader)


def ids(batches) -> list[int]:
    return [sample.img_id for batch in batches for sample in batch["data_samples"]]


def test_branch_window_flip_boxes_and_noise_are_the_cores_plan(root) -> None:
    loader = build(root, [RESIZE, ADAPTIVE])
    plain = DATASETS.build(dataset(root, [RESIZE]))
    augment = AdaptiveFreqAug(**{k: v for k, v in ADAPTIVE.items() if k != "type"})
    branches, flips = set(), set()
    for epoch in range(2):
        for batch in epoch_of(loader, epoch):
            for image, sample in zip(batch["inputs"], batch["data_samples"], strict=True):
                item = plain[sample.img_id]
                before = item["data_samples"]
                boxes, size = before.gt_instances.bboxes.tensor, before.img_shape
                key = image_key(before.metainfo)
                plan = augment.plan([boxes], [size], [key], epoch, scale=[before.scale_factor])
                target = dict(boxes=boxes, labels=before.gt_instances.labels)
                (expected,), (moved,) = augment.apply([item["inputs"]], [target], plan)
                assert torch.equal(sample.gt_instances.bboxes.tensor, moved["boxes"])
                assert torch.equal(sample.gt_instances.labels, moved["labels"])
                assert sample.img_shape == plan.out_sizes[0] == tuple(image.shape[1:])
                flip = sample.metainfo.get("flip", False)
                assert flip == bool(plan.flip[0])
                x0, y0, x1, y1 = plan.window[0].tolist()
                sx, sy = before.scale_factor
                mirrored = np.array([[-1, 0, x1], [0, 1, -y0], [0, 0, 1]])
                upright = np.array([[1, 0, -x0], [0, 1, -y0], [0, 0, 1]])
                here = (mirrored if flip else upright) @ np.diag([sx, sy, 1])
                # The matrix is float32.
                np.testing.assert_allclose(sample.homography_matrix, here, rtol=1e-5, atol=1e-4)
                assert torch.equal(image, expected)
                branches.add(int(plan.branch[0]))
                flips.add(flip)
    assert branches >= {int(Branch.CROP), int(Branch.NOISE)}
    assert flips == {True, False}


@pytest.mark.parametrize("workers", [0, 2])
def test_every_image_once_an_epoch_in_the_keyed_order(root, workers: int) -> None:
    loader = build(root, workers=workers)
    for epoch in range(2):
        batches = epoch_of(loader, epoch)
        assert [len(b["inputs"]) for b in batches] == [4, 4, 3]
        assert ids(batches) == samplers.keyed_order(IMAGES, epoch, 1).tolist()


def test_workers_change_nothing(root) -> None:
    transforms = [RESIZE, dict(type="RandomCrop", crop_size=(40, 40)), FLIP, ADAPTIVE]
    a, b = (epoch_of(build(root, transforms, workers, masks=True), 1) for workers in (0, 2))
    for x, y in zip(a, b, strict=True):
        assert all(torch.equal(i, j) for i, j in zip(x["inputs"], y["inputs"], strict=True))
        for s, t in zip(x["data_samples"], y["data_samples"], strict=True):
            assert torch.equal(s.gt_instances.bboxes.tensor, t.gt_instances.bboxes.tensor)
            assert np.array_equal(s.gt_instances.masks.masks, t.gt_instances.masks.masks)
            assert s.gt_instances.masks.masks.shape[1:] == s.img_shape


def test_two_ranks_have_disjoint_and_complete_parts(root, monkeypatch) -> None:
    parts = []
    for rank in range(2):
        monkeypatch.setattr(samplers, "get_dist_info", lambda rank=rank: (rank, 2))
        parts.append(ids(epoch_of(build(root), 3)))
    assert [len(part) for part in parts] == [6, 6]
    # 11 images on two ranks: the epoch's first comes a second time.
    merged = [i for row in zip(*parts, strict=True) for i in row]
    assert merged[:IMAGES] == samplers.keyed_order(IMAGES, 3, 1).tolist()
    assert merged[IMAGES] == merged[0]


def test_other_samplers_and_settings_of_the_dict(root) -> None:
    whole = build(root, sampler=dict(type="DefaultSampler", shuffle=False), drop_last=True)
    assert ids(list(whole)) == list(range(8))
    grouped = build(root, batch_sampler=dict(type="AspectRatioBatchSampler"))
    assert sorted(ids(list(grouped))) == list(range(IMAGES))
    assert isinstance(grouped, DALIDetLoader)
    settings = build(
        root, prefetch=3, on_error="skip", channel_order="rgb", workers=1, persistent_workers=True
    )
    assert (settings.ahead, settings.on_error, settings.channel_order) == (3, "skip", "rgb")
    assert settings.persistent_workers
    bgr, rgb = (next(iter(build(root, channel_order=order)))["inputs"][0] for order in ("bgr", "rgb"))
    assert torch.equal(bgr.flip(0), rgb)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(output="torch"), ValueError, r"DALIDetLoader\(output='torch'\) is for loops of your own; expected 'mmdet'"),
        (dict(collate_fn=dict(type="pseudo_collate")), ValueError, "makes its batches itself; leave collate_fn out"),
        (dict(device="tpu"), ValueError, "device must be 'cpu', 'gpu' or None, got 'tpu'"),
        (dict(on_error="stop"), ValueError, "on_error must be one of 'raise', 'skip', got 'stop'"),
        (dict(resizer="pil"), ValueError, "resizer must be one of 'cv2', 'dali', got 'pil'"),
        (dict(threads="2"), ValueError, "threads must be a whole number >= 1, got '2'"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be(root, change: dict, error, message: str) -> None:
    with pytest.raises(error, match=message):
        list(build(root, **change))


def run_config(root, *, workers=0, loop="epoch", transforms=(FLIP, ADAPTIVE), **changes):
    config = with_ikd(stock_config(root, batch_size=4), **dict(augment=None) | changes)
    config["train_dataloader"] = DALI | dict(
        batch_size=4, num_workers=workers, persistent_workers=workers > 0, sampler=dict(type="KeyedSampler"),
        dataset=dataset(root, [RESIZE, *transforms]),
    )  # fmt: skip
    if loop == "iter":
        config["train_cfg"] = dict(type="IterBasedTrainLoop", max_iters=6, val_interval=1000)
        config["train_dataloader"]["sampler"]["infinite"] = True
    config["default_hooks"]["checkpoint"] = dict(type="CheckpointHook", by_epoch=False, interval=2)
    return config | dict(val_dataloader=None, val_evaluator=None, val_cfg=None)


def test_a_batch_sampler_that_does_not_say_its_size(root) -> None:
    data = DATASETS.build(dataset(root, [RESIZE]))
    with pytest.raises(
        ValueError, match="list does not say its batch_size, and DALI has to know the largest"
    ):
        list(DALIDetLoader(data, batch_sampler=[[0, 1], [2]], device="cpu"))


CASES = {
    "epoch": {},
    "epoch, 2 workers": dict(workers=2),
    "iter, infinite, 2 workers": dict(loop="iter", workers=2),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_run_stopped_inside_an_epoch_goes_on_with_the_next_image(root, tmp_path, case: str) -> None:
    """11 images, batches of 4: three iterations an epoch. Stopped in iteration 5, resumed from the checkpoint of 4, all bits equal."""
    config = run_config(root, **CASES[case])
    _, seen, logs = train(config, tmp_path / "full")
    assert len(seen) == 6
    if case.startswith("epoch"):
        for rows in (seen[:3], seen[3:]):
            assert sorted(i for row in rows for i in row[2]) == list(range(IMAGES))
    train(config, tmp_path / "cut", stop=5)
    _, seen_2, logs_2 = train(config, tmp_path / "cut", resume=True)
    assert seen_2 == seen[4:]
    assert logs_2 == logs[4:]
    a, b = (torch.load(tmp_path / name / "iter_6.pth", weights_only=True) for name in ("full", "cut"))
    for part in ("state_dict", "optimizer", "ikd_sampler"):
        assert_bitwise(a[part], b[part])


def test_augmenting_in_the_loader_and_in_the_model_is_an_error(root, tmp_path) -> None:
    config = run_config(root, augment=dict(type="AdaptiveFreqAug"))
    with pytest.raises(ValueError, match="images would be augmented twice"):
        train(config, tmp_path)


def test_a_batch_augment_counts_as_the_models(root, tmp_path) -> None:
    config = run_config(root)
    norm = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375])
    student = config["model"]["student"] if "student" in config["model"] else config["model"]
    student["data_preprocessor"] = student["data_preprocessor"] | dict(
        batch_augments=[dict(type="AdaptiveFreqAug", **norm)]
    )
    with pytest.raises(ValueError, match="images would be augmented twice"):
        train(config, tmp_path)


def test_the_type_in_other_letters(root) -> None:
    with pytest.raises(ValueError, match="a loader's type is 'DaliDetLoader': did you mean 'DALIDetLoader'"):
        build(root, type="DaliDetLoader")


def test_the_model_may_augment_what_dali_gives(root, tmp_path) -> None:
    config = run_config(root, transforms=(FLIP,), augment=dict(type="AdaptiveFreqAug"))
    config["train_cfg"]["max_epochs"] = 1
    _, seen, logs = train(config, tmp_path)
    assert len(seen) == 3
    assert all(np.isfinite(list(row.values())).all() for row in logs)
