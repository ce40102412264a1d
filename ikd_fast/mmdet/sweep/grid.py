"""The settings of a sweep and what each changes in a config."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ikd_fast.attack import OfflineImages
from ikd_fast.mmdet.errors import InputError
from ikd_fast.mmdet.settings import Branch, build_attack

OFFLINE = "offline"
KEPT = ("type", "objective", "targeted", "seed")
"""What an attack keeps from the config where the sweep gives it another mode: all else belongs to the mode."""


@dataclass(frozen=True)
class Setting:
    """One setting of a grid; ``mode`` None: no adversarial branch."""

    mode: str | None = None
    eps: float = 0.0
    beta: float = 0.0

    @property
    def name(self) -> str:
        """Of its folder."""
        return "baseline" if self.mode is None else f"{self.mode}_eps{self.eps:g}_beta{self.beta:g}"

    @classmethod
    def named(cls, name: str) -> Setting | None:
        """The setting of a folder; None where it is no setting's.

        >>> Setting.named("carry_eps8_beta1e-05")
        Setting(mode='carry', eps=8.0, beta=1e-05)
        """
        if name == "baseline":
            return cls()
        found = re.fullmatch(r"(\w+)_eps([\d.e+-]+)_beta([\d.e+-]+)", name)
        return cls(found[1], float(found[2]), float(found[3])) if found else None

    @property
    def title(self) -> str:
        if self.mode is None:
            return "no adversarial branch"
        if self.mode == OFFLINE:
            return f"images made before, beta {self.beta:g}"
        return f"{self.mode}, eps {self.eps:g}, beta {self.beta:g}"


def grid(
    model: Mapping[str, Any],
    *,
    modes: Sequence[str] = (),
    eps: Sequence[float] = (),
    betas: Sequence[float] = (),
    baseline: bool = True,
) -> list[Setting]:
    """All combinations, the baseline first; an empty list stands for the config's own value.

    Raises:
        InputError: a value that no attack takes.
    """
    kind = str(model.get("type")).rpartition(".")[2]
    if kind != "IKDDistiller":
        raise InputError(
            f"a sweep needs a config whose model is IKDDistiller, got {kind}; `ikd-fast init` writes one"
        )
    branch = Branch.of(model.get("adv") if model.get("adv") is not None else {})
    own = build_attack(branch.attack)
    settings = [Setting()] if baseline else []
    if isinstance(own, OfflineImages) and (baseline or eps or list(modes) not in ([], [OFFLINE])):
        raise InputError(
            "the config trains on adversarial images made before (OfflineImages, LoadAdversarialImage): only --beta and --seeds can "
            "be swept; write --no-baseline, and no --eps or --mode",
            usage=True,
        )
    radii = [0.0] if isinstance(own, OfflineImages) else eps or [own.eps]
    combinations = itertools.product(modes or [own.mode], radii, betas or [branch.beta])
    for mode, radius, beta in combinations:
        setting = Setting(mode, float(radius), float(beta))
        if not beta > 0:
            raise InputError(
                f"--beta must be above 0, got {beta:g}; --baseline is the run without", usage=True
            )
        try:
            build_attack(attack_of(model, setting))
        except (ValueError, TypeError) as error:
            raise InputError(f"{setting.title}: {error}", usage=True) from None
        if setting not in settings:
            settings.append(setting)
    return settings


def attack_of(model: Mapping[str, Any], setting: Setting) -> dict[str, Any]:
    """The config's attack with the setting's mode and eps. A step size scales with eps; another mode has its own defaults."""
    given = dict((model.get("adv") or {}).get("attack") or {})
    own = build_attack(given)
    if isinstance(own, OfflineImages):
        return given
    if setting.mode != own.mode:
        given = {key: value for key, value in given.items() if key in KEPT}
    elif given.get("step_size") is not None:
        given["step_size"] *= setting.eps / own.eps
    return {"type": "OnlineDIFGSM", **given, "mode": setting.mode, "eps": setting.eps}


def apply(cfg: Any, setting: Setting, repeat: int) -> Any:
    """A copy of ``cfg`` with the setting and with ``repeat`` added to every seed in it: repeat 0 is the config as written."""
    cfg = copy.deepcopy(cfg)
    if setting.mode is None:
        cfg.model.adv = None
    else:
        cfg.model.adv = {
            **(cfg.model.get("adv") or {}),
            "beta": setting.beta,
            "attack": attack_of(cfg.model, setting),
        }
    for part in (cfg.model, cfg.train_dataloader):
        _add_to_seeds(part, repeat)
    cfg.model.setdefault("seed", repeat)
    cfg.randomness = {**(cfg.get("randomness") or {}), "seed": seed_of(cfg, repeat)}
    return cfg


def seed_of(cfg: Any, repeat: int) -> int:
    """The Runner's seed of a repeat: the config's (0 where it has none) plus ``repeat``."""
    return int((cfg.get("randomness") or {}).get("seed") or 0) + repeat


def _add_to_seeds(node: Any, repeat: int) -> None:
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "seed" and isinstance(value, int):
                node[key] = value + repeat
            else:
                _add_to_seeds(value, repeat)
    elif isinstance(node, (list, tuple)):
        for value in node:
            _add_to_seeds(value, repeat)
