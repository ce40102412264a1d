"""Whole trainings by mmengine's Runner in two processes: uneven batches, averaged weights, resuming on other ranks."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch

from ikd_fast.mmdet.sampler import keyed_order
from tests.distributed import work
from tests.distributed.work import fcos
from tests.mmdet.conftest import retinanet, stock_config, with_ikd

from mmdet.registry import MODELS
from mmengine.hooks import Hook

pytestmark = pytest.mark.distributed

RANDOM = [dict(type="RandomFlip", prob=0.5), dict(type="CutOut", n_holes=(1, 4), cutout_shape=(12, 12))]


def config_for(root, *, batch_size=2, images=12, student=None, **changes):
    """No crop, so that every image has the batch's size whatever comes with it."""
    config = stock_config(
        root, batch_size=batch_size, pipeline_extra=[dict(type="KeyedRandomness", transforms=RANDOM)]
    )
    config["model"] = student or fcos()
    config = with_ikd(config, teacher_config=retinanet(12), augment=None, **changes)
    loader = config["train_dataloader"]
    loader["sampler"] = dict(type="KeyedSampler")
    loader["dataset"] = loader["dataset"] | dict(indices=images)
    config["default_hooks"] = config["default_hooks"] | dict(
        checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=2)
    )
    config["env_cfg"] = config["env_cfg"] | dict(dist_cfg=dict(backend="gloo"))
    return config | dict(val_dataloader=None, val_evaluator=None, val_cfg=None)


def test_an_uneven_last_batch(pair, coco_root, tmp_path):
    """11 images, 2 ranks, batches of 4: 6 images a rank, one of them from the epoch's beginning again; 4 then 2."""
    a, b = pair.run(work.train, config_for(coco_root, batch_size=4, images=11), str(tmp_path))
    assert a["wrapped"] == "MMDistributedDataParallel"
    assert [len(row["ids"]) for row in a["rows"]] == [4, 2, 4, 2] == [len(row["ids"]) for row in b["rows"]]
    for epoch in range(2):
        rows = zip(a["rows"][2 * epoch : 2 * epoch + 2], b["rows"][2 * epoch : 2 * epoch + 2], strict=True)
        seen = [i for x, y in rows for both in zip(x["ids"], y["ids"], strict=True) for i in both]
        order = keyed_order(11, epoch, 0).tolist()
        assert seen == [*order, order[0]]
    assert a["weights"] == b["weights"]


class Kept(Hook):
    """What this rank's memory has done by the end, and what the log says of it."""

    priority = "VERY_LOW"

    def after_train(self, runner):
        memory = work.plain(runner.model).ikd.attack.memory
        found = dict(memory.counters)
        if runner.rank == 0:
            found["log"] = Path(runner._log_dir, f"{runner.timestamp}.log").read_text()
        Path(runner.work_dir, f"rank{runner.rank}.json").write_text(json.dumps(found))


def carry_config(root, **sampler):
    config = config_for(root, adv=dict(beta=1e-5, attack=dict(type="OnlineDIFGSM", mode="carry")))
    config["train_dataloader"]["sampler"] = dict(type="KeyedSampler", **sampler)
    return config | dict(train_cfg=dict(type="EpochBasedTrainLoop", max_epochs=3), log_level="INFO")


@pytest.mark.parametrize("slots", [4, None])
def test_carry_meets_each_image_on_one_rank_where_the_sampler_has_slots(pair, coco_root, tmp_path, slots):
    """12 images, 3 epochs. With slots the two ranks together are cold 12 times; without, some images are cold on both."""
    a, b = pair.run(work.train, carry_config(coco_root, slots=slots), str(tmp_path), (Kept(),))
    own = [{i for row in rank["rows"] for i in row["ids"]} for rank in (a, b)]
    found = [json.loads((tmp_path / f"rank{r}.json").read_text()) for r in range(2)]
    for ids, counts in zip(own, found, strict=True):
        assert counts["unknown"] == counts["images"] == len(ids)
        assert counts["hits"] == 18 - len(ids)
    if slots:
        assert [len(ids) for ids in own] == [6, 6]
        assert not own[0] & own[1]
        assert "each of the 2 ranks keeps its own images', about" in found[0]["log"]
    else:
        assert own[0] & own[1]
        assert "starts every image anew that another rank has had" in found[0]["log"]


class Averages(Hook):
    """What EMAHook should hold, recomputed from the live weights."""

    priority = "VERY_LOW"

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        live = {k: v.clone() for k, v in work.plain(runner.model).state_dict().items()}
        if runner.iter == 0:
            self.mean = live
        else:
            for k, v in self.mean.items():
                self.mean[k] = torch.lerp(v, live[k], 0.1) if v.is_floating_point() else live[k]
        self.live = live

    def after_train(self, runner):
        (hook,) = [h for h in runner.hooks if type(h).__name__ == "EMAHook"]
        ema, model = hook.ema_model.module, work.plain(runner.model)
        assert ema.ikd.teacher is model.ikd.teacher
        own = sum(p.numel() for p in model.parameters())
        assert sum(p.numel() for p in ema.parameters()) == own
        if runner.rank == 0:
            torch.save(dict(mean=self.mean, live=self.live), f"{runner.work_dir}/truth.pth")


def train_with_ema(config, folder):
    return work.train(config | dict(custom_hooks=[dict(type="EMAHook", momentum=0.1)]), folder, (Averages(),))


def test_ema_averages_student_and_losses_and_not_the_teacher(pair, coco_root, tmp_path):
    """``state_dict`` has the averaged student, ``kd_state_dict`` the averages of the losses' layers, ``ema_state_dict`` the live ones."""
    a, b = pair.run(train_with_ema, config_for(coco_root), str(tmp_path))
    assert a["weights"] == b["weights"]
    saved, truth = torch.load(tmp_path / "iter_6.pth"), torch.load(tmp_path / "truth.pth")
    averaged = saved["state_dict"] | saved["kd_state_dict"]
    assert averaged.keys() == truth["mean"].keys()
    assert any(k.startswith("kd.losses.0.") for k in averaged)
    student = MODELS.build(fcos())
    trained = {name for name, _ in student.named_parameters()}
    for key, value in truth["mean"].items():
        if key in trained or key.startswith("kd."):
            torch.testing.assert_close(averaged[key], value, rtol=1e-5, atol=1e-7)
    live = {
        k.removeprefix("module."): v for k, v in saved["ema_state_dict"].items() if k.startswith("module.")
    }
    assert all(torch.equal(live[k], v) for k, v in truth["live"].items())
    assert any(not torch.equal(live[k], averaged[k]) for k in trained)
    for plain in (saved["state_dict"], {k: v for k, v in live.items() if not k.startswith("kd.")}):
        student.load_state_dict(plain, strict=True)


def merged(results):
    """Ids of each global batch, whatever ranks they came to, with the sums of their pixels."""
    return [
        sorted(
            pair
            for result in results
            for pair in zip(result["rows"][k]["ids"], result["rows"][k]["sums"], strict=True)
        )
        for k in range(len(results[0]["rows"]))
    ]


class Start(Hook):
    def before_train(self, runner):
        self.weights = {k: v.clone() for k, v in runner.model.state_dict().items()}


def test_one_rank_and_two_see_the_same_images_and_learn_the_same(pair, coco_root, tmp_path):
    """4 images an iteration either way. Weights after 6 steps of AdamW differ by rounding only, which its normalised steps
    of 1e-3 can lift where a gradient is near 0: a hundredth of the way gone."""
    begin = Start()
    one = work.train(config_for(coco_root, batch_size=4), str(tmp_path / "one"), (begin,))
    two = pair.run(work.train, config_for(coco_root), str(tmp_path / "two"))
    assert merged([one]) == merged(two)
    a, b = (torch.load(tmp_path / name / "iter_6.pth")["state_dict"] for name in ("one", "two"))

    def distance(x, y):
        return sum(float((x[k] - y[k]).norm()) ** 2 for k in x if x[k].is_floating_point()) ** 0.5

    assert distance(a, b) < 0.01 * distance(a, begin.weights)
    for ours, theirs in zip(zip(*[r["rows"] for r in two], strict=True), one["rows"], strict=True):
        mean = sum(row["losses"]["loss"] for row in ours) / 2
        assert mean == pytest.approx(theirs["losses"]["loss"], rel=1e-3)


@pytest.mark.parametrize("direction", ["two to two", "one to two"])
def test_resuming_inside_an_epoch(pair, coco_root, tmp_path, direction):
    """From iteration 2 of 3: on the same ranks bit for bit, on other ranks the next images of the global order."""
    one = direction == "one to two"
    whole = [work.train(config_for(coco_root, batch_size=4), str(tmp_path / "a"))] if one else (
        pair.run(work.train, config_for(coco_root), str(tmp_path / "a"))
    )  # fmt: skip
    (tmp_path / "b").mkdir()
    shutil.copy(tmp_path / "a" / "iter_2.pth", tmp_path / "b")
    changes = dict(resume=True, load_from=str(tmp_path / "b" / "iter_2.pth"))
    rest = pair.run(work.train, config_for(coco_root), str(tmp_path / "b"), **changes)
    assert merged(rest) == merged(whole)[2:]
    assert rest[0]["weights"] == rest[1]["weights"]
    if not one:
        assert rest[0]["weights"] == whole[0]["weights"]
        assert [r["rows"] for r in rest] == [r["rows"][2:] for r in whole]


def test_resuming_inside_an_epoch_with_another_global_batch_is_refused(coco_root, tmp_path):
    config = config_for(coco_root, batch_size=4)
    work.train(config, str(tmp_path))
    changes = dict(resume=True, load_from=str(tmp_path / "iter_2.pth"))
    with pytest.raises(
        ValueError,
        match=r"after 2 iterations of an epoch, with batch_size 4, now 3: the next image is not defined",
    ):
        work.train(config_for(coco_root, batch_size=3), str(tmp_path), **changes)
    with pytest.raises(ValueError, match=r"with images 12, now 9; batch_size 4, now 3"):
        work.train(config_for(coco_root, batch_size=3, images=9), str(tmp_path), **changes)
    stock = copy.deepcopy(config)
    stock["train_dataloader"]["sampler"] = dict(type="DefaultSampler", shuffle=True)
    work.train(stock, str(tmp_path / "stock"))
    with pytest.raises(ValueError, match=r"was saved by a run without KeyedSampler"):
        work.train(config, str(tmp_path), resume=True, load_from=str(tmp_path / "stock" / "iter_2.pth"))
    endless = copy.deepcopy(config)
    endless["train_dataloader"]["sampler"]["infinite"] = True
    with pytest.raises(ValueError, match=r"infinite=True\) never ends an epoch"):
        work.train(endless, str(tmp_path))
