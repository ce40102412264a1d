"""The result of ``cost`` as Markdown: every number of ``docs/cost.md`` comes from here.

``python -m benchmarks.end_to_end.cost_table RESULT.json ... [--into docs/cost.md]``
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.tables import IDLE, duration

from .measure import quartiles
from .modes import PLAIN, REFRESH, VISITS
from .schedule import Schedule, rows
from .timeline import PARTS

TARGET = 1.15
BEGIN, END = "<!-- cost: generated below -->", "<!-- cost: generated above -->"
WHERE = {
    "data": "reading", "augmentation": "augmentation", "teacher": "teacher", "attack": "attack", "student": "student", "losses": "losses",
}  # fmt: skip

PIECES = {
    "teacher": "F: teacher, backbone and pyramid",
    "head": "H: its head, for the class loss",
    "teacher_input": "D: gradient of F to the images",
    "head_input": "gradient of the class loss to the pyramid",
    "task": "student with its own losses, forward and backward",
    "features": "student's pyramid, forward and backward",
    "distill": "FGD itself",
}


def ratios(result: dict[str, Any], name: str) -> dict[str, tuple[float, float, float]]:
    """Quartiles over the rounds: ``time``, seconds over those of plain FGD in the same round, and ``excess``, that over the ratio of
    the multiply-adds."""
    mode, plain = result["modes"][name], result["modes"][PLAIN]
    time = [a / b for a, b in zip(mode["seconds"], plain["seconds"], strict=True)]
    work = [a / b for a, b in zip(mode["predicted"], plain["predicted"], strict=True)]
    return {"time": quartiles(time), "excess": quartiles([t / w for t, w in zip(time, work, strict=True)])}


def excess_by_part(result: dict[str, Any], name: str) -> dict[str, float]:
    """Where a step takes longer than plain FGD's seconds a multiply-add: a share of the predicted time for each part, of sum
    measured / predicted - 1 (up to medians)."""
    mode, plain = result["modes"][name], result["modes"][PLAIN]
    rate = statistics.median(plain["seconds"]) / statistics.fmean(plain["predicted"])
    predicted = rate * statistics.fmean(mode["predicted"])
    parts = {}
    for part in PARTS:
        if part != "data":
            work = (
                mode["counted_parts"].get(part, 0.0) * statistics.fmean(mode["predicted"]) / mode["counted"]
            )
            parts[part] = (statistics.median(mode["parts"][part]) - rate * work) / predicted
    return parts


def _lines(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return ["| " + " | ".join(cells) + " |" for cells in (head, rule, *body)] + [""]


def steps_table(result: dict[str, Any]) -> list[str]:
    """Seconds a step, times plain FGD, and the prediction beside."""
    body = []
    for name, mode in result["modes"].items():
        r = ratios(result, name)
        q1, median, q3 = quartiles(mode["seconds"])
        work = statistics.fmean(mode["predicted"]) / statistics.fmean(result["modes"][PLAIN]["predicted"])
        over = r["excess"][1]
        verdict = "" if name == PLAIN else f"{over:.2f}" if over <= TARGET else f"**{over:.2f}**"
        body.append(
            [
                f"**{name}**" if name == PLAIN else name,
                f"{statistics.fmean(mode['gradients']):.2f}".rstrip("0").rstrip("."),
                f"{duration(median)} ({duration(q3 - q1)})",
                f"{r['time'][1]:.2f} ({r['time'][0]:.2f} .. {r['time'][2]:.2f})",
                f"{statistics.fmean(mode['predicted']):.4g}",
                f"{100 * (mode['counted'] / mode['predicted_once'] - 1):+.1f} %",
                f"{work:.2f}",
                verdict,
            ]
        )
    head = [
        "step", "gradients an image", "median (IQR)", "times plain FGD (quartiles)", "GMAC by formula", "counted, against it",
        "GMAC, times plain FGD", "measured / predicted",
    ]  # fmt: skip
    return _lines(head, body)


def parts_table(result: dict[str, Any]) -> list[str]:
    """Medians of each part of the step, and what reading the data takes beside it."""
    shown = [part for part in PARTS if part != "data"]
    body = []
    for name, mode in result["modes"].items():
        medians = {part: statistics.median(mode["parts"][part]) for part in PARTS}
        body.append(
            [
                name,
                *(_share(medians[p], mode["counted_parts"].get(p, 0.0)) for p in shown),
                duration(medians["data"]),
            ]
        )
    return _lines(["step", *(WHERE[p] for p in shown), "reading the data"], body)


def _share(seconds: float, gmac: float) -> str:
    if seconds == 0:
        return "-"
    return duration(seconds) + (f", {gmac / seconds:.0f} GMAC/s" if gmac > seconds else "")


def explanation(result: dict[str, Any]) -> list[str]:
    """Of the sides beyond the target: which parts take longer than plain FGD's time for as many multiply-adds."""
    lines = []
    for name in result["modes"]:
        over = ratios(result, name)["excess"][1]
        if over <= TARGET or name == PLAIN:
            continue
        parts = sorted(excess_by_part(result, name).items(), key=lambda item: -item[1])
        told = ", ".join(f"{WHERE[part]} {100 * value:+.0f} %" for part, value in parts if abs(value) >= 0.01)
        lines.append(f"- {name}, {over:.2f}: {told}.")
    if not lines:
        return [f"Every side is within {TARGET} of its prediction.", ""]
    return [
        f"Beyond {TARGET}, and where (each part against the time that plain FGD takes for as many multiply-adds, in per cent of the "
        "predicted step):",
        "",
        *lines,
        "",
    ]


def pieces_table(result: dict[str, Any]) -> list[str]:
    return _lines(
        ["piece, a batch", "GMAC"],
        [[label, f"{result['pieces'][key]:.4g}"] for key, label in PIECES.items()],
    )


def schedule_table(result: dict[str, Any]) -> list[str]:
    """The paper's appendix B for this model; nothing where the result lacks a side of it."""
    if result.get("schedule") is None:
        return []
    schedule = Schedule(**result["schedule"])
    body = []
    for row in rows(schedule, result["modes"], result.get("generation")):
        hours, share = row["paper_hours"], row["paper_of_baseline"]
        body.append(
            [
                row["row"],
                _time(row["seconds"]),
                f"{row['of_baseline']:.2f}",
                "-" if hours is None else f"{hours:g} h",
                "-" if share is None else f"{share:.3g}",
            ]
        )
    return [
        f"{schedule.steps} steps of {schedule.batch} out of {schedule.images} images, the adversarial branch in the first "
        f"{100 * schedule.active:g} % of them: an image is met {schedule.visits:.1f} times while it is on. Times are those of the steps "
        "above, reading the data included, multiplied out; the paper's are of another model on 8 GPUs.",
        "",
        *_lines(["", "this model", "times baseline", "paper", "times baseline"], body),
    ]


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def _time(seconds: float) -> str:
    return f"{seconds / 3600:.2f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"


def markdown(result: dict[str, Any]) -> str:
    """All tables of a result under a heading of the third level."""
    machine, commit = result["machine"], result["commit"]
    changed = " with changes" if commit["dirty"] else ""
    lines = [
        f"### {result['title'][0].upper()}{result['title'][1:]}",
        "",
        f"{result['created'][:10]}, commit `{commit['id'][:10]}`{changed}, {machine['gpu'] or machine['cpu']}, "
        f"{_count(machine['threads'], 'thread')}, torch {result['versions']['torch']}; {result['rounds']} rounds, each one step of every "
        "side on the same images.",
        "",
    ]
    if machine["load"] > IDLE:
        lines += [
            f"**The machine was busy** (load average {machine['load']:g} before the run): these are not figures to quote.",
            "",
        ]
    lines += steps_table(result)
    lines += explanation(result)
    lines += [
        "Where the time goes (medians; they need not add up to the median of the step):",
        "",
        *parts_table(result),
    ]
    lines += ["What the formulas are made of:", "", *pieces_table(result)]
    if f"carry, refresh {REFRESH} of {VISITS}" in result["modes"]:
        lines += [
            f"`refresh {REFRESH} of {VISITS}`: one first visit, {REFRESH - 1} that update and {VISITS - REFRESH} that reuse, measured "
            "apart in each round and averaged over an image's visits.",
            "",
        ]
    if table := schedule_table(result):
        lines += ["The paper's appendix B, for this model:", "", *table]
    return "\n".join(lines)


def insert(page: str, text: str) -> str:
    """``page`` with what lies between the two marks replaced.

    >>> insert(f"a\\n{BEGIN}\\nold\\n{END}\\nb\\n", "new") == f"a\\n{BEGIN}\\n\\nnew\\n{END}\\nb\\n"
    True
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"expected a page with the lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{text.strip()}\n{END}{after}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.end_to_end.cost_table",
        description="Markdown of results of benchmarks.end_to_end.cost.",
    )
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULT.json")
    parser.add_argument(
        "--into", type=Path, metavar="PAGE.md", help="write it between the marks of this page"
    )
    arguments = parser.parse_args(argv)
    text = "\n".join(markdown(json.loads(path.read_text())) for path in arguments.results)
    if arguments.into is None:
        print(text)
    else:
        arguments.into.write_text(insert(arguments.into.read_text(), text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
