"""The result as Markdown; a dry run marked so that it cannot be taken for a measurement."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .run import Found
from .steps import CARRY, OF_PREDICTION

SMOKE = "SMOKE (no measurement): "


def smoke_marked(result: dict[str, Any]) -> dict[str, Any]:
    """Every group renamed, targets dropped."""
    rows = [
        {**r, "group": SMOKE + r["group"], "targets": {}, "notes": {**r["notes"], "smoke": 1}}
        for r in result["benchmarks"]
    ]
    return {**result, "benchmarks": rows}


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:,.0f}"


def _note(name: str, form: Callable[[Any], str]) -> Callable[[dict[str, Any]], str]:
    return lambda row: form(row["notes"][name]) if name in row["notes"] else "-"


def _gpu(row: dict[str, Any]) -> str:
    notes = row["notes"]
    if "gpu_us" not in notes:
        return "-"
    return f"{notes['gpu_us']:,.1f} ({notes['gpu_q1_us']:,.1f}..{notes['gpu_q3_us']:,.1f})"


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "side": lambda r: r["side"],
    "GPU us (quartiles)": _gpu,
    "wall us (quartiles)": lambda r: f"{_us(r['median'])} ({_us(r['q1'])}..{_us(r['q3'])})",
    "host us": _note("host_us", lambda v: f"{v:,.0f}"),
    "of copy": _note("copy_share", lambda v: f"{v:.0%}"),
    "launches": _note("launches", str),
    "syncs": _note("syncs", str),
    "peak extra MB": _note("peak_extra_bytes", lambda v: f"{v / 1e6:,.1f}"),
    "of S and T": _note("peak_of_maps", lambda v: f"{v:.2f}x"),
    "error": _note("error", lambda v: f"{v:.1e}"),
    "GFLOP": _note("gflop", lambda v: f"{v:,.0f}"),
    "of plain": _note("flop_of_plain", lambda v: f"{v:.2f}x"),
    "time of FGD": _note("time_of_fgd", lambda v: f"{v:.2f}x"),
    "predicted": _note("predicted_of_fgd", lambda v: f"{v:.2f}x"),
}


def _ratios(rows: list[dict[str, Any]]) -> list[str]:
    """Ours against each peer by wall time, and a training step against its prediction, with the target where there is one."""
    lines = []
    for ours in (r for r in rows if r["role"] == "ours"):
        for peer in (r for r in rows if r["role"] == "peer"):
            ratio = peer["median"] / ours["median"]
            target = ours["targets"].get(peer["side"])
            verdict = (
                "" if target is None else f"; target {target:g}x {'met' if ratio >= target else 'MISSED'}"
            )
            lines.append(f"- {ours['side']} against {peer['side']}: {ratio:.2f}x{verdict}")
        if (over := ours["notes"].get("of_prediction")) is not None:
            verdict = ""
            if ours["side"] == CARRY:
                verdict = f"; target at most {OF_PREDICTION:g} {'met' if over <= OF_PREDICTION else 'MISSED'}"
            lines.append(
                f"- {ours['side']}: {ours['notes']['time_of_fgd']:.2f}x the time of FGD at this precision, by its multiply-adds "
                f"{ours['notes']['predicted_of_fgd']:.2f}x: {over:.2f} of the prediction{verdict}"
            )
    return lines


def _table(rows: list[dict[str, Any]]) -> list[str]:
    used = [name for name, cell in COLUMNS.items() if any(cell(r) != "-" for r in rows)]
    lines = ["| " + " | ".join(used) + " |", "|" + "---|" * len(used)]
    return lines + ["| " + " | ".join(COLUMNS[name](r) for name in used) + " |" for r in rows]


def markdown(result: dict[str, Any], found: Found, smoke: bool) -> str:
    facts, versions, commit = result["machine"], result["versions"], result["commit"]
    lines = ["# Kernels and training step on a GPU", ""]
    if smoke:
        lines += [
            "**A dry run at tiny shapes with interpreted kernels: none of these figures is a measurement.**",
            "",
        ]
    lines += [
        f"{facts['gpu'] or 'no GPU'}; {facts['cpu']}, {facts['cores']} cores; "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + f"; commit {commit['id'][:12]}{' with changes' if commit['dirty'] else ''}; {result['created']}; {found.seconds:.0f} s.",
        "",
    ]
    if found.copy:
        lines += [f"Device copy: {found.copy / 1e12:.3f} TB/s, read and written bytes counted.", ""]
    lines += [
        "GPU time: events around queued calls, inputs rotating over more than three times the L2 cache. Wall time: from the "
        "call to the end of its work. Host: until the call returns. Each side was checked against the reference first.",
        "",
        "## Tests",
        "",
        "| file | passed | skipped | outcome |",
        "|---|---|---|---|",
    ]
    lines += [f"| {o.name} | {o.passed} | {o.skipped} | {o.problem or 'passed'} |" for o in found.tests]
    lines += ["", "## Figures", ""]
    for group in dict.fromkeys(r["group"] for r in result["benchmarks"]):
        rows = [r for r in result["benchmarks"] if r["group"] == group]
        lines += [f"### {group}", "", *_table(rows), ""]
        if ratios := _ratios(rows):
            lines += [*ratios, ""]
    lines += ["## Skipped", ""]
    lines += [f"- {s['name']}: {s['reason']}" for s in result["skipped"]] or ["Nothing."]
    return "\n".join(lines) + "\n"
