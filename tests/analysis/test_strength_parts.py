"""Measures, views, round trip and summary against values made by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ikd_fast import PixelUnits
from ikd_fast.analysis.strength import pixel_change, published_round_trip, pyramid_change
from ikd_fast.analysis.strength.plan import StrengthSettings, candidates
from ikd_fast.analysis.strength.summary import summarise
from ikd_fast.analysis.strength.views import draw_view, move_batch

PIXELS = PixelUnits(value_range=(0, 255))


def test_pyramid_change_by_hand():
    clean = [torch.tensor([[3.0, 4.0], [1.0, 0.0]])[..., None, None], torch.ones(2, 1, 2, 2)]
    moved = [torch.tensor([[0.0, 0.0], [0.0, 2.0]])[..., None, None], torch.full((2, 1, 2, 2), 1.5)]
    found = pyramid_change(clean, moved)
    # |(0,0) - (3,4)| / 5 = 1, cosine with nothing 0; |(0,2) - (1,0)| / 1 = sqrt 5, orthogonal; half of itself more, same direction.
    assert found.tolist() == [
        [[1.0, 1.0], [0.5, 0.0]],
        [[pytest.approx(math.sqrt(5)), 1.0], [0.5, 0.0]],
    ]


def test_pixel_change_counts_valid_pixels_in_grey_levels():
    units = PixelUnits(mean=(10, 20, 30), std=(2, 4, 5))
    clean = torch.zeros(2, 3, 4, 4)
    moved = clean.clone()
    moved[0, 0, 0, 0] = 3.0  # 6 grey levels of channel 0
    moved[1, 2, 3, 3] = 9.0  # padding of the second image
    moved[1, 2, 1, 1] = -2.0  # 10 grey levels of channel 2
    found = pixel_change(clean, moved, [(4, 4), (2, 2)], units, eps=6)
    assert found[0].tolist() == pytest.approx([6, 6 / 48, 0])
    assert found[1].tolist() == pytest.approx([10, 10 / 12, 1 / 12])


def test_views_move_boxes_with_pixels():
    """A bright rectangle stays where its box says, through crop and mirror; view and pixels agree."""
    image = torch.zeros(2, 3, 40, 64)
    image[:, :, 10:20, 30:50] = 1.0
    targets = [
        dict(
            boxes=torch.tensor([[30.0, 10.0, 50.0, 20.0], [0.0, 0.0, 2.0, 2.0]]),
            labels=torch.tensor([4, 5]),
            size=(40, 60),
        )
        for _ in range(2)
    ]
    drawn = [((4, 3, 58, 37), True), ((4, 3, 58, 37), False)]
    out = move_batch(image, targets, [(40, 60)] * 2, drawn, divisor=32)
    assert tuple(out.images.shape) == (2, 3, 64, 64)
    assert out.sizes == [(34, 54)] * 2 == [view.size for view in out.views]
    # 58 - 50 .. 58 - 30 mirrored, 30 - 4 .. 50 - 4 as it was; the box outside is gone with its label.
    assert out.targets[0]["boxes"].tolist() == [[8, 7, 28, 17]]
    assert out.targets[1]["boxes"].tolist() == [[26, 7, 46, 17]]
    assert [t["labels"].tolist() for t in out.targets] == [[4], [4]]
    assert [t["size"] for t in out.targets] == [(34, 54)] * 2
    for i, target in enumerate(out.targets):
        x0, y0, x1, y1 = (int(v) for v in target["boxes"][0])
        lit = torch.zeros(64, 64)
        lit[y0:y1, x0:x1] = 1
        assert torch.equal(out.images[i, 0], lit)
        cells = out.views[i].cells(1, frame=(64, 64))
        # Each pixel of the view is the canonical pixel that its view names; -1 is padding.
        rows, columns = cells.y_cell[:34].long(), cells.x_cell[:54].long()
        assert torch.equal(image[i, 0][rows][:, columns], out.images[i, 0, :34, :54])
        assert set(cells.x_cell[54:].tolist()) == {-1}


def test_views_are_keyed_and_span_the_range():
    size = (200, 300)
    drawn = [draw_view(size, seed=1, image_id=i, visit=2) for i in range(400)]
    assert drawn == [draw_view(size, seed=1, image_id=i, visit=2) for i in range(400)]
    assert (
        drawn[0]
        != draw_view(size, seed=1, image_id=0, visit=3)
        != draw_view(size, seed=2, image_id=0, visit=3)
    )
    # 400 fair coins: standard deviation 0.025
    assert np.mean([flip for _, flip in drawn]) == pytest.approx(0.5, abs=0.1)
    sides = np.array([((y1 - y0) / 200, (x1 - x0) / 300) for (x0, y0, x1, y1), _ in drawn])
    assert 0.795 <= sides.min() < 0.81 < 0.99 < sides.max() <= 1
    assert all(0 <= x0 < x1 <= 300 and 0 <= y0 < y1 <= 200 for (x0, y0, x1, y1), _ in drawn)


def test_round_trip_is_pillow_s_jpeg_where_nothing_is_resized():
    """At the saved size of the image itself only truncation and JPEG are left, and libjpeg is libjpeg."""
    pytest.importorskip("cv2", reason="needs the mmdet extra: pip install 'ikd_fast[mmdet]'")
    import io

    from PIL import Image

    rng = np.random.default_rng(0)
    smooth = np.kron(rng.integers(0, 256, (4, 6, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    units = PixelUnits(mean=(120, 110, 100), std=(58, 57, 56))
    x = units.from_pixels(
        torch.from_numpy(smooth.transpose(2, 0, 1).copy())[None].float() + 0.7 * (torch.rand(1, 3, 32, 48))
    )
    x = torch.cat([x, torch.zeros(1, 3, 32, 16)], 3)  # padding
    got = published_round_trip(x, [(32, 48)], [(32, 48)], units, rgb=True)
    file = io.BytesIO()
    whole = np.clip(smooth, 0, 255)
    Image.fromarray(whole).save(file, "jpeg", quality=95, subsampling="4:2:0")
    truth = np.asarray(Image.open(file)).astype(float)
    grey = units.to_pixels(got[:, :, :, :48])[0].permute(1, 2, 0).numpy()
    gap = np.abs(grey - truth)
    # Two builds of libjpeg may differ by a level or two in colour conversion, the turned channels by far more.
    assert gap.mean() < 1
    assert gap.max() <= 4
    turned = published_round_trip(x, [(32, 48)], [(32, 48)], units, rgb=False)
    assert (units.to_pixels(turned - got + x)[..., :48] - units.to_pixels(x)[..., :48]).abs().mean() > 0.2
    assert torch.equal(got[..., 48:], x[..., 48:])


def test_round_trip_loses_fine_noise():
    """The energy of white sign noise that survives 0.6 of the size and JPEG 95: most of it is lost, a smooth ramp is not."""
    pytest.importorskip("cv2", reason="needs the mmdet extra: pip install 'ikd_fast[mmdet]'")
    ramp = torch.linspace(60, 180, 128).expand(1, 3, 128, 128).contiguous()
    noise = 8 * torch.randn(ramp.shape, generator=torch.Generator().manual_seed(0)).sign()
    noisy = published_round_trip(ramp + noise, [(128, 128)], [(77, 77)], PIXELS)
    plain = published_round_trip(ramp, [(128, 128)], [(77, 77)], PIXELS)
    assert (plain - ramp).abs().mean() < 1.5
    kept = ((noisy - plain) * noise).mean() / 64
    assert 0.02 < kept < 0.4


def row(name, loss, change, **more):
    base = dict(
        name=name, class_loss=loss, feature_change=change, linf=8.0, mean_abs=4.0, gradient_evals=1, seconds=0.1,
        metrics={"AP50": 0.5}, levels=[dict(l2=change, cosine=change / 2)], outside=0.0,
    )  # fmt: skip
    return base | more


def test_summary_by_hand():
    def run(seed, single):
        rows = [
            row("random sign", 1.0, 0.1),
            row("single", single, 0.3),
            row("iterative", 3.0, 0.5),
            row("PGD-20", 5.0, 0.9),
        ]
        return dict(eps=8.0, seed=seed, rows=rows)

    found = {r["name"]: r for r in summarise([row("clean", 0.9, 0.0)], [run(0, 2.0), run(1, 2.4)])}
    single = found["single"]
    assert single["class_loss"] == {"mean": pytest.approx(2.2), "spread": pytest.approx(0.4 / math.sqrt(2))}
    assert single["class_loss_gain"]["mean"] == pytest.approx(1.2)
    # (1.0 + 1.4) / 2 of 2 and of 4; (0.3 - 0.1) of 0.4 and of 0.8
    assert single["class_loss_percent_of_iterative"]["mean"] == pytest.approx(60)
    assert single["class_loss_percent_of_pgd"]["mean"] == pytest.approx(30)
    assert single["feature_change_percent_of_iterative"] == {
        "mean": pytest.approx(50),
        "spread": pytest.approx(0, abs=1e-9),
    }
    assert single["feature_change_percent_of_pgd"]["mean"] == pytest.approx(25)
    assert found["clean"]["eps"] is None
    assert "class_loss_gain" not in found["clean"]


def test_a_reference_that_gains_nothing_gives_no_percentage():
    rows = [row("random sign", 1.0, 0.1), row("iterative", 0.9, 0.5), row("PGD-20", 5.0, 0.9)]
    found = summarise([row("clean", 0.9, 0.0)], [dict(eps=1.0, seed=0, rows=rows)])
    last = found[-1]
    assert last["class_loss_percent_of_iterative"]["mean"] is None
    assert last["class_loss_percent_of_pgd"] == {"mean": pytest.approx(100), "spread": None}


def test_candidates_scale_with_eps():
    own = dict(mode="single", eps=8, step_size=16)
    plan = {c.name: c for c in candidates(StrengthSettings(own=own, visits=(1, 3)), 2.0)}
    assert plan["iterative"].build(5).step_size == 0.5
    pgd = plan["PGD-20"].build(5)
    assert (pgd.steps, pgd.step_size, pgd.diversity_prob, pgd.random_start, pgd.seed) == (20, 0.5, 0, True, 5)
    mine = plan["as configured (single)"].build(0)
    assert (mine.eps, mine.step_size) == (2, 4)
    assert plan["carry"].row_names() == ["carry, visit 1", "carry, visit 3"]
    # each build has a memory of its own
    assert plan["carry"].build(0).memory is not plan["carry"].build(0).memory


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (dict(eps=()), "eps must be one or more"),
        (dict(eps=(4, 4)), "different numbers"),
        (dict(eps=(0,)), "above 0 and up to 255"),
        (dict(seeds=(-1,)), "seeds must be >= 0"),
        (dict(visits=(0, 1)), "visits count from 1"),
        (dict(shrink=0), "shrink"),
    ],
)
def test_settings_that_mean_nothing(wrong, says):
    with pytest.raises(ValueError, match=says):
        StrengthSettings(**wrong)
