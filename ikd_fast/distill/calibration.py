"""Whether each term of the loss moves the student: shares of the gradient norm in the first steps of a run."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .terms import log_key

KD_BAND = (0.01, 100.0)
ADV_BAND = (0.01, 1.0)
"""A term's gradient norm over the sum of the clean branch's other terms': below, it does next to nothing; above, it swamps them.

The demo's RetinaNet (FGD, ``single`` at eps 8, published beta 1e-5), means of 10 steps from steps 0, 50, 100 and 150 of 210:
adversarial branch 0.055, 0.065, 0.115, 0.116; FGD 15, 1.7, 2.3, 1.7. Over the task's gradient alone, which is next to nothing
before the head has learned anything, the same terms are at 5.2 and 94 in the first steps and at 0.2 and 2 from step 50.
"""
HALF_SCALE = 4096.0
"""float16 gradients of a weighted term are mostly zeros; a power of two in front is taken out of the norm again."""

logger = logging.getLogger("ikd_fast")


@dataclass(frozen=True)
class TermBalance:
    """One term, mean over the measured steps.

    Attributes:
        name: ``task`` (all terms of the task together), ``kd/<loss>`` or ``kd/adv``.
        ratio: gradient norm over the sum of the norms of the clean branch's other terms.
        gradshare: gradient norm over the sum of all terms' norms.
        share: of the loss.
        advice: what to write where ``ratio`` is outside the band, else empty.
    """

    name: str
    ratio: float
    gradshare: float
    share: float
    advice: str = ""


class Calibration:
    r"""Measures the first steps of a run, says once what it found, and is off.

    .. math:: g_k = \Vert \partial\, \mathrm{term}_k / \partial\, \theta_{student} \Vert_2, \quad
              \mathrm{gradshare}_k = g_k / \textstyle\sum_j g_j, \quad
              \mathrm{ratio}_k = g_k / \textstyle\sum_{j \ne k,\, j \ne adv} g_j

    over all trainable parameters of the student, for the task's terms as one, each KD loss, and the adversarial branch, all
    with their weights. ``ratio`` of a KD loss must be in ``kd_band``, that of the adversarial branch in ``adv_band``; outside, a
    warning gives the factor (for the adversarial branch the ``beta``) that brings it to the band's geometric mean: a gradient is
    linear in its weight.

    A measured step costs one more backward pass a term. Nothing is read from the device but once, after the last of them.
    Gradients are asked for by ``torch.autograd.grad``, so nothing is accumulated in ``.grad``, and DistributedDataParallel's
    reducer is not woken: every rank measures its own batch, rank 0 speaks. What is measured is unscaled, whatever
    ``GradScaler`` or accumulation do later.

    Where a net's gradients cannot be asked for by parameter or twice (reentrant activation checkpointing, ``torch.compile``
    with donated buffers), the calibration says so and is off.

    Args:
        steps: how many steps are measured; 0: none.
        kd_band, adv_band: (low, high) for ``ratio``.
        say: ``(text, is_warning)``; default: the logger ``ikd_fast``.

    >>> net = nn.Linear(1, 1, bias=False)
    >>> calibration = Calibration(1, say=lambda text, is_warning: None)
    >>> y = net(torch.ones(1, 1)).sum()
    >>> logs = calibration.observe({"task/task": 4 * y, "kd/adv": y}, net, beta=1.0)
    >>> [round(float(v), 2) for v in logs.values()], calibration.report[1].ratio
    ([0.8, 0.2], 0.25)
    """

    def __init__(
        self,
        steps: int = 10,
        *,
        kd_band: tuple[float, float] = KD_BAND,
        adv_band: tuple[float, float] = ADV_BAND,
        say: Callable[[str, bool], None] | None = None,
    ) -> None:
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
            raise ValueError(f"calibrate must be a number of steps >= 0, got {steps!r}; write 0 for none")
        for name, band in (("kd_band", kd_band), ("adv_band", adv_band)):
            if not 0 < band[0] < band[1]:
                raise ValueError(f"{name} must be (low, high) with 0 < low < high, got {band}")
        self.steps, self.kd_band, self.adv_band = steps, kd_band, adv_band
        self.say = say or _log
        self.report: list[TermBalance] | None = None
        self._norms: list[dict[str, Tensor]] = []
        self._values: list[dict[str, Tensor]] = []
        self._left = steps

    @property
    def active(self) -> bool:
        """Whether the next step is measured."""
        return self._left > 0

    def observe(
        self, terms: Mapping[str, Tensor], student: nn.Module, *, beta: float, step: int = 0
    ) -> dict[str, Tensor]:
        """Measure one step: ``gradshare/<term>``, detached scalars for the log. Empty where there is nothing to measure.

        Args:
            terms: the addends of the loss, with their graph, which is kept.
            student: whose trainable parameters count.
            beta: weight that ``kd/adv`` has in ``terms``.
            step: of the run; a run that is resumed beyond the first steps is not measured.
        """
        if self._left == self.steps and step >= self.steps:
            self._left = 0
        groups = {name: term for name, term in _groups(terms).items() if term.requires_grad}
        if not self.active or not torch.is_grad_enabled() or set(groups) <= {"task"}:
            return {}
        if self._left == self.steps and any(_replays(term) for term in groups.values()):
            return self._give_up("reentrant activation checkpointing hides its parameters")
        try:
            norms = gradient_norms(groups, student)
        except RuntimeError as error:
            return self._give_up(str(error).strip().splitlines()[0])
        self._left -= 1
        self._norms.append(norms)
        self._values.append({name: term.detach() for name, term in groups.items()})
        total = torch.stack(list(norms.values())).sum()
        logs = {f"gradshare/{log_key(name)}": norm / total for name, norm in norms.items()}
        if self._left == 0:
            self._conclude(beta)
        return logs

    def _give_up(self, why: str) -> dict[str, Tensor]:
        self._left = 0
        self.say(
            f"calibration is off: the student's gradients could not be taken term by term ({why}). Write calibrate=0, or "
            "use_reentrant=False for activation checkpointing",
            True,
        )
        return {}

    def _conclude(self, beta: float) -> None:
        norms, values = _means([self._norms, self._values])
        self._norms, self._values = [], []
        all_norms, all_values = sum(norms.values()), sum(values.values())
        self.report = []
        for name, norm in norms.items():
            others = sum(v for k, v in norms.items() if k not in (name, "kd/adv"))
            ratio = norm / others if others > 0 else math.inf
            advice = "" if name == "task" else self._advice(name, ratio, beta)
            share = values[name] / all_values if all_values else math.nan
            gradshare = norm / all_norms if all_norms else math.nan
            self.report.append(TermBalance(name, ratio, gradshare, share, advice))
        if not _first_process():
            return
        self.say(render(self.report, self.steps), False)
        for row in self.report:
            if row.advice:
                self.say(row.advice, True)

    def _advice(self, name: str, ratio: float, beta: float) -> str:
        low, high = self.adv_band if name == "kd/adv" else self.kd_band
        if low <= ratio <= high:
            return ""
        found = (
            f"{name}: its gradient norm is {ratio:.3g} times the clean branch's other terms' over the first {self.steps} steps, expected "
            f"{low:g} to {high:g}"
        )
        if not math.isfinite(ratio) or ratio == 0:
            return (
                f"{found}. No weight puts that right: are the losses finite, and do they reach the student?"
            )
        factor = math.sqrt(low * high) / ratio
        what = "it does next to nothing" if ratio < low else "it swamps them"
        write = (
            f"beta={beta * factor:.2g} (now {beta:.3g})"
            if name == "kd/adv"
            else f"its weights times {factor:.2g}"
        )
        return f"{found}: {what}. {write} would bring it to {math.sqrt(low * high):.2g}"


def gradient_norms(terms: Mapping[str, Tensor], student: nn.Module) -> dict[str, Tensor]:
    """L2 norm of each term's gradient to the student's trainable parameters: float32 scalars on the terms' device.

    The graph stays; ``.grad`` and running statistics are as before.
    """
    parameters = [p for p in student.parameters() if p.requires_grad]
    kept = list(_running_stats(student))
    found = {}
    for name, term in terms.items():
        half = torch.is_autocast_enabled(term.device.type) and (
            torch.get_autocast_dtype(term.device.type) == torch.float16
        )
        scale = HALF_SCALE if half else 1.0
        gradients = torch.autograd.grad(
            term, parameters, torch.full_like(term, scale), retain_graph=True, allow_unused=True
        )
        parts = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients if g is not None]
        norm = torch.linalg.vector_norm(torch.stack(parts)) if parts else term.new_zeros(())
        found[name] = norm.float() / scale
    for buffer, before in kept:
        # Activation checkpointing has run the forward again. Not an in-place change that the graph would see.
        buffer.data.copy_(before)
    return found


def render(report: Iterable[TermBalance], steps: int) -> str:
    """One line a term."""
    lines = [f"terms of the loss over the first {steps} steps (gradient norm over all student parameters):"]
    for row in report:
        lines.append(
            f"  {row.name:<16} {100 * row.share:5.1f} % of the loss, {100 * row.gradshare:5.1f} % of the gradient norms, "
            f"{row.ratio:.3g} times the clean branch's others"
        )
    return "\n".join(lines)


def _groups(terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
    groups: dict[str, Tensor] = {}
    for name, term in terms.items():
        group = "task" if name.startswith("task/") else name
        groups[group] = groups[group] + term if group in groups else term
    return groups


def _running_stats(net: nn.Module) -> Iterable[tuple[Tensor, Tensor]]:
    for module in net.modules():
        if isinstance(module, _BatchNorm) and module.training:
            for buffer in module.buffers(recurse=False):
                yield buffer, buffer.clone()


def _means(tables: list[list[dict[str, Tensor]]]) -> list[dict[str, float]]:
    """For each table, mean of each name over the rows that have it and are finite; NaN where none is. One read from the device."""
    names = [list(dict.fromkeys(name for row in table for name in row)) for table in tables]
    missing = next(iter(tables[0][0].values())).new_full((), math.nan, dtype=torch.float32)
    flat = [row.get(n, missing).float() for ns, t in zip(names, tables, strict=True) for n in ns for row in t]
    values = iter(torch.stack(flat).tolist())
    found = []
    for ns, table in zip(names, tables, strict=True):
        columns = {n: [v for v in (next(values) for _ in table) if math.isfinite(v)] for n in ns}
        found.append({n: sum(c) / len(c) if c else math.nan for n, c in columns.items()})
    return found


def _replays(term: Tensor) -> bool:
    """Whether reentrant checkpointing is in the graph: it runs a backward of its own, which asks for no parameter's gradient."""
    nodes, seen = [term.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        if node.name() == "CheckpointFunctionBackward":
            return True
        seen.add(node)
        nodes.extend(parent for parent, _ in node.next_functions)
    return False


def _first_process() -> bool:
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0


def _log(text: str, is_warning: bool) -> None:
    logger.log(logging.WARNING if is_warning else logging.INFO, "%s", text)
