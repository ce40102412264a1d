"""What a deep copy of an IKD may assume about the teacher, which it shares with the original."""

from __future__ import annotations

from typing import Any

from torch import nn

from .teacher import FrozenTeacher


def agreement(student: nn.Module, teacher: FrozenTeacher) -> frozenset[str]:
    """Which of device and dtype the two nets have in common."""
    s, t = _place(student), _place(teacher.net)
    return frozenset(name for name in s.keys() & t.keys() if s[name] == t[name])


def require_agreement(agreed: frozenset[str], student: nn.Module, teacher: FrozenTeacher) -> None:
    """What the two had in common when they were copied must be so still.

    Raises:
        RuntimeError: the copy was moved or cast without its teacher, or the original's teacher without the copy.
    """
    lost = sorted(agreed - agreement(student, teacher))
    if not lost:
        return
    s, t = _place(student), _place(teacher.net)
    apart = " and ".join(f"{name} ({s[name]}, the teacher's is {t[name]})" for name in lost)
    wanted = ", ".join(f"{name}={_literal(s[name])}" for name in lost)
    raise RuntimeError(
        f"this IKD is a deep copy, which shares the teacher of its original and does not move it; its student is now of another "
        f"{apart}. Build an IKD with a teacher of its own, IKD(student, copy.deepcopy(ikd.teacher.net), ...), or, where the "
        f"original is not used any more, write ikd.teacher.to({wanted})"
    )


def _literal(value: Any) -> str:
    return str(value) if str(value).startswith("torch.") else repr(str(value))


def _place(net: nn.Module) -> dict[str, Any]:
    parameter = next(net.parameters(), None)
    return {} if parameter is None else {"device": parameter.device, "dtype": parameter.dtype}
