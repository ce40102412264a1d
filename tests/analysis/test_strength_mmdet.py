"""A detector as a report's subject: boxes, maps, loss and AP against the drawing, the net itself and perfect detections."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("mmengine", reason="needs the mmdet extra: pip install 'ikd_fast[mmdet]'")

from tests.mmdet.conftest import IMAGES, SIDE, _mmdet_scope, coco_root, draw, retinanet, stock_config  # noqa: F401

SCALE = 80 / SIDE


def config(root, **dataset):
    from mmengine.config import Config

    cfg = stock_config(root)
    cfg["test_dataloader"]["dataset"] |= dataset
    return Config(cfg)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    import ikd_fast.mmdet  # noqa: F401
    from ikd_fast.mmdet.build import build_detector

    torch.manual_seed(0)
    net = build_detector(retinanet())
    path = tmp_path_factory.mktemp("w") / "teacher.pth"
    torch.save(dict(state_dict=net.state_dict(), meta=dict(dataset_meta=dict(classes=("box",)))), path)
    return str(path)


@pytest.fixture
def subject(coco_root, weights):  # noqa: F811
    from ikd_fast.mmdet.strength import build_subject

    return build_subject(config(coco_root), "c.py", weights, images=5, batch=2)


def test_images_are_evenly_spaced_and_boxes_are_the_drawn_ones(subject):
    assert subject.indices == [0, 2, 4, 7, 9]
    seen = []
    for batch in subject.batches():
        for i, target in enumerate(batch.targets):
            place = subject.indices[len(seen)]
            boxes = torch.tensor(draw(place)[1]) * SCALE
            # Annotations hold x, y, w, h as decimals: sums of two float32.
            assert torch.allclose(target["boxes"], boxes, atol=1e-4)
            assert target["labels"].tolist() == [0, 0]
            assert (target["size"], batch.originals[i]) == ((80, 80), (SIDE, SIDE))
            assert len(target["ignored"]) == 0
            seen.append(batch.ids[i])
    assert len(set(seen)) == 5 == sum(1 for _ in subject.batches()) * 2 - 1
    assert subject.batches_count == 3
    assert subject.rgb


@pytest.mark.parametrize("order", ["before", "without"])
def test_boxes_do_not_depend_on_where_the_pipeline_loads_them(coco_root, weights, subject, order):  # noqa: F811
    from ikd_fast.mmdet.strength import build_subject

    resize = dict(type="Resize", scale=(80, 80), keep_ratio=True)
    load = [dict(type="LoadAnnotations", with_bbox=True)] if order == "before" else []
    meta = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")
    pipeline = [dict(type="LoadImageFromFile"), *load, resize, dict(type="PackDetInputs", meta_keys=meta)]
    other = build_subject(config(coco_root, pipeline=pipeline), "c.py", weights, images=5, batch=2)
    for a, b in zip(subject.batches(), other.batches(), strict=True):
        assert torch.equal(a.images, b.images)
        assert all(torch.equal(x["boxes"], y["boxes"]) for x, y in zip(a.targets, b.targets, strict=True))


def test_look_is_the_net_s_own_loss_and_detections(subject):
    from ikd_fast.mmdet.samples import from_targets

    batch = next(subject.batches())
    images = batch.images + 0.05
    with torch.no_grad():
        maps = subject.victim.features(images)
        truth = subject.net.loss(images, from_targets(batch.targets, (96, 96)))
        found = subject.net.predict(images, [sample.clone() for sample in batch.payload])
    loss, seen = subject.look(images, batch, maps)
    assert float(loss) == pytest.approx(float(sum(truth["loss_cls"])), rel=1e-6)
    for a, b in zip(seen, found, strict=True):
        assert torch.equal(a["pred_instances"]["bboxes"], b.pred_instances.bboxes)
        assert torch.equal(a["pred_instances"]["scores"], b.pred_instances.scores)
    joint, value = subject.victim.maps_and_loss(_batch(images, batch))
    assert all(torch.equal(a, b) for a, b in zip(joint, maps, strict=True))
    assert float(value) == pytest.approx(float(loss), rel=1e-6)


def _batch(images, batch):
    from ikd_fast.attack import AttackBatch

    return AttackBatch(images, batch.targets, batch.sizes, 0, lambda: images, batch.ids)


def detections(place: int, boxes) -> dict:
    boxes = torch.tensor(np.asarray(boxes), dtype=torch.float32).reshape(-1, 4)
    instances = dict(
        bboxes=boxes, scores=torch.ones(len(boxes)), labels=torch.zeros(len(boxes), dtype=torch.long)
    )
    return dict(img_id=place, ori_shape=(SIDE, SIDE), pred_instances=instances)


def test_ap_is_of_the_chosen_images_alone(subject):
    """Perfect boxes on 5 of 12 images are AP 1; one of two boxes of each is half of it, by hand."""
    perfect = [detections(i, draw(i)[1]) for i in subject.indices]
    assert subject.score(perfect) == {"AP50": pytest.approx(1), "AP": pytest.approx(1)}
    half = [detections(i, draw(i)[1][:1]) for i in subject.indices]
    # Precision 1 up to recall 0.5: 51 of the 101 recall points; mmdet rounds to three digits.
    assert subject.score(half)["AP50"] == pytest.approx(51 / 101, abs=6e-4)
    assert subject.score([detections(i, []) for i in subject.indices]) == {"AP50": 0.0, "AP": 0.0}


def test_what_cannot_be_measured_is_said(coco_root, weights, tmp_path):  # noqa: F811
    import json

    from ikd_fast.mmdet.build import build_detector
    from ikd_fast.mmdet.errors import InputError
    from ikd_fast.mmdet.strength import build_subject

    def fails(cfg, says, checkpoint=weights, kind=(InputError, ValueError, FileNotFoundError)):
        with pytest.raises(kind, match=says):
            build_subject(cfg, "c.py", checkpoint, images=3)

    other = tmp_path / "other.pth"
    torch.save(dict(state_dict=build_detector(retinanet(12)).state_dict()), other)
    fails(config(coco_root), "of another shape", str(other), ValueError)
    named = tmp_path / "named.pth"
    meta = dict(dataset_meta=dict(classes=("cat",)))
    torch.save(dict(state_dict=build_detector(retinanet()).state_dict(), meta=meta), named)
    fails(config(coco_root), "class names differ", str(named))
    fails(config(coco_root, metainfo=dict(classes=("box", "hat"))), "2 classes, the teacher 1")
    fails(config(coco_root, metainfo=dict(classes=())), "names no classes|has no images|none of the")
    content = json.loads((coco_root / "ann.json").read_text())
    (tmp_path / "empty.json").write_text(json.dumps(content | dict(images=[], annotations=[])))
    fails(config(coco_root, ann_file=str(tmp_path / "empty.json")), "the test set has no images")
    (tmp_path / "bare.json").write_text(json.dumps(content | dict(annotations=[])))
    fails(config(coco_root, ann_file=str(tmp_path / "bare.json")), "none of the 3 test images has a box")
    fails(config(coco_root, data_root=str(tmp_path / "none")), "the test data is not there")
    cfg = config(coco_root)
    cfg.test_evaluator.ann_file = str(tmp_path / "none.json")
    fails(cfg, "the metric's annotations are not there")
    cfg = config(coco_root)
    cfg.test_dataloader = cfg.val_dataloader = None
    fails(cfg, "no test_dataloader")


def test_a_cropping_test_pipeline_is_refused(coco_root, weights):  # noqa: F811
    from ikd_fast.mmdet.errors import InputError
    from ikd_fast.mmdet.strength import build_subject

    pipeline = [
        dict(type="LoadImageFromFile"), dict(type="LoadAnnotations", with_bbox=True), dict(type="RandomCrop", crop_size=(60, 60)),
        dict(type="PackDetInputs"),
    ]  # fmt: skip
    found = build_subject(config(coco_root, pipeline=pipeline), "c.py", weights, images=2)
    with pytest.raises(InputError, match="flips or crops"):
        next(found.batches())
