"""How strong the attacks are on the demo's teacher: the report of ``ikd-fast strength`` on the validation tiles. Imports mmdet.

``python -m ikd_fast.demo.strength runs/demo/data`` measures the shipped teacher and writes ``runs/strength/demo``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ikd_fast.analysis.strength import report_markdown
from ikd_fast.commands.strength import strength_of
from ikd_fast.demo import configs
from ikd_fast.demo.coco import find_splits
from ikd_fast.demo.quiet import quiet
from ikd_fast.demo.teacher import SHIPPED


def demo_strength(root: Path, out: Path, *, images: int = 100, **settings: Any) -> dict[str, Any]:
    """The report on the shipped teacher and the validation tiles below ``root``; ``settings`` as of ``strength_of``."""
    with quiet(out / "strength.log"):
        cfg = configs.load("teacher.py", find_splits(root), evaluate="val")
    return strength_of(cfg, "the demo's teacher", str(SHIPPED), out, images=images, **settings)


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("root", type=Path, help="data folder of a demo run, e.g. runs/demo/data")
    parser.add_argument("--out", type=Path, default=Path("runs/strength/demo"), help="folder of the report")
    parser.add_argument("--images", type=int, default=100, help="tiles, evenly spaced over the split")
    given = parser.parse_args()
    print(report_markdown(demo_strength(given.root, given.out, images=given.images)))
