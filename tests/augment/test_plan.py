"""Which branch, which window: the rule on hand-made boxes, the crop by hand, and independence of the batch."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from ikd_fast.augment import AdaptiveFreqAug, AugPlan, Branch, geometry
from ikd_fast.kernels.reference.philox import philox4x32

SIZE = (200, 300)


def branch(boxes, **options) -> Branch:
    plan_args = {k: options.pop(k) for k in ("scale", "ignore") if k in options}
    # noise_prob=1 and a long list of ids would be the same: with one id only the rule speaks
    aug = AdaptiveFreqAug(**{"noise_prob": 1.0, **options})
    return Branch(int(aug.plan([np.array(boxes, np.float32)], [SIZE], [1], 0, **plan_args).branch[0]))


def box(side_w: float, side_h: float, x: float = 10, y: float = 20) -> list[float]:
    return [x, y, x + side_w, y + side_h]


@pytest.mark.parametrize(
    ("boxes", "any_large", "no_small"),
    [
        ([box(32, 32)], "CROP", "CROP"),  # area exactly tau is large
        ([box(31, 33)], "NOISE", "NOISE"),  # 1023
        ([box(16, 64)], "CROP", "CROP"),  # 1024, flat
        ([box(32, 31.96875)], "NOISE", "NOISE"),  # 1023, float sides that float32 holds exactly
        ([box(10, 10), box(100, 100)], "CROP", "NOISE"),
        ([box(50, 50), box(100, 100)], "CROP", "CROP"),
        ([box(10, 10), box(12, 9)], "NOISE", "NOISE"),
        ([], "NOISE", "NOISE"),  # "for all" on the empty set
    ],
)
def test_rule(boxes, any_large: str, no_small: str) -> None:
    assert branch(boxes).name == any_large
    assert branch(boxes, rule="no_small").name == no_small


def test_area_is_in_the_annotations_pixels() -> None:
    """A 32x32 annotation resized by COCO's factors is still exactly tau, and 31x33 is still below it."""
    for s in (1.6666666, 0.37, 2.5, 800 / 427, 1333 / 640):
        for x in (0.0, 17.3, 55.1):
            kept = np.array([x, x, x + 32, x + 32], np.float32) * np.float32(s)
            assert branch([kept], scale=[(s, s)]) == Branch.CROP, (s, x)
            below = np.array([x, x, x + 31, x + 33], np.float32) * np.float32(s)
            assert branch([below], scale=[(s, s)]) == Branch.NOISE, (s, x)
    assert branch([box(40, 20)], scale=[(2.0, 0.25)]) == Branch.CROP  # 20 x 80 = 1600
    assert branch([box(40, 40)]) == Branch.CROP
    assert branch([box(40, 40)], scale=torch.tensor([[2.0, 2.0]])) == Branch.NOISE


def test_ignored_boxes_do_not_count() -> None:
    boxes = [box(10, 10), box(100, 100)]
    assert branch(boxes, ignore=[torch.tensor([False, True])]) == Branch.NOISE
    assert branch(boxes, ignore=[None]) == Branch.CROP
    # no counted box left: the branch of an image with no boxes
    assert branch([box(99, 99)], ignore=[[1]]) == Branch.NOISE
    assert branch([box(99, 99)], ignore=[[1]], no_boxes="keep") == Branch.KEEP


def test_callable_rule_sees_the_areas() -> None:
    seen = []

    def rule(areas: torch.Tensor) -> str:
        seen.append(areas)
        return "crop" if areas.max() > 500 else "keep"

    assert branch([box(10, 20), box(30, 30)], rule=rule) == Branch.CROP
    assert branch([box(10, 20)], rule=rule) == Branch.KEEP
    assert [a.tolist() for a in seen] == [[200.0, 900.0], [200.0]]
    assert branch([], rule=rule, no_boxes="keep") == Branch.KEEP


def test_gates_have_their_probabilities() -> None:
    n = 4000
    ids, sizes = range(n), [SIZE] * n
    noise = AdaptiveFreqAug(hflip_prob=0.25).plan([[]] * n, sizes, ids, 0)
    crop = AdaptiveFreqAug(crop_prob=0.7).plan([[box(50, 50)]] * n, sizes, ids, 0)
    # four standard errors of a proportion
    for share, p in (
        (noise.noise_frac, 0.3),
        (crop.crop_frac, 0.7),
        (float(noise.flip.float().mean()), 0.25),
    ):
        assert abs(share - p) < 4 * math.sqrt(p * (1 - p) / n)
    assert set(noise.branch.tolist()) == {Branch.KEEP, Branch.NOISE}
    assert noise.sigma[noise.branch == Branch.NOISE].unique().tolist() == [pytest.approx(20.4, rel=1e-7)]
    assert noise.sigma[noise.branch != Branch.NOISE].abs().max() == 0
    assert AdaptiveFreqAug(noise_prob=1, noise_std=0).plan([[]], [SIZE], [1], 0).noise_frac == 0


def hand_window(seed: int, key: int, epoch: int, index: int, h: int, w: int, r: float) -> list[int]:
    """Stream CROP is 2; words 0..3 give f_h, f_w, offset y, offset x."""
    words = philox4x32((index, key & 0xFFFFFFFF, (key >> 32) ^ 2, epoch), (seed & 0xFFFFFFFF, seed >> 32))
    u = [(x >> 8) / 2**24 for x in words]
    ch, cw = int(((1 - r) + r * u[0]) * h + 0.5), int(((1 - r) + r * u[1]) * w + 0.5)
    y, x = int(u[2] * (h - ch + 1)), int(u[3] * (w - cw + 1))
    return [x, y, x + cw, y + ch]


@pytest.mark.parametrize("r", [0.2, 0.6])
def test_window_by_hand(r: float) -> None:
    seed, epoch = 2**40 + 17, 9
    ids = [*range(200), 2**64 - 1, 2**63, 12345678901234567]
    whole = [[0, 0, SIZE[1], SIZE[0]]]  # survives any window
    plan = AdaptiveFreqAug(crop_ratio=r, seed=seed).plan([whole] * len(ids), [SIZE] * len(ids), ids, epoch)
    assert plan.window.tolist() == [hand_window(seed, k, epoch, 0, *SIZE, r) for k in ids]
    sides = torch.tensor(plan.out_sizes) / torch.tensor(SIZE)
    assert sides.min() >= 1 - r - 0.5 / min(SIZE)
    assert sides.max() <= 1
    assert plan.ids.tolist()[-3:] == [-1, -(2**63), 12345678901234567]


def test_published_numbers_stay() -> None:
    """Plans must not change between releases: a run resumed on a newer one would see other images."""
    plan = AdaptiveFreqAug(hflip_prob=0.5, noise_prob=0.5).plan(
        [[box(50, 50)]] * 3, [SIZE] * 3, [0, 1, 42], 3
    )
    assert plan.window.tolist() == [hand_window(0, k, 3, 0, *SIZE, 0.2) for k in (0, 1, 42)]
    assert plan.window.tolist() == [[10, 33, 280, 199], [9, 18, 287, 193], [21, 9, 279, 194]]
    assert plan.flip.tolist() == [True, False, False]


def test_redraws_until_a_box_survives() -> None:
    """A box in a corner: the window is the first try that meets it; if none of ten does the image stays whole."""
    corner, r = [[0, 0, 3, 400]], 0.5
    size, n = (400, 400), 300
    aug = AdaptiveFreqAug(crop_ratio=r)
    plan = aug.plan([corner] * n, [size] * n, range(n), 0)
    tries = []
    for key in range(n):
        rows = [hand_window(0, key, 0, t, *size, r) for t in range(10)]
        meets = [t for t, row in enumerate(rows) if row[0] < 3]
        tries.append(meets[0] if meets else None)
        assert plan.window[key].tolist() == (rows[meets[0]] if meets else [0, 0, 400, 400])
        assert (plan.branch[key] == Branch.KEEP) == (not meets)
    assert 0 in tries
    assert None in tries
    assert max(t for t in tries if t is not None) > 3


def test_ignored_boxes_do_not_save_a_window() -> None:
    boxes, flags = [[0, 0, 3, 400], [0, 0, 400, 400]], [torch.tensor([False, True])]
    aug = AdaptiveFreqAug(crop_ratio=0.5)
    alone = [aug.plan([boxes[:1]], [(400, 400)], [k], 0) for k in range(40)]
    crowd = [aug.plan([boxes], [(400, 400)], [k], 0, ignore=flags) for k in range(40)]
    assert alone == crowd


@pytest.fixture(scope="module")
def many() -> tuple[list[np.ndarray], list[tuple[int, int]], list[int]]:
    rng = np.random.default_rng(0)
    boxes, sizes = [], []
    for i in range(24):
        h, w = (int(v) for v in rng.integers(60, 300, 2))
        low = rng.uniform(0, 40, (i % 5, 2))
        high = low + rng.uniform(1, 20 if i % 2 else 60, (i % 5, 2))
        boxes.append(np.concatenate([low, np.minimum(high, [w, h])], 1).astype(np.float32))
        sizes.append((h, w))
    return boxes, sizes, [int(v) for v in rng.integers(0, 2**63, 24)]


OPTIONS = {"noise_prob": 0.5, "hflip_prob": 0.5, "seed": 5}


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_plan_does_not_depend_on_the_batch(many, batch: int) -> None:
    boxes, sizes, ids = many
    aug = AdaptiveFreqAug(**OPTIONS)
    whole = aug.plan(boxes, sizes, ids, 2)
    assert set(whole.branch.tolist()) == set(Branch)
    order = np.random.default_rng(batch).permutation(24).tolist()
    parts = []
    for start in range(0, 24, batch):
        rows = order[start : start + batch]
        tensors = [torch.tensor(boxes[i]) for i in rows]
        parts.append(aug.plan(tensors, [sizes[i] for i in rows], torch.tensor([ids[i] for i in rows]), 2))
    assert AugPlan.cat(parts) == whole.select(order)
    assert AugPlan.cat(parts).select(np.argsort(order).tolist()) == whole
    assert aug.plan(boxes, sizes, ids, 3) != whole
    assert (
        AdaptiveFreqAug(**{**OPTIONS, "seed": 6}).plan(boxes, sizes, ids, 2).window.tolist()
        != whole.window.tolist()
    )


class Planned(Dataset):
    """Plans in the worker, as a loader transform does."""

    def __init__(self, many, epoch: int) -> None:
        self.many, self.epoch, self.aug = many, epoch, AdaptiveFreqAug(**OPTIONS)

    def __len__(self) -> int:
        return len(self.many[2])

    def __getitem__(self, i: int) -> AugPlan:
        boxes, sizes, ids = self.many
        return self.aug.plan([boxes[i]], [sizes[i]], [ids[i]], self.epoch)


@pytest.mark.parametrize(("batch", "workers"), [(1, 0), (3, 2), (8, 2)])
def test_plan_does_not_depend_on_loader_workers(many, batch: int, workers: int) -> None:
    loader = DataLoader(Planned(many, 2), batch_size=batch, num_workers=workers, collate_fn=AugPlan.cat)
    boxes, sizes, ids = many
    assert AugPlan.cat(list(loader)) == AdaptiveFreqAug(**OPTIONS).plan(boxes, sizes, ids, 2)


def test_json_round_trip_and_summary(many) -> None:
    boxes, sizes, ids = many
    plan = AdaptiveFreqAug(rng="torch", round_noise=True, **OPTIONS).plan(
        boxes, sizes, [2**64 - 1, *ids[1:]], 2
    )
    again = AugPlan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan
    assert (again.rng, again.round_noise, again.seed, again.epoch) == ("torch", True, 5, 2)
    assert AugPlan.from_dict(json.loads(json.dumps(plan.select([]).to_dict()))) == plan.select([])
    text = plan.summary()
    assert "24 images, epoch 2, seed 5, rng torch" in text
    assert "id 18446744073709551615" in text
    assert len(text.splitlines()) == 25
    x0, y0, _, _ = plan.window[(plan.branch == Branch.CROP).nonzero()[0, 0]].tolist()
    assert f"at x {x0}, y {y0}" in text
    counts = [plan.branch.tolist().count(b) / 24 for b in (Branch.CROP, Branch.NOISE)]
    assert [plan.crop_frac, plan.noise_frac] == counts
    with pytest.raises(ValueError, match=r"missing \['sigma'\], unexpected \['sgima'\]"):
        AugPlan.from_dict({("sgima" if k == "sigma" else k): v for k, v in plan.to_dict().items()})
    with pytest.raises(ValueError, match=r"plans of one epoch, got \[2, 1\]"):
        AugPlan.cat(
            [plan, AdaptiveFreqAug(rng="torch", round_noise=True, **OPTIONS).plan([[]], [SIZE], [1], 1)]
        )


def test_seed_none_records_what_it_drew() -> None:
    aug = AdaptiveFreqAug(seed=None)
    a, b = (aug.plan([[box(50, 50)]], [SIZE]) for _ in range(2))
    assert a.seed != b.seed
    assert a.window.tolist() == [hand_window(a.seed, 0, 0, 0, *SIZE, 0.2)]
    torch.manual_seed(1)
    first = aug.plan([[box(50, 50)]], [SIZE])
    torch.manual_seed(1)
    assert aug.plan([[box(50, 50)]], [SIZE]) == first


def test_box_formats_give_one_plan(many) -> None:
    boxes, sizes, ids = many
    norm = []
    for b, (h, w) in zip(boxes, sizes, strict=True):
        b = b.astype(np.float64)
        centre, side = (b[:, :2] + b[:, 2:]) / 2, b[:, 2:] - b[:, :2]
        norm.append(np.concatenate([centre / (w, h), side / (w, h)], 1))
    xyxy = AdaptiveFreqAug(**OPTIONS).plan(boxes, sizes, ids, 2)
    assert AdaptiveFreqAug(box_format="cxcywh_norm", **OPTIONS).plan(norm, sizes, ids, 2) == xyxy


def test_min_kept_drops_slivers_and_asks_a_survivor_for_its_share() -> None:
    """By hand: boxes with 100 %, 40 %, 39 % and 0 % of their area left of x = 100."""
    boxes = torch.tensor(
        [
            [10.0, 10.0, 60.0, 60.0],
            [60.0, 0.0, 160.0, 10.0],
            [61.0, 0.0, 161.0, 10.0],
            [100.0, 0.0, 120.0, 9.0],
        ]
    )
    window = (0, 0, 100, 100)
    for min_kept, expected in ((0.0, [0, 1, 2]), (0.4, [0, 1]), (0.5, [0]), (1.0, [0])):
        assert geometry.kept(boxes.double(), window, min_kept).nonzero().flatten().tolist() == expected
    aug = AdaptiveFreqAug(crop_ratio=0.5, min_kept=0.9, noise_prob=0)
    cut = 0
    for key in range(200):
        plan = aug.plan([boxes[:1] * 2], [(200, 200)], [key], 0)
        _, (target,) = aug.apply(
            [torch.zeros(3, 200, 200, dtype=torch.uint8)], [dict(boxes=boxes[:1] * 2, labels=[0])], plan
        )
        assert len(target["boxes"]) == 1
        x0, y0, x1, y1 = target["boxes"][0].tolist()
        assert (x1 - x0) * (y1 - y0) >= 0.9 * 100 * 100
        cut += int(plan.branch[0]) == Branch.CROP
    assert 20 < cut <= 200
