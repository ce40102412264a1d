"""What a config says of a distiller, as objects; what it cannot mean, as an error that says what to write."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from ikd_fast.attack import OfflineImages, OnlineDIFGSM
from ikd_fast.losses import KDLoss

from .build import model_config
from .registry import KD_LOSSES

Loss = KDLoss | Mapping[str, Any]
ADV = "dict(beta=1e-5, attack=dict(type='OnlineDIFGSM', mode='single'), loss=dict(type='AdvFeatureLoss'))"


def plain_model(name: str, config: Any) -> dict[str, Any]:
    """:func:`~ikd_fast.mmdet.build.model_config` of a detector, not of what distils one."""
    model = model_config(config)
    if str(model["type"]).rpartition(".")[2] == "IKDDistiller":
        what = f"{name}={config!r:.100}" if isinstance(config, str) else name
        advice = (
            "give the plain student config it was made from, and as teacher_ckpt its exported weights: ikd-fast export epoch_N.pth "
            "teacher.pth"
            if name == "teacher_config"
            else "give the plain detector's model, student=_base_.model of a stock config"
        )
        raise ValueError(f"{what} is itself a distilled config (its model is IKDDistiller); {advice}")
    return model


def listed(losses: Any) -> list[Loss]:
    """``losses`` as a list: one loss is a list of one."""
    found = [losses] if isinstance(losses, (KDLoss, Mapping)) else losses
    if not isinstance(found, (list, tuple)) or not all(isinstance(loss, (KDLoss, Mapping)) for loss in found):
        raise TypeError(
            f"losses must be a list of dicts, [dict(type='FGDLoss', preset='retinanet')], or one such dict, got {losses!r:.200}"
        )
    return list(found)


def source_of(loss: Loss | None) -> Any:
    """Where a loss looks, if it says so itself."""
    return loss.get("source") if isinstance(loss, Mapping) else getattr(loss, "source", None)


def build_kd_loss(loss: Loss) -> KDLoss:
    return loss if isinstance(loss, KDLoss) else KD_LOSSES.build(dict(loss))


class Branch(NamedTuple):
    """The adversarial branch as configured; ``attack=None``: there is none."""

    beta: float = 1e-5
    attack: Any = None
    loss: Loss | None = None

    @classmethod
    def of(cls, adv: Any) -> Branch:
        """From ``adv``: None is no branch, ``dict()`` the defaults."""
        if adv is None:
            return cls()
        if not isinstance(adv, Mapping):
            raise TypeError(f"adv must be {ADV}, or None for no adversarial branch, got {adv!r:.200}")
        extra = sorted(adv.keys() - {"beta", "attack", "loss"})
        if extra:
            raise TypeError(f"adv takes beta, attack and loss, got also {extra}")
        beta, attack, loss = adv.get("beta", 1e-5), adv.get("attack", {}), adv.get("loss")
        if isinstance(beta, bool) or not isinstance(beta, (int, float)):
            raise TypeError(f"adv.beta must be a number, got {beta!r}")
        if loss is not None and not isinstance(loss, (KDLoss, Mapping)):
            raise TypeError(f"adv.loss must be dict(type='AdvFeatureLoss', ...), got {loss!r:.200}")
        if not isinstance(attack, (OnlineDIFGSM, OfflineImages, Mapping)):
            raise TypeError(
                f"adv.attack must be dict(type='OnlineDIFGSM', ...), got {attack!r:.200}; for no adversarial branch write adv=None"
            )
        return cls(float(beta), attack, loss)


def build_attack(
    config: OnlineDIFGSM | OfflineImages | Mapping[str, Any], seed: int = 0
) -> OnlineDIFGSM | OfflineImages:
    """An attack from ``dict(type="OnlineDIFGSM", ...)``, or ``dict(type="OfflineImages")``; ``seed`` where it names none."""
    if isinstance(config, (OnlineDIFGSM, OfflineImages)):
        return config
    config = dict(config)
    kind = config.pop("type", "OnlineDIFGSM")
    if kind in ("OfflineImages", OfflineImages):
        if config:
            raise TypeError(
                f"adv.attack: OfflineImages has no parameter {sorted(config)}: how the images were made is with them, and where they are "
                "says LoadAdversarialImage in the train pipeline"
            )
        return OfflineImages()
    if kind not in ("OnlineDIFGSM", OnlineDIFGSM):
        raise ValueError(
            f"adv.attack must be dict(type='OnlineDIFGSM', ...) or dict(type='OfflineImages'), got type={kind!r}"
        )
    check_parameters(OnlineDIFGSM, config, "adv.attack")
    return OnlineDIFGSM(**{"seed": seed, **config})


def check_parameters(kind: type, given: Mapping[str, Any], where: str) -> None:
    """Raise where a config names a parameter that ``kind`` does not have, with the nearest and all it has."""
    valid = [name for name in inspect.signature(kind).parameters if name != "self"]
    for name in given:
        if name not in valid:
            near = difflib.get_close_matches(str(name), valid, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise TypeError(
                f"{where}: {kind.__name__} has no parameter {name!r}; {hint}It has {', '.join(valid)}"
            )


def forward_for(sources: Sequence[Any]) -> Callable[[nn.Module, Tensor], Any]:
    """The cheapest forward that passes every tapped module: backbone and neck, and the dense heads that are tapped."""
    given = [s for s in sources if s is not None and not callable(s)]
    paths = [p for s in given for p in ([s] if isinstance(s, str) else s)]
    parts = {p.split(".")[0] for p in paths} - {"backbone", "neck"}
    if "roi_head" in parts:
        raise ValueError(
            f"features {sorted(p for p in paths if p.startswith('roi_head'))}: boxes differ between student and teacher, and so do "
            "the maps of an RoI head; tap backbone, neck, rpn_head or bbox_head"
        )
    if not parts <= {"bbox_head", "rpn_head"}:
        return whole_forward
    return partial(dense_forward, heads=tuple(sorted(parts)))


def whole_forward(net: Any, images: Tensor) -> Any:
    """All of a detector, without its post-processing."""
    return net(images, mode="tensor")


def dense_forward(net: Any, images: Tensor, heads: Sequence[str] = ()) -> Any:
    """Backbone and neck, whose maps are returned, and those of ``heads`` that the net has."""
    maps = net.extract_feat(images)
    for head in heads:
        if hasattr(net, head):
            getattr(net, head)(maps)
    return maps
