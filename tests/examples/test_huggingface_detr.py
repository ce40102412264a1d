"""Tokens become maps, boxes become Hugging Face's and back, and the student learns."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers: pip install transformers")


@pytest.fixture
def detr(example):
    return example("huggingface_detr")


def test_it_learns_on_a_fixed_batch_and_the_teacher_does_not(detr):
    result = detr.main(["--steps", "8", "--batch", "2"])
    history = result["history"]
    assert set(history[0]) == {"task/task", "kd/fgd", "kd/adv"}
    assert history[-1]["task/task"] < history[0]["task/task"]
    assert history[-1]["kd/fgd"] < history[0]["kd/fgd"]
    fresh = detr.detr(48, seed=1).state_dict()
    assert all(torch.equal(value, fresh[name]) for name, value in result["teacher"].state_dict().items())


def test_token_maps_are_the_encoders_tokens_laid_out(detr):
    images, _ = detr.scenes(2, height=detr.HEIGHT, width=detr.WIDTH)
    x = detr.UNITS.from_pixels(torch.stack(images))
    teacher = detr.detr(48, seed=1)
    ikd = detr.build(detr.detr(32, seed=2), teacher)
    (maps,) = ikd.teacher.features(x, "model.encoder")
    with torch.no_grad():
        tokens = teacher(
            pixel_values=x, pixel_mask=torch.ones(2, detr.HEIGHT, detr.WIDTH, dtype=torch.long)
        ).encoder_last_hidden_state
    assert maps.shape == (2, 48, 2, 3)
    for row in range(2):
        for column in range(3):
            torch.testing.assert_close(maps[:, :, row, column], tokens[:, 3 * row + column], atol=0, rtol=0)


def test_padding_is_masked(detr):
    x = torch.zeros(1, 3, detr.HEIGHT, detr.WIDTH)
    x[:, :, :40, :50] = detr.UNITS.from_pixels(torch.zeros(1, 3, 40, 50))  # black, not padding
    mask = detr.pixel_mask(x)
    assert mask.sum() == 40 * 50
    assert mask[0, :40, :50].all()


def test_boxes_go_there_and_back(detr):
    images, targets = detr.scenes(3, height=detr.HEIGHT, width=detr.WIDTH)
    labels = detr.labels_of(torch.stack(images), targets)
    x1, y1, x2, y2 = targets[0]["boxes"][0].tolist()
    expected = [(x1 + x2) / 2 / 96, (y1 + y2) / 2 / 64, (x2 - x1) / 96, (y2 - y1) / 64]
    assert labels[0]["boxes"][0].tolist() == pytest.approx(expected, abs=1e-6)
    back = detr.pixels_of(labels, detr.HEIGHT, detr.WIDTH)
    for a, b in zip(targets, back, strict=True):
        torch.testing.assert_close(a["boxes"], b["boxes"], atol=1e-4, rtol=0)
        assert torch.equal(a["labels"], b["labels"])


def test_the_attack_raises_the_class_loss(detr):
    images, targets = detr.scenes(4, height=detr.HEIGHT, width=detr.WIDTH)
    teacher = detr.detr(48, seed=1)
    ikd = detr.build(detr.detr(32, seed=2), teacher)
    x = detr.UNITS.from_pixels(torch.stack(images))
    out = ikd.attack(ikd.victim, x, targets, image_ids=range(4), epoch=0, units=detr.UNITS)
    with torch.no_grad():
        clean, moved = (float(ikd.victim(v, targets)) for v in (x, out.images))
    assert moved > clean
