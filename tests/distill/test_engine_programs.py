"""Compiled forwards of the frozen teacher: taps, gradients, one program a shape, the bound on shapes."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

from ikd_fast import FrozenTeacher
from tests.distill.engine_nets import Backbone, trained
from tests.distill.test_engine import images, maps_and_gradient, relative

SOURCES = ("block", ["stem", "block.downsample.{i}"])


@pytest.fixture
def counted():
    """Counts the graphs, which ``aot_eager`` runs forward and backward as they were traced."""
    return CompileCounterWithBackend("aot_eager")


def teachers(backend, **options):
    torch.manual_seed(0)
    net = trained(Backbone()).double()
    return FrozenTeacher(net), FrozenTeacher(net, engine=dict(report=None, compile=backend, **options))


def test_compiled_maps_and_gradients_are_those_of_the_net(counted):
    reference, teacher = teachers(counted)
    x = images(dtype=torch.float64)
    truth, slope = maps_and_gradient(reference, x, SOURCES)
    for turn in range(4):
        found, gradient = maps_and_gradient(teacher, x, SOURCES)
        # float64 roundings of five layers.
        assert max(relative(a, b) for a, b in zip(found, truth, strict=True)) < 1e-13
        assert relative(gradient, slope) < 1e-13
        # The first time a shape runs as it is; then once without gradient, for the self-check, and once with.
        assert counted.frame_count == (0 if turn == 0 else 2)
    with torch.no_grad():
        again = teacher.pyramids(x, SOURCES)
    assert relative(again[1][2], truth[3]) < 1e-13
    assert counted.frame_count == 2


def test_half_precision_is_compiled_too(counted):
    reference, teacher = teachers(counted, dtype="bfloat16")
    x = images(dtype=torch.float64)
    for _ in range(2):
        found, gradient = maps_and_gradient(teacher, x, SOURCES)
    truth, slope = maps_and_gradient(reference, x, SOURCES)
    assert counted.frame_count == 2
    assert found[0].dtype == torch.float32
    assert max(relative(a, b) for a, b in zip(found, truth, strict=True)) < 2e-2
    assert gradient.dtype == torch.float64
    assert relative(gradient, slope) < 0.2


def test_shapes_have_programs_of_their_own_up_to_a_bound(counted):
    reference, teacher = teachers(counted, max_shapes=2)
    sizes = (32, 48, 64)
    for side in sizes[:2]:
        for _ in range(3):
            teacher.features(images(side=side, dtype=torch.float64), "block")
    assert counted.frame_count == 2
    x = images(side=sizes[2], dtype=torch.float64)
    teacher.features(x, "block")
    with pytest.warns(
        UserWarning, match=r"2 shapes are compiled or captured, \(2, 3, 64, 64\) and further ones run without"
    ):
        found = teacher.features(x, "block")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        teacher.features(x, "block")
    assert counted.frame_count == 2
    torch.testing.assert_close(found[0], reference.features(x, "block")[0], rtol=1e-12, atol=1e-12)


def test_many_teachers_do_not_use_up_one_anothers_programs():
    counted = CompileCounter()
    x = images(n=1, side=4)
    for turn in range(1, 11):
        teacher = FrozenTeacher(nn.Sequential(nn.Conv2d(3, 4, 1)), engine=dict(report=None, compile=counted))
        for _ in range(3):
            teacher.features(x, "0")
        assert counted.frame_count == turn


def test_callables_and_the_overriding_of_methods(counted):
    reference, teacher = teachers(counted)
    source = lambda net, x: list(net(x))  # noqa: E731
    x = images(dtype=torch.float64)
    for _ in range(3):
        found = teacher.features(x, source)
    assert counted.frame_count == 1
    torch.testing.assert_close(found[1], reference.features(x, "block")[0], rtol=1e-12, atol=1e-12)
    with teacher.eager():
        calls = []
        handle = teacher.running.register_forward_hook(lambda *_: calls.append(1))
        teacher.features(x, source)
        handle.remove()
    assert calls == [1]
