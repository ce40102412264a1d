"""The memory of an attack in mmdet's Runner: what is canonical, what it takes, whose data it is for."""

from __future__ import annotations

import copy
import logging
import re
from types import SimpleNamespace

import pytest
import torch

import ikd_fast.mmdet  # noqa: F401
from ikd_fast import OnlineDIFGSM
from ikd_fast.attack.memory import PerturbationMemory
from ikd_fast.mmdet.banner import memory as memory_line
from ikd_fast.mmdet.facts import kept_facts
from ikd_fast.mmdet.memory import census, choose_resolution, memory_facts, prepare, start
from tests.mmdet.conftest import IMAGES, SIDE, stock_config, with_ikd

from mmdet.registry import DATASETS
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner

FLIP = dict(type="RandomFlip", prob=0.5)
RANDOM_SCALE = dict(type="RandomResize", scale=(80, 80), ratio_range=(0.5, 1.5), keep_ratio=True)
MATRIX = (
    "img_id", "img_path", "ori_shape", "img_shape", "scale_factor", "flip", "flip_direction", "homography_matrix",
)  # fmt: skip


def config_of(root, *, resize=None, extra=(), memory=None, epochs=1, **changes):
    config = stock_config(root, epochs=epochs, pipeline_extra=extra)
    pipeline = config["train_dataloader"]["dataset"]["pipeline"]
    if resize is not None:
        pipeline[2] = resize
    pipeline[-1]["meta_keys"] = MATRIX
    for name in ("dataloader", "evaluator", "cfg"):
        config[f"val_{name}"] = None  # nothing of it is about validation
    attack = dict(type="OnlineDIFGSM", mode="carry", step_size=2, memory=memory or {})
    return with_ikd(config, adv=dict(beta=1e-5, attack=attack), **changes)


def dataset_of(root, wrap=None, **kwargs):
    config = config_of(root, **kwargs)["train_dataloader"]["dataset"]
    return DATASETS.build(Config(wrap(config) if wrap else config).to_dict())


@pytest.fixture
def quick(monkeypatch):
    """mmengine formats every config it logs, half a second each."""
    monkeypatch.setattr("mmengine.config.config.FormatCode", lambda text, **_: (text, True))


def test_a_census_reads_sizes_without_images(coco_root):
    found = census(dataset_of(coco_root))
    assert found.sizes == dict(original=[(SIDE, SIDE)] * IMAGES, network=[(80, 80)] * IMAGES)
    assert (found.unknown, found.why_original, found.rules) == (0, "", ["(80, 80) keep_ratio"])
    assert found.fingerprint.startswith(f"{IMAGES} images ")


def test_each_image_counts_once_whatever_wraps_it(coco_root):
    plain = census(dataset_of(coco_root))
    repeated = census(dataset_of(coco_root, wrap=lambda c: dict(type="RepeatDataset", times=3, dataset=c)))
    assert repeated.fingerprint == plain.fingerprint
    assert repeated.sizes == plain.sizes
    both = census(
        dataset_of(coco_root, wrap=lambda c: dict(type="ConcatDataset", datasets=[c, copy.deepcopy(c)]))
    )
    assert len(both.sizes["original"]) == 2 * IMAGES
    assert both.fingerprint != plain.fingerprint


def test_the_fingerprint_is_of_the_images_not_of_the_pipeline(coco_root):
    plain = census(dataset_of(coco_root))
    assert census(dataset_of(coco_root, resize=RANDOM_SCALE, extra=[FLIP])).fingerprint == plain.fingerprint
    fewer = census(dataset_of(coco_root, wrap=lambda c: c | dict(indices=8)))
    assert fewer.fingerprint.startswith("8 images ")
    assert fewer.fingerprint.split()[-1] != plain.fingerprint.split()[-1]


@pytest.mark.parametrize(
    ("resize", "wanted", "chosen"),
    [
        (None, "auto", "network"),
        (None, "original", "original"),
        (None, "network", "network"),
        (RANDOM_SCALE, "auto", "original"),
        (RANDOM_SCALE, "original", "original"),
    ],
)
def test_which_image_is_canonical(coco_root, resize, wanted, chosen):
    found = census(dataset_of(coco_root, resize=resize))
    assert choose_resolution(PerturbationMemory(resolution=wanted), found) == chosen


def test_network_resolution_needs_one_rule(coco_root):
    found = census(dataset_of(coco_root, resize=RANDOM_SCALE))
    with pytest.raises(ValueError, match=r"pipeline\[2\] is RandomResize.*write resolution='original'"):
        choose_resolution(PerturbationMemory(resolution="network"), found)


class Preprocessor:
    resolution = "original"


def test_it_is_bound_to_the_data_and_refuses_other_data(coco_root):
    attack = OnlineDIFGSM("carry", eps=8)
    text = prepare(attack, Preprocessor(), dataset_of(coco_root))
    # 80 columns of 4 bits are 40 bytes a row.
    assert (
        text
        == "perturbation memory: 12 images x 9.6 kB = 115 kB of host memory (4 bits, stride 1, network resolution)"
    )
    prepare(attack, Preprocessor(), dataset_of(coco_root))
    with pytest.raises(ValueError, match=r"data: 12 images \w+ there, 8 images \w+ now"):
        prepare(attack, Preprocessor(), dataset_of(coco_root, wrap=lambda c: c | dict(indices=8)))
    with pytest.raises(ValueError, match=r"size: network \(80, 80\) keep_ratio there, original now"):
        prepare(attack, Preprocessor(), dataset_of(coco_root, resize=RANDOM_SCALE))
    other = OnlineDIFGSM("carry", eps=4, memory=attack.memory)
    with pytest.raises(ValueError, match=r"eps: 8\.0 there, 4\.0 now"):
        prepare(other, Preprocessor(), dataset_of(coco_root))


def test_images_of_unknown_size_are_said(coco_root):
    data = dataset_of(coco_root)
    for info in data.data_list[:3]:
        info.pop("width")
    assert "9 images x" in (text := prepare(OnlineDIFGSM("carry"), Preprocessor(), data))
    assert "3 more images have no width and height" in text
    for info in data.data_list:
        info["width"] = 0
    text = prepare(OnlineDIFGSM("carry"), Preprocessor(), data)
    assert "Its size is not known" in text


def test_ranks_of_one_machine_share_its_memory(coco_root):
    attack = OnlineDIFGSM("carry", memory=dict(max_bytes=115_200))
    assert "each of the 2 ranks of this machine" in prepare(
        attack, Preprocessor(), dataset_of(coco_root), ranks=2
    )


def test_ranks_that_share_the_images_out_need_a_share_of_the_memory(coco_root):
    """115,200 bytes in all, of which two ranks keep 57,600 each."""
    attack = OnlineDIFGSM("carry", memory=dict(max_bytes=57_600))
    with pytest.raises(MemoryError, match="115 kB"):
        prepare(attack, Preprocessor(), dataset_of(coco_root), ranks=2)
    text = prepare(attack, Preprocessor(), dataset_of(coco_root), ranks=2, shares=2)
    assert text.endswith("each of the 2 ranks keeps its own images', about 57.6 kB")
    attack = OnlineDIFGSM("carry", memory=dict(max_bytes=57_599))
    with pytest.raises(MemoryError, match="115 kB .* 57.6 kB of it for each of 2 ranks"):
        prepare(attack, Preprocessor(), dataset_of(coco_root), ranks=2, shares=2)


def test_too_little_memory_stops_the_run_before_its_first_step(coco_root, tmp_path, quick):
    runner = Runner.from_cfg(
        Config(config_of(coco_root, memory=dict(max_bytes=60_000)) | dict(work_dir=str(tmp_path)))
    )
    with pytest.raises(MemoryError, match=r"115 kB .* 60 kB may be taken.*These settings fit") as error:
        runner.train()
    assert runner.iter == 0
    assert "memory=dict(bits=4, stride=2, resolution='network')  # 28.8 kB" in str(error.value)


def test_explain_says_what_is_kept_and_what_it_will_take(coco_root):
    attack = OnlineDIFGSM("carry", step_size=2, memory=dict(stride=2))
    kept = kept_facts(attack)
    assert kept["canonical"] == "auto"
    kept |= memory_facts(attack.memory, dataset_of(coco_root, resize=RANDOM_SCALE))
    # 48 x 48 cells of 4 bits in three channels.
    assert kept["bytes"] == IMAGES * 3 * 48 * 24
    assert memory_line(kept) == (
        "perturbations kept in 4 bits (9 levels, 2 grey levels apart) for 2 x 2 pixels of the canonical image (original): 12 images x "
        "3.46 kB = 41.5 kB of host memory (4 bits, stride 2, original resolution)"
    )
    assert kept_facts(OnlineDIFGSM("single")) is None


class Lines(logging.Handler):
    def __init__(self):
        super().__init__()
        self.text = ""

    def emit(self, record):
        self.text += record.getMessage() + "\n"


class Watch(Hook):
    """Every visit: the batch, what was kept before it, what the attack made of it; and the counters at the end."""

    def before_train(self, runner):
        self.visits, ikd = [], runner.model.ikd
        craft = ikd._craft

        def watched(batch, *args, **kwargs):
            before = [ikd.attack.memory.store.get(int(i), torch.device("cpu")) for i in batch.image_ids]
            out = craft(batch, *args, **kwargs)
            self.visits.append((batch, before, out))
            return out

        ikd._craft = watched


@pytest.mark.slow
class Bytes(Hook):
    def __init__(self):
        self.kept = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.kept.append(runner.model.ikd.attack.memory.counters["bytes"])


def test_the_memory_is_given_back_where_the_adversarial_branch_ends(coco_root, tmp_path, quick):
    """2 epochs of 3; a run that is resumed after that needs no room at all."""
    lines, watch = Lines(), Bytes()
    config = config_of(coco_root, epochs=3)
    config["model"]["stop_at"] = dict(epoch=2)
    config["default_hooks"]["checkpoint"] = dict(type="CheckpointHook", interval=1)
    config = Config(config | dict(work_dir=str(tmp_path), log_level="INFO"))
    runner = Runner.from_cfg(config)
    runner.logger.addHandler(lines)
    runner.register_hook(watch)
    runner.train()
    assert [kept > 0 for kept in watch.kept] == [True] * 6 + [False] * 3
    (line,) = [line for line in lines.text.splitlines() if "visits had a perturbation" in line]
    assert "12 of 24 visits" in line
    assert line.endswith("the adversarial branch is over, and its memory is given back")

    config.model.adv.attack.memory = dict(max_bytes=1)
    config.merge_from_dict(
        dict(resume=True, load_from=str(tmp_path / "epoch_2.pth"), work_dir=str(tmp_path / "b"))
    )
    lines, watch = Lines(), Bytes()
    runner = Runner.from_cfg(config)
    runner.logger.addHandler(lines)
    runner.register_hook(watch)
    runner.train()
    assert watch.kept == [0] * 3
    assert "perturbation memory:" not in lines.text


@pytest.mark.parametrize("resize", [None, RANDOM_SCALE], ids=["fixed", "random"])
def test_a_run_carries_from_epoch_to_epoch(coco_root, tmp_path, quick, resize):
    """Every image starts anew once and is found from then on, through flips, crops and, at original resolution, any scale; and what is
    added to a flipped, cropped, scaled image is what is kept of the canonical one at the same places."""
    lines, watch = Lines(), Watch()
    config = config_of(coco_root, resize=resize, extra=[FLIP], epochs=3)
    config["default_hooks"]["checkpoint"] = None
    runner = Runner.from_cfg(Config(config | dict(work_dir=str(tmp_path), log_level="INFO")))
    runner.logger.addHandler(lines)
    runner.register_hook(watch)
    runner.train()

    memory, units = runner.model.ikd.attack.memory, runner.model.ikd.units
    counters = memory.counters
    assert (counters["unknown"], counters["resized"], counters["hits"]) == (IMAGES, 0, 2 * IMAGES)
    side = 80 if resize is None else SIDE
    assert counters["bytes"] == IMAGES * 3 * side * side // 2  # as forecast
    assert f"ikd_fast perturbation memory: {IMAGES} images x {3 * side * side / 2e3:.3g} kB" in lines.text
    assert "24 of 36 visits had a perturbation, 12 cold starts of unknown images, 0 of images" in lines.text
    assert re.search(
        r"memory +perturbations kept in 4 bits \(9 levels, 2 grey levels apart\) for each pixel of the canonical",
        lines.text,
    )

    views = [view for batch, _, _ in watch.visits for view in batch.views]
    assert len(views) == 3 * IMAGES
    assert {view.canonical for view in views} == {(side, side)}
    assert {view.scale[1] > 0 for view in views} == {True, False}
    assert len({view.size for view in views}) > 1
    mean, std = (torch.tensor(v)[:, None, None] for v in (units.mean, units.std))
    checked = 0
    for batch, before, out in watch.visits[IMAGES // 4 :]:
        for image, delta, view, record in zip(batch.geo, out.delta, batch.views, before, strict=True):
            values = memory.codes.decode(memory.codes.unpack(record.delta, (3, side, side)))
            table = view.cells(1)
            (h, w), y, x = view.size, table.y_cell.long(), table.x_cell.long()
            pixels = image[:, :h, :w] * std + mean
            expected = (pixels + values[:, y][:, :, x]).clamp(0, 255) - pixels
            # float32 at normalised values of up to 3, times a std of 58.
            assert ((delta * std)[:, :h, :w] - expected).abs().max() < 2e-3
            checked += 1
    assert checked == 2 * IMAGES


def test_a_resumed_run_starts_empty_and_says_so(coco_root, monkeypatch):
    said = []
    monkeypatch.setattr("ikd_fast.mmdet.memory.print_log", lambda text, **_: said.append(text))
    attack = OnlineDIFGSM("carry")
    loader = SimpleNamespace(dataset=dataset_of(coco_root))
    model = SimpleNamespace(
        ikd=SimpleNamespace(
            attack=attack, adversarial=True, teacher=SimpleNamespace(fingerprint=lambda: "0" * 64)
        ),
        data_preprocessor=Preprocessor(),
        is_active=lambda: True,
    )
    for resumed in (False, True):
        start(SimpleNamespace(train_dataloader=loader, _resume=resumed, work_dir="."), model)
    assert ["host memory is not in a checkpoint: every image starts anew" in text for text in said] == [
        False,
        True,
    ]
    model.ikd.adversarial = False
    start(SimpleNamespace(train_dataloader=loader, _resume=False), model)
    assert len(said) == 2
