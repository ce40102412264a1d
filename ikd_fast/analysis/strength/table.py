"""A report as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .plan import CONTROL

EXPLAINED = """\
Means over {seeds} seed{s} and {images} images{spread}. Class loss: the teacher's, of the images' boxes. Feature change:
||F(x + delta) - F(x)|| / ||F(x)||, mean over levels and images. Gain: over random signs of the same eps and seed, in per cent
of what `iterative` (the paper's 5 steps of eps / 4 with input diversity) and PGD-{steps} gain. L-inf and mean: of what the net
reads, in grey levels; outside: values further than eps from the clean image. Gradients: of the teacher, per image, in the
measured step. Seconds: per image, for the images and the teacher's maps of them.

`carry`, visit n: n - 1 visits before in random views of the image (mirrored, cropped to 0.8 .. 1 of each side; `crop_align 8`: on
multiples of 8 pixels), kept with
{bits} bits a value; measured on the whole image, as every row is. Published round trip: the images of `iterative` truncated to
uint8, resized to the original size ({shrink} of the network's where that is the same), JPEG quality {quality}, enlarged again; its
changes are from the clean image after the same trip, whose own are in the second row."""


def report_markdown(report: Mapping[str, Any]) -> str:
    """Title, one table an eps, and a table of levels for the largest eps."""
    rows, settings = report["rows"], report["settings"]
    clean = [row for row in rows if row["eps"] is None]
    names = list(clean[0]["metrics"])
    seeds = len(settings["seeds"])
    blocks = [
        f"# How strong attacks are on {report.get('teacher', 'the teacher')}",
        EXPLAINED.format(
            seeds=seeds, s="" if seeds == 1 else "s", images=report.get("images", "the"), steps=settings["steps"],
            bits=settings["memory"].get("bits", 4), shrink=settings["shrink"], quality=settings["quality"],
            spread="; +- is the standard deviation over seeds" if seeds > 1 else "",
        ),
    ]  # fmt: skip
    for eps in settings["eps"]:
        blocks += [f"## eps {eps:g}", _table(clean + [row for row in rows if row["eps"] == eps], names)]
    largest = max(settings["eps"])
    blocks += [
        f"## Change of each level at eps {largest:g}",
        _levels([row for row in rows if row["eps"] == largest]),
    ]
    return "\n\n".join(blocks) + "\n"


def _table(rows: list[dict[str, Any]], names: list[str]) -> str:
    head = ["", "class loss", *names, "feature change", "loss gain, % of iterative", "% of PGD", "feature gain, % of iterative",
            "% of PGD", "L-inf", "mean", "outside", "gradients", "s/image"]  # fmt: skip
    lines = [_line(head), "|---|" + "---:|" * (len(head) - 1)]
    for row in rows:
        metrics = [_number(row["metrics"][name], 3) for name in names]
        percents = [
            ""
            if row["eps"] is None or row["name"] == CONTROL
            else _number(row[f"{key}_percent_of_{label}"], 0)
            for key in ("class_loss", "feature_change")
            for label in ("iterative", "pgd")
        ]
        lines.append(_line([
            row["name"], _number(row["class_loss"], 3), *metrics, _number(row["feature_change"], 3), *percents, f"{row['linf']:.2f}",
            f"{row['mean_abs']['mean']:.2f}", f"{100 * row['outside']['mean']:.0f} %" if row["eps"] is not None else "",
            f"{row['gradient_evals']:g}", f"{row['seconds']['mean']:.3f}" if row["eps"] is not None else "",
        ]))  # fmt: skip
    return "\n".join(lines)


def _levels(rows: list[dict[str, Any]]) -> str:
    count = len(rows[0]["levels"])
    head = ["", *(f"L2, level {k}" for k in range(count)), *(f"1 - cos, level {k}" for k in range(count))]
    lines = [_line(head), "|---|" + "---:|" * (2 * count)]
    for row in rows:
        cells = [f"{level[key]['mean']:.3f}" for key in ("l2", "cosine") for level in row["levels"]]
        lines.append(_line([row["name"], *cells]))
    return "\n".join(lines)


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _number(value: Mapping[str, float | None], digits: int) -> str:
    """``1.234 +- 0.012``; ``n/a`` where there is none.

    >>> _number({"mean": 1.2345, "spread": 0.0125}, 2), _number({"mean": None, "spread": None}, 2)
    ('1.23 +- 0.01', 'n/a')
    """
    mean, spread = value["mean"], value["spread"]
    if mean is None:
        return "n/a"
    return f"{mean:.{digits}f}" + ("" if spread is None else f" +- {spread:.{digits}f}")
