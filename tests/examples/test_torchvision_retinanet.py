"""RetinaNet and FCOS of torchvision, where it imports."""

from __future__ import annotations

import math

import pytest
import torch


@pytest.fixture
def retinanet(example):
    try:
        import torchvision.ops

        torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    except (ImportError, OSError, RuntimeError) as error:  # not there, or built for another torch
        pytest.skip(f"needs torchvision with its operators: {str(error).splitlines()[0]}")
    return example("torchvision_retinanet")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["retinanet", "fcos"])
def test_it_learns_and_the_teacher_does_not(retinanet, kind):
    result = retinanet.main(["--detector", kind, "--steps", "3", "--batch", "1"])
    history = result["history"]
    assert {"task/classification", "task/bbox_regression", "kd/fgd", "kd/adv"} <= set(history[0])
    assert history[-1]["task/classification"] < history[0]["task/classification"]
    assert history[-1]["kd/fgd"] < history[0]["kd/fgd"]
    assert all(math.isfinite(v) for row in history for v in row.values())
    fresh = retinanet.detector(kind, "resnet34", seed=1).state_dict()
    trained = {
        k.replace("transform.original.", "transform."): v for k, v in result["teacher"].state_dict().items()
    }
    assert all(torch.equal(value, trained[name]) for name, value in fresh.items())
    assert type(result["student"].transform).__name__ == "GeneralizedRCNNTransform"


def test_stacked_losses_are_those_of_the_list(retinanet):
    """Where torchvision's own transform neither resizes nor pads, both ways in give the same losses."""
    images, targets = retinanet.scenes(2)
    net = retinanet.detector("retinanet", "resnet18", seed=0).train()
    net.transform.min_size, net.transform.max_size = (64,), 64
    net.eval()
    with retinanet.losses_from(net), torch.no_grad():
        listed = net(
            [image / 255 for image in images], [{k: t[k] for k in ("boxes", "labels")} for t in targets]
        )
        net.transform = retinanet.Stacked(net.transform)
        stacked = net(torch.stack([retinanet.UNITS.from_pixels(image) for image in images]), targets)
    assert not net.training
    for name, value in listed.items():
        torch.testing.assert_close(stacked[name], value, rtol=1e-4, atol=1e-5)
