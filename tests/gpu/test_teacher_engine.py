"""The frozen teacher's engine where only a GPU can show it: CUDA graphs, half precision, compiled programs, no host sync."""

from __future__ import annotations

import pytest
import torch

from ikd_fast import FrozenTeacher
from tests.distill.engine_nets import Backbone, trained
from tests.distill.test_engine import images, maps_and_gradient, relative
from tests.gpu.test_cuda import no_sync

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SOURCES = ("block", ["stem", "block.downsample.{i}"])


def teachers(**options):
    torch.manual_seed(0)
    net = trained(Backbone())
    pair = FrozenTeacher(net), FrozenTeacher(net, engine=dict(report=None, **options))
    net.cuda()
    return pair


@pytest.fixture
def exact():
    """float32 convolutions in float32, so that tolerances are those of roundings."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize(
    ("options", "bound"),
    [
        (dict(fold_bn=True), 5e-6),
        (dict(fold_bn=True, channels_last=True), 5e-6),
        (dict(dtype="float16", channels_last=True), 3e-3),
        (dict(dtype="bfloat16", channels_last=True), 2e-2),
    ],
)
def test_maps_and_gradients_are_those_of_the_net(exact, options, bound):
    reference, teacher = teachers(**options)
    x = images().cuda()
    truth, slope = maps_and_gradient(reference, x, SOURCES)
    found, gradient = maps_and_gradient(teacher, x, SOURCES)
    assert max(relative(a, b) for a, b in zip(found, truth, strict=True)) < bound
    # An activation near zero that turns moves the gradient by all of its share.
    assert relative(gradient, slope) < 20 * bound


@pytest.mark.parametrize(
    "options", [{}, dict(dtype="bfloat16", channels_last=True)], ids=["float32", "bfloat16"]
)
def test_a_replayed_graph_gives_what_the_forward_gives(exact, options):
    eager, graphed = teachers(**options)[1], teachers(cuda_graphs=True, **options)[1]
    kept = []
    for turn in range(4):
        for n, side in ((2, 32), (1, 64)):
            x = (images(n, side) + turn).cuda()
            (found,), (truth,) = graphed.pyramids(x, ["block"]), eager.pyramids(x, ["block"])
            # The same kernels, but libraries may choose others while capturing.
            torch.testing.assert_close(
                found[0], truth[0], rtol=2e-2 if options else 1e-4, atol=2e-2 if options else 1e-4
            )
            kept.append((found[0], found[0].clone()))
    assert len(graphed._run.shapes.graphs) == 2
    # A later replay leaves earlier maps as they were.
    assert all(torch.equal(a, b) for a, b in kept)


def test_graphs_leave_the_way_to_the_images_open(exact):
    reference, teacher = teachers(cuda_graphs=True)
    x = images().cuda()
    for _ in range(3):
        teacher.pyramids(x, SOURCES)
        found, gradient = maps_and_gradient(teacher, x, SOURCES)
    truth, slope = maps_and_gradient(reference, x, SOURCES)
    assert max(relative(a, b) for a, b in zip(found, truth, strict=True)) < 5e-6
    assert relative(gradient, slope) < 1e-4


def test_compiled_programs_can_be_captured(exact):
    reference, teacher = teachers(cuda_graphs=True, compile=True)
    x = images().cuda()
    for _ in range(3):
        (found,) = teacher.pyramids(x, ["block"])
    assert relative(found[0], reference.pyramids(x, ["block"])[0][0]) < 5e-6


def test_what_waits_cannot_be_captured():
    torch.manual_seed(0)
    net = trained(Backbone()).cuda()
    waiting = lambda n, x: n(x * float(x.mean() > -100))  # noqa: E731
    teacher = FrozenTeacher(net, call=waiting, engine=dict(cuda_graphs=True, report=None))
    x = images().cuda()
    teacher.features(x, "block")
    with pytest.raises(
        RuntimeError, match=r"cuda_graphs=True, but the forward on \(2, 3, 32, 32\) cannot be captured"
    ):
        teacher.features(x, "block")


def test_graphs_need_images_on_the_device():
    torch.manual_seed(0)
    teacher = FrozenTeacher(trained(Backbone()), engine=dict(cuda_graphs=True, report=None))
    x = images()
    teacher.features(x, "block")
    with pytest.raises(RuntimeError, match=r"cuda_graphs=True needs images on a CUDA device, got cpu"):
        teacher.features(x, "block")


@pytest.mark.parametrize("options", [{}, dict(dtype="bfloat16"), dict(dtype="float16", cuda_graphs=True)])
def test_a_forward_does_not_wait_for_the_device(options):
    _, teacher = teachers(**options)
    x = images().cuda()
    for _ in range(3):
        maps_and_gradient(teacher, x, SOURCES)
        teacher.pyramids(x, SOURCES)
    with no_sync():
        y = x.clone().requires_grad_(True)
        maps = teacher.watch(y, SOURCES)
        torch.autograd.grad(sum(m.square().mean() for p in maps for m in p), y)
        teacher.pyramids(x, SOURCES)
