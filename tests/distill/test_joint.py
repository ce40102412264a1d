"""Clean and adversarial images in one forward of the student: the same numbers as in two, and what cannot be joined."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ikd_fast.distill.joint import FeatureTask, joint_forward, require_frozen_norms
from tests.distill.engine_nets import Backbone, trained


def student():
    torch.manual_seed(0)
    return trained(Backbone()).double()


def images(n, seed):
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed)).double()


class Task:
    """Mean of the last map against the target, from images or from features."""

    def __call__(self, net, x, targets):
        return self.from_features(net, net(x), targets)

    def from_features(self, net, features, targets):
        return (features[-1].mean((1, 2, 3)) - targets).square().mean()


def forward(net, x):
    return net(x)


@pytest.mark.parametrize(
    ("clean_sources", "adv_sources"),
    [(["block"], [["stem", "block"]]), (["", "block"], [""]), ([forward], [forward]), ([], ["block"])],
    ids=["paths", "net", "callable", "adversarial only"],
)
def test_one_forward_is_two(clean_sources, adv_sources):
    """Losses of both halves and all gradients; M < N, as under ``fraction``."""
    net, task = student(), Task()
    clean, adv, targets = images(3, 1), images(2, 2), torch.tensor([0.1, 0.2, 0.3]).double()
    passes = []
    net.register_forward_hook(lambda *_: passes.append(1))

    def loss(pyramids, features):
        terms = [m.square().mean() * (i + 1) for i, m in enumerate(m for p in pyramids for m in p)]
        return torch.stack(terms).sum() + task.from_features(net, features, targets)

    def maps(source, x):
        out = net(x)
        stem = net.stem(x)
        if callable(source) or source == "":
            return list(out)
        return [out[1]] if source == "block" else [stem, out[1]]

    total = loss([maps(s, clean) for s in clean_sources] + [maps(s, adv) for s in adv_sources], net(clean))
    expected = torch.autograd.grad(total, list(net.parameters()))
    passes.clear()
    joint = joint_forward(net, clean, adv, clean_sources, adv_sources, call=forward)
    assert len(passes) == 1
    value = loss([*joint.clean, *joint.adversarial], joint.features)
    # float64; convolutions may add in another order for another batch size.
    torch.testing.assert_close(value, total, rtol=1e-12, atol=0)
    for a, b in zip(torch.autograd.grad(value, list(net.parameters())), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


def test_norms_must_be_frozen():
    net = student()
    require_frozen_norms(net)
    net.block.bn2.train()
    with pytest.raises(
        ValueError, match=r"needs frozen norms; block.bn2 \(BatchNorm2d\) takes its statistics from the batch"
    ):
        joint_forward(net, images(1, 0), images(1, 1), ["block"], ["block"], call=forward)
    with pytest.raises(ValueError, match=r"0 \(BatchNorm2d\)"):
        require_frozen_norms(nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)).eval())
    with pytest.raises(ValueError, match=r"0 \(InstanceNorm2d\)"):
        require_frozen_norms(nn.Sequential(nn.InstanceNorm2d(3, track_running_stats=True)).train())
    require_frozen_norms(nn.Sequential(nn.GroupNorm(1, 3), nn.InstanceNorm2d(3), nn.LayerNorm(3)).train())


def test_what_cannot_be_joined():
    net = student()
    with pytest.raises(ValueError, match=r"one padded size, got \(3, 32, 32\) and \(3, 32, 16\)"):
        joint_forward(net, images(1, 0), images(1, 1)[..., :16], ["block"], ["block"], call=forward)
    pooled = lambda n, x: n(x)[1].mean(0, keepdim=True)  # noqa: E731
    with pytest.raises(ValueError, match="has 1 entries for 3 images, so it cannot be parted"):
        joint_forward(net, images(2, 0), images(1, 1), [pooled], ["block"], call=forward)
    assert isinstance(Task(), FeatureTask)
    assert not isinstance(lambda n, x, y: n(x), FeatureTask)


def test_an_adversarial_loss_with_a_callable_source_leaves_the_features_of_the_task_alone() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1)).eval()
    clean, adversarial = torch.rand(2, 3, 6, 6), torch.rand(1, 3, 6, 6)
    out = joint_forward(net, clean, adversarial, ["0"], [lambda n, x: n[0](x)], call=lambda n, x: n(x))
    torch.testing.assert_close(out.features, net(clean))
