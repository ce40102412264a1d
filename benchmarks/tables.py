"""A result as Markdown, and two results beside each other."""

from __future__ import annotations

from collections import Counter
from typing import Any

Row = dict[str, Any]
IDLE = 0.5
_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns"))


def duration(seconds: float) -> str:
    """Three significant digits.

    >>> duration(0.01234), duration(2.0), duration(0)
    ('12.3 ms', '2 s', '0 s')
    """
    if seconds == 0:
        return "0 s"
    scale, unit = next(((s, u) for s, u in _UNITS if seconds >= 0.9995 * s), _UNITS[-1])
    value = seconds / scale
    return f"{value:.0f} {unit}" if value >= 99.95 else f"{value:.3g} {unit}"


def speed(ours: Row, peer: Row) -> tuple[float, float, float]:
    """How many times as fast ours is: of the medians, and between the far ends of both interquartile ranges."""
    return peer["median"] / ours["median"], peer["q1"] / ours["q3"], peer["q3"] / ours["q1"]


def groups(result: dict[str, Any]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in result["benchmarks"]:
        found.setdefault(row["group"], []).append(row)
    return found


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines] + [""]


def _header(result: dict[str, Any]) -> list[str]:
    m, commit = result["machine"], result["commit"]
    what = m["gpu"] or m["cpu"]
    changed = " with changes" if commit["dirty"] else ""
    return [
        f"# Benchmarks on {what}",
        "",
        f"{result['created'][:10]}, commit `{commit['id'][:10]}`{changed}. {m['cpu']}, {m['cores']} cores, {m['threads']} threads, "
        f"{m['memory_gib']:g} GiB, {m['system']} {m['arch']}{', ' + m['gpu'] if m['gpu'] else ''}. "
        + ", ".join(f"{name} {version}" for name, version in result["versions"].items())
        + ".",
        "",
        *_busy(result),
        "Median and interquartile range of time per call, after warm-up; wall time unless a note names another timer. "
        "Ratios: how many times as fast ours is; in brackets, from the far ends of both interquartile ranges.",
        "",
    ]


def _busy(result: dict[str, Any]) -> list[str]:
    """A word of warning: sides are timed one after the other, and other processes do not slow them evenly."""
    if (load := result["machine"]["load"]) <= IDLE:
        return []
    return [
        f"**The machine was busy** (load average {load:g} before the run): ratios are not to be relied on.",
        "",
    ]


def targets(result: dict[str, Any]) -> list[list[str]]:
    """A line for every target whose peer ran."""
    lines = []
    for group, rows in groups(result).items():
        peers = {row["side"]: row for row in rows if row["role"] == "peer"}
        for row in rows:
            for peer, target in row["targets"].items():
                if peer in peers:
                    ratio, low, high = speed(row, peers[peer])
                    verdict = "met" if ratio >= target else "**below**"
                    lines.append(
                        [
                            group,
                            row["side"],
                            peer,
                            f"{ratio:.2f} ({low:.2f} .. {high:.2f})",
                            f"{target:g}",
                            verdict,
                        ]
                    )
    return lines


def _against(row: Row, peers: list[Row]) -> str:
    if row["role"] == "peer":
        return ""
    return ", ".join("{} {:.2f} ({:.2f} .. {:.2f})".format(p["side"], *speed(row, p)) for p in peers)


def markdown(result: dict[str, Any]) -> str:
    """Header, targets, one table per group, what was skipped."""
    lines = _header(result)
    if wanted := targets(result):
        lines += [
            "## Targets",
            "",
            *_table(["work", "ours", "against", "times as fast", "target", ""], wanted),
        ]
    for group, rows in groups(result).items():
        peers = [row for row in rows if row["role"] == "peer"]
        cells = []
        for row in rows:
            notes = ", ".join(f"{name} {value}" for name, value in row["notes"].items())
            spread = duration(row["q3"] - row["q1"])
            side = f"**{row['side']}**" if row["role"] == "ours" else row["side"]
            cells.append(
                [side, duration(row["median"]), spread, str(row["rounds"]), _against(row, peers), notes]
            )
        head = ["side", "median", "IQR", "rounds", "times as fast as", "notes"]
        keep = [i for i in range(len(head)) if i < 4 or any(line[i] for line in cells)]
        lines += [
            f"## {group}",
            "",
            *_table([head[i] for i in keep], [[line[i] for i in keep] for line in cells]),
        ]
    if result["skipped"]:
        count = Counter((s["name"].partition("[")[0], s["reason"]) for s in result["skipped"])
        rows = [[name, str(n), reason] for (name, reason), n in count.items()]
        lines += ["## Not run", "", *_table(["benchmark", "cases", "reason"], rows)]
    return "\n".join(lines)


def compare(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Time of ``after`` over that of ``before``; flagged where the interquartile ranges do not meet."""
    old, new = ({(r["group"], r["side"]): r for r in x["benchmarks"]} for x in (before, after))
    names = [f"`{x['commit']['id'][:10]}` of {x['created'][:10]}" for x in (before, after)]
    lines = [f"# {names[1]} against {names[0]}", ""]
    lines += [*_busy(before), *_busy(after)]
    for field in ("machine", "versions"):
        changes = [
            f"{key} {before[field].get(key)} -> {after[field].get(key)}"
            for key in sorted({*before[field], *after[field]})
            if key != "load" and before[field].get(key) != after[field].get(key)
        ]
        if changes:
            lines += [f"**Different {field}**: {', '.join(changes)}.", ""]
    lines += [
        "Time after over time before; slower or faster where the interquartile ranges lie apart.",
        "",
    ]
    cells = []
    for key in [k for k in old if k in new]:
        a, b = old[key], new[key]
        flag = "slower" if b["q1"] > a["q3"] else "faster" if b["q3"] < a["q1"] else ""
        both = [duration(a["median"]), duration(b["median"])]
        cells.append([*key, *both, f"{b['median'] / a['median']:.2f}", f"**{flag}**" if flag else ""])
    lines += _table(["work", "side", "before", "after", "ratio", ""], cells)
    for title, keys in (("Only before", old.keys() - new.keys()), ("Only after", new.keys() - old.keys())):
        if keys:
            lines += [f"{title}: " + "; ".join(f"{group}: {side}" for group, side in sorted(keys)) + ".", ""]
    return "\n".join(lines)
