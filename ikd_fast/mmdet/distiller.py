"""``IKDDistiller``: IKD as an mmdet model. A thin adapter: the maths is in :class:`ikd_fast.IKD`."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ikd_fast.attack import OnlineDIFGSM
from ikd_fast.augment import AugPlan
from ikd_fast.distill import IKD, Renormalize, StepBatch

from mmdet.registry import MODELS
from mmengine.logging import print_log
from mmengine.model import BaseModel

from .build import (
    build_detector,
    build_teacher,
    common_divisor,
    model_config,
    num_classes,
    preprocessor_facts,
)
from .preprocessor import IKDDetDataPreprocessor
from .progress import Progress
from .registry import KD_LOSSES
from .samples import to_targets
from .state import export_keys, import_keys
from .victim import MMDetVictim


@MODELS.register_module()
class IKDDistiller(BaseModel):
    """Distils ``teacher`` into ``student`` inside an unchanged mmdet Runner.

    Args:
        student: model dict of a stock mmdet config (``_base_.model``), its ``data_preprocessor`` included.
        teacher_config: config file of the teacher (``mmdet::`` paths too), or its model dict.
        teacher_ckpt: its weights, ``.pth`` or ``.safetensors``; every key must fit.
        losses: KD losses, e.g. ``[dict(type="FGDLoss", preset="retinanet")]``.
        adv: ``dict(beta=1e-5, attack=dict(type="OnlineDIFGSM", mode="single"), loss=dict(type="AdvFeatureLoss"))``, or None.
        augment: ``dict(type="AdaptiveFreqAug", ...)``, or None.
        stop_at: ``dict(epoch=16)``, ``dict(iter=N)`` or a fraction of the run.
        features: where losses with the default source look; a module path below the detector.
        init_student: load the teacher's weights outside its backbone into the student first (FGD's "inheriting").
        include_rpn: attack the RPN's class loss too (two-stage).
        seed: keys every draw of augmentation, attack and losses; ``augment`` and ``attack`` may name their own.
        allow_random_teacher: for tests.

    Checkpoints hold the student under its own names; weights of the losses are kept beside it (``kd_state_dict``), so
    ``epoch_N.pth`` loads into the plain student config.
    """

    keeps_kd_state = True

    def __init__(
        self,
        student: Mapping[str, Any],
        teacher_config: Any,
        teacher_ckpt: str | None = None,
        losses: Sequence[Mapping[str, Any]] = (),
        adv: Mapping[str, Any] | None = None,
        augment: Mapping[str, Any] | None = None,
        stop_at: Mapping[str, int] | float | None = None,
        features: Any = "neck",
        teacher_features: Any = None,
        init_student: bool = False,
        include_rpn: bool = False,
        match: str | None = None,
        seed: int = 0,
        allow_random_teacher: bool = False,
        init_cfg: Any = None,
    ) -> None:
        student_cfg, teacher_cfg = model_config(student), model_config(teacher_config)
        units, turned, divisor = preprocessor_facts(student_cfg)
        t_units, t_turned, t_divisor = preprocessor_facts(teacher_cfg)
        if isinstance(augment, Mapping):
            augment = {"seed": seed, **augment}
        lifted = lift_preprocessor(student_cfg, augment, common_divisor(divisor, t_divisor))
        adv = dict(adv or {})
        sources = [
            loss.get("source") for loss in (*losses, adv.get("loss") or {}) if isinstance(loss, Mapping)
        ]
        call = forward_for([features, teacher_features, *sources])
        super().__init__(data_preprocessor=lifted, init_cfg=init_cfg)
        convert = Renormalize(units, t_units, flip_channels=turned != t_turned)
        teacher = build_teacher(teacher_cfg, teacher_ckpt, convert, call, allow_random=allow_random_teacher)
        attack = build_attack(adv.pop("attack", {}), seed) if adv else None
        adv_loss, beta = adv.pop("loss", None), adv.pop("beta", 1e-5)
        if adv:
            raise TypeError(f"adv takes beta, attack and loss, got also {sorted(adv)}")
        detector = build_detector(student_cfg)
        self.init_student = init_student
        self.progress = Progress()
        self.ikd = IKD(
            detector,
            teacher,
            features=features,
            teacher_features=teacher_features,
            losses=[KD_LOSSES.build(dict(loss)) for loss in losses],
            attack=attack,
            beta=beta,
            adv_loss=None if adv_loss is None else KD_LOSSES.build(dict(adv_loss)),
            stop_at=stop_at,
            task_loss=self._task,
            victim=MMDetVictim(teacher, include_rpn=include_rpn),
            call=call,
            units=units,
            match=match,
            seed=seed,
        )
        self._register_state_dict_hook(export_keys)
        self._extras: dict[str, Any] = {}
        preprocessor: IKDDetDataPreprocessor = self.data_preprocessor
        preprocessor.is_active = self.is_active
        if attack is not None and attack.objective_name == "cls":
            preprocessor.teacher_classes = num_classes(teacher.net)
            _check_classes(detector, teacher.net)

    @property
    def student(self) -> Any:
        return self.ikd.student

    def is_active(self) -> bool:
        """Whether augmentation and adversarial branch are on now."""
        epoch = self.progress.require_epoch("IKDDistiller")
        return self.ikd.active(epoch=epoch, step=self.progress.step)

    def set_progress(self, epoch: int, step: int) -> None:
        """Where training is; :class:`~ikd_fast.mmdet.hooks.IKDHook` calls it."""
        self.progress.epoch, self.progress.step = epoch, step
        self.data_preprocessor.set_progress(epoch, step)

    def set_epoch(self, epoch: int) -> None:
        """For students that follow the epoch themselves (mmdet's SetEpochInfoHook)."""
        if hasattr(self.student, "set_epoch"):
            self.student.set_epoch(epoch)

    def set_total_steps(self, total: int) -> None:
        self.ikd.stop_at.total_steps = total

    def init_weights(self) -> None:
        """The student's own initialisation, then the teacher's neck and head where asked."""
        self.student.init_weights()
        if self.init_student:
            inherit(self.student, self.ikd.teacher.net)

    def forward(
        self,
        inputs: Tensor,
        data_samples: Any = None,
        mode: str = "tensor",
        geo: Tensor | None = None,
        plan: AugPlan | None = None,
        image_keys: list[int] | None = None,
    ) -> Any:
        """``mode="loss"``: the distillation step. ``"predict"`` and ``"tensor"``: the student's."""
        if mode != "loss":
            return self.student(inputs, data_samples, mode)
        if geo is None or image_keys is None:
            raise ValueError(
                "mode='loss' needs what IKDDetDataPreprocessor returns; call model.train_step(data, optim_wrapper)"
            )
        targets = to_targets(data_samples)
        batch = StepBatch(
            clean=inputs,
            geo=geo,
            targets=targets,
            sizes=[t["size"] for t in targets],
            image_ids=image_keys,
            epoch=self.progress.require_epoch("IKDDistiller"),
            step=self.progress.step,
            active=self.is_active(),
            plan=plan,
            task_targets=data_samples,
        )
        out = self.ikd.run(batch)
        # mmengine sums every key containing "loss"; everything else is logged only.
        result: dict[str, Any] = {}
        for name, term in out.terms.items():
            result[name.removeprefix("task/") if name.startswith("task/") else f"loss_{name}"] = term
        result.update(self._extras)
        result.update(out.logs)
        self._extras = {}
        return result

    def _task(self, net: Any, images: Tensor, samples: Any) -> dict[str, Tensor]:
        """The detector's losses as scalars, by their own names; what is not a loss is kept for the log."""
        terms = {}
        for name, value in net.loss(images, samples).items():
            scalar = value.mean() if isinstance(value, Tensor) else sum(v.mean() for v in value)
            if "loss" in name:
                terms[name] = scalar
            else:
                self._extras[name] = scalar
        return terms

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        import_keys(state_dict, prefix, self.ikd)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def describe(self) -> str:
        """What is distilled into what, in a few lines."""
        lines = [
            f"teacher {self.ikd.teacher!r}",
            f"student {type(self.student).__name__}",
            f"beta {self.ikd.beta:g}, {self.ikd.attack!r}",
        ]
        lines += [
            f"loss {name}: {loss!r}".splitlines()[0]
            for name, loss in zip(self.ikd._names, self.ikd.losses, strict=True)
        ]
        return "\n".join(
            [*lines, f"augment {self.data_preprocessor.augment!r}", f"stop {self.ikd.stop_at!r}"]
        )


def lift_preprocessor(config: Mapping[str, Any], augment: Any, divisor: int) -> dict[str, Any]:
    """The student's ``DetDataPreprocessor`` as ``IKDDetDataPreprocessor``, everything it says kept."""
    lifted = dict(config.get("data_preprocessor") or {})
    kind = str(lifted.get("type", "DetDataPreprocessor")).removeprefix("mmdet.")
    if kind not in ("DetDataPreprocessor", "IKDDetDataPreprocessor"):
        raise ValueError(
            f"the student's data_preprocessor is {kind}; IKDDistiller lifts DetDataPreprocessor. Write data_preprocessor="
            "dict(type='DetDataPreprocessor', ...) in the student's model"
        )
    lifted.update(type="IKDDetDataPreprocessor", augment=augment, pad_size_divisor=divisor, return_geo=True)
    return lifted


def build_attack(config: Any, seed: int = 0) -> OnlineDIFGSM:
    """An attack from ``dict(type="OnlineDIFGSM", ...)``; ``seed`` where it names none."""
    if isinstance(config, OnlineDIFGSM):
        return config
    config = dict(config)
    kind = config.pop("type", "OnlineDIFGSM")
    if kind not in ("OnlineDIFGSM", OnlineDIFGSM):
        raise ValueError(f"adv.attack must be dict(type='OnlineDIFGSM', ...), got type={kind!r}")
    return OnlineDIFGSM(**{"seed": seed, **config})


def forward_for(sources: Sequence[Any]) -> Any:
    """The cheapest forward that passes every tapped module: backbone and neck, or the head too."""
    given = [s for s in sources if s is not None and not callable(s)]
    paths = [p for s in given for p in ([s] if isinstance(s, str) else s)]
    if all(p.split(".")[0] in ("backbone", "neck") for p in paths):
        return lambda net, images: net.extract_feat(images)
    return lambda net, images: net(images, mode="tensor")


def inherit(student: nn.Module, teacher: nn.Module) -> None:
    """Copy the teacher's weights outside the backbone; shapes must agree."""
    own = student.state_dict()
    chosen = {k: v for k, v in teacher.state_dict().items() if not k.startswith("backbone.")}
    wrong = [k for k, v in chosen.items() if k not in own or own[k].shape != v.shape]
    if wrong:
        raise ValueError(
            f"init_student=True needs the same neck and head in both nets; {len(wrong)} weights differ: {', '.join(wrong[:8])}"
        )
    student.load_state_dict(chosen, strict=False)
    print_log(
        f"ikd_fast: {len(chosen)} weights of neck and head taken from the teacher",
        logger="current",
        level=logging.INFO,
    )


def _check_classes(student: nn.Module, teacher: nn.Module) -> None:
    s, t = num_classes(student), num_classes(teacher)
    if s is not None and t is not None and t < s:
        raise ValueError(
            f"the student has {s} classes, the teacher {t}: objective 'cls' attacks the teacher's classification of the student's "
            "classes; use a teacher of the same classes, or attack=dict(type='OnlineDIFGSM', objective='feature')"
        )
    if s is not None and t is not None and t > s:
        print_log(
            f"ikd_fast: the teacher has {t} classes, the student {s}: class id k must mean the same in both",
            logger="current",
            level=logging.WARNING,
        )
