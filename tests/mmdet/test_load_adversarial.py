"""``LoadAdversarialImage`` in mmdet's pipelines, and a distiller that trains on what it loads."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import ikd_fast.mmdet  # noqa: F401
from ikd_fast.attack.offline import Format, SetManifest
from ikd_fast.attack.offline.adversarial_set import IMAGES, file_name
from ikd_fast.mmdet import LoadAdversarialImage
from ikd_fast.mmdet.banner import attack as attack_line
from ikd_fast.mmdet.facts import attack_facts
from ikd_fast.mmdet.pipeline_checks import check_pipeline
from ikd_fast.mmdet.samples import image_key
from tests.mmdet.conftest import SIDE, draw, stock_config, with_ikd

from mmcv.transforms import BaseTransform, Compose
from mmdet.registry import DATASETS, MODELS, TRANSFORMS
from mmengine.config import Config
from mmengine.runner import Runner

EPS = 8.0
RESIZE = dict(type="Resize", scale=(80, 80), keep_ratio=True)


def moved_image(image: np.ndarray, seed: int) -> np.ndarray:
    delta = np.random.default_rng(seed).choice([-8, 8], image.shape)
    return (image.astype(int) + delta).clip(0, 255).astype(np.uint8)


def write_set(
    root: Path, directory: Path, *, size: tuple[int, int] | None, fmt: Format | None = None
) -> Path:
    """Adversarial images of the tiny set; ``size``: (w, h) that mmdet resizes to before, None: as in the file."""
    fmt = fmt or Format()
    manifest = SetManifest(
        format=fmt, attack={"mode": "single", "eps": EPS, "steps": 1, "objective": "cls"},
        teacher="abc", data="12 images", channels="rgb", images=12,
        size="original" if size is None else f"network {size}",
    )  # fmt: skip
    (directory / IMAGES).mkdir(parents=True)
    manifest.write(directory)
    for i in range(12):
        path = root / "images" / f"{i}.png"
        image = cv2.imread(str(path))
        clean = image if size is None else cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
        key = image_key(dict(img_path=str(path), img_id=i))
        moved = torch.from_numpy(moved_image(clean, i).transpose(2, 0, 1).copy()).float()
        (directory / IMAGES / file_name(key, path.name, fmt.suffix)).write_bytes(
            fmt.encode(key & (1 << 64) - 1, clean, moved, (SIDE, SIDE), EPS)
        )
    return directory


@pytest.fixture(scope="module")
def resized(coco_root, tmp_path_factory) -> Path:
    return write_set(coco_root, tmp_path_factory.mktemp("resized") / "set", size=(80, 80))


@pytest.fixture(scope="module")
def whole(coco_root, tmp_path_factory) -> Path:
    return write_set(coco_root, tmp_path_factory.mktemp("whole") / "set", size=None)


def dataset_of(root, steps):
    config = stock_config(root)["train_dataloader"]["dataset"]
    config["pipeline"] = [config["pipeline"][0], config["pipeline"][1], *steps, config["pipeline"][-1]]
    return DATASETS.build(Config(config).to_dict())


def load(directory) -> dict:
    return dict(type="LoadAdversarialImage", directory=str(directory))


@pytest.mark.parametrize("seed", range(4))
def test_both_images_go_where_mmdet_puts_one(coco_root, resized, whole, seed: int) -> None:
    """The truth: mmdet's own transforms on the adversarial image alone, with the same draws."""
    behind = [dict(type="RandomFlip", prob=0.5), dict(type="RandomCrop", crop_size=(48, 56))]
    pipelines = {
        resized: [RESIZE, load(resized), *behind],
        whole: [
            load(whole),
            dict(type="RandomResize", scale=(80, 80), ratio_range=(0.5, 1.5), keep_ratio=True),
            *behind,
        ],
    }
    for directory, steps in pipelines.items():
        at = steps.index(load(directory))
        dataset = dataset_of(coco_root, steps)
        for i in range(0, len(dataset), 5):
            np.random.seed(seed)  # noqa: NPY002  (what mmdet draws from)
            found = dataset.prepare_data(i)
            assert found["inputs"].shape[0] == 6
            info = dataset.get_data_info(i)
            results = Compose(dataset.pipeline.transforms[: 2 + at])(dict(info))
            image = results["img"]
            results["img"] = moved_image(image, info["img_id"])
            np.random.seed(seed)  # noqa: NPY002  (what mmdet draws from)
            truth = Compose(dataset.pipeline.transforms[3 + at :])(results)
            assert torch.equal(found["inputs"][3:], truth["inputs"])
            assert torch.equal(
                found["data_samples"].gt_instances.bboxes.tensor,
                truth["data_samples"].gt_instances.bboxes.tensor,
            )
            results = Compose(dataset.pipeline.transforms[: 2 + at])(dict(info))
            np.random.seed(seed)  # noqa: NPY002  (what mmdet draws from)
            clean = Compose(dataset.pipeline.transforms[3 + at :])(results)
            assert torch.equal(found["inputs"][:3], clean["inputs"])


def test_a_set_of_the_files_size_is_enlarged_as_published(coco_root, tmp_path) -> None:
    """Attacked at 80 x 80, saved at the file's 96 x 96 as JPEG, read back at 80 x 80."""
    fmt = Format("jpeg", quality=95, scale="original")
    directory = write_set(coco_root, tmp_path / "set", size=(80, 80), fmt=fmt)
    dataset = dataset_of(coco_root, [RESIZE, load(directory)])
    found = dataset.prepare_data(3)["inputs"].permute(1, 2, 0).numpy()
    small = cv2.resize(draw(3)[0], (80, 80), interpolation=cv2.INTER_LINEAR)
    file = cv2.resize(moved_image(small, 3), (SIDE, SIDE), interpolation=cv2.INTER_LINEAR)
    data = cv2.imencode(".jpg", file, [int(cv2.IMWRITE_JPEG_QUALITY), 95])[1]
    truth = cv2.resize(cv2.imdecode(data, cv2.IMREAD_COLOR), (80, 80), interpolation=cv2.INTER_LINEAR)
    assert np.array_equal(found[..., :3], small)
    assert np.array_equal(found[..., 3:], truth)


def test_packed_perturbations_are_added_to_the_image(coco_root, tmp_path) -> None:
    """In the teacher's order of channels, here RGB, on an image that mmdet reads as BGR."""
    fmt = Format("packed", step=2)
    directory = tmp_path / "set"
    SetManifest(
        fmt,
        {"mode": "single", "eps": EPS, "steps": 1, "objective": "cls"},
        "abc",
        "12 images",
        "original",
        "rgb",
        12,
    ).write(directory)
    (directory / IMAGES).mkdir()
    image = np.full((SIDE, SIDE, 3), 100, np.uint8)
    moved = torch.full((3, SIDE, SIDE), 100.0) + torch.tensor([8.0, 0.0, -4.0])[:, None, None]  # R + 8, B - 4
    path = coco_root / "images" / "3.png"
    key = image_key(dict(img_path=str(path), img_id=3)) & (1 << 64) - 1
    content = fmt.encode(key, image, moved, (SIDE, SIDE), EPS)
    (directory / IMAGES / file_name(key, "3.png", fmt.suffix)).write_bytes(content)
    found = LoadAdversarialImage(str(directory))(dict(img=image, img_path=str(path), img_id=3))
    assert found["img"][5, 7].tolist() == [100, 100, 100, 96, 100, 108]


@pytest.mark.parametrize("to_float32", [False, True])
def test_float_images_of_whole_grey_levels_do_as_well(coco_root, whole, to_float32: bool) -> None:
    reader = TRANSFORMS.build(dict(type="LoadImageFromFile", to_float32=to_float32))
    found = Compose([reader, LoadAdversarialImage(str(whole))])(
        dict(img_path=str(coco_root / "images" / "3.png"), img_id=3)
    )
    assert found["img"].dtype == (np.float32 if to_float32 else np.uint8)
    assert np.array_equal(found["img"][..., 3:], moved_image(draw(3)[0], 3))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(flip=True), "came behind a flip: write it before"),
        (
            dict(img=np.zeros((SIDE, SIDE, 6), np.uint8)),
            r"expects \[H, W, 3\], got \[96, 96, 6\]: once in a pipeline",
        ),
        (
            dict(img=np.full((SIDE, SIDE, 3), 0.5, np.float32)),
            "expects whole grey levels, got float32 of 0.5..0.5",
        ),
        (dict(img=np.zeros((SIDE, SIDE, 3), np.uint8)), "grey levels away from the image that was loaded"),
        (
            dict(img=np.zeros((40, SIDE, 3), np.uint8)),
            "made for an image of 96x96, the one that was loaded has 40x96",
        ),
    ],
)
def test_what_is_not_the_image_of_the_file(coco_root, whole, change: dict, said: str) -> None:
    results = dict(img=draw(3)[0], img_path=str(coco_root / "images" / "3.png"), img_id=3)
    with pytest.raises(ValueError, match=said) as error:
        LoadAdversarialImage(str(whole))(results | change)
    assert "3.png" in str(error.value)


def test_an_image_that_was_not_made(coco_root, whole) -> None:
    with pytest.raises(
        FileNotFoundError,
        match=r"images/3\..*\.png: 3\.png has no adversarial image in this set, which is of 12",
    ):
        LoadAdversarialImage(str(whole))(dict(img=draw(3)[0], img_path="other/3.png", img_id=3))


class _Offline:
    mode = "offline"


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ([RESIZE], r"expected one LoadAdversarialImage in the pipeline of .*pipeline\[0\], found 0"),
        ([RESIZE, "load", "load"], "found 2"),
        ([RESIZE, dict(type="RandomFlip", prob=0.5), "load"], r"pipeline\[3\] \(RandomFlip\) comes before LoadAdversarialImage"),
        ([RESIZE, "load", dict(type="PhotoMetricDistortion")], r"pipeline\[4\] \(PhotoMetricDistortion\) comes behind"),
        ([RESIZE, "load", dict(type="Pad", size_divisor=32)], r"\(Pad\) comes behind"),
        ([RESIZE, "load", dict(type="Rotate", prob=1.0)], r"\(Rotate\) comes behind"),
        ([RESIZE, dict(type="Rotate", prob=1.0), "load"], r"\(Rotate\) comes before"),
        ([RESIZE, dict(type="PhotoMetricDistortion"), "load"], r"\(PhotoMetricDistortion\) comes before"),
        ([RESIZE, "load", dict(type="AdaptiveFreqAug")], r"AdaptiveFreqAug is written augment="),
        ([RESIZE, "load", dict(type="CachedMosaic", img_scale=(80, 80))], r"\(CachedMosaic\) comes behind"),
    ],
)  # fmt: skip
def test_pipelines_that_cannot_be_right(coco_root, resized, steps: list, said: str) -> None:
    dataset = dataset_of(coco_root, [load(resized) if step == "load" else step for step in steps])
    with pytest.raises(ValueError, match=said):
        check_pipeline(dataset, _Offline())


def test_a_pipeline_that_is_right(coco_root, resized) -> None:
    check_pipeline(
        dataset_of(coco_root, [RESIZE, load(resized), dict(type="RandomFlip", prob=0.5)]), _Offline()
    )


def test_a_transform_of_ones_own_may_say_that_it_does(coco_root, resized) -> None:
    @TRANSFORMS.register_module(force=True)
    class UpsideDown(BaseTransform):
        def transform(self, results):
            return results

    dataset = dataset_of(coco_root, [RESIZE, load(resized), dict(type="UpsideDown")])
    with pytest.raises(ValueError, match="any_channels = True"):
        check_pipeline(dataset, _Offline())
    UpsideDown.any_channels = True
    check_pipeline(dataset, _Offline())


def test_a_run_with_a_part_of_the_set_does_not_begin(coco_root, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("mmengine.config.config.FormatCode", lambda text, **_: (text, True))
    directory = write_set(coco_root, tmp_path / "set", size=(80, 80))
    next((directory / IMAGES).glob("7.*")).unlink()
    runner = Runner.from_cfg(
        Config(config_of(coco_root, directory) | dict(work_dir=str(tmp_path / "run"), experiment_name="part"))
    )
    with pytest.raises(
        ValueError,
        match=r"has 11 adversarial images, 1 of the 12 training images have none, .*7\.png for one",
    ):
        runner.train()
    assert runner.iter == 0


# ---- training ----


def config_of(root, directory, **changes) -> dict:
    config = stock_config(root, epochs=2)
    pipeline = config["train_dataloader"]["dataset"]["pipeline"]
    config["train_dataloader"]["dataset"]["pipeline"] = [*pipeline[:3], load(directory), *pipeline[3:]]
    for name in ("dataloader", "evaluator", "cfg"):
        config[f"val_{name}"] = None
    return with_ikd(
        config,
        **{"adv": dict(beta=1e-5, attack=dict(type="OfflineImages")), "stop_at": dict(epoch=1), **changes},
    )


def test_a_run_distils_from_the_images(coco_root, resized, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("mmengine.config.config.FormatCode", lambda text, **_: (text, True))
    augment = dict(type="AdaptiveFreqAug", hflip_prob=0.5, noise_prob=1.0)
    runner = Runner.from_cfg(
        Config(
            config_of(coco_root, resized, augment=augment)
            | dict(work_dir=str(tmp_path), experiment_name="distils")
        )
    )
    seen: list = []
    model = runner.model
    run = model.ikd.run
    monkeypatch.setattr(model.ikd, "run", lambda batch: (seen.append(batch), run(batch))[1])
    runner.train()
    active = [batch for batch in seen if batch.active]
    assert len(seen) == 2 * len(active) > 0
    assert all(batch.adversarial is None for batch in seen if not batch.active)
    units = model.ikd.units
    for batch in active:
        gap = units.to_pixels(batch.adversarial) - units.to_pixels(batch.geo)
        for i, (h, w) in enumerate(batch.sizes):
            assert (gap[i, :, h:] == 0).all()
            assert (gap[i, :, :, w:] == 0).all()
            # 8 grey levels everywhere but where 0 or 255 stopped them.
            inside = gap[i, :, :h, :w].abs()
            assert inside.max() == pytest.approx(EPS, abs=1e-3)
            assert (inside > EPS - 1e-3).float().mean() > 0.9
    log = next(tmp_path.glob("*/*.log")).read_text()
    assert "12 png, single, eps 8, at network (80, 80) resolution" in log
    assert "They were made from another teacher (abc) than the one that is distilled" in log
    facts = attack_facts(model.ikd.attack)
    assert facts == dict(mode="offline", steps=0, objective="none", teacher_gradients=0)
    assert attack_line(facts).startswith("none in the step: adversarial images come with the data")


def distiller(root, directory, **changes):
    return MODELS.build(Config(config_of(root, directory, **changes)).model)


def test_images_and_attack_must_go_together(coco_root, resized) -> None:
    dataset = dataset_of(coco_root, [RESIZE])
    item = dataset.prepare_data(0)
    batch = dict(inputs=[item["inputs"]], data_samples=[item["data_samples"]])
    model = distiller(coco_root, resized)
    model.set_progress(0, 0)
    with pytest.raises(
        ValueError,
        match=r"OfflineImages, which takes .* 6 channels; got \[3\]: write dict\(type='LoadAdversarialImage'",
    ):
        model.data_preprocessor(batch, True)
    online = distiller(coco_root, resized, adv=dict(attack=dict(type="OnlineDIFGSM", mode="single")))
    online.set_progress(0, 0)
    six = dict(batch, inputs=[torch.cat([item["inputs"]] * 2)])
    with pytest.raises(
        ValueError, match=r"nothing takes them: write adv=dict\(attack=dict\(type='OfflineImages'\)\)"
    ):
        online.data_preprocessor(six, True)


def test_settings_that_cannot_be_meant(coco_root, resized) -> None:
    with pytest.raises(TypeError, match=r"OfflineImages has no parameter \['eps'\]"):
        distiller(coco_root, resized, adv=dict(attack=dict(type="OfflineImages", eps=4)))
    config = Config(config_of(coco_root, resized))
    config.model.student.data_preprocessor.batch_augments = [
        dict(type="BatchSyncRandomResize", random_size_range=(64, 96), interval=1, size_divisor=32)
    ]
    with pytest.raises(
        ValueError, match="batch_augments would change the clean images and not the adversarial ones"
    ):
        MODELS.build(config.model)
