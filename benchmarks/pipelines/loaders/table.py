"""The loaders' result as Markdown.

``python -m benchmarks.pipelines.loaders.table RESULT.json [--into docs/dali.md]``
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.tables import IDLE

BEGIN, END = "<!-- dali: generated below -->", "<!-- dali: generated above -->"


def spread(values: Sequence[float], digits: int) -> str:
    """``median (q1 .. q3)``."""
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return f"{median:.{digits}f} ({q1:.{digits}f} .. {q3:.{digits}f})"


def ratios(mine: list[dict], theirs: list[dict], key: str) -> list[float]:
    """Theirs over mine in the same round, of ``key`` an image."""
    return [(b[key] / b["images"]) / (a[key] / a["images"]) for a, b in zip(mine, theirs, strict=True)]


def work_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| workers | loader | images a second | CPU ms an image | times as fast | times less CPU |",
        "| ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    peers = {row["workers"]: row["passes"] for row in rows if row["name"] == "mmdet"}
    for row in rows:
        passes = row["passes"]
        cells = [
            str(row["workers"]),
            row["name"],
            spread([p["images"] / p["seconds"] for p in passes], 0),
            spread([1e3 * p["cpu_seconds"] / p["images"] for p in passes], 1),
        ]
        if row["name"] == "mmdet":
            cells += ["", ""]
        else:
            theirs = peers[row["workers"]]
            cells += [spread(ratios(passes, theirs, key), 2) for key in ("seconds", "cpu_seconds")]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def stage_table(stages: dict[str, dict[str, list[float]]]) -> list[str]:
    lines = ["| one thread, ms an image | cv2 | DALI | DALI over cv2 |", "| --- | ---: | ---: | ---: |"]
    for stage, sides in stages.items():
        over = [b / a for a, b in zip(sides["cv2"], sides["DALI"], strict=True)]
        times = [spread([1e3 * v for v in sides[name]], 2) for name in ("cv2", "DALI")]
        lines.append(f"| {stage} | {times[0]} | {times[1]} | {spread(over, 2)} |")
    return [*lines, ""]


def markdown(result: dict[str, Any]) -> str:
    machine, commit = result["machine"], result["commit"]
    where = f"{machine['gpu'] or machine['cpu']}, {machine['cores']} cores, DALI on the {result['device'].upper()}"
    changed = " with changes" if commit["dirty"] else ""
    lines = [
        f"{result['created'][:10]}, commit `{commit['id'][:10]}`{changed}, {where}; medians (quartiles) of {result['rounds']} rounds, "
        "ratios to mmdet's pass of the same round. Workers: processes of mmdet's loader; threads of DALI, and as many "
        "of cv2 where it resizes, with files and annotations read by the main process.",
        "",
    ]
    if machine["load"] > IDLE:
        lines += [
            f"**The machine was busy** (load average {machine['load']:g} before the run): not figures to quote.",
            "",
        ]
    for name, rows in result["work"].items():
        lines += [f"**{name[0].upper()}{name[1:]}**", "", *work_table(rows)]
    lines += ["Pixels alone, of the JPEGs resized to 1067 x 800:", "", *stage_table(result["stages"])]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pipelines.loaders.table")
    parser.add_argument("result", type=Path, metavar="RESULT.json")
    parser.add_argument(
        "--into", type=Path, metavar="PAGE.md", help="write it between the marks of this page"
    )
    arguments = parser.parse_args(argv)
    text = markdown(json.loads(arguments.result.read_text()))
    if arguments.into is None:
        print(text)
        return 0
    before, begin, rest = arguments.into.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        parser.error(f"{arguments.into}: expected the lines {BEGIN} and {END}")
    arguments.into.write_text(f"{before}{BEGIN}\n\n{text.strip()}\n\n{END}{after}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
