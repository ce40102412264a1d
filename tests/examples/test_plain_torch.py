"""The plain loop learns, leaves the teacher alone, and goes on from a checkpoint as if it had never stopped."""

from __future__ import annotations

import math

import pytest
import torch

TINY = ["--images", "8", "--batch", "4", "--teacher-steps", "25"]


@pytest.fixture
def plain(example):
    return example("plain_torch")


def test_it_learns_and_the_teacher_does_not(plain):
    result = plain.main([*TINY, "--epochs", "4"])
    history = result["history"]
    assert len(history) == 8
    assert set(history[0]) == {"total", "task/cls", "task/box", "kd/fgd", "kd/adv"}
    for name in ("total", "task/cls"):
        assert history[-1][name] + history[-2][name] < history[0][name] + history[1][name]
    again = plain.train_teacher(25, *plain.scenes(8))
    trained = result["teacher"].state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in again.state_dict().items())


def test_the_attack_raises_the_class_loss_of_the_teacher(plain):
    images, targets = plain.scenes(4)
    teacher = plain.train_teacher(40, images, targets)
    ikd = plain.build(teacher, "single")
    x = torch.stack([plain.UNITS.from_pixels(image) for image in images])
    out = ikd.attack(ikd.victim, x, targets, image_ids=range(4), epoch=0, units=plain.UNITS)
    with torch.no_grad():
        clean, moved = (float(teacher.losses(v, targets)["cls"]) for v in (x, out.images))
    assert moved > 1.5 * clean
    assert 7.9 < float((out.delta / plain.UNITS.grey_level(x)).abs().max()) <= 8.01  # grey levels


def test_resumed_equals_uninterrupted(plain, tmp_path):
    path = tmp_path / "ikd.pt"
    whole = plain.main([*TINY, "--epochs", "2"])
    plain.main([*TINY, "--epochs", "1", "--checkpoint", str(path)])
    resumed = plain.main([*TINY, "--epochs", "2", "--checkpoint", str(path)])
    assert resumed["history"] == whole["history"]
    other = resumed["ikd"].state_dict()
    assert all(torch.equal(value, other[name]) for name, value in whole["ikd"].state_dict().items())


def test_amp_starts_from_the_same_losses(plain):
    full = plain.main([*TINY, "--epochs", "1"])["history"]
    half = plain.main([*TINY, "--epochs", "1", "--amp"])["history"]
    assert all(math.isfinite(v) for row in half for v in row.values())
    # bfloat16 has 8 bits: 0.4 % a rounding, several in a row; the attack's signs may differ where gradients are near 0.
    for name, value in full[0].items():
        assert half[0][name] == pytest.approx(value, rel=0.05), name
