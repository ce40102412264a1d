"""Algorithm 1 of IKD on any two nets."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ikd_fast.attack import AttackOutput, OfflineImages, OnlineDIFGSM
from ikd_fast.attack.memory import View
from ikd_fast.attack.objectives import cls_objective
from ikd_fast.augment import AdaptiveFreqAug
from ikd_fast.losses import AdvFeatureLoss, KDLoss, build_loss
from ikd_fast.pixels import PixelUnits

from .calibration import Calibration
from .copies import agreement, require_agreement
from .joint import FeatureTask, JointForward, joint_forward
from .norms import require_equal_branches, suspend_running_stats
from .prepare import prepare_batch
from .pyramids import MATCHES, match_pyramids
from .schedule import StopAt
from .step import StepBatch, StepOutput
from .taps import as_pyramid
from .teacher import FrozenTeacher, run_tapped
from .terms import log_key, loss_and_maps, task_terms, unique_names, weighted
from .victim import StepVictim, require_shared_forward


class IKD(nn.Module):
    r"""Inconsistent knowledge distillation: one training step of a student under a frozen teacher.

    .. math:: L = L_{GT}(x_{data}) + L_T(x_{data}) + \beta\, L_{adv}(x_{adv}), \quad
              x_{data} = a_{data}(x), \; x_{adv} = x_{geo} + \delta

    (Liang et al., ACM MM 2023, eq. 7 and Algorithm 1). x_geo is the image after the adaptive crop, x_data = x_geo + noise.
    The clean branch has the task loss and the KD losses; the adversarial branch has the feature loss only, and no ground truth.

    Args:
        student: the net to train. Trainable parameters of the losses are in this module too: optimise ``ikd.parameters()``.
        teacher: a net, which is frozen in place, or a :class:`FrozenTeacher`.
        features: where feature maps come from: a module path (``"neck"``, ``"neck.fpn_convs.{i}.conv"``), a list of paths, or a
            callable ``(net, images) -> maps``. Losses with the default source take this one.
        teacher_features: the same for the teacher where its modules have other names.
        losses: KD losses: :class:`KDLoss` objects or ``dict(type="FGDLoss", ...)``; weights are inside them.
        attack: :class:`OnlineDIFGSM`; :class:`~ikd_fast.attack.OfflineImages` for adversarial images that come with the batch; or None
            for no adversarial branch.
        beta: weight of the adversarial feature loss. Published: 1e-5 (one-stage), 2.5e-7 (two-stage), for ``AdvFeatureLoss()``.
        adv_loss: the loss of the adversarial branch.
        augment: :class:`AdaptiveFreqAug`, or None.
        stop_at: ``dict(epoch=16)``, ``dict(iter=N)`` or a fraction of ``total_steps``: from then on augmentation and adversarial
            branch are off and cost nothing.
        task_loss: ``(student, images, targets) -> Tensor | dict[str, Tensor]``, the one forward of the student on clean images.
            Default ``student(images, targets)`` (torchvision's way). Where ``features`` is a callable it returns ``(loss, maps)``.
        victim: what the attack differentiates. For ``objective="cls"``: ``(images, targets) -> class loss`` of the teacher, or
            an object with ``cls_loss`` and ``features``. Not needed for ``"feature"`` and custom objectives. In mode ``carry`` its
            forward must be the teacher's, through the tapped modules, once for the batch; or it has ``joint(batch, forward) ->
            (maps, loss)``, where ``forward()`` runs the teacher on ``batch.images`` and gives its maps.
        call: ``(net, images) -> anything``: a forward for features only. Default ``net(images)``.
        units: what float images are; default: what ``attack`` or ``augment`` say.
        pad_divisor: lists of images are stacked and zero-padded to a multiple of this.
        example: ``[1, C, H, W]`` probe that tells channel counts at construction.
        token_grid: (h, w) of token features ``[N, L, C]``.
        match: ``"resize"`` accepts maps of different stride; default: an error.
        joint_student: the student's clean and adversarial images in one forward. Its norms must be frozen, and ``task_loss`` must
            have ``from_features(student, features, targets)`` too (:class:`~ikd_fast.distill.joint.FeatureTask`).
        calibrate: in so many first steps, ``logs`` has each term's share of the student's gradient norm (one more backward pass
            a term), and after them a term out of balance is warned of once, with the ``beta`` to write; 0: never.
            Or a :class:`~ikd_fast.distill.calibration.Calibration`.

    Shape:
        ``step(images, targets, image_ids=ids, epoch=e, step=k) -> StepOutput``; images: list of ``[3, H, W]`` or
        ``[N, 3, H, W]``, uint8 or float in ``units``; targets: list of dicts with ``boxes`` (xyxy pixels) and ``labels``.
        ``views=``: for ``OnlineDIFGSM(mode="carry")``, one :class:`~ikd_fast.attack.memory.View` an image where the loader has
        flipped, cropped or resized it: what was done to the image that the id names. Default: nothing.
        ``adversarial=``: for :class:`~ikd_fast.attack.OfflineImages`, an image of the same shape and dtype for each.

    >>> import torch
    >>> from ikd_fast import AdvFeatureLoss
    >>> net = lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1))
    >>> ikd = IKD(net(), net(), features="0", losses=[AdvFeatureLoss()], units=PixelUnits(value_range=(0, 1)),
    ...           attack=OnlineDIFGSM(objective="feature"), task_loss=lambda s, x, y: s(x).mean())
    >>> boxes = torch.tensor([[1.0, 1.0, 9.0, 9.0]])
    >>> out = ikd.step(torch.rand(1, 3, 16, 16), [dict(boxes=boxes, labels=torch.tensor([0]))], image_ids=[7], epoch=0)
    >>> sorted(out.terms)
    ['kd/adv', 'kd/adv_feature', 'task/task']
    """

    # Of a deep copy: what its student had in common with the teacher, which is the original's.
    _agreed: frozenset[str] | None = None

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | FrozenTeacher,
        *,
        features: str | Sequence[str] | Callable = "neck",
        teacher_features: str | Sequence[str] | Callable | None = None,
        losses: Sequence[KDLoss | Mapping[str, Any]] = (),
        attack: OnlineDIFGSM | OfflineImages | None = None,
        beta: float = 1e-5,
        adv_loss: KDLoss | Mapping[str, Any] | None = None,
        augment: AdaptiveFreqAug | None = None,
        stop_at: Mapping[str, int] | float | None = None,
        total_steps: int | None = None,
        task_loss: Callable[[nn.Module, Tensor, Any], Any] | None = None,
        victim: Any = None,
        call: Callable[[nn.Module, Tensor], Any] | None = None,
        units: PixelUnits | None = None,
        pad_divisor: int = 1,
        example: Tensor | None = None,
        token_grid: tuple[int, int] | None = None,
        match: str | None = None,
        joint_student: bool = False,
        seed: int = 0,
        calibrate: int | Calibration = 10,
    ) -> None:
        super().__init__()
        if match not in MATCHES:
            raise ValueError(f"match must be one of {list(MATCHES)}, got {match!r}")
        if not beta >= 0:
            raise ValueError(f"beta must be >= 0, got {beta}")
        self.student = student
        self.call = call or (lambda net, images: net(images))
        kinds: tuple[type, ...]
        for name, value, kinds in (
            ("attack", attack, (OnlineDIFGSM, OfflineImages)),
            ("augment", augment, (AdaptiveFreqAug,)),
        ):
            if value is not None and not isinstance(value, kinds):
                kind = kinds[0].__name__
                raise TypeError(
                    f"{name} must be an ikd_fast.{kind} or None, got {value!r}; write {kind}(...)"
                )
        net = teacher.net if isinstance(teacher, FrozenTeacher) else teacher
        shared = {id(p) for p in student.parameters()} & {id(p) for p in net.parameters()}
        if shared:
            raise ValueError(
                f"student and teacher share {len(shared)} parameters, and freezing the teacher would freeze them in the student; "
                "give the teacher its own: copy.deepcopy(net)"
            )
        if not isinstance(teacher, FrozenTeacher):
            teacher = FrozenTeacher(teacher, call=self.call, grid=token_grid)
        self._teacher = teacher
        self.features = features
        self.teacher_features = features if teacher_features is None else teacher_features
        losses = [losses] if isinstance(losses, (KDLoss, Mapping)) else losses
        self.losses = nn.ModuleList(build_loss(loss) for loss in losses)
        self.attack = attack
        self.beta = float(beta)
        self.adv_loss = build_loss(adv_loss) if adv_loss is not None else AdvFeatureLoss()
        self.augment = augment
        self.stop_at = StopAt(stop_at, total_steps=total_steps)
        self.task_loss = task_loss or (lambda net, images, targets: net(images, targets))
        if joint_student and not isinstance(self.task_loss, FeatureTask):
            raise TypeError(
                "joint_student=True needs a task_loss with from_features(student, features, targets) beside its call, got "
                f"{type(self.task_loss).__name__}; write that method, or joint_student=False"
            )
        self.joint_student = joint_student
        self.victim = victim
        self.units = _units(units, attack, augment)
        if augment is not None and self.units is not None and augment.units != self.units:
            self.augment = copy.copy(augment)
            self.augment.units = self.units
        self.pad_divisor = pad_divisor
        self.token_grid = token_grid
        self.match = match
        self.seed = seed
        self.calibration = calibrate if isinstance(calibrate, Calibration) else Calibration(calibrate)
        self._names = unique_names(self.losses)
        if augment is not None and augment.box_format != "xyxy":
            raise ValueError(
                f"IKD reads boxes as xyxy pixels, augment has box_format={augment.box_format!r}; convert the targets' boxes and "
                "leave box_format alone"
            )
        sources = {id(s): s for s in (self._source(loss, features) for loss in self.losses) if callable(s)}
        if len(sources) > 1:
            raise ValueError(
                "features of the losses are different callables, but task_loss can return the maps of one only; give module "
                "paths, or one callable for all"
            )
        if attack is not None and attack.objective is cls_objective and attack.steps and victim is None:
            raise ValueError(
                "attack objective 'cls' needs victim=: (images, targets) -> classification loss of the teacher, e.g. "
                "victim=lambda x, y: F.cross_entropy(teacher(x), y, reduction='none'); or use objective='feature'"
            )
        if (
            attack is not None
            and attack.mode == "carry"
            and attack.objective is cls_objective
            and not attack.fresh
        ):
            require_shared_forward(victim, self._source(self.adv_loss, self.teacher_features))
        self._bind(torch.zeros(1, 3, 128, 128) if example is None else example)

    @property
    def teacher(self) -> FrozenTeacher:
        return self._teacher

    @property
    def adversarial(self) -> bool:
        """Whether there is an adversarial branch at all."""
        return self.attack is not None and self.beta > 0

    def _apply(self, fn: Callable, recurse: bool = True) -> IKD:
        """``to``, ``cuda``, ``half``: the teacher goes along, though it is no part of the module tree; not with a deep copy."""
        if self._agreed is None:
            self.teacher.net._apply(fn)
        return super()._apply(fn, recurse)

    def __deepcopy__(self, memo: dict) -> IKD:
        """A copy (an EMA, a snapshot) that shares the teacher. Only the original moves and casts it."""
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__dict__, memo))
        if self._agreed is None:
            twin._agreed = agreement(self.student, self.teacher)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled has a teacher of its own when it is read."""
        return {**self.__dict__, "_agreed": None}

    def _require_own_place(self) -> None:
        if self._agreed is not None:
            require_agreement(self._agreed, self.student, self.teacher)

    def active(self, *, epoch: int, step: int | None) -> bool:
        """Whether augmentation and adversarial branch are on at this point of the run."""
        return self.stop_at.active(epoch=epoch, step=step)

    def step(
        self,
        images: Tensor | Sequence[Tensor],
        targets: Any,
        *,
        image_ids: Sequence[int | str] | Tensor,
        epoch: int,
        step: int | None = None,
        views: Sequence[View] | None = None,
        adversarial: Tensor | Sequence[Tensor] | None = None,
    ) -> StepOutput:
        """One step of Algorithm 1: augment, attack, both branches, losses. Call ``.total.backward()`` on the result."""
        return self(
            images, targets, image_ids=image_ids, epoch=epoch, step=step, views=views, adversarial=adversarial
        )

    def forward(
        self,
        images: Tensor | Sequence[Tensor],
        targets: Any,
        *,
        image_ids: Sequence[int | str] | Tensor,
        epoch: int,
        step: int | None = None,
        views: Sequence[View] | None = None,
        adversarial: Tensor | Sequence[Tensor] | None = None,
    ) -> StepOutput:
        """As :meth:`step`, so that ``DistributedDataParallel(ikd)`` works."""
        if adversarial is not None and not isinstance(self.attack, OfflineImages):
            raise ValueError(
                f"adversarial images came with the batch, and attack is {self.attack!r:.60}, which takes none; write attack=OfflineImages()"
            )
        active = self.active(epoch=epoch, step=step)
        device = next(self.student.parameters()).device
        batch = prepare_batch(
            images, targets, image_ids=image_ids, epoch=epoch, step=step, active=active,
            augment=self.augment if active else None, units=self.units, pad_divisor=self.pad_divisor, device=device,
            views=views, needs_views=active and self.adversarial and bool(self.attack and self.attack.needs_views),
            adversarial=adversarial if active else None,
        )  # fmt: skip
        return self.run(batch)

    def run(self, batch: StepBatch) -> StepOutput:
        """The step on a prepared batch (what adapters call)."""
        self._require_own_place()
        logs: dict[str, Tensor] = {}
        teacher_maps, clean_maps = self._clean_teacher(batch)
        adversarial, both = None, None
        if self.adversarial and batch.active and self.joint_student:
            adversarial = self._craft(batch, clean_maps, with_maps=True)
            both = self._joint_forward(batch, adversarial.images) if len(adversarial.images) else None
        terms, maps = self._clean_branch(batch, both)
        if len(self.losses):
            ctx = batch.context(self.seed)
            for loss, name, s, t in zip(self.losses, self._names, maps, teacher_maps, strict=True):
                s, t = self._matched(loss, s, t, batch.clean)
                terms[f"kd/{name}"] = weighted(loss(s, t, ctx), 1.0, f"kd/{name}", logs)
        if self.adversarial and batch.active:
            adversarial = adversarial or self._craft(batch, clean_maps, with_maps=True)
            logs.update(self._attack_logs(adversarial))
            if len(adversarial.images):
                terms["kd/adv"] = self._adversarial_branch(batch, adversarial, logs, both)
        if self.adversarial and "kd/adv" not in terms:
            # Nothing to attack here, or the branch is over; but DistributedDataParallel still waits for its loss's parameters. In
            # a term, since an adapter may sum the terms itself.
            first = next(iter(terms))
            terms[first] = sum((0 * p.sum() for p in self.adv_loss.parameters()), start=terms[first])
        total = sum(terms.values(), start=batch.clean.new_zeros(()))
        if batch.plan is not None:
            logs["aug/crop_frac"] = torch.tensor(float(batch.plan.crop_frac))
            logs["aug/noise_frac"] = torch.tensor(float(batch.plan.noise_frac))
        for name, term in terms.items():
            logs[f"share/{log_key(name)}"] = (term / total).detach()
        if self.calibration.active:
            logs.update(self.calibration.observe(terms, self.student, beta=self.beta, step=batch.step))
        return StepOutput(total, terms, logs, batch.plan)

    def craft(self, batch: StepBatch) -> AttackOutput:
        """Adversarial examples of the teacher on x_geo; in mode ``carry`` this is a visit, which moves what is kept."""
        return self._craft(batch, None, with_maps=False)

    def _craft(self, batch: StepBatch, clean_maps: list[Tensor] | None, *, with_maps: bool) -> AttackOutput:
        if self.attack is None:
            raise RuntimeError("this IKD has no attack: build it with attack=OnlineDIFGSM(...)")
        self._require_own_place()
        require_equal_branches(self.student, self.attack.fraction)
        (source,) = self._teacher_sources([self.adv_loss])
        victim = StepVictim(self.teacher, source, self.victim, batch.sizes)
        if isinstance(self.attack, OfflineImages):
            return self.attack(victim, batch.geo, batch.adversarial, with_maps=with_maps)
        return self.attack(
            victim,
            batch.geo,
            batch.targets,
            image_ids=batch.image_ids,
            epoch=batch.epoch,
            sizes=batch.sizes,
            units=self.units,
            views=batch.views,
            clean_maps=clean_maps,
            with_maps=with_maps,
            step=batch.step,
        )

    def _clean_teacher(self, batch: StepBatch) -> tuple[list[list[Tensor]], list[Tensor] | None]:
        """The teacher's maps of x_data for each loss, and for the attack where it can use them: one forward for all."""
        sources = self._teacher_sources(self.losses)
        attack = self.attack if self.adversarial and batch.active else None
        # Of x_geo: noise is no part of what the attack starts from.
        wanted = attack is not None and attack.reads_clean_maps and batch.clean is batch.geo
        wanted = wanted and not hasattr(self.victim, "features")
        adv = self._teacher_sources([self.adv_loss]) if wanted else []
        if not sources:
            return [], None
        # A tap costs nothing, a callable its own forward.
        more = [source for source in adv if source not in sources and not callable(source)]
        maps = self.teacher.pyramids(batch.clean, [*sources, *more], batch.sizes)
        known = adv and (adv[0] in sources or more)
        clean = maps[sources.index(adv[0]) if adv[0] in sources else -1] if known else None
        return maps[: len(sources)], clean

    def _joint_forward(self, batch: StepBatch, images: Tensor) -> JointForward:
        sources = [self._source(loss, self.features) for loss in self.losses]
        source = self._source(self.adv_loss, self.features)
        return joint_forward(
            self.student, batch.clean, images, sources, [source], call=self.call, grid=self.token_grid
        )

    def _clean_branch(
        self, batch: StepBatch, both: JointForward | None = None
    ) -> tuple[dict[str, Tensor], list[list[Tensor]]]:
        targets = batch.targets if batch.task_targets is None else batch.task_targets
        if both is not None:
            task: Any = self.task_loss
            return task_terms(task.from_features(self.student, both.features, targets)), both.clean
        sources = [self._source(loss, self.features) for loss in self.losses]
        paths = [s for s in sources if not callable(s)]
        result: list[Any] = []

        def run() -> None:
            result.append(self.task_loss(self.student, batch.clean, targets))

        tapped = run_tapped(self.student, paths, run, batch.clean, self.token_grid)
        if not result:
            run()
        value, given = loss_and_maps(result[0]) if len(paths) < len(sources) else (result[0], None)
        rest = iter(tapped)
        maps = [as_pyramid(given, self.token_grid) if callable(s) else next(rest) for s in sources]
        return task_terms(value), maps

    def _adversarial_branch(
        self,
        batch: StepBatch,
        adversarial: AttackOutput,
        logs: dict[str, Tensor],
        both: JointForward | None = None,
    ) -> Tensor:
        images, t = adversarial.images, adversarial.maps or []
        ctx = batch.context(self.seed, adversarial.rows)
        source = self._source(self.adv_loss, self.features)
        if both is not None:
            (s,) = both.adversarial
        else:
            with suspend_running_stats(self.student):
                (s,) = run_tapped(
                    self.student, [source], lambda: self.call(self.student, images), images, self.token_grid
                )
        s, t = self._matched(self.adv_loss, s, t, images)
        return weighted(self.adv_loss(s, t, ctx), self.beta, "kd/adv", logs)

    def _attack_logs(self, out: AttackOutput) -> dict[str, Tensor]:
        grey = self.units.grey_level(out.delta) if self.units is not None else 1.0
        logs = {"attack/gradients": torch.tensor(float(out.gradient_evals))}
        if out.rows is not None:
            logs["attack/images"] = torch.tensor(float(len(out.rows)))
        if not len(out.images):
            return logs
        logs["attack/linf"] = (out.delta / grey).abs().amax()
        if out.memory_hits is not None:
            logs["attack/memory_hit"] = torch.tensor(out.memory_hits / len(out.images))
        if out.objective:
            first, last = out.objective[0].float().mean(), out.objective[-1].float().mean()
            logs["attack/objective"] = first
            if len(out.objective) > 1 and out.memory_hits is None:
                logs["attack/gain"] = last / first
        if out.nonfinite is not None:
            logs["attack/nonfinite"] = out.nonfinite.float().sum()
        return logs

    def _matched(
        self, loss: Any, student: Sequence[Tensor], teacher: Sequence[Tensor], images: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        height, width = images.shape[-2:]
        return match_pyramids(
            student, teacher, self._source(loss, self.features), self.match,
            levels=loss.levels, input_size=(height, width), loss=type(loss).__name__,
        )  # fmt: skip

    def _source(self, loss: Any, default: Any) -> Any:
        return default if loss.source is None else loss.source

    def _teacher_sources(self, losses: Iterable[Any]) -> list[Any]:
        return [self._source(loss, self.teacher_features) for loss in losses]

    @torch.no_grad()
    def _bind(self, example: Tensor) -> None:
        """A probe forward of each net: channel counts, levels, and a teacher that gives finite features."""
        losses = [*self.losses, *([self.adv_loss] if self.adversarial else [])]
        if not losses:
            return
        parameter = next(self.student.parameters())
        example = example.to(parameter.device, parameter.dtype)
        modes = {module: module.training for module in self.student.modules()}
        self.student.eval()
        try:
            student = run_tapped(
                self.student,
                [self._source(loss, self.features) for loss in losses],
                lambda: self.call(self.student, example),
                example,
                self.token_grid,
            )
        finally:
            for module, training in modes.items():
                module.training = training
        # Zeros cannot tell a healthy net from a dead one; noise of the images' size can.
        noise = torch.randn(example.shape, generator=torch.Generator().manual_seed(0)).to(example)
        teacher = self.teacher.pyramids(noise, self._teacher_sources(losses))
        for loss, s, t in zip(losses, student, teacher, strict=True):
            s, t = self._matched(loss, s, t, example)
            bad = [i for i, m in enumerate(t) if not bool(m.isfinite().all())]
            if bad:
                raise ValueError(
                    f"the teacher's features are not finite at levels {bad} of {self._source(loss, self.teacher_features)!r}: "
                    "check its checkpoint"
                )
            loss.bind([m.shape[1] for m in s], [m.shape[1] for m in t])
            loss.to(parameter.device)


def _units(
    units: PixelUnits | None, attack: OnlineDIFGSM | OfflineImages | None, augment: AdaptiveFreqAug | None
) -> PixelUnits | None:
    """One declaration is enough; two must agree."""
    undeclared = PixelUnits()
    said = {
        name: value
        for name, value in (
            ("units", units),
            ("attack", getattr(attack, "units", None)),
            ("augment", getattr(augment, "units", None)),
        )
        if value is not None and value != undeclared
    }
    if len(set(map(repr, said.values()))) > 1:
        raise ValueError(f"units, attack and augment describe the images differently: {said}")
    return next(iter(said.values()), None)
