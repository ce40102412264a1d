"""Runs that are stopped inside an epoch and resumed, and loaders with any number of workers."""

from __future__ import annotations

import time

import pytest
import torch

from tests.mmdet.conftest import IMAGES, stock_config, with_ikd

from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner

pytestmark = pytest.mark.distributed


@pytest.fixture(autouse=True)
def _no_formatting(monkeypatch):
    """mmengine lays every config out with yapf, half a second each."""
    monkeypatch.setattr("mmengine.config.config.FormatCode", lambda text, **_: (text, True))


class Interrupt(Hook):
    """Ctrl-C after iteration ``at``."""

    priority = "LOWEST"

    def __init__(self, at):
        self.at = at

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter + 1 == self.at:
            raise KeyboardInterrupt


class Seen(Hook):
    """What came: (epoch of the model, index of the batch, image ids, sums of the pixels)."""

    priority = "LOWEST"

    def __init__(self, rows):
        self.rows = rows

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        ids = [s.img_id for s in data_batch["data_samples"]]
        sums = [float(x.sum()) for x in data_batch["inputs"]]
        lr = runner.optim_wrapper.get_lr()["lr"][0]
        self.rows.append((runner.model.progress.epoch, batch_idx, ids, sums, lr))


RANDOM = [
    dict(type="AdaptiveFreqAug", noise_prob=1.0),
    dict(type="RandomFlip", prob=0.5),
    dict(type="CutOut", n_holes=(1, 4), cutout_shape=(12, 12)),
]


def keyed_config(root, *, workers=0, loop="epoch", infinite=False, grouped=False, batch_size=5):
    config = with_ikd(stock_config(root, batch_size=batch_size, pipeline_extra=RANDOM), augment=None)
    loader = config["train_dataloader"]
    loader |= dict(num_workers=workers, persistent_workers=workers > 0)
    loader["sampler"] = dict(type="KeyedSampler", infinite=infinite)
    if grouped:
        loader["batch_sampler"] = dict(type="AspectRatioBatchSampler")
    if loop == "iter":
        config["train_cfg"] = dict(type="IterBasedTrainLoop", max_iters=6, val_interval=1000)
    config["param_scheduler"] = [
        dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=5),
        dict(type="MultiStepLR", by_epoch=True, milestones=[1], gamma=0.5),
    ]
    config["default_hooks"] = config["default_hooks"] | dict(
        checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=2)
    )
    return config | dict(val_dataloader=None, val_evaluator=None, val_cfg=None)


def train(config, work, *, stop=None, resume=False):
    seen, logs = [], []

    class Record(Hook):
        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            logs.append({k: float(torch.as_tensor(v).detach()) for k, v in outputs.items()})

    runner = Runner.from_cfg(Config(config | dict(work_dir=str(work), resume=resume)))
    for hook in (Seen(seen), Record(), *([Interrupt(stop)] if stop else [])):
        runner.register_hook(hook)
    if stop:
        with pytest.raises(KeyboardInterrupt):
            runner.train()
    else:
        runner.train()
    workers = runner.train_dataloader._iterator
    if workers is not None:
        # Left to the garbage collector, each of them is waited for five seconds.
        workers._shutdown_workers()
    return runner, seen, logs


def assert_bitwise(a, b):
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_bitwise(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_bitwise(x, y)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


CASES = {
    "epoch": {},
    "epoch, 2 workers": dict(workers=2),
    "epoch, grouped": dict(grouped=True),
    "iter, 2 workers": dict(loop="iter", workers=2),
    "iter, infinite, 2 workers": dict(loop="iter", infinite=True, workers=2),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_stopped_inside_an_epoch_equals_the_uninterrupted_one(coco_root, tmp_path, case, monkeypatch):
    """12 images, batches of 5: three iterations an epoch. Stopped in iteration 5, resumed from the checkpoint of 4, all bits equal."""
    sleep = time.sleep
    # mmengine waits 2 s at each end of a finite loader.
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(0 if seconds == 2 else seconds))
    config = keyed_config(coco_root, **CASES[case])
    full, seen, logs = train(config, tmp_path / "full")
    assert len(seen) == 6
    train(config, tmp_path / "cut", stop=5)
    resumed, seen_2, logs_2 = train(config, tmp_path / "cut", resume=True)
    assert seen_2 == seen[4:]
    assert logs_2 == logs[4:]
    assert resumed.max_iters == full.max_iters == 6
    a, b = (torch.load(tmp_path / name / "iter_6.pth", weights_only=True) for name in ("full", "cut"))
    for part in ("state_dict", "kd_state_dict", "optimizer", "param_schedulers", "ikd_sampler"):
        assert_bitwise(a[part], b[part])
    if "epoch" in case:
        ids = [i for row in seen[:3] for i in row[2]]
        assert sorted(ids) == list(range(IMAGES))
        assert [row[1] for row in seen_2] == [1, 2]
