"""What the column of costs in docs/losses.md is made with."""

from __future__ import annotations

import pytest

from benchmarks.end_to_end import losses


def test_ratios_are_to_fgd_of_the_same_round(monkeypatch) -> None:
    """With seconds that grow from call to call: FGD takes its place in each round in turn, its own ratio stays 1."""
    calls: list[str] = []

    def run(self, loss) -> float:
        calls.append(type(loss).__name__)
        return float(len(calls))

    monkeypatch.setattr(losses.Work, "run", run)
    found, seconds = losses.ratios(["FGDLoss", "L1Loss"], 2, losses.Size(4, (64, 64)))
    assert calls == ["FGDLoss", "L1Loss", "L1Loss", "FGDLoss", "FGDLoss", "L1Loss"]
    assert seconds == [4.0, 5.0]
    assert found == {"FGDLoss": [1.0, 1.0], "L1Loss": [3 / 4, 6 / 5]}


def test_every_loss_of_the_library_is_timed_forward_and_backward() -> None:
    from ikd_fast.losses.registry import loss_class, loss_names

    names = [name for name in loss_names() if loss_class(name).__module__.startswith("ikd_fast.losses")]
    work = losses.Work(losses.Size(8, (64, 96)))
    gradients: list[bool] = []
    for x in work.student:
        x.register_hook(lambda g: gradients.append(bool(g.isfinite().all())))
    for name in names:
        before = len(gradients)
        assert work.run(work.loss(name)) > 0
        assert len(gradients) > before, name
    assert all(gradients)
    assert all(x.grad is None for x in work.student)


def test_a_cell_has_median_and_quartiles() -> None:
    assert losses.cell([1.0, 2.0, 3.0, 4.0, 9.0]) == "3.00 (2.00 to 4.00)"


def test_arguments(capsys) -> None:
    for given, said in (
        (["--rounds", "1"], "2 or more"),
        (["--only", "Nothing"], "unknown loss 'Nothing'; valid: ACMLoss"),
    ):
        with pytest.raises(SystemExit):
            losses.main(given)
        assert said in capsys.readouterr().err
