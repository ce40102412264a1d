"""Binding, level choice, checks and state, the same for every loss."""

from __future__ import annotations

import copy

import pytest
import torch

from ikd_fast.losses import AdvFeatureLoss, FGDLoss, KDLoss, MGDLoss
from tests.losses.setups import context, pyramid

ALL = [AdvFeatureLoss, FGDLoss, MGDLoss]


def bound(cls: type[KDLoss], channels: int = 4, levels: int = 3, **arguments) -> KDLoss:
    loss = cls(**arguments)
    loss.bind([channels] * levels, [channels] * levels)
    return loss


@pytest.mark.parametrize("cls", [FGDLoss, MGDLoss])
def test_unbound_says_what_to_call(cls) -> None:
    loss = cls()
    assert not loss.bound
    assert not list(loss.parameters())
    with pytest.raises(
        RuntimeError, match=r"call bind\(\[4, 4, 4\], \[4, 4, 4\]\) before building the optimizer"
    ):
        loss(pyramid(4, 1), pyramid(4, 2), context())


@pytest.mark.parametrize("cls", ALL)
def test_bind_again(cls) -> None:
    loss = bound(cls)
    parameters = list(loss.parameters())
    loss.bind([4] * 3, [4] * 3)
    assert all(a is b for a, b in zip(parameters, loss.parameters(), strict=True))
    with pytest.raises(ValueError, match=r"cannot be bound to .*\(5, 4\).*make a new loss"):
        loss.bind([4, 4, 5], [4] * 3)
    with pytest.raises(ValueError, match="as many student as teacher levels"):
        loss.bind([4, 4], [4] * 3)
    with pytest.raises(ValueError, match="channel counts >= 1"):
        cls().bind([0], [4])


@pytest.mark.parametrize("cls", [FGDLoss, MGDLoss])
def test_channels_given_to_the_constructor(cls) -> None:
    names = {n: p.shape for n, p in bound(cls).named_parameters()}
    assert {n: p.shape for n, p in cls(channels=4, num_levels=3).named_parameters()} == names
    assert {n: p.shape for n, p in cls(channels=[4, 4, 4]).named_parameters()} == names
    assert {n: p.shape for n, p in cls(channels=4, levels=(0, 1, 2)).named_parameters()} == names
    loss = cls(channels=4, num_levels=3)
    loss.bind([4] * 3, [4] * 3)  # as IKD does with the networks at hand: nothing changes
    with pytest.raises(
        ValueError, match=r"do not give one number of levels; write e.g. channels=256, num_levels=5"
    ):
        cls(channels=256)
    with pytest.raises(ValueError, match="do not give one number of levels"):
        cls(channels=[4, 4], num_levels=3)
    with pytest.raises(ValueError, match="go with channels="):
        cls(teacher_channels=4)


def test_four_of_five_levels() -> None:
    loss = FGDLoss(preset="mask_rcnn")
    loss.bind([4] * 5, [4] * 5)
    levels = ((12, 16), (6, 8), (3, 4), (2, 2), (1, 1))
    assert list(loss(pyramid(4, 1, levels=levels), pyramid(4, 2, levels=levels), context())) == [
        "0",
        "1",
        "2",
        "3",
    ]
    assert list(loss.relation) == ["0", "1", "2", "3"]


@pytest.mark.parametrize("cls", ALL)
def test_level_errors(cls) -> None:
    for levels in ([], [-1], [0, 0], [1.0]):
        with pytest.raises(ValueError, match="levels must be distinct indices >= 0"):
            cls(levels=levels)
    with pytest.raises(ValueError, match=r"\[3, 7\] do not exist; valid indices are 0\.\.2"):
        cls(levels=[0, 3, 7]).bind([4] * 3, [4] * 3)


@pytest.mark.parametrize("cls", ALL)
def test_map_errors(cls) -> None:
    loss, s, t, ctx = bound(cls), pyramid(4, 1), pyramid(4, 2), context()
    with pytest.raises(ValueError, match="3 student and 2 teacher levels"):
        loss(s, t[:2], ctx)
    with pytest.raises(ValueError, match=r"bound to levels \[0, 1, 2\], got a pyramid of 2 levels"):
        loss(s[:2], t[:2], ctx)
    with pytest.raises(ValueError, match=r"level 1.*the teacher map requires a gradient.*map\.detach\(\)"):
        loss(s, [t[0], t[1].clone().requires_grad_(), t[2]], ctx)
    with pytest.raises(
        ValueError, match=r"level 2.*student \(2, 4, 3, 4\) and teacher \(2, 4, 3, 5\).*equal stride"
    ):
        loss(s, [*t[:2], torch.zeros(2, 4, 3, 5)], ctx)
    with pytest.raises(ValueError, match=r"level 0.*student \(2, .* teacher \(1, "):
        loss(s, [x[:1] for x in t], ctx)
    with pytest.raises(
        ValueError, match=r"level 0: bound to \(student, teacher\) channels \(4, 4\), got \(4, 6\)"
    ):
        loss(s, pyramid(6, 2), ctx)
    with pytest.raises(ValueError, match=r"level 0: expected a floating-point student map.*torch.int64"):
        loss([x.long() for x in s], t, ctx)
    with pytest.raises(ValueError, match=r"level 0: expected a floating-point teacher map.*\(4, 12, 16\)"):
        loss(s, [x[0] for x in t], ctx)
    with pytest.raises(ValueError, match="level 0: expected at least one element"):
        loss([x[:0] for x in s], [x[:0] for x in t], ctx)
    with pytest.raises(ValueError, match="student map on cpu, teacher map on meta"):
        loss(s, [x.to("meta") for x in t], ctx)


@pytest.mark.parametrize("cls", ALL)
def test_state_holds_parameters_and_nothing_of_a_step(cls) -> None:
    loss = cls()
    loss.bind([4] * 3, [6] * 3)
    before = {k: v.clone() for k, v in loss.state_dict().items()}
    attributes = set(vars(loss))
    sum(loss([x.requires_grad_() for x in pyramid(4, 1)], pyramid(6, 2), context()).values()).backward()
    after = loss.state_dict()
    assert set(after) == set(before) == {n for n, _ in loss.named_parameters()}
    assert all(torch.equal(after[k], before[k]) for k in before)
    assert not list(loss.buffers())
    assert set(vars(loss)) == attributes
    other = copy.deepcopy(loss)
    other.load_state_dict(after)
    assert other.bound


class WithoutForward(KDLoss):
    pass


def test_base_class_messages() -> None:
    with pytest.raises(
        NotImplementedError, match=r"WithoutForward must define forward\(student, teacher, ctx\)"
    ):
        WithoutForward()(pyramid(4, 1), pyramid(4, 2), context())
    with pytest.raises(ValueError, match="expected equal channels, got student 4 and teacher 6"):
        list(WithoutForward().pairs(pyramid(4, 1), pyramid(6, 2)))


@pytest.mark.parametrize("cls", ALL)
def test_name_and_source(cls) -> None:
    loss = cls(name="mine", source="neck.fpn_convs.{i}.conv")
    assert (loss.name, loss.source) == ("mine", "neck.fpn_convs.{i}.conv")
    assert cls().name == cls.default_name
    assert cls().source is None
    assert "name='mine'" in repr(loss)
