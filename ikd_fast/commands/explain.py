"""``ikd-fast explain CONFIG``."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path

from ikd_fast.mmdet import launch


def run(
    config: Path,
    *,
    options: list[str],
    size: tuple[int, int] | None,
    weights: bool,
    ranks: int,
    as_json: bool,
) -> None:
    """Print the resolved step of ``config``."""
    if size is not None and min(size) < 1:
        raise launch.InputError(
            f"--size takes height and width in pixels, got {size[0]} {size[1]}", usage=True
        )
    if ranks < 1:
        raise launch.InputError(f"--ranks must be at least 1, got {ranks}", usage=True)
    # What readers of data sets print is not part of the answer.
    with redirect_stdout(sys.stderr):
        cfg = launch.load_config(config, work_dir=None, options=options, launcher="none")
        from ikd_fast.mmdet import explain

        facts = explain.explain(cfg, name=str(config), size=size, weights=weights, ranks=ranks)
    print(json.dumps(facts, indent=1) if as_json else explain.render(facts))
