"""``_base_/dali_loader.py`` over every paper-scale config and the demo's: what it changes, and that DALI's graph can follow the pipeline.

Needs no DALI: the pipeline is translated and run without pixels.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

pytest.importorskip("mmengine", reason="needs the mmdet extra: pip install 'ikd_fast[mmdet]'")

from ikd_fast.dali.steps import run, table
from ikd_fast.mmdet import LoadAdversarialImage
from ikd_fast.mmdet.dali.build import is_dali
from ikd_fast.mmdet.dali.host_transforms import RECORD, host_transforms
from ikd_fast.mmdet.dali.source import prepare
from tests.configs.reduced import HOME, IKD, load

from mmdet.registry import DATASETS, TRANSFORMS
from mmdet.utils import register_all_modules
from mmengine.config import Config, ConfigDict
from mmengine.dataset import Compose

pytestmark = pytest.mark.configs
FRAGMENT = HOME / "_base_" / "dali_loader.py"
STORED = "demo/fgd_ikd_offline"
"""Reads a second image, which the loader refuses."""
MIXING = "retinanet_x101-64x4d_r50_fgd_copypaste_noflip_2x_coco"
DEMO = [path.stem for path in sorted((HOME / "demo").glob("*.py"))]
NAMES = [*(f"ikd/{name}" for name in IKD), *(f"demo/{name}" for name in DEMO)]


def with_dali(name: str, folder: Path) -> Config:
    """The two lines of the fragment's header."""
    path = folder / f"{name.replace('/', '_')}.py"
    path.write_text(
        f"_base_ = [{f'{HOME / name}.py'!r}, {str(FRAGMENT)!r}]\ntrain_dataloader = _base_.dali_loader\n"
    )
    return Config.fromfile(path)


def plain(name: str) -> Config:
    return (
        load(name.removeprefix("ikd/")) if name.startswith("ikd/") else Config.fromfile(HOME / f"{name}.py")
    )


@pytest.mark.parametrize("name", NAMES)
def test_it_adds_its_settings_and_nothing_else(name: str, tmp_path: Path) -> None:
    before, after = plain(name).to_dict(), with_dali(name, tmp_path).to_dict()
    added = after.pop("dali_loader")
    assert added == dict(type="DALIDetLoader", threads=2, prefetch=2, on_error="raise", resizer=None)
    assert is_dali(after["train_dataloader"])
    for key, value in added.items():
        assert after["train_dataloader"].pop(key) == value
    assert after == before


def test_two_bases_with_a_loader_are_refused_by_mmengine(tmp_path: Path) -> None:
    """Why the fragment has a name of its own."""
    (tmp_path / "loader.py").write_text("train_dataloader = dict(type='DALIDetLoader')\n")
    (tmp_path / "c.py").write_text(
        f"_base_ = [{str(HOME / 'ikd/retinanet_r50_2x_coco.py')!r}, './loader.py']\n"
    )
    with pytest.raises(KeyError, match="Duplicate key"):
        Config.fromfile(tmp_path / "c.py")


def dataset_of(config: Config, root: Path) -> ConfigDict:
    """The training set, pointed at a small one."""
    register_all_modules(init_default_scope=True)
    dataset = ConfigDict(config.train_dataloader.dataset)
    dataset.update(data_root=str(root), ann_file="ann.json", data_prefix=dict(img="images/"))
    if "metainfo" in dataset:
        dataset.metainfo = dict(classes=("person",))
    return dataset


def loaded(dataset, index: int) -> dict:
    """One sample; mmdet's flips draw from numpy's generator, the demo's crops are keyed."""
    np.random.seed(index)  # noqa: NPY002  (the one that mmcv's transforms read)
    random.seed(index)
    for transform in dataset.pipeline.transforms:
        if hasattr(transform, "set_epoch"):
            transform.set_epoch(0)
    return dataset.prepare_data(index)


def test_the_pipeline_without_pixels_gives_what_the_pipeline_gives(coco80_root: Path, tmp_path: Path) -> None:
    """Once for each data set that the configs have; most share theirs."""
    found: dict[str, Config] = {}
    for name in NAMES:
        if name not in (f"ikd/{MIXING}", STORED):
            cfg = with_dali(name, tmp_path)
            found.setdefault(json.dumps(cfg.train_dataloader.dataset.to_dict(), sort_keys=True), cfg)
    assert len(found) == 4  # with and without masks, without flips, the demo's crops
    for cfg in found.values():
        whole, host = (DATASETS.build(dataset_of(cfg, coco80_root)) for _ in range(2))
        prepare(host)
        for index in range(4):
            check(loaded(whole, index), loaded(host, index))


def check(a: dict, b: dict) -> None:
    """``b``, made without pixels, has the geometry of ``a`` and the file's bytes."""
    pixels = b[RECORD]
    assert bytes(pixels.encoded[1:4]) == b"PNG"
    one, two = a["data_samples"], b["data_samples"]
    made = run(cv2.imread(one.img_path), table(one.ori_shape, pixels.steps), pixels.gain)
    assert np.array_equal(made.transpose(2, 0, 1), a["inputs"].numpy())
    assert len(one.gt_instances) > 0
    assert torch.equal(one.gt_instances.bboxes.tensor, two.gt_instances.bboxes.tensor)
    assert torch.equal(one.gt_instances.labels, two.gt_instances.labels)
    assert ("masks" in one.gt_instances) == ("masks" in two.gt_instances)
    if "masks" in one.gt_instances:
        masks = (s.gt_instances.masks.to_tensor(torch.uint8, "cpu") for s in (one, two))
        assert torch.equal(*masks)
    for item in one.metainfo:
        assert np.array_equal(one.metainfo[item], two.metainfo[item]), item


def test_images_made_before_are_refused_by_name(tmp_path: Path) -> None:
    register_all_modules(init_default_scope=True)
    steps = with_dali(STORED, tmp_path).train_dataloader.dataset.pipeline
    at = [step["type"] for step in steps].index("LoadAdversarialImage")
    # The transform itself wants a set that is there.
    built = [
        LoadAdversarialImage.__new__(LoadAdversarialImage) if i == at else TRANSFORMS.build(step)
        for i, step in enumerate(steps)
    ]
    with pytest.raises(
        ValueError,
        match=rf"pipeline\[{at}\] is LoadAdversarialImage, which DALI's graph has no counterpart for",
    ):
        host_transforms(built)


def test_copy_paste_is_refused_by_name(coco80_root: Path, tmp_path: Path) -> None:
    """Its data set mixes images, and its transforms need pixels."""
    cfg = with_dali(f"ikd/{MIXING}", tmp_path)
    register_all_modules(init_default_scope=True)
    outer = ConfigDict(cfg.train_dataloader.dataset)
    outer.dataset.update(data_root=str(coco80_root), ann_file="ann.json", data_prefix=dict(img="images/"))
    with pytest.raises(TypeError, match="expects an mmdet data set.*got MultiImageMixDataset"):
        prepare(DATASETS.build(outer))
    with pytest.raises(
        ValueError, match=r"pipeline\[0\] is CopyPaste, which DALI's graph has no counterpart"
    ):
        host_transforms(Compose(outer.pipeline).transforms)
