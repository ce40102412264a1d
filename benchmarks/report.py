"""``python -m benchmarks.report RESULT.json [--out DIR] [--save]`` and ``python -m benchmarks.report --compare A.json B.json``.

RESULT.json is a result file (``schema.py``) or what ``pytest benchmarks/ --benchmark-only --benchmark-json=RESULT.json`` wrote.
The table goes to the terminal; ``--out`` writes it and a picture as report.md and report.png; ``--save`` keeps the result under
``benchmarks/results/<machine>/`` with both beside it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .picture import draw
from .results import ROOT, load, save
from .tables import compare, markdown


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("result", nargs="?", type=Path, help="one result")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write the table and the picture there")
    parser.add_argument(
        "--save",
        nargs="?",
        type=Path,
        const=ROOT,
        metavar="ROOT",
        help="keep the result under ROOT/<machine>/",
    )
    parser.add_argument(
        "--compare", nargs=2, type=Path, metavar=("A", "B"), help="two results: B's times over A's"
    )
    args = parser.parse_args(arguments)
    if (args.result is None) == (args.compare is None):
        parser.error("expected either one RESULT.json or --compare A.json B.json")
    try:
        if args.compare:
            text = compare(*(load(path) for path in args.compare))
            print(text)
            if args.out:
                args.out.mkdir(parents=True, exist_ok=True)
                (args.out / "compare.md").write_text(text)
            return 0
        result = load(args.result)
    except (OSError, ValueError) as error:
        print(f"benchmarks.report: {error}", file=sys.stderr)
        return 2
    text = markdown(result)
    print(text)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        _write(result, text, args.out / "report")
    if args.save:
        path = save(result, args.save)
        _write(result, text, path.with_suffix(""))
        print(f"saved {path.name} in {path.parent.name}/")
    return 0


def _write(result: dict, text: str, stem: Path) -> None:
    """``stem``.md and ``stem``.png."""
    stem.with_name(stem.name + ".md").write_text(text)
    draw(result, stem.with_name(stem.name + ".png"))


if __name__ == "__main__":
    sys.exit(main())
