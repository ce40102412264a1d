"""``ikd-fast preview``: pixels, shares and lost boxes against the loader's images and counts by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from tests.mmdet.conftest import IMAGES, SIDE, draw


@pytest.fixture
def loaded(configs):
    """The config's model at epoch 0 and its data set."""
    from ikd_fast.mmdet.explain import build_dataset, build_distiller
    from ikd_fast.mmdet.launch import load_config

    cfg = load_config(configs["ikd"], work_dir=None, options=[], launcher="none")
    model = build_distiller(cfg, "c.py")
    model.set_total_steps(1)
    model.set_progress(0, 0)
    return model, build_dataset(cfg, "c.py")


def test_counts_and_picture(ikd, configs, coco_root, tmp_path) -> None:
    from ikd_fast import AdaptiveFreqAug
    from ikd_fast.mmdet.samples import image_key

    result = ikd("preview", configs["ikd"], "--out", tmp_path / "deep/p.png", "--images", "3", "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    lost = noise = 0
    aug = AdaptiveFreqAug()
    for i in range(IMAGES):
        boxes = draw(i)[1]
        key = image_key(dict(img_id=i, img_path=str(coco_root / "images" / f"{i}.png")))
        plan = aug.plan([np.array(boxes)], [(SIDE, SIDE)], [key], 0)
        noise += int(plan.branch[0]) == 2
        left, top, right, bottom = plan.window[0].tolist()
        lost += sum(
            min(x1, right) <= max(x0, left) or min(y1, bottom) <= max(y0, top) for x0, y0, x1, y1 in boxes
        )
    assert found["sample"] == {
        "images": IMAGES, "epoch": 0, "crop": 0.5, "noise": noise / IMAGES, "keep": (IMAGES / 2 - noise) / IMAGES,
        "boxes": 2 * IMAGES, "boxes_lost": lost,
        "small": 3 * IMAGES // 2, "medium": IMAGES // 2, "large": 0, "changed_by": [],
    }  # fmt: skip
    assert noise > 0
    assert {row["branch"] for row in found["images"]} == {"crop", "noise", "keep"}
    for row in found["images"]:
        assert row["linf"] == pytest.approx(8, abs=1e-3)
        assert row["adversarial_class_loss"] > row["class_loss"]
    with Image.open(tmp_path / "deep/p.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 500


def test_pixels_of_each_column(loaded) -> None:
    """Kept and cropped images are the loader's pixels; noise and perturbation are what differs, within their bounds."""
    from ikd_fast.mmdet.preview import branch_rows, choose_rows
    from ikd_fast.pictures.branches import GAIN, to_uint8

    model, dataset = loaded
    rows = choose_rows(model, dataset, range(IMAGES), 3)
    seen = list(branch_rows(model, rows))
    assert [figures["branch"] for _, figures in seen] == ["crop", "noise", "keep"]
    for (row, figures), source in zip(seen, rows, strict=True):
        # The loader's BGR turned into RGB, by OpenCV's own file.
        bgr = source["inputs"].permute(1, 2, 0).numpy()
        assert np.array_equal(row.loaded, bgr[..., ::-1])
        h, w = row.clean.shape[:2]
        windows = np.lib.stride_tricks.sliding_window_view(row.loaded, (h, w, 3))[:, :, 0]
        gaps = np.abs(windows.astype(int) - to_uint8(row.geo).astype(int)).max((2, 3, 4))
        assert gaps.min() == 0  # the crop is a window of the image, pixel by pixel
        delta = row.adversarial - row.geo
        assert np.abs(delta).max() == pytest.approx(8, abs=1e-3)
        assert np.abs(to_uint8(127.5 + GAIN * delta).astype(int) - 128).max() <= 10 * 8 + 1
        noise = row.clean - row.geo
        if figures["branch"] == "noise":
            # sigma 20.4 of 255 on an image that is nowhere near black or white; 19,200 values
            assert noise.std() == pytest.approx(20.4, rel=0.05)
            assert "noise, sigma 20.4" in row.clean_title
        else:
            assert not noise.any()
        assert len(row.boxes) == figures["boxes"] - figures["boxes_lost"]
    assert "a box of 32 x 32 pixels or more" in seen[0][0].clean_title


def test_without_augmentation_and_branch(ikd, configs, tmp_path) -> None:
    out = tmp_path / "p.jpg"
    options = ["model.adv=None", "model.augment=None"]
    result = ikd(
        "preview", configs["ikd"], "--out", out, "--images", "2", "--sample", "5", "--cfg-options", *options
    )
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == f"5 of {IMAGES} training images, epoch 0, planned from their annotations"
    assert lines[1] == "  no augmentation in the model (augment=None)"
    assert lines[-1] == f"picture: {out}"
    with Image.open(out) as picture:
        assert picture.format == "JPEG"


def test_the_seed_chooses_the_images(ikd, configs, tmp_path) -> None:
    files = []
    for seed in (0, 1, 0):
        result = ikd(
            "preview", configs["ikd"], "--out", tmp_path / "p.png", "--images", "1", "--seed", seed, "--json"
        )
        files.append(json.loads(result.stdout)["images"][0]["file"])
    assert files[0] == files[2] != files[1]


def test_a_cutting_pipeline_is_named(loaded, coco_root) -> None:
    from ikd_fast.mmdet.census import census, render
    from tests.mmdet.conftest import stock_config

    from mmdet.registry import DATASETS

    model, _ = loaded
    extra = [dict(type="RandomCrop", crop_size=(64, 64))]
    dataset = DATASETS.build(stock_config(coco_root, pipeline_extra=extra)["train_dataloader"]["dataset"])
    found = census(dataset, model.data_preprocessor.augment, range(4))
    assert found["changed_by"] == ["RandomCrop"]
    plain = stock_config(coco_root)["train_dataloader"]["dataset"]
    mixed = dict(
        type="MultiImageMixDataset", dataset=plain, pipeline=[dict(type="Mosaic", img_scale=(64, 64))]
    )
    composed = census(DATASETS.build(mixed), model.data_preprocessor.augment, range(4))
    assert composed == found | {"changed_by": ["Mosaic"]}
    assert "the pipeline's RandomCrop changes which boxes an image has" in render(found, 12)
    assert "  crop     50.0%  ####################" in render(found, 12)


def test_an_image_without_boxes_and_one_with_a_crowd(loaded) -> None:
    from ikd_fast.mmdet.census import census

    class Rows:
        pipeline = None
        rows = (
            dict(instances=[], height=64, width=64, img_id=0, img_path="a/0.png"),
            dict(
                instances=[dict(bbox=[0, 0, 60, 60], ignore_flag=1), dict(bbox=[1, 1, 9, 9], ignore_flag=0)],
                height=64, width=64, img_id=1, img_path="a/1.png",
            ),
            dict(instances=[dict(bbox=[5, 5, 2, 9], ignore_flag=0)], height=64, width=64, img_id=2, img_path="a/2.png"),
        )  # fmt: skip

        def get_data_info(self, i):
            return self.rows[i]

    model, _ = loaded
    found = census(Rows(), model.data_preprocessor.augment, [0, 1])
    assert (found["crop"], found["boxes"], found["small"], found["medium"]) == (0.0, 1, 1, 0)
    with pytest.raises(ValueError, match=r"a/2\.png: "):
        census(Rows(), model.data_preprocessor.augment, [2])


def test_missing_data_is_1_and_says_where_to_point(ikd, configs, tmp_path) -> None:
    result = ikd(
        "preview", configs["ikd"], "--cfg-options", f"train_dataloader.dataset.data_root={tmp_path}/none"
    )
    assert result.exit_code == 1
    text = " ".join(result.stderr.split())
    assert "the training data is not there" in text
    assert "--cfg-options train_dataloader.dataset.data_root=FOLDER/" in text
    empty = "train_dataloader.dataset.metainfo.classes=('nothing',)"
    result = ikd(
        "preview",
        configs["ikd"],
        "--cfg-options",
        empty,
        "train_dataloader.dataset.filter_cfg.filter_empty_gt=True",
    )
    assert result.exit_code == 1
    assert "the training set has no images; check ann_file" in " ".join(result.stderr.split())
