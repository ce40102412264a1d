"""Losses by name: the library's, a user's own, and what a wrong config is told."""

from __future__ import annotations

import logging

import pytest
import torch

from ikd_fast import losses
from ikd_fast.losses import (
    AdvFeatureLoss,
    FGDLoss,
    KDLoss,
    MGDLoss,
    build_loss,
    loss_class,
    loss_names,
    preset_values,
    register_loss,
)
from tests.losses.setups import context, pyramid

# What the documentation promises of a user's own loss: fifteen lines.


@register_loss
class ChannelMeanGap(KDLoss):
    """Squared gap of the channels' means."""

    default_name = "channel_mean_gap"
    align_channels = True

    def __init__(self, weight: float = 1.0, **kwargs):
        super().__init__(**kwargs)
        self.weight = weight

    def forward(self, student, teacher, ctx):
        gaps = {}
        for level, s, t in self.pairs(student, teacher):
            gaps[str(level)] = self.weight * (s.mean((2, 3)) - t.mean((2, 3))).square().mean()
        return gaps


def test_a_users_own_loss_is_built_by_name() -> None:
    loss = build_loss({"type": "ChannelMeanGap", "weight": 2.0, "levels": [1]})
    assert type(loss) is ChannelMeanGap
    s, t = pyramid(4, 1), pyramid(4, 2)
    got = loss(s, t, context())
    assert list(got) == ["1"]
    assert got["1"].item() == pytest.approx(2 * float((s[1] - t[1]).mean((2, 3)).square().mean()), rel=1e-5)
    loss.bind([3] * 3, [4] * 3)
    loss(pyramid(3, 1), t, context())["1"].backward()
    assert loss.align["1"].weight.grad.abs().max() > 0


def test_build() -> None:
    assert {"AdvFeatureLoss", "FGDLoss", "MGDLoss"} <= set(loss_names())
    assert loss_names() == sorted(loss_names())
    config = {"type": "AdvFeatureLoss", "form": "norm", "weight": 3}
    loss = build_loss(config)
    assert isinstance(loss, AdvFeatureLoss)
    assert (loss.form, loss.weight) == ("norm", 3.0)
    assert config == {"type": "AdvFeatureLoss", "form": "norm", "weight": 3}
    assert build_loss(loss) is loss
    assert isinstance(build_loss({"type": MGDLoss}), MGDLoss)


def test_errors_list_what_is_valid() -> None:
    with pytest.raises(
        ValueError, match=r"unknown loss 'FGDlos'; valid: .*FGDLoss, .*MGDLoss.*Did you mean 'FGDLoss'\?"
    ):
        build_loss({"type": "FGDlos"})
    with pytest.raises(
        TypeError, match="FGDLoss takes no argument alfa; valid: preset, temperature, alpha, beta"
    ):
        build_loss({"type": "FGDLoss", "alfa": 1.0})
    with pytest.raises(TypeError, match=r"expected a KDLoss or a dict with 'type', e\.g\."):
        build_loss({"preset": "retinanet"})
    with pytest.raises(TypeError, match="got 'FGDLoss'"):
        build_loss("FGDLoss")
    with pytest.raises(TypeError, match="type must be a registered name"):
        build_loss({"type": torch.nn.MSELoss})


def test_register_refuses_strangers_and_namesakes() -> None:
    with pytest.raises(TypeError, match=r"expects a subclass of ikd_fast.losses.KDLoss"):
        register_loss(torch.nn.MSELoss)
    namesake = type("FGDLoss", (KDLoss,), {"__module__": "elsewhere"})
    with pytest.raises(ValueError, match=r"named FGDLoss is registered already, from ikd_fast.losses.fgd"):
        register_loss(namesake)
    assert build_loss({"type": "FGDLoss"}).__class__ is FGDLoss
    assert register_loss(FGDLoss) is FGDLoss  # the same class twice, as on a reload


# Table 12 of the specification: the published configurations.
FGD = {
    "retinanet": (0.5, 1e-3, 5e-4, 5e-4, 5e-6, None),
    "reppoints": (0.5, 1.6e-3, 8e-4, 8e-4, 8e-6, None),
    "mask_rcnn": (0.5, 5e-5, 2.5e-5, 5e-5, 5e-7, (0, 1, 2, 3)),
}
MGD = {
    "retinanet": (2e-5, 0.65, None),
    "reppoints": (2e-5, 0.65, None),
    "mask_rcnn": (5e-7, 0.45, (0, 1, 2, 3)),
}
BETA = {"retinanet": 1e-5, "reppoints": 1e-5, "mask_rcnn": 2.5e-7}
# The FGD and MGD repositories' configurations of the pairs that IKD has no run of.
FURTHER = [
    ("FGDLoss", "faster_rcnn", "mask_rcnn"),
    ("FGDLoss", "gfl", "retinanet"),
    ("MGDLoss", "faster_rcnn", "mask_rcnn"),
]


@pytest.mark.parametrize("preset", ["retinanet", "reppoints", "mask_rcnn"])
def test_presets(preset, caplog) -> None:
    with caplog.at_level(logging.INFO, logger="ikd_fast"):
        fgd, mgd = FGDLoss(preset=preset), MGDLoss(preset=preset)
    got = (fgd.temperature, fgd.alpha, fgd.beta, fgd.gamma, fgd.lambda_, fgd.levels)
    assert got == FGD[preset]
    assert (mgd.alpha, mgd.mask_ratio, mgd.levels) == MGD[preset]
    assert preset_values(preset, "IKD")["beta"] == BETA[preset]
    assert f"FGDLoss preset '{preset}' sets temperature=0.5, alpha={fgd.alpha}" in caplog.text
    assert f"MGDLoss preset '{preset}' sets alpha={mgd.alpha}, mask_ratio={mgd.mask_ratio}" in caplog.text


@pytest.mark.parametrize(("loss", "preset", "like"), FURTHER)
def test_presets_of_further_families_have_the_numbers_of_their_kind(loss, preset, like) -> None:
    assert preset_values(preset, loss) == preset_values(like, loss)
    with pytest.raises(ValueError, match=f"preset '{preset}' has no numbers for 'IKD'"):
        preset_values(preset, "IKD")


def test_a_preset_is_a_copy() -> None:
    preset_values("gfl", "FGDLoss")["alpha"] = 7.0
    assert preset_values("gfl", "FGDLoss")["alpha"] == preset_values("retinanet", "FGDLoss")["alpha"] == 1e-3


def test_defaults_and_arguments_over_a_preset(caplog) -> None:
    plain = FGDLoss()
    assert (plain.temperature, plain.alpha, plain.beta, plain.gamma, plain.lambda_) == (
        0.5,
        1e-3,
        5e-4,
        1e-3,
        5e-6,
    )
    assert (MGDLoss().alpha, MGDLoss().mask_ratio) == (2e-5, 0.65)
    with caplog.at_level(logging.INFO, logger="ikd_fast"):
        loss = FGDLoss(preset="mask_rcnn", gamma=0.0, levels=[1])
    assert (loss.gamma, loss.levels, loss.alpha) == (0.0, (1,), 5e-5)
    assert "as given: gamma=0.0, levels=[1]" in caplog.text
    with pytest.raises(
        ValueError, match="unknown preset 'fcos'; valid: faster_rcnn, gfl, mask_rcnn, reppoints, retinanet"
    ):
        FGDLoss(preset="fcos")
    with pytest.raises(ValueError, match="no numbers for 'CWD'"):
        preset_values("retinanet", "CWD")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (dict(type="FGDLoss"), "sums over C, H, W; divided by N"),
        (dict(type="AdvFeatureLoss", form="mean"), "mean over N, C, H, W"),
        (dict(type="L2Loss"), "sum over C, H, W; divided by N (of maps of norm 1)"),
        (dict(type="L1Loss", reduction="sum"), "sum over N, C, H, W; not divided"),
        (dict(type="NADLoss"), "mean over N, H, W"),
    ],
)
def test_normalisers_in_words(config, words):
    assert build_loss(config).normaliser == words


def test_every_shipped_loss_says_its_normaliser_and_whether_it_reads_boxes():
    ours = [loss_class(name) for name in losses.__all__ if name.endswith("Loss") and name != "KDLoss"]
    assert len(ours) == 11
    for cls in ours:
        loss = cls()
        assert loss.normaliser != "its own"
        assert loss.reads_boxes is (cls.__name__ == "FGDLoss")


@pytest.mark.parametrize("name", ["NADLoss", "ACMLoss"])
def test_weights_of_another_number_of_levels_are_refused_before_training(name):
    loss = build_loss(dict(type=name, weight=[1.0, 2.0, 3.0]))
    with pytest.raises(ValueError, match=rf"{name}: expected one weight for each of the 5 levels .* got 3"):
        loss.bind([8] * 5, [8] * 5)
    loss.bind([8] * 3, [8] * 3)


def test_pkd_refuses_unequal_channels_before_training_and_in_a_step():
    words = r"PKDLoss, level 0: expected equal channels, got student 4 and teacher 8; it compares channel by channel"
    loss = build_loss(dict(type="PKDLoss"))
    with pytest.raises(ValueError, match=words):
        loss.bind([4], [8])
    with pytest.raises(ValueError, match=words):
        loss([torch.rand(1, 4, 4, 4)], [torch.rand(1, 8, 4, 4)], None)


def test_one_tensor_is_not_a_pyramid():
    maps = torch.rand(2, 4, 4, 4)
    with pytest.raises(
        TypeError,
        match=r"CWDLoss: expected a list of maps, one a level, got one teacher tensor \(2, 4, 4, 4\)",
    ):
        build_loss(dict(type="CWDLoss"))([maps, maps], maps, None)


def test_levels_that_are_no_sequence():
    with pytest.raises(ValueError, match=r"levels must be distinct indices >= 0, .* got 1"):
        build_loss(dict(type="CWDLoss", levels=1))
