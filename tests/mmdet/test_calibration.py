"""Calibration through mmengine's Runner: logged in the first steps, gone from the log after, the training as without."""

from __future__ import annotations

import torch

from tests.mmdet.conftest import run, stock_config, with_ikd


def test_first_steps_are_measured_and_training_is_the_same(coco_root, tmp_path, monkeypatch) -> None:
    said: list[tuple[str, int]] = []
    monkeypatch.setattr(
        "ikd_fast.mmdet.distiller.print_log", lambda text, logger, level: said.append((text, level))
    )
    stock = stock_config(coco_root, epochs=1)
    adv = dict(beta=1e-12, attack=dict(type="OnlineDIFGSM", mode="single"))
    measured, logs = run(with_ikd(stock, calibrate=2, adv=adv), tmp_path / "a", experiment_name="measured")
    plain, _ = run(with_ikd(stock, calibrate=0, adv=adv), tmp_path / "b", experiment_name="plain")
    names = {"gradshare/task", "gradshare/kd/fgd", "gradshare/kd/adv"}
    assert [names & set(row) for row in logs] == [names, names, set()]
    for row in logs[:2]:
        assert abs(sum(row[name] for name in names) - 1) < 1e-6
    # mmengine would go on logging a key's last value.
    assert not any("gradshare" in key for key in measured.message_hub.log_scalars)
    texts = [text for text, _ in said]
    assert sum("terms of the loss over the first 2 steps" in text for text in texts) == 1
    (warning,) = [text for text in texts if "kd/adv: its gradient norm" in text]
    assert "beta=" in warning
    for name, value in plain.model.state_dict().items():
        assert torch.equal(measured.model.state_dict()[name], value), name
