"""The frozen teacher's engine against the net as it was given: numbers, gradients, taps, refusals."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from ikd_fast import IKD, AdvFeatureLoss, FrozenTeacher, OnlineDIFGSM, PixelUnits
from ikd_fast.distill import TeacherEngine
from ikd_fast.distill.engine import EngineCheck
from tests.distill.engine_nets import Backbone, Branching, trained

QUIET = dict(report=None)


def features(net, images):
    return net(images)


def images(n=2, side=32, dtype=torch.float32):
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(1)).to(dtype)


def backbone(seed=0):
    torch.manual_seed(seed)
    return trained(Backbone())


def pair(net, **options):
    return FrozenTeacher(net), FrozenTeacher(net, engine={**QUIET, **options})


def maps_and_gradient(teacher, x, sources=("", "block")):
    """All maps, and the gradient of a fixed random projection of them to the images."""
    x = x.clone().requires_grad_(True)
    maps = [m for pyramid in teacher.watch(x, list(sources)) for m in pyramid]
    g = torch.Generator().manual_seed(2)
    total = sum((m * torch.randn(m.shape, generator=g).to(m)).sum() for m in maps)
    return maps, torch.autograd.grad(total, x)[0]


def relative(a, b):
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(
    ("dtype", "options", "bound"),
    [
        # Folding and layouts change the order of roundings: a few of 1.1e-16 and 6e-8 a layer, five layers.
        (torch.float64, dict(fold_bn=True), 1e-13),
        (torch.float64, dict(fold_bn=True, channels_last=True), 1e-13),
        (torch.float32, dict(fold_bn=True), 2e-6),
        (torch.float32, dict(fold_bn=False, channels_last=True), 2e-6),
        (torch.float32, dict(fold_bn=True, channels_last=True, dtype="float32"), 2e-6),
        # 2^-9 and 2^-12 a rounding.
        (torch.float32, dict(fold_bn=True, dtype="bfloat16"), 2e-2),
        (torch.float32, dict(fold_bn=False, dtype=torch.bfloat16), 2e-2),
        (torch.float32, dict(fold_bn=True, channels_last=True, dtype="float16"), 3e-3),
    ],
)
def test_maps_and_gradients_are_those_of_the_net(dtype, options, bound):
    net = backbone().to(dtype)
    reference, teacher = pair(net, **options)
    x = images(dtype=dtype)
    (truth, slope), (found, gradient) = maps_and_gradient(reference, x), maps_and_gradient(teacher, x)
    for a, b in zip(found, truth, strict=True):
        assert a.dtype == dtype
        assert a.is_contiguous()
        assert relative(a, b) <= bound
    assert gradient.dtype == dtype
    # An activation near zero that turns moves the gradient by all of its share.
    assert relative(gradient, slope) <= (bound if dtype == torch.float64 else 20 * bound)
    folded = sum(isinstance(m, nn.Identity) for m in teacher.running.modules())
    assert folded == (4 if options["fold_bn"] else 0)
    assert not any(m.grad_fn for m in teacher.pyramids(x, [""])[0])


def test_without_an_engine_every_bit_is_as_before():
    net = backbone()
    x = images()
    assert all(torch.equal(a, b) for a, b in zip(FrozenTeacher(net).features(x, ""), net(x), strict=True))
    assert FrozenTeacher(net).running is net


def test_only_consecutive_pairs_are_folded():
    torch.manual_seed(0)
    net = trained(Branching()).double()
    reference, teacher = pair(net, fold_bn=True)
    x = images(dtype=torch.float64)
    for a, b in zip(teacher(x), reference(x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    names = {name for name, m in teacher.running.named_modules() if isinstance(m, nn.Identity)}
    assert names == {f"{name}_norm" for name in Branching.FOLDS}
    assert not any(isinstance(m, nn.Identity) for m in net.modules())


def test_norms_in_training_mode_or_without_statistics_stay():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False), nn.Conv2d(4, 4, 1))
    _, teacher = pair(net, fold_bn=True)
    teacher.features(images(), "2")
    assert isinstance(teacher.running[1], nn.BatchNorm2d)


def test_a_tapped_convolution_is_left_unfolded():
    net = backbone().double()
    reference, teacher = pair(net, fold_bn=True)
    x = images(dtype=torch.float64)
    for source in ("", "block.conv1", "stem.0", ["stem", "block.downsample.{i}"]):
        truth, found = (t.features(x, source) for t in (reference, teacher))
        for a, b in zip(found, truth, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    kept = {name for name, m in teacher.running.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert kept == {"block.bn1", "stem.1", "block.downsample.1"}


def test_a_wrapper_of_a_convolution_counts_as_a_tap_of_it():
    net = trained(nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1)), nn.BatchNorm2d(4)))
    reference, teacher = pair(net, fold_bn=True)
    x = images()
    teacher.features(x, "1")
    assert isinstance(teacher.running[1], nn.Identity)
    torch.testing.assert_close(teacher.features(x, "0")[0], reference.features(x, "0")[0])


def test_the_net_is_shared_and_untouched():
    net = backbone()
    before = FrozenTeacher(net).fingerprint()
    teacher = FrozenTeacher(net, engine=dict(fold_bn=True, **QUIET))
    teacher.features(images(), "")
    copied = dict(teacher.running.named_modules())
    assert teacher.fingerprint() == before
    assert teacher.net is net
    assert copy.deepcopy(teacher) is teacher
    _, half = pair(net, fold_bn=False, channels_last=False, dtype="bfloat16")
    half.features(images(), "")
    assert half.running.stem[0].weight.dtype == torch.bfloat16
    assert half.running.stem[1].weight is net.stem[1].weight
    assert copied["stem.0"].weight is not net.stem[0].weight
    assert not any(p.requires_grad for p in half.running.parameters())


def test_moved_cast_and_loaded_weights_are_taken_up():
    net, other = backbone(), backbone(seed=5)
    _, teacher = pair(net, fold_bn=True)
    x = images()
    teacher.features(x, "")
    net.load_state_dict(other.state_dict())
    torch.testing.assert_close(teacher.features(x, "")[1], other(x)[1], rtol=1e-4, atol=1e-5)
    assert teacher.fingerprint() == FrozenTeacher(other).fingerprint()
    teacher.to(torch.float64)
    found = teacher.features(x.double(), "")[1]
    torch.testing.assert_close(found, net(x.double())[1], rtol=1e-11, atol=1e-11)
    assert len(teacher.checks) == 3  # each state of the net is looked at once


def test_double_nets_may_run_in_less():
    net = backbone().double()
    reference, teacher = pair(net, fold_bn=True, dtype="float32")
    x = images(dtype=torch.float64)
    (truth, slope), (found, gradient) = maps_and_gradient(reference, x), maps_and_gradient(teacher, x)
    assert found[0].dtype == torch.float32
    assert gradient.dtype == torch.float64
    assert relative(found[1], truth[1]) < 2e-6
    assert relative(gradient, slope) < 2e-5
    assert {p.dtype for p in net.parameters()} == {torch.float64}


def test_native_outputs_and_surrounding_autocast():
    net = backbone()
    x = images()
    _, native = pair(net, dtype="bfloat16", outputs="native")
    assert {m.dtype for m in native.features(x, "")} == {torch.bfloat16}
    _, surrounded = pair(net)
    _, fixed = pair(net, dtype="float32")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert surrounded.features(x, "stem.0")[0].dtype == torch.bfloat16
        assert fixed.features(x, "stem.0")[0].dtype == torch.float32


def test_a_loss_through_the_teacher_runs_the_engine():
    net = backbone()
    reference, teacher = pair(net, fold_bn=True, dtype="float16")
    x = images().requires_grad_(True)
    values = [t(x)[1].square().mean() for t in (reference, teacher)]
    assert values[1].dtype == torch.float32
    assert 0 < relative(values[1], values[0]) < 1e-2
    with teacher.entered(x) as (running, half):
        assert half.dtype == torch.float16
        assert running is teacher.running
    assert teacher.gradients_in_half
    assert not reference.gradients_in_half


def test_the_self_check_says_what_it_found(capsys):
    net = backbone()
    FrozenTeacher(net, engine=dict(fold_bn=True, channels_last=False, dtype="bfloat16")).features(
        images(), ""
    )
    line = capsys.readouterr().out
    assert line.startswith("teacher engine (fold_bn 4 of 4, bfloat16): relative error per level:  ")
    assert line.rstrip().endswith("bound 5.0e-02")


def test_the_self_check_raises_and_names_the_option():
    net = backbone()
    _, strict = pair(net, fold_bn=True, dtype="bfloat16", tolerance=1e-5)
    with pytest.raises(
        ValueError, match=r"is above it; switch off dtype=None \(then \d\.\de-07\), or accept it with"
    ):
        strict.features(images(), "")
    _, impossible = pair(net, fold_bn=True, channels_last=True, tolerance=1e-12)
    with pytest.raises(ValueError, match="no single option is to blame: write engine=None"):
        impossible.features(images(), "")


def test_an_overflow_is_found():
    net = trained(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    with torch.no_grad():
        net[1].weight.mul_(1e6)  # finite in float32, above 65504
    _, teacher = pair(net, fold_bn=True, dtype="float16")
    with pytest.raises(ValueError, match=r"maps are not finite where the net's are; switch off dtype=None"):
        teacher.features(images(), "1")


def test_a_norm_that_a_plain_list_holds_is_found_out():
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
            self.order = [self.conv, self.norm]

        def forward(self, x):
            for layer in self.order:
                x = layer(x)
            return x

    _, teacher = pair(trained(Hidden()), fold_bn=True, channels_last=False)
    with pytest.raises(ValueError, match=r"switch off fold_bn=False \(then 0.0e\+00\)"):
        teacher.features(images(), "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(fold_bn="yes"), "fold_bn must be True, False or 'auto', got 'yes'"),
        (
            dict(dtype="int8"),
            r"dtype must be one of \['float32', 'bfloat16', 'float16'\] or None, got 'int8'",
        ),
        (dict(max_shapes=0), "max_shapes must be an integer >= 1, got 0"),
        (dict(tolerance=0), "tolerance must be above 0"),
        (dict(outputs="half"), "outputs must be 'float32' or 'native', got 'half'"),
        (dict(compile=3), "compile must be a bool or a backend, got 3"),
    ],
)
def test_options_say_what_they_take(options, message):
    with pytest.raises(ValueError, match=message):
        FrozenTeacher(backbone(), engine=options)


def test_unknown_options_and_types():
    with pytest.raises(TypeError, match="has no option 'foldbn'; did you mean 'fold_bn'"):
        FrozenTeacher(backbone(), engine=dict(foldbn=True))
    with pytest.raises(TypeError, match=r"engine must be TeacherEngine\(...\), dict"):
        FrozenTeacher(backbone(), engine="fast")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens where there is no CUDA device")
def test_cuda_graphs_need_cuda():
    with pytest.raises(ValueError, match="cuda_graphs=True needs a CUDA device, and there is none"):
        TeacherEngine(cuda_graphs=True)


def test_a_net_that_the_probe_does_not_fit():
    net = nn.Sequential(nn.Conv2d(5, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 64, 2))
    _, teacher = pair(net, fold_bn=True)
    x = torch.rand(1, 5, 8, 8)
    with pytest.raises(
        RuntimeError, match=r"fold_bn looks for norms in a forward on \(1, 5, 128, 128\) noise"
    ):
        teacher.features(x, "1")
    traced = FrozenTeacher(net, engine=dict(fold_bn=True, **QUIET), trace=lambda n, y: n[:2](y))
    torch.testing.assert_close(traced.features(x, "1")[0], net[:2](x))
    assert isinstance(traced.running[1], nn.Identity)


def test_it_is_pickled_without_what_it_made():
    teacher = FrozenTeacher(backbone(), call=features, engine=TeacherEngine(fold_bn=True, report=None))
    x = images()
    expected = teacher.features(x, "block")[0]
    again = pickle.loads(pickle.dumps(teacher))
    assert torch.equal(again.features(x, "block")[0], expected)
    assert "fold_bn" in repr(again)


def test_worst_error_is_nan_where_one_is():
    check = EngineCheck(("a",), ((1e-3, float("nan"), 2e-3),), 1.0, "")
    assert check.worst != check.worst
    assert not check.passed


def test_a_whole_step_under_a_folded_teacher_is_that_under_the_net():
    def total(engine):
        torch.manual_seed(0)
        student, net = Backbone(), backbone(seed=1)
        teacher = FrozenTeacher(net.double(), engine=engine)
        ikd = IKD(
            student.double(),
            teacher,
            features="block",
            losses=[AdvFeatureLoss()],
            attack=OnlineDIFGSM("iterative", objective="feature", seed=3),
            task_loss=lambda s, x, y: s(x)[1].mean(),
            units=PixelUnits(value_range=(0, 1)),
            example=torch.zeros(1, 3, 32, 32).double(),
        )
        targets = [dict(boxes=torch.tensor([[1.0, 1.0, 9.0, 9.0]]), labels=torch.tensor([0]))] * 2
        out = ikd.step(images(dtype=torch.float64).sigmoid(), targets, image_ids=[1, 2], epoch=0)
        out.total.backward()
        return out.total.detach(), [p.grad for p in student.parameters()]

    (plain, gradients), (folded, found) = (
        total(None),
        total(dict(fold_bn=True, channels_last=True, report=None)),
    )
    torch.testing.assert_close(folded, plain, rtol=1e-10, atol=0)
    for a, b in zip(found, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
