"""FGDLoss against the published form in float64; initialisation, gradients, box scale, precision, errors."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from ikd_fast.kernels import fgd_sums
from ikd_fast.losses import FGDLoss
from ikd_fast.losses.fgd import _added
from tests.losses import published
from tests.losses.setups import context, pyramid, randomise
from tests.tolerances import DTYPES, TOLERANCES, assert_near, gradcheck

WEIGHTS = {"fg": 1e-3, "bg": 5e-4, "mask": 1e-3, "rela": 5e-6}  # the class defaults


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [0, 1, 20])
def test_terms_total_and_gradients_against_the_published_form(count, dtype) -> None:
    s, t = pyramid(10, 1, dtype=dtype), pyramid(10, 2, dtype=dtype)
    ctx = context(count=count)
    loss = FGDLoss(channels=10, num_levels=3, temperature=0.8)
    randomise(loss)
    if dtype == torch.float64:
        loss.double()
    mine = [x.clone().requires_grad_() for x in s]
    terms, got = loss.terms(mine, t, ctx), loss(mine, t, ctx)
    assert list(terms) == list(got) == ["0", "1", "2"]

    truth = [x.double().requires_grad_() for x in s]
    copies = {k: v.detach().double().requires_grad_() for k, v in loss.named_parameters()}
    # float32 masks bound the float64 case too.
    tolerance = max(TOLERANCES[dtype].value, 2e-7)
    # Scaled as a GradScaler does: weighted gradients of 1e-5 are subnormal in fp16.
    upstream = (1024 * torch.randn(3, dtype=torch.float64)).tolist()
    want = []
    for i in range(3):
        start = f"relation.{i}."
        level = {k.removeprefix(start): v for k, v in copies.items() if k.startswith(start)}
        expected = published.fgd_terms(truth[i], t[i].double(), ctx, level, 0.8)
        for key, value in expected.items():
            scale = 1.0 if key == "fg" and count == 0 else float(value.detach())
            assert abs(terms[str(i)][key].item() - value.item()) <= tolerance * scale, (i, key)
        want.append(sum(WEIGHTS[k] * v for k, v in expected.items()))
        assert got[str(i)].item() == pytest.approx(want[i].item(), rel=tolerance)
    sum(u * v for u, v in zip(upstream, got.values(), strict=True)).backward()
    sum(u * v for u, v in zip(upstream, want, strict=True)).backward()
    for a, b in zip(mine, truth, strict=True):
        assert a.grad.dtype == dtype
        assert_near(a.grad, b.grad, max(TOLERANCES[dtype].gradient, 1e-6), "student maps")
    for name, p in loss.named_parameters():
        # Parameters are float32 and their gradients with them, whatever the maps.
        assert_near(p.grad, copies[name].grad, 1e-4 if dtype != torch.float64 else 1e-6, name)


def test_gradcheck() -> None:
    s, t = (pyramid(4, k, dtype=torch.float64, levels=((3, 2), (1, 1))) for k in (1, 2))
    loss = FGDLoss(alpha=1.0, beta=2.0, gamma=0.5, lambda_=0.1, channels=4, num_levels=2).double()
    randomise(loss)
    ctx = context()
    gradcheck(lambda *s: tuple(loss(list(s), t, ctx).values()), *(x.requires_grad_() for x in s))


def test_initial_values_as_published() -> None:
    torch.manual_seed(0)
    loss = FGDLoss(channels=256, num_levels=4)
    masks = torch.stack(
        [getattr(p, side) for p in loss.relation.values() for side in ("student_mask", "teacher_mask")]
    )
    # Kaiming normal: std sqrt(2 / C); 2048 draws, 4 standard errors.
    expected = math.sqrt(2 / 256)
    assert abs(masks.std().item() - expected) < 4 * expected / math.sqrt(2 * masks.numel())
    assert abs(masks.mean().item()) < 4 * expected / math.sqrt(masks.numel())
    for level in loss.relation.values():
        for branch in (level.student_context, level.teacher_context):
            assert branch.expand.weight.abs().max() == 0
            assert branch.expand.bias.abs().max() == 0
            assert branch.reduce.weight.shape == (128, 256)
            assert branch.reduce.weight.abs().max() <= 1 / 16  # uniform in +-1/sqrt(C)
            assert branch.norm.eps == 1e-5
            assert torch.equal(branch.norm.weight, torch.ones(128))


def test_relation_is_sum_of_squares_at_first_and_zero_at_equality() -> None:
    s, t, ctx = pyramid(8, 1), pyramid(8, 2), context()
    loss = FGDLoss(channels=8, num_levels=3)
    for i, terms in enumerate(loss.terms(s, t, ctx).values()):
        assert terms["rela"].item() == pytest.approx(float((s[i] - t[i]).square().sum()) / 2, rel=1e-6)
    same = [x.clone().requires_grad_() for x in t]
    terms = loss.terms(same, t, ctx)
    assert all(v.item() == 0.0 for level in terms.values() for v in level.values())
    sum(loss(same, t, ctx).values()).backward()
    assert all(x.grad.isfinite().all() for x in same)


def test_first_step_gradients_reach_the_last_layers_alone_then_all() -> None:
    s, t, ctx = [x.requires_grad_() for x in pyramid(8, 1)], pyramid(8, 2), context()
    loss = FGDLoss(channels=8, num_levels=3)
    sum(loss(s, t, ctx).values()).backward()
    for name, p in loss.named_parameters():
        assert (p.grad.abs().max() > 0) == (".expand." in name), name
    with torch.no_grad():
        for p in loss.parameters():
            p -= 10.0 * p.grad
    loss.zero_grad()
    sum(loss(s, t, ctx).values()).backward()
    for name, p in loss.named_parameters():
        assert p.grad.abs().max() > 0, name
    assert all(x.grad.abs().max() > 0 for x in s)
    assert all(x.grad is None for x in t)


def test_align_brings_the_student_to_the_teachers_channels() -> None:
    s, t, ctx = [x.requires_grad_() for x in pyramid(6, 1)], pyramid(10, 2), context()
    loss = FGDLoss()
    loss.bind([6, 6, 6], [10, 10, 10])
    assert {k: tuple(v.weight.shape) for k, v in loss.align.items()} == {
        str(i): (10, 6, 1, 1) for i in range(3)
    }
    got = loss(s, t, ctx)
    sum(got.values()).backward()
    assert all(p.grad.abs().max() > 0 for p in loss.align.parameters())
    aligned = [F.conv2d(x, loss.align[str(i)].weight, loss.align[str(i)].bias) for i, x in enumerate(s)]
    plain = FGDLoss(channels=10, num_levels=3)
    plain.load_state_dict({k: v for k, v in loss.state_dict().items() if k.startswith("relation.")})
    for key, value in plain(aligned, t, ctx).items():
        assert got[key].item() == pytest.approx(value.item(), rel=1e-6)


def test_levels_are_independent_and_selectable() -> None:
    s, t, ctx = pyramid(8, 1), pyramid(8, 2), context()
    whole = FGDLoss(channels=8, num_levels=3)
    randomise(whole)
    some = FGDLoss(channels=8, num_levels=3, levels=[2, 0])
    some.load_state_dict({k: v for k, v in whole.state_dict().items() if not k.startswith("relation.1.")})
    got, all_levels = some(s, t, ctx), whole(s, t, ctx)
    assert list(got) == ["2", "0"]
    assert all(torch.equal(got[k], all_levels[k]) for k in got)


def test_box_scale() -> None:
    s, t = pyramid(8, 1), pyramid(8, 2)
    ctx = context()
    padded = context(image_sizes=[ctx.input_size] * 2, boxes=ctx.boxes)
    by_padded, published_scale = (
        FGDLoss(channels=8, num_levels=3, box_scale=b) for b in ("padded", "published")
    )
    for key, terms in by_padded.terms(s, t, ctx).items():
        assert torch.equal(terms["fg"], published_scale.terms(s, t, padded)[key]["fg"])
        assert terms["fg"] != published_scale.terms(s, t, ctx)[key]["fg"]
    with pytest.raises(ValueError, match="unknown box_scale 'image'; valid: published, padded"):
        FGDLoss(box_scale="image")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_maps_of_norm_1e4_under_autocast(dtype) -> None:
    # sum D^2 = 1e8 an image: 1500 times the largest fp16 number.
    s, t = ([x.mul(100).to(dtype) for x in pyramid(64, k)] for k in (1, 2))
    loss = FGDLoss(channels=64, num_levels=3)
    ctx = context()
    mine = [x.clone().requires_grad_() for x in s]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = loss(mine, t, ctx)
    want = loss([x.double() for x in s], [x.double() for x in t], ctx)
    for key, value in want.items():
        assert got[key].dtype == torch.float32
        # exp of attentions of size 1e2 / 0.5: the exponent's rounding is 2^-24 * 2e2.
        assert got[key].item() == pytest.approx(value.item(), rel=5e-5)
    sum(got.values()).backward()
    assert all(x.grad.isfinite().all() for x in mine)


def test_parameters_kept_in_half_precision_still_compute_in_float32() -> None:
    s, t, ctx = pyramid(8, 1), pyramid(8, 2), context()
    loss = FGDLoss(channels=8, num_levels=3)
    randomise(loss)
    loss.to(torch.bfloat16)
    reference = FGDLoss(channels=8, num_levels=3)
    reference.load_state_dict(loss.state_dict())
    for key, value in loss(s, t, ctx).items():
        assert value.item() == pytest.approx(reference(s, t, ctx)[key].item(), rel=1e-6)


def test_box_errors_name_the_image() -> None:
    s, t = pyramid(8, 1), pyramid(8, 2)
    loss = FGDLoss(channels=8, num_levels=3)
    good = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    with pytest.raises(ValueError, match="each of the 2 images of the batch, got 1 and 2"):
        loss(s, t, context(boxes=[good]))
    with pytest.raises(ValueError, match=r"image 1: expected boxes \[n,4\] xyxy in pixels, got \(4,\)"):
        loss(s, t, context(boxes=[good, good[0]]))
    with pytest.raises(ValueError, match=r"image 1, box 1: expected finite.*got \[5\.0, 2\.0, 3\.0, 4\.0\]"):
        loss(s, t, context(boxes=[good, torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 2.0, 3.0, 4.0]])]))
    with pytest.raises(ValueError, match=r"image 0, box 0: expected finite.*nan"):
        loss(s, t, context(boxes=[good * float("nan"), good]))
    with pytest.raises(ValueError, match=r"image 0: boxes on meta, maps on cpu; write boxes\.to"):
        loss(s, t, context(boxes=[good.to("meta"), good]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0.0}, "temperature must be a finite number > 0, got 0.0"),
        ({"temperature": -1}, "temperature must be a finite number > 0, got -1"),
        ({"alpha": float("nan")}, "alpha must be a finite number, got nan"),
        ({"lambda_": "5e-6"}, "lambda_ must be a finite number, got '5e-6'"),
        ({"channels": 1, "num_levels": 1}, "level 0: the relation term needs >= 2 teacher channels, got 1"),
    ],
)
def test_argument_errors(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        FGDLoss(**arguments)


def test_branches_computed_together_equal_each_alone() -> None:
    # Levels of 8, 6 and 8 channels: two groups, and a group that is not contiguous.
    channels = [8, 6, 8]
    s, t = ([pyramid(c, k)[i] for i, c in enumerate(channels)] for k in (1, 2))
    ctx = context()
    loss = FGDLoss(channels=channels, num_levels=3)
    randomise(loss)
    terms = loss.terms(s, t, ctx)
    for i, c in enumerate(channels):
        alone = FGDLoss(channels=c, num_levels=1)
        start = f"relation.{i}."
        state = {k.removeprefix(start): v for k, v in loss.state_dict().items() if k.startswith(start)}
        alone.relation["0"].load_state_dict(state)
        for key, value in alone.terms([s[i]], [t[i]], ctx)["0"].items():
            assert terms[str(i)][key].item() == pytest.approx(value.item(), rel=1e-6), (i, key)
        expected = published.fgd_terms(
            s[i].double(), t[i].double(), ctx, {k: v.double() for k, v in state.items()}, loss.temperature
        )
        for key, value in expected.items():
            assert terms[str(i)][key].item() == pytest.approx(value.item(), rel=1e-5), (i, key)
    mine = [x.requires_grad_() for x in s]
    sum(loss(mine, t, ctx).values()).backward()
    assert all(p.grad.abs().max() > 0 for p in loss.parameters())


def test_branches_equal_their_own_modules() -> None:
    loss = FGDLoss(channels=6, num_levels=2)
    randomise(loss)
    parts = list(loss.relation.values())
    x = torch.randn(2, 2, 3, 6)
    want = [p.student_context(x[0, i]) - p.teacher_context(x[1, i]) for i, p in enumerate(parts)]
    assert_near(_added(parts, x), torch.stack(want), 1e-6)


def test_maps_reach_the_operation_as_they_came(monkeypatch) -> None:
    seen = []

    def spy(student, teacher, *args, **kwargs):
        seen.append(([x.dtype for x in (*student, *teacher)], kwargs["backend"]))
        return fgd_sums(student, teacher, *args, **kwargs)

    monkeypatch.setattr("ikd_fast.losses.fgd.fgd_sums", spy)
    loss = FGDLoss(channels=8, num_levels=3, backend="reference")
    loss(pyramid(8, 1, dtype=torch.bfloat16), pyramid(8, 2, dtype=torch.bfloat16), context())
    assert seen == [([torch.bfloat16] * 6, "reference")]


def test_backend_is_checked() -> None:
    with pytest.raises(ValueError, match="FGDLoss: backend must be one of .* got 'cuda'"):
        FGDLoss(backend="cuda")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.slow
def test_compiles_whole() -> None:
    s, t, ctx = pyramid(8, 1), pyramid(8, 2), context()
    loss = FGDLoss(channels=8, num_levels=3)
    randomise(loss)
    compiled = torch.compile(lambda *s: loss(list(s), t, ctx), fullgraph=True, backend="aot_eager")
    for key, value in loss(s, t, ctx).items():
        assert compiled(*s)[key].item() == pytest.approx(value.item(), rel=1e-6)


def test_a_first_call_in_inference_mode_leaves_training_possible() -> None:
    s, t, ctx = pyramid(8, 1, levels=((5, 3),)), pyramid(8, 2, levels=((5, 3),)), context()
    loss = FGDLoss(channels=8, num_levels=1)
    randomise(loss)
    with torch.inference_mode():
        want = loss(s, t, ctx)["0"].item()
    got = loss([x.requires_grad_() for x in s], t, ctx)["0"]
    got.backward()
    assert got.item() == want
