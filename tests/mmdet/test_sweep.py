"""``ikd-fast sweep`` on the tiny data set, runs in this process: grid, length, resume, refusal, failure, table, picture."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from scipy.stats import t as student_t

from ikd_fast.commands import sweep as command
from ikd_fast.commands.sweep import Options, numbers, sweep
from ikd_fast.mmdet.errors import InputError
from ikd_fast.mmdet.history import read_history
from ikd_fast.mmdet.sweep import folder, grid, length, summary, worker
from ikd_fast.mmdet.sweep.grid import Setting
from tests.mmdet.conftest import stock_config, with_ikd

from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import PARAM_SCHEDULERS


@pytest.fixture(scope="module")
def config(coco_root, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "ikd.py"
    settings = with_ikd(stock_config(coco_root, epochs=4), stop_at=dict(epoch=3), calibrate=1)
    path.write_text("".join(f"{key} = {value!r}\n" for key, value in settings.items()))
    return path


def quiet() -> Console:
    return Console(file=io.StringIO())


def never(home: Path, advance) -> None:
    raise AssertionError(f"{home} was to be skipped")


@pytest.fixture(scope="module")
def swept(config, tmp_path_factory):
    """Baseline, a beta that trains and one whose loss overflows: two steps each."""
    out = tmp_path_factory.mktemp("sweep") / "s"
    options = Options(str(config), out, betas=[1e-5, 1e38], eps=[4.0], iters=2)
    console = quiet()
    found, _ = sweep(options, console, worker.attempt)
    return options, out, found, console.file.getvalue()


def test_a_grid_of_runs_and_one_that_fails(swept) -> None:
    _, out, found, text = swept
    names = ["baseline", "single_eps4_beta1e-05", "single_eps4_beta1e+38"]
    assert [row["name"] for row in found["settings"]] == names
    runs = [row["runs"]["0"] for row in found["settings"]]
    assert [run["status"] for run in runs] == ["done", "done", "failed"]
    assert "loss is inf at step 1: " in runs[2]["message"]
    assert "loss_kd/adv inf" in runs[2]["message"]
    assert found["failed"] == 1
    assert found["metrics"] == ["AP", "AP50"]
    for row, run in zip(found["settings"][:2], runs, strict=False):
        assert row["scores"]["AP50"]["points"] == [run["metrics"]["coco/bbox_mAP_50"]]
        assert run["steps"] == 2
        assert run["seconds_per_step"] > 0
    assert found["settings"][2]["scores"]["AP"]["mean"] is None
    assert found["settings"][0]["balance"].keys() == {"task", "kd/fgd"}
    for term in found["settings"][1]["balance"].values():
        assert 0 < term["gradshare"] < 1
    assert "failed: FloatingPointError" in text
    # All start from the same student, and the adversarial branch is all that differs.
    first = [read_history(out / "runs" / name / "seed0")[0] for name in names[:2]]
    assert first[0]["loss_cls"] == first[1]["loss_cls"]
    assert "loss_kd/adv" not in first[0]
    assert first[1]["loss_kd/adv"] > 0
    assert json.loads((out / command.JSON).read_text()) == json.loads(json.dumps(found))
    table = (out / command.TABLE).read_text()
    assert "| single, eps 4, beta 1e+38 | - |" in table
    assert "failed: single, eps 4, beta 1e+38, seed 0: FloatingPointError" in table


def test_what_is_done_is_not_done_again_and_a_failure_only_when_asked(swept) -> None:
    options, out, found, _ = swept
    again, _ = sweep(options, quiet(), never)
    assert again == found
    with pytest.raises(AssertionError, match=r"beta1e\+38.seed0 was to be skipped"):
        sweep(Options(**vars(options) | dict(retry=True)), quiet(), never)


def test_another_length_or_config_is_refused_with_the_difference(swept, config) -> None:
    options, _, _, _ = swept
    with pytest.raises(InputError, match="length: 2 iterations there, 3 iterations now"):
        sweep(Options(**vars(options) | dict(iters=3)), quiet(), never)
    changed = ["optim_wrapper.optimizer.lr=0.5", "model.augment=None"]
    with pytest.raises(InputError) as error:
        sweep(Options(**vars(options) | dict(cfg_options=changed)), quiet(), never)
    assert "optim_wrapper.optimizer.lr: 0.001 there, 0.5 now" in str(error.value)
    assert "model.augment.type: 'AdaptiveFreqAug' there, nothing now" in str(error.value)
    assert error.value.usage


def test_an_interrupted_run_goes_on_and_ends_where_it_would_have(swept, tmp_path) -> None:
    def interrupted(home: Path, advance) -> None:
        def stop(done: int, total: int) -> None:
            if done == 2:
                raise KeyboardInterrupt

        worker.attempt(home, stop)

    options, straight, found, _ = swept
    options = Options(**vars(options) | dict(out=tmp_path / "a", betas=[1e-5], baseline=False))
    with pytest.raises(KeyboardInterrupt):
        sweep(options, quiet(), interrupted)
    console = quiet()
    resumed, _ = sweep(options, console, worker.attempt)
    assert "resumed at step 1 of 2" in console.file.getvalue()
    rows = [read_history(out / "runs/single_eps4_beta1e-05/seed0") for out in (tmp_path / "a", straight)]
    assert [row["step"] for row in rows[0]] == [0, 1]
    assert [row["loss"] for row in rows[0]] == [row["loss"] for row in rows[1]]
    assert resumed["settings"][0]["runs"]["0"]["metrics"] == found["settings"][1]["runs"]["0"]["metrics"]


def test_settings_of_a_grid() -> None:
    attack = dict(type="OnlineDIFGSM", mode="iterative", eps=8, step_size=2, objective="feature", steps=3)
    model = dict(type="IKDDistiller", adv=dict(beta=1e-5, attack=attack))
    found = grid.grid(model, modes=["iterative", "single"], eps=[4, 8], betas=[1e-6, 1e-6])
    assert [s.name for s in found] == [
        "baseline", "iterative_eps4_beta1e-06", "iterative_eps8_beta1e-06", "single_eps4_beta1e-06", "single_eps8_beta1e-06",
    ]  # fmt: skip
    assert grid.grid(model, baseline=False) == [Setting("iterative", 8.0, 1e-5)]
    assert grid.attack_of(model, found[1]) == attack | dict(eps=4.0, step_size=1.0)
    assert grid.attack_of(model, found[3]) == dict(
        type="OnlineDIFGSM", mode="single", eps=4.0, objective="feature"
    )
    assert grid.grid(dict(type="IKDDistiller", adv=None), eps=[2])[1].eps == 2
    for changes, message in (
        (dict(eps=[300]), "eps"), (dict(modes=["sngle"]), "mode must be one of"), (dict(betas=[0.0]), "--beta must be above 0"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message) as error:
            grid.grid(model, **changes)
        assert error.value.usage
    with pytest.raises(InputError, match="got RetinaNet"):
        grid.grid(dict(type="RetinaNet"))
    with pytest.raises(InputError, match="--beta takes numbers"):
        numbers("--beta", "1e-5,a")


def test_images_made_before_leave_beta_to_sweep() -> None:
    model = dict(type="IKDDistiller", adv=dict(beta=1e-5, attack=dict(type="OfflineImages")))
    found = grid.grid(model, betas=[1e-6, 1e-5], baseline=False)
    assert [(s.mode, s.eps, s.beta) for s in found] == [("offline", 0, 1e-6), ("offline", 0, 1e-5)]
    assert grid.attack_of(model, found[0]) == dict(type="OfflineImages")
    assert grid.Setting.named(found[0].name) == found[0]
    assert found[1].title == "images made before, beta 1e-05"
    for more in (dict(eps=[4]), dict(modes=["single"]), dict(baseline=True)):
        with pytest.raises(InputError, match="only --beta and --seeds can be swept"):
            grid.grid(model, **{"baseline": False, **more})


def test_a_repeat_moves_every_seed_and_nothing_else(coco_root) -> None:
    crop = dict(type="KeyedRandomCrop", size=32, seed=5)
    plain = with_ikd(
        stock_config(coco_root, pipeline_extra=[crop]), augment=dict(type="AdaptiveFreqAug", seed=2)
    )
    cfg = Config(plain)
    before = copy.deepcopy(cfg.to_dict())
    moved = grid.apply(cfg, Setting("single", 8.0, 1e-5), 3)
    assert moved.train_dataloader.dataset.pipeline[3].seed == 8
    assert (moved.model.augment.seed, moved.model.seed, moved.randomness.seed) == (5, 3, 3)
    assert cfg.to_dict() == before
    as_written = grid.apply(cfg, Setting("single", 8.0, 1e-5), 0)
    del as_written.model["seed"]
    as_written.model.adv.attack.pop("eps")
    assert as_written.to_dict() == before


def rates(schedulers: list[dict], steps: int, per_epoch: int) -> list[float]:
    """The learning rate in each of ``steps`` iterations, by mmengine's own schedulers."""
    optimizer = build_optim_wrapper(
        torch.nn.Linear(1, 1), dict(type="OptimWrapper", optimizer=dict(type="SGD", lr=1.0))
    ).optimizer
    built = [
        PARAM_SCHEDULERS.build(dict(s), default_args=dict(optimizer=optimizer, epoch_length=per_epoch))
        for s in schedulers
    ]
    found = []
    for k in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        for scheduler in built:
            if not scheduler.by_epoch or (k + 1) % per_epoch == 0:
                scheduler.step()
    return found


@pytest.mark.parametrize(
    "schedulers",
    [
        [dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=200),
         dict(type="MultiStepLR", by_epoch=True, begin=0, end=24, milestones=[16, 22], gamma=0.1)],
        [dict(type="LinearLR", start_factor=0.04, end=5, by_epoch=True, convert_to_iter_based=True),
         dict(type="CosineAnnealingLR", begin=5, end=24, eta_min=0, by_epoch=True, convert_to_iter_based=True)],
        [dict(type="PolyLR", power=0.9, eta_min=0.01, begin=0, end=24, by_epoch=True, convert_to_iter_based=True)],
        [dict(type="ExponentialLR", gamma=0.8)],
        [dict(type="StepLR", step_size=6, gamma=0.5)],
        [dict(type="CosineRestartLR", periods=[12, 12], restart_weights=[1, 0.5], eta_min=0.1, by_epoch=True,
              convert_to_iter_based=True)],
    ],
    ids=["mmdet 2x", "demo", "poly", "exponential", "step", "restart"],
)  # fmt: skip
def test_a_scaled_schedule_has_the_shape_of_the_original(schedulers) -> None:
    """2400 iterations of 24 epochs against 240: the rate at step k is that at step 10 k."""
    whole = rates(schedulers, 2400, 100)
    scaled = [length.scale_scheduler(s, steps=100, factor=0.1, total=2400) for s in schedulers]
    short = rates(scaled, 240, 10)
    # An exponential that stepped once an epoch is compared at the epochs' beginnings.
    points = range(0, 240, 10 if schedulers[0]["type"] == "ExponentialLR" else 1)
    for k in points:
        # A ramp over n steps ends after n - 1: short ones are a step ahead.
        near = whole[max(0, 10 * k - 10) : 10 * k + 21]
        assert min(near) - 1e-9 <= short[k] <= max(near) + 1e-9, k


def test_ramps_too_short_to_ramp_are_left_out_and_unknown_schedules_refused() -> None:
    ramp = dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=500)
    assert length.scale_scheduler(ramp, steps=100, factor=0.002, total=9000) is None
    with pytest.raises(InputError, match="ReduceOnPlateauLR cannot be scaled"):
        length.scale_scheduler(dict(type="ReduceOnPlateauLR"), steps=100, factor=0.1, total=9000)


def test_stop_at_is_scaled_with_the_run(swept, config) -> None:
    """Epoch 3 of 4 (12 images in batches of 4) is iteration 9 of 12; of 2, round(1.5)."""
    from mmengine.runner import Runner

    _, out, _, _ = swept
    home = out / "runs/single_eps4_beta1e-05/seed0"
    cfg = Config.fromfile(home / worker.CONFIG)
    cfg.experiment_name = "stop_at"
    runner = Runner.from_cfg(cfg)
    length.scale_schedule(runner, json.loads((home / worker.SPEC).read_text())["scale"])
    assert runner.max_iters == 2
    assert runner.model.ikd.stop_at.rule == {"iter": 2}


def test_lengths_that_contradict() -> None:
    with pytest.raises(InputError, match="--iters or --epochs"):
        length.Length(1, 1)
    cfg = Config(dict(train_cfg=dict(type="IterBasedTrainLoop", max_iters=90)))
    with pytest.raises(InputError, match="write --iters"):
        length.set_length(cfg, length.Length(epochs=1))
    length.set_length(cfg, length.Length())
    assert cfg.train_cfg == dict(type="IterBasedTrainLoop", max_iters=90, val_begin=90, val_interval=90)
    assert cfg.default_hooks.checkpoint.interval == 9


def result(ap: float, **balance: float) -> dict:
    return {
        "status": "done", "metrics": {"coco/bbox_mAP": ap, "coco/bbox_mAP_50": 2 * ap}, "seconds_per_step": 1.0, "steps": 5,
        "balance": {"kd/adv": balance} if balance else {},
    }  # fmt: skip


@pytest.fixture
def three_seeds() -> dict:
    base = {k: result(v) for k, v in enumerate((0.10, 0.20, 0.30))}
    adv = {k: result(v, gradshare=0.1, share=0.02) for k, v in enumerate((0.12, 0.21, 0.33))}
    runs = {Setting(): base, Setting("single", 8.0, 1e-5): adv, Setting("single", 8.0, 1e-4): dict(adv)}
    runs[Setting("single", 8.0, 1e-4)][2] = {"status": "failed", "message": "boom"}
    return summary.summarise(runs, [0, 1, 2], dict(config="c.py", length="5 iterations"))


def test_means_intervals_and_paired_differences(three_seeds) -> None:
    row = three_seeds["settings"][1]
    half = float(student_t.ppf(0.975, 2)) / 3**0.5
    gain = row["scores"]["AP"]["over_baseline"]
    # Differences .02, .01, .03: mean .02, deviation .01.
    assert gain["mean"] == pytest.approx(0.02)
    assert gain["interval95"] == pytest.approx([0.02 - 0.01 * half, 0.02 + 0.01 * half])
    assert row["balance"] == {"kd/adv": {"gradshare": pytest.approx(0.1), "share": pytest.approx(0.02)}}
    broken = three_seeds["settings"][2]
    assert broken["scores"]["AP"]["points"] == [0.12, 0.21]
    assert broken["scores"]["AP"]["over_baseline"]["points"] == pytest.approx([0.02, 0.01])
    text = summary.render(three_seeds)
    assert "| +2.0 [-0.5, +4.5] | 12.0, 21.0, 33.0 |" in text
    assert "| 2 % | 10 % |" in text
    assert "failed: single, eps 8, beta 0.0001, seed 2: boom" in text


def test_the_picture_shows_means_points_and_the_baseline(three_seeds, tmp_path) -> None:
    from ikd_fast.pictures.sweep import draw_sweep, sweep_figure

    fig = sweep_figure(three_seeds)
    ax = fig.axes[0]
    baseline, line = (ax.lines[0], next(x for x in ax.lines if x.get_label() == "single, eps 8"))
    assert baseline.get_ydata()[0] == pytest.approx(20.0)
    assert list(line.get_xdata()) == pytest.approx([1e-5, 1e-4])
    assert list(line.get_ydata()) == pytest.approx([22.0, 16.5])
    dots = [tuple(p) for c in ax.collections for p in getattr(c, "get_offsets", list)()]
    assert (1e-5, pytest.approx(33.0)) in dots
    assert "with failed runs: single, eps 8, beta 0.0001" in fig.get_suptitle()
    assert draw_sweep(tmp_path / "p.png", three_seeds).read_bytes().startswith(b"\x89PNG")


def test_folders_and_configs_that_cannot_be_swept(config, coco_root, tmp_path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(InputError, match="not empty and holds no sweep"):
        sweep(Options(str(config), tmp_path, iters=1), quiet(), never)
    with pytest.raises(InputError, match=r"no val_evaluator|no val_cfg, val_evaluator"):
        sweep(
            Options(str(config), tmp_path / "o", cfg_options=["val_evaluator=None", "val_cfg=None"]),
            quiet(),
            never,
        )
    with pytest.raises(InputError, match=r"no annotation file .*gone.json.*--data"):
        sweep(
            Options(str(config), tmp_path / "o", cfg_options=["train_dataloader.dataset.ann_file=gone.json"]),
            quiet(),
            never,
        )
    with pytest.raises(InputError, match=r"--data .*expected .*annotations/train.json"):
        sweep(Options(str(config), tmp_path / "o", data=coco_root), quiet(), never)
    assert not (tmp_path / "o").exists()
    assert folder.result_of(tmp_path) is None
