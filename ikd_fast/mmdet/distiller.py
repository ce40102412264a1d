"""``IKDDistiller``: IKD as an mmdet model. A thin adapter: the maths is in :class:`ikd_fast.IKD`."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ikd_fast.attack import OfflineImages
from ikd_fast.attack.memory import View
from ikd_fast.augment import AugPlan
from ikd_fast.distill import IKD, Renormalize, StepBatch
from ikd_fast.distill.calibration import Calibration

from mmdet.registry import MODELS
from mmengine.logging import print_log
from mmengine.model import BaseModel

from .banner import render
from .build import build_detector, build_teacher, common_divisor, num_classes, preprocessor_facts
from .classes import attacks_classes, check_counts
from .facts import collect
from .joint import DetectorTask
from .preprocessor import IKDDetDataPreprocessor
from .progress import Progress
from .samples import to_targets
from .settings import Branch, build_attack, build_kd_loss, forward_for, listed, plain_model, source_of
from .state import export_keys, import_keys
from .victim import MMDetVictim, check_class_loss


@MODELS.register_module()
class IKDDistiller(BaseModel):
    """Distils ``teacher`` into ``student`` inside an unchanged mmdet Runner.

    Where the attack's objective is ``"cls"``, class id k must mean the same to both: class names in the teacher's checkpoint are
    compared with the training data's before the first step.

    Args:
        student: model dict of a stock mmdet config (``_base_.model``), its ``data_preprocessor`` included.
        teacher_config: config file of the teacher (``mmdet::`` paths too), or its model dict.
        teacher_ckpt: its weights, ``.pth`` or ``.safetensors``; every key must fit.
        losses: KD losses, e.g. ``[dict(type="FGDLoss", preset="retinanet")]``; a single one may go without the list.
        adv: ``dict(beta=1e-5, attack=dict(type="OnlineDIFGSM", mode="single"), loss=dict(type="AdvFeatureLoss"))``, which are also
            the defaults of ``dict()``; ``attack=dict(type="OfflineImages")`` for images of ``ikd-fast attack``; None: no adversarial
            branch.
        augment: ``dict(type="AdaptiveFreqAug", ...)``, or None.
        stop_at: ``dict(epoch=16)``, ``dict(iter=N)`` or a fraction of the run.
        features: where losses with the default source look: a module path below the detector, or a list of paths. Losses choose
            levels of it by ``levels=[...]``: an R-CNN's neck gives five maps, of which the paper distils 0..3.
        teacher_features: the same for the teacher, where maps of equal stride have other names there. RetinaNet under Mask R-CNN
            (strides 8, 16 and 32): ``features=[f"neck.fpn_convs.{i}.conv" for i in (0, 1, 2)]``, here ``for i in (1, 2, 3)``.
        match: ``"resize"`` accepts maps of different stride; default: an error.
        init_student: load the teacher's weights outside its backbone into the student first (FGD's "inheriting").
        include_rpn: attack the RPN's class loss too (two-stage).
        seed: keys every draw of augmentation, attack and losses; ``augment`` and ``attack`` may name their own.
        joint_student: the student's clean and adversarial images in one forward; its norms must be frozen (``norm_eval=True``).
        teacher_engine: how the teacher is run: ``dict(fold_bn=True, dtype="bfloat16", ...)``
            (:class:`~ikd_fast.distill.TeacherEngine`); None: as its config has it.
        calibrate: first steps in which each term's share of the student's gradient norm is logged (``gradshare/<term>``); a term
            out of balance is then warned of once. 0: none.
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
        losses: Mapping[str, Any] | Sequence[Mapping[str, Any]] = (),
        adv: Mapping[str, Any] | None = None,
        augment: Mapping[str, Any] | None = None,
        stop_at: Mapping[str, int] | float | None = None,
        features: Any = "neck",
        teacher_features: Any = None,
        init_student: bool = False,
        include_rpn: bool = False,
        match: str | None = None,
        seed: int = 0,
        joint_student: bool = False,
        teacher_engine: Mapping[str, Any] | None = None,
        calibrate: int = 10,
        allow_random_teacher: bool = False,
        init_cfg: Any = None,
        data_preprocessor: Any = None,
    ) -> None:
        if data_preprocessor is not None:
            raise TypeError(
                "IKDDistiller takes the student's data_preprocessor: write it (batch_augments, mean, std, ...) in the student, "
                "student=dict(..., data_preprocessor=dict(...)), e.g. in the student's own config"
            )
        student_cfg, teacher_cfg = (
            plain_model("student", student),
            plain_model("teacher_config", teacher_config),
        )
        chosen, branch = listed(losses), Branch.of(adv)
        units, turned, divisor = preprocessor_facts(student_cfg)
        t_units, t_turned, t_divisor = preprocessor_facts(teacher_cfg)
        if isinstance(augment, Mapping):
            augment = {"seed": seed, **augment}
        lifted = lift_preprocessor(student_cfg, augment, common_divisor(divisor, t_divisor))
        call = forward_for([features, teacher_features, *map(source_of, (*chosen, branch.loss))])
        super().__init__(data_preprocessor=lifted, init_cfg=init_cfg)
        convert = Renormalize(units, t_units, flip_channels=turned != t_turned)
        teacher = build_teacher(
            teacher_cfg,
            teacher_ckpt,
            convert,
            call,
            allow_random=allow_random_teacher,
            engine=teacher_engine,
        )
        attack = None if branch.attack is None else build_attack(branch.attack, seed)
        detector = build_detector(student_cfg)
        self.init_student = init_student
        self.progress = Progress()
        self.ikd = IKD(
            detector,
            teacher,
            features=features,
            teacher_features=teacher_features,
            losses=[build_kd_loss(loss) for loss in chosen],
            attack=attack,
            beta=branch.beta,
            adv_loss=None if branch.loss is None else build_kd_loss(branch.loss),
            stop_at=stop_at,
            task_loss=DetectorTask(self._terms, call) if joint_student else self._task,
            joint_student=joint_student,
            victim=MMDetVictim(teacher, include_rpn=include_rpn),
            call=call,
            units=units,
            match=match,
            seed=seed,
            calibrate=Calibration(calibrate, say=say),
        )
        self._register_state_dict_hook(export_keys)
        self._extras: dict[str, Any] = {}
        preprocessor: IKDDetDataPreprocessor = self.data_preprocessor
        preprocessor.is_active = self.is_active
        preprocessor.needs_views = self.ikd.adversarial and getattr(attack, "needs_views", False)
        preprocessor.takes_adversarial = isinstance(attack, OfflineImages)
        if preprocessor.takes_adversarial and preprocessor.batch_augments:
            raise ValueError(
                "attack OfflineImages: batch_augments would change the clean images and not the adversarial ones; write such transforms "
                "into the pipeline, behind LoadAdversarialImage, or take them out"
            )
        if attack is not None and attack.objective_name == "cls":
            preprocessor.teacher_classes = num_classes(teacher.net)
            names = None if teacher.loaded is None else teacher.loaded.classes
            check_counts(num_classes(detector), num_classes(teacher.net), names)
            if attacks_classes(self.ikd) and not teacher_cfg.get("train_cfg"):
                check_class_loss(self.ikd.victim)

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
        views: list[View] | None = None,
        adversarial: Tensor | None = None,
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
            views=views,
            adversarial=adversarial,
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
        return self._terms(net.loss(images, samples))

    def _terms(self, losses: dict[str, Any]) -> dict[str, Tensor]:
        terms = {}
        for name, value in losses.items():
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
        """What is distilled into what: the lines that are logged when training starts, as far as the model knows them."""
        return render(collect(self))


def say(text: str, is_warning: bool) -> None:
    """Into the Runner's log."""
    level = logging.WARNING if is_warning else logging.INFO
    print_log(f"ikd_fast: {text}", logger="current", level=level)


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
