"""What each mode does to a classifier, in the order of their strength."""

from __future__ import annotations

import torch


def test_modes_and_distillation(example):
    module = example("classifier_attack")
    result = module.main(["--steps", "60"])
    teacher, student = result["reports"]["teacher"], result["reports"]["student"]
    loss = {mode: value[0] for mode, value in teacher.items()}
    assert teacher["clean"][1] > 0.95
    assert abs(teacher["random_sign"][1] - teacher["clean"][1]) < 0.05
    assert loss["clean"] < loss["single"] < loss["iterative"]
    assert loss["random_sign"] < 0.2 * loss["single"]
    assert teacher["iterative"][1] < 0.2
    first, last = result["history"][0], result["history"][-1]
    assert set(first) == {"task/ce", "kd/adv"}
    assert last["task/ce"] < 0.8 * first["task/ce"]
    assert last["kd/adv"] < first["kd/adv"]
    assert student["clean"][1] > 0.4  # of 4 classes: 0.25 is chance
    torch.manual_seed(1)
    again = module.fit(module.Classifier(12), 60, 16).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in result["teacher"].state_dict().items())


def test_no_attack_changes_more_than_eps(example):
    module = example("classifier_attack")
    net = module.Classifier(4).eval()
    x, y = module.gratings(8)
    assert 0 <= x.amin() <= x.amax() <= 1
    clean = module.score(net, x, y)
    report = module.under_attack(net, x, y, eps=0)
    assert all(value == clean for value in report.values())
