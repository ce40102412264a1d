"""When the data and feature augmentation end (the paper stops them after epoch 16 of 24)."""

from __future__ import annotations

from collections.abc import Mapping


class StopAt:
    """``dict(epoch=E)``, ``dict(iter=N)``, a fraction of the run in (0, 1], or ``None`` (never).

    Epochs and steps count from 0: ``dict(epoch=16)`` is active in epochs 0..15.

    >>> StopAt(dict(epoch=16)).active(epoch=15, step=0), StopAt(dict(epoch=16)).active(epoch=16, step=0)
    (True, False)
    >>> StopAt(0.5, total_steps=100).active(epoch=0, step=50)
    False
    """

    def __init__(self, rule: Mapping[str, int] | float | None, *, total_steps: int | None = None) -> None:
        self.rule = rule
        self.total_steps = total_steps
        if rule is None:
            return
        if isinstance(rule, Mapping):
            if (
                len(rule) != 1
                or next(iter(rule)) not in ("epoch", "iter")
                or int(next(iter(rule.values()))) < 0
            ):
                raise ValueError(
                    f"stop_at must be dict(epoch=E) or dict(iter=N) with a count >= 0, or a fraction, got {rule}"
                )
        elif isinstance(rule, bool) or not isinstance(rule, (int, float)) or not 0 < rule <= 1:
            raise ValueError(
                f"stop_at must be dict(epoch=E), dict(iter=N) or a fraction of the run in (0, 1], got {rule!r}"
            )

    def active(self, *, epoch: int, step: int | None) -> bool:
        if self.rule is None:
            return True
        if isinstance(self.rule, Mapping) and "epoch" in self.rule:
            return epoch < self.rule["epoch"]
        if step is None:
            raise ValueError(f"stop_at={self.rule} counts steps: give step= to every ikd.step(...)")
        if isinstance(self.rule, Mapping):
            return step < self.rule["iter"]
        if self.total_steps is None:
            raise ValueError(
                f"stop_at={self.rule} is a fraction of the run: give total_steps=, or write dict(epoch=E) or dict(iter=N)"
            )
        return step < self.rule * self.total_steps

    def __repr__(self) -> str:
        return f"StopAt({self.rule!r})"
