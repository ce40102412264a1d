"""The config diff on a stock mmdet RetinaNet: training, checkpoints, resume, and what plain FGD would give."""

from __future__ import annotations

import json
from fractions import Fraction

import pytest
import torch

import ikd_fast.mmdet  # noqa: F401
from ikd_fast import DistillContext, FGDLoss, KDLoss, OnlineDIFGSM, register_loss
from ikd_fast.distill import FeatureTap
from tests.mmdet.conftest import retinanet, run, stock_config, with_ikd

from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner


def build(**changes):
    from mmengine.registry import init_default_scope

    init_default_scope("mmdet")
    torch.manual_seed(0)
    return MODELS.build(with_ikd(dict(model=retinanet()), **changes)["model"])


@pytest.fixture(scope="module")
def trained(coco_root, tmp_path_factory):
    """Two epochs of the full step, with checkpoints."""
    work = tmp_path_factory.mktemp("ikd")
    runner, logs = run(with_ikd(stock_config(coco_root)), work)
    return work, runner, logs


def test_every_branch_ran_and_nothing_is_summed_twice(trained):
    _, _, logs = trained
    assert len(logs) == 6
    for log in logs:
        terms = [v for k, v in log.items() if "loss" in k and k != "loss"]
        assert log["loss"] == pytest.approx(sum(terms), rel=1e-5)
        assert {"loss_cls", "loss_bbox", "loss_kd/fgd", "loss_kd/adv", "attack/linf"} <= set(log)
        assert log["attack/linf"] == pytest.approx(8, abs=1e-3)
    # Even images have a box of 48 px in the annotation: half of each epoch is cropped, though resized to 40 px here.
    assert sum(log["aug/crop_frac"] for log in logs) / 6 == pytest.approx(0.5)
    assert sum(log["aug/noise_frac"] for log in logs) > 0


def test_epoch_checkpoint_is_a_plain_students(trained):
    work, runner, _ = trained
    checkpoint = torch.load(work / "epoch_2.pth", weights_only=True)
    plain = MODELS.build(retinanet())
    result = plain.load_state_dict(checkpoint["state_dict"], strict=True)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    for key, value in runner.model.student.state_dict().items():
        assert torch.equal(checkpoint["state_dict"][key], value)
    kd = checkpoint["kd_state_dict"]
    assert kd
    assert all(k.startswith("kd.losses.0.") for k in kd)
    teacher = sum(p.numel() for p in runner.model.ikd.teacher.net.parameters())
    assert sum(v.numel() for v in [*checkpoint["state_dict"].values(), *kd.values()]) < teacher


def test_resume_at_an_epochs_end_equals_the_uninterrupted_run(trained, coco_root, tmp_path):
    work, _, logs = trained
    run(with_ikd(stock_config(coco_root, epochs=1)), tmp_path)
    _, resumed = run(with_ikd(stock_config(coco_root)), tmp_path, resume=True)
    assert len(resumed) == 3
    for ours, theirs in zip(resumed, logs[3:], strict=True):
        for key in theirs:
            if key.startswith("loss"):
                assert ours[key] == pytest.approx(theirs[key], rel=1e-6), key


def test_plain_student_and_own_checkpoints_can_be_loaded_from(trained, coco_root, tmp_path):
    work, runner, _ = trained
    plain = retinanet()
    weights = MODELS.build(plain).state_dict()
    torch.save(dict(state_dict=weights), tmp_path / "plain.pth")

    class Snapshot(Hook):
        def before_train_iter(self, runner, batch_idx, data_batch=None):
            if runner.iter == 0:
                self.seen = {k: v.clone() for k, v in runner.model.state_dict().items()}

    for path, expected in (
        (tmp_path / "plain.pth", weights),
        (work / "epoch_2.pth", torch.load(work / "epoch_2.pth")["state_dict"]),
    ):
        config = with_ikd(stock_config(coco_root, epochs=1)) | dict(
            load_from=str(path), work_dir=str(tmp_path / path.stem)
        )
        r = Runner.from_cfg(Config(config))
        hook = Snapshot()
        r.register_hook(hook)
        r.train()
        assert all(torch.equal(hook.seen[k], v) for k, v in expected.items())
    kd = torch.load(work / "epoch_2.pth")["kd_state_dict"]
    assert all(torch.equal(hook.seen[k], v) for k, v in kd.items())


def test_a_student_key_left_without_a_weight_stops_the_run(coco_root, tmp_path):
    weights = MODELS.build(retinanet()).state_dict()
    weights.pop("neck.fpn_convs.0.conv.weight")
    torch.save(dict(state_dict=weights), tmp_path / "bad.pth")
    with pytest.raises(
        ValueError, match=r"lacks 1 of the student's \d+ weights: neck.fpn_convs.0.conv.weight"
    ):
        run(with_ikd(stock_config(coco_root, epochs=1)), tmp_path, load_from=str(tmp_path / "bad.pth"))


def batch_of(model, coco_root, n=4):
    config = Config(stock_config(coco_root, batch_size=n))
    loader = Runner.build_dataloader(config.train_dataloader, seed=0)
    data = next(iter(loader))
    model.set_progress(0, 0)
    return model.data_preprocessor(data, True)


def test_without_adv_and_augment_it_is_plain_fgd(coco_root):
    """Task losses are mmdet's own, the KD term is FGDLoss on tapped necks: to 1e-6."""
    model = build(adv=None, augment=None).train()
    data = batch_of(model, coco_root)
    out = model(**data, mode="loss")
    torch.manual_seed(0)
    twin = build(adv=None, augment=None).train()
    with FeatureTap(twin.student, "neck").capture() as s:
        task = twin.student.loss(data["inputs"], data["data_samples"])
    with torch.no_grad():
        t = twin.ikd.teacher.net.extract_feat(data["inputs"])
    loss = FGDLoss(preset="retinanet")
    loss.bind([16] * 4, [16] * 4)
    loss.load_state_dict(twin.ikd.losses[0].state_dict())
    samples = data["data_samples"]
    ctx = DistillContext(
        [x.gt_instances.bboxes for x in samples],
        None,
        [x.img_shape for x in samples],
        tuple(data["inputs"].shape[-2:]),
        data["image_keys"],
    )
    expected = {k: float(sum(v).detach()) for k, v in task.items()} | {
        "loss_kd/fgd": float(sum(loss(s, t, ctx).values()).detach())
    }
    got = {k: float(v.detach()) for k, v in out.items() if "loss" in k}
    assert got == pytest.approx(expected, rel=1e-6)


def test_stop_at_inside_a_run(coco_root, tmp_path):
    _, logs = run(with_ikd(stock_config(coco_root), stop_at=dict(epoch=1)), tmp_path)
    assert ["loss_kd/adv" in log for log in logs] == [True] * 3 + [False] * 3
    assert ["aug/crop_frac" in log for log in logs] == [True] * 3 + [False] * 3
    # What is written is what was: mmengine by itself repeats the last value of a key that is gone.
    (scalars,) = tmp_path.glob("*/vis_data/scalars.json")
    written = [line for line in map(json.loads, scalars.read_text().splitlines()) if "loss" in line]
    assert ["attack/linf" in line for line in written] == [True] * 3 + [False] * 3
    for line in written:
        shares = sum(v for k, v in line.items() if k.startswith("share/"))
        assert shares == pytest.approx(1, abs=1e-5)
    assert not any(k.startswith(("aug/", "kd/adv", "loss_kd/adv")) for k in written[-1])
    _, logs = run(with_ikd(stock_config(coco_root), stop_at=0.5), tmp_path / "fraction")
    assert ["loss_kd/adv" in log for log in logs] == [True] * 3 + [False] * 3


def test_iteration_based_loop_counts_the_samplers_passes(coco_root, tmp_path):
    config = with_ikd(stock_config(coco_root))
    config["train_cfg"] = dict(type="IterBasedTrainLoop", max_iters=7, val_interval=1000)
    config["train_dataloader"]["sampler"] = dict(type="InfiniteSampler", shuffle=True)
    seen = []

    class Watch(Hook):
        priority = "LOWEST"

        def before_train_iter(self, runner, batch_idx, data_batch=None):
            seen.append(runner.model.progress.epoch)

    runner = Runner.from_cfg(
        Config(
            config
            | dict(work_dir=str(tmp_path), default_hooks=config["default_hooks"] | dict(checkpoint=None))
        )
    )
    runner.register_hook(Watch())
    runner.train()
    assert seen == [0, 0, 0, 1, 1, 1, 2]


def test_teacher_and_student_of_different_input_units(coco_root):
    """A teacher on BGR 0..255 images sees the loader's own pixels; padding suits both divisors."""
    teacher = retinanet(12, mean=[0, 0, 0], std=[1, 1, 1], bgr_to_rgb=False, pad_size_divisor=48)
    model = build(teacher_config=teacher, augment=None, adv=None).eval()
    config = Config(stock_config(coco_root, batch_size=2))
    data = next(iter(Runner.build_dataloader(config.train_dataloader, seed=0)))
    raw = [x.clone() for x in data["inputs"]]
    model.set_progress(0, 0)
    out = model.data_preprocessor(data, True)
    assert tuple(out["inputs"].shape[-2:]) == (96, 96)
    sizes = [x.img_shape for x in out["data_samples"]]
    seen = model.ikd.teacher.convert(out["inputs"], sizes)
    for i, image in enumerate(raw):
        # (x - mean) / std and back in float32: 255 * 6e-8 * a few operations.
        torch.testing.assert_close(seen[i, :, :80, :80], image.float(), atol=2e-4, rtol=0)
    assert float(seen[:, :, 80:].abs().max()) == 0


def test_init_student_inherits_neck_and_head():
    model = build(init_student=True, teacher_config=retinanet(8))
    model.init_weights()
    teacher = model.ikd.teacher.net
    assert torch.equal(model.student.bbox_head.retina_cls.weight, teacher.bbox_head.retina_cls.weight)
    assert not torch.equal(model.student.backbone.conv1.weight, teacher.backbone.conv1.weight)
    with pytest.raises(
        ValueError, match=r"init_student=True needs the same neck and head.*neck.lateral_convs"
    ):
        build(init_student=True).init_weights()


@register_loss
class CosineGapForTests(KDLoss):
    default_name = "cosine"

    def forward(self, student, teacher, ctx):
        return sum(1 - torch.cosine_similarity(s, t).mean() for _, s, t in self.pairs(student, teacher))


def test_own_loss_by_name_and_no_collision_with_mmdets_registry(coco_root):
    @MODELS.register_module(name="FGDLoss", force=True)
    class SomebodyElses(torch.nn.Module):
        pass

    try:
        model = build(
            losses=[dict(type="CosineGapForTests"), dict(type="ikd_fast.FGDLoss")], adv=None, augment=None
        )
        assert [type(x) for x in model.ikd.losses] == [CosineGapForTests, FGDLoss]
    finally:
        MODELS.module_dict.pop("FGDLoss")
    out = model(**batch_of(model, coco_root), mode="loss")
    assert float(out["loss_kd/cosine"]) > 0


def test_errors_name_cause_and_remedy(tmp_path):
    with pytest.raises(ValueError, match="the teacher has no weights: give teacher_ckpt"):
        build(allow_random_teacher=False)
    torch.save(
        {k: v for k, v in MODELS.build(retinanet(12)).state_dict().items() if "retina_cls" not in k},
        tmp_path / "t.pth",
    )
    with pytest.raises(
        ValueError,
        match=r"2 missing in the checkpoint: bbox_head.retina_cls.bias, bbox_head.retina_cls.weight",
    ):
        build(allow_random_teacher=False, teacher_ckpt=str(tmp_path / "t.pth"))
    with pytest.raises(ValueError, match="unknown loss 'FGD'; valid: .*FGDLoss"):
        build(losses=[dict(type="FGD")])
    with pytest.raises(ValueError, match="preset"):
        build(losses=[dict(type="FGDLoss", preset="yolo")])
    with pytest.raises(TypeError, match=r"adv takes beta, attack and loss, got also \['alpha'\]"):
        build(adv=dict(beta=1, alpha=2))
    with pytest.raises(ValueError, match="mode must be one of"):
        build(adv=dict(attack=dict(type="OnlineDIFGSM", mode="pgd")))
    with pytest.raises(ValueError, match="the student has 3 classes, the teacher 1"):
        build(student=retinanet(classes=3))
    with pytest.raises(FileNotFoundError, match="teacher_config: no file ./nowhere.py"):
        build(teacher_config="./nowhere.py")
    with pytest.raises(FileNotFoundError, match="ikd_fast ships no such file; did you mean ikd_fast::demo/"):
        build(teacher_config="ikd_fast::demo/nothing.py")
    model = build()
    with pytest.raises(
        RuntimeError, match=r"nobody has told it the epoch; add custom_hooks=\[dict\(type='IKDHook'\)\]"
    ):
        model.is_active()


def test_class_ids_the_teacher_lacks(coco_root):
    model = build()
    config = Config(stock_config(coco_root, batch_size=2))
    data = next(iter(Runner.build_dataloader(config.train_dataloader, seed=0)))
    data["data_samples"][1].gt_instances.labels[0] = 5
    model.set_progress(0, 0)
    with pytest.raises(ValueError, match=r"has class ids \[0, 5\], but the teacher has 1 classes"):
        model.data_preprocessor(data, True)


@pytest.mark.parametrize(
    "box", [[float("nan"), 1.0, 5.0, 5.0], [9.0, 1.0, 5.0, 5.0], [0.0, 0.0, float("inf"), 4.0]]
)
def test_broken_boxes_name_their_file(coco_root, box):
    model = build(augment=None)
    config = Config(stock_config(coco_root, batch_size=2))
    data = next(iter(Runner.build_dataloader(config.train_dataloader, seed=0)))
    data["data_samples"][1].gt_instances.bboxes.tensor[1] = torch.tensor(box)
    model.set_progress(0, 0)
    path = data["data_samples"][1].img_path
    with pytest.raises(ValueError, match=rf"{path}: box 1 is .*expected finite xyxy with x1 <= x2"):
        model.data_preprocessor(data, True)


def test_attack_is_on_the_teachers_class_loss(coco_root):
    """The crafted images raise the teacher's own loss_cls, computed by mmdet, above random signs."""
    model = build(augment=None).train()
    data = batch_of(model, coco_root)
    teacher = model.ikd.teacher.net

    def teacher_loss(images):
        with torch.no_grad():
            return float(sum(teacher.loss(images, data["data_samples"])["loss_cls"]))

    from ikd_fast.distill import StepBatch
    from ikd_fast.mmdet.samples import to_targets

    targets = to_targets(data["data_samples"])
    batch = StepBatch(
        data["inputs"], data["geo"], targets, [t["size"] for t in targets], data["image_keys"], 0, 0
    )
    clean = teacher_loss(batch.geo)
    single = teacher_loss(model.ikd.craft(batch).images)
    model.ikd.attack = OnlineDIFGSM("random_sign")
    control = teacher_loss(model.ikd.craft(batch).images)
    assert single - clean > 3 * abs(control - clean)


def test_ema_averages_the_student_and_resumes(coco_root, tmp_path):
    """mmengine's EMAHook beside the distiller: checkpoints are whole, plain, and a resumed run goes on with the same averages."""
    ema = dict(custom_hooks=[dict(type="EMAHook", momentum=0.1)])
    full, _ = run(with_ikd(stock_config(coco_root)) | ema, tmp_path / "full")
    run(with_ikd(stock_config(coco_root, epochs=1)) | ema, tmp_path / "part")
    run(with_ikd(stock_config(coco_root)) | ema, tmp_path / "part", resume=True)
    a, b = (torch.load(tmp_path / name / "epoch_2.pth") for name in ("full", "part"))
    assert not any(k.startswith("kd.") for k in a["state_dict"])
    MODELS.build(retinanet()).load_state_dict(a["state_dict"], strict=True)
    for part in ("state_dict", "kd_state_dict", "ema_state_dict"):
        assert a[part].keys() == b[part].keys()
        for key, value in a[part].items():
            torch.testing.assert_close(b[part][key], value, rtol=1e-5, atol=1e-7)
    teacher = full.model.ikd.teacher
    (hook,) = [h for h in full.hooks if type(h).__name__ == "EMAHook"]
    copy = hook.ema_model.module
    assert copy.ikd.teacher is teacher
    assert copy.ikd.victim.teacher is teacher


def test_other_models_keep_their_own_kd_modules(tmp_path):
    from torch.utils.data import DataLoader

    from mmengine.model import BaseModel

    class Model(BaseModel):
        def __init__(self):
            super().__init__()
            self.kd = torch.nn.Linear(2, 1)

        def forward(self, inputs, mode="tensor"):
            return dict(loss=self.kd(inputs).mean())

    loader = DataLoader(
        torch.rand(4, 2), batch_size=2, collate_fn=lambda rows: dict(inputs=torch.stack(rows))
    )
    runner = Runner(
        Model(), str(tmp_path), train_dataloader=loader, train_cfg=dict(by_epoch=True, max_epochs=1),
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1)), default_scope="mmengine", log_level="WARNING",
    )  # fmt: skip
    runner.train()
    assert sorted(torch.load(tmp_path / "epoch_1.pth")["state_dict"]) == ["kd.bias", "kd.weight"]


def test_a_checkpoint_of_other_shapes_stops_the_run(coco_root, tmp_path):
    torch.save(dict(state_dict=MODELS.build(retinanet(classes=5)).state_dict()), tmp_path / "five.pth")
    with pytest.raises(ValueError, match=r"2 of the checkpoint's weights have another shape.*retina_cls"):
        run(with_ikd(stock_config(coco_root, epochs=1)), tmp_path, load_from=str(tmp_path / "five.pth"))


def test_resuming_another_losses_run_is_refused(trained, coco_root, tmp_path):
    work, _, _ = trained
    config = with_ikd(stock_config(coco_root, epochs=3), losses=[dict(type="MGDLoss")])
    with pytest.raises(ValueError, match="to resume from lacks .* weights of the losses"):
        run(config, tmp_path, resume=True, load_from=str(work / "epoch_2.pth"))


def test_loader_transforms_follow_an_iteration_based_loop(coco_root, tmp_path):
    """The loader's crop of every batch is that of the pass the model is told."""
    seen = []

    class Watch(Hook):
        priority = "LOWEST"

        def before_train_iter(self, runner, batch_idx, data_batch=None):
            samples = data_batch["data_samples"]
            seen.append(
                (runner.model.progress.epoch, [s.img_shape for s in samples], [s.img_id for s in samples])
            )

    from ikd_fast import AdaptiveFreqAug
    from ikd_fast.mmdet.samples import image_key
    from tests.mmdet.conftest import draw

    settings = dict(noise_prob=0.0, area_threshold=40**2)
    config = with_ikd(
        stock_config(coco_root, pipeline_extra=[dict(type="AdaptiveFreqAug", **settings)]),
        augment=None,
        adv=None,
    )
    config["train_cfg"] = dict(type="IterBasedTrainLoop", max_iters=7, val_interval=1000)
    config["train_dataloader"]["sampler"] = dict(type="InfiniteSampler", shuffle=True)
    config["default_hooks"] = config["default_hooks"] | dict(checkpoint=None)
    runner = Runner.from_cfg(Config(config | dict(work_dir=str(tmp_path))))
    runner.register_hook(Watch())
    runner.train()
    assert [epoch for epoch, *_ in seen] == [0, 0, 0, 1, 1, 1, 2]
    aug = AdaptiveFreqAug(**settings)
    for epoch, shapes, ids in seen:
        for shape, i in zip(shapes, ids, strict=True):
            boxes = torch.tensor(draw(i)[1]) * (80 / 96)
            key = image_key(dict(img_id=i, img_path=str(coco_root / "images" / f"{i}.png")))
            plan = aug.plan([boxes], [(80, 80)], [key], epoch, scale=[(80 / 96, 80 / 96)])
            assert shape == plan.out_sizes[0]


def test_passes_of_an_infinite_sampler_count_all_ranks(coco_root, monkeypatch):
    from ikd_fast.mmdet import hooks

    config = Config(stock_config(coco_root, batch_size=2)["train_dataloader"])
    config.sampler = dict(type="InfiniteSampler", shuffle=True)
    loader = Runner.build_dataloader(config, seed=0)
    runner = type("R", (), dict(train_dataloader=loader))
    assert hooks._iterations_per_pass(runner) == 6  # 12 images, 2 each
    monkeypatch.setattr(hooks, "get_world_size", lambda: 3)
    assert hooks._iterations_per_pass(runner) == 2
    # 12 images in 8 slots: passes of 16 places, also for the sampler's own count of its epochs.
    config.sampler = dict(type="KeyedSampler", infinite=True, slots=8)
    loader = Runner.build_dataloader(config, seed=0)
    assert hooks._iterations_per_pass(type("R", (), dict(train_dataloader=loader))) == Fraction(16, 6)
    epochs = [i.epoch for i, _ in zip(loader.batch_sampler.sampler, range(40), strict=False)]
    assert [epochs.count(e) for e in range(3)] == [16, 16, 8]


def test_augmenting_in_loader_and_model_is_refused(coco_root, tmp_path):
    config = with_ikd(stock_config(coco_root, pipeline_extra=[dict(type="AdaptiveFreqAug")]))
    with pytest.raises(ValueError, match="images would be augmented twice"):
        run(config, tmp_path)


def test_one_seed_keys_everything_and_sources_of_the_adversarial_loss_are_tapped(coco_root):
    model = build(seed=5, adv=dict(loss=dict(type="AdvFeatureLoss", source="bbox_head.retina_cls")))
    assert (model.ikd.seed, model.ikd.attack.seed, model.data_preprocessor.augment.seed) == (5, 5, 5)
    out = model(**batch_of(model, coco_root), mode="loss")
    assert float(out["loss_kd/adv"].detach()) > 0
    own = build(seed=5, augment=dict(type="AdaptiveFreqAug", seed=6))
    assert own.data_preprocessor.augment.seed == 6


def test_an_image_without_boxes(coco_root):
    model = build().train()
    config = Config(stock_config(coco_root, batch_size=3))
    data = next(iter(Runner.build_dataloader(config.train_dataloader, seed=0)))
    data["data_samples"][1].gt_instances = data["data_samples"][1].gt_instances[:0]
    model.set_progress(0, 0)
    out = model(**model.data_preprocessor(data, True), mode="loss")
    assert all(bool(v.isfinite()) for k, v in out.items() if "loss" in k)
