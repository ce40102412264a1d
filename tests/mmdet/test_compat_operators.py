"""Which operators stand in for mmcv._ext and through what, which are missing, and full mmcv left alone."""

from __future__ import annotations

import importlib.machinery
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

import ikd_fast.mmdet  # noqa: F401  activates compat
from ikd_fast.mmdet import compat
from ikd_fast.mmdet.compat import operators
from tests.mmdet.operator_truth import compiled_wheel, recording_torchvision

REPO = Path(__file__).parents[2]


def test_an_operator_nobody_serves_is_named_when_called() -> None:
    module, providers = operators.build_extension()
    assert set(providers) == set(operators.PROVIDED)
    assert len(providers) == 11
    assert callable(module.roi_pool_forward)  # mmcv asserts the names when it is imported
    with pytest.raises(
        compat.OperatorNotAvailable,
        match=r"'roi_pool_forward' is not available: .* only deform_conv_backward_input, .*\n.*mmcv==2.1.0",
    ):
        module.roi_pool_forward(1, aligned=True)
    assert not hasattr(module, "__path__")


def test_lacking_operators_through_mmcv() -> None:
    """CARAFE is named with the remedy; deformable attention has a plain form in mmcv, which goes on working."""
    if compat.activate().mode != "substitutes":
        pytest.skip("mmcv is compiled here and lacks nothing")
    import torch

    from mmcv.ops import CARAFE, MultiScaleDeformableAttention

    with pytest.raises(
        compat.OperatorNotAvailable, match=r"'carafe_forward' is not .*\n  pip uninstall -y mmcv-lite"
    ):
        CARAFE(3, 1, 2)(torch.zeros(1, 4, 4, 4), torch.zeros(1, 9, 8, 8))
    attention = MultiScaleDeformableAttention(embed_dims=8, num_heads=2, num_levels=1, num_points=2)
    out = attention(
        torch.randn(6, 1, 8), value=torch.randn(20, 1, 8), reference_points=torch.rand(1, 6, 1, 2),
        spatial_shapes=torch.tensor([[4, 5]]), level_start_index=torch.tensor([0]),
    )  # fmt: skip
    assert out.shape == (6, 1, 8)
    module, _ = operators.build_extension()
    with pytest.raises(compat.OperatorNotAvailable, match="'ms_deform_attn_forward'"):  # its way on a GPU
        module.ms_deform_attn_forward()


def fake_torchvision(monkeypatch: pytest.MonkeyPatch, **changes: object) -> None:
    """Something importable as torchvision.ops, some of its functions changed."""
    ops = ModuleType("torchvision.ops")
    vars(ops).update({**vars(recording_torchvision()), **changes})
    torchvision = ModuleType("torchvision")
    torchvision.ops = ops  # type: ignore[attr-defined]
    torchvision.__spec__ = importlib.machinery.ModuleSpec("torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision", torchvision)
    monkeypatch.setitem(sys.modules, "torchvision.ops", ops)


def test_a_working_torchvision_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_torchvision(monkeypatch)
    ops, reason = operators.find_torchvision()
    assert (ops, reason) == (sys.modules["torchvision.ops"], None)
    assert [name for name, _ in ops.calls] == ["nms", "roi_align", "deform_conv2d"]
    _, providers = operators.build_extension()
    plain = {"softnms", "sigmoid_focal_loss_forward", "sigmoid_focal_loss_backward"}
    assert {name for name, provider in providers.items() if provider == "ikd_fast"} == plain
    assert {providers[name] for name in set(providers) - plain} == {"torchvision"}


@pytest.mark.parametrize("name", ["nms", "roi_align", "deform_conv2d"])
def test_a_torchvision_that_fails_at_one_operator_serves_none(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError(f"operator torchvision::{name} does not exist")

    fake_torchvision(monkeypatch, **{name: broken})
    ops, reason = operators.find_torchvision()
    assert ops is None
    assert reason == (
        f"torchvision does not work with this torch: RuntimeError: operator torchvision::{name} does not exist"
    )
    assert set(operators.build_extension()[1].values()) == {"ikd_fast"}


FULL = """
import json, sys
import ikd_fast.mmdet
from ikd_fast import doctor
from ikd_fast.mmdet import compat
import mmcv, mmcv._ext, mmdet.models, torch
from mmcv.ops import roi_align, nms_match
report = compat.activate()
rois = torch.tensor([[0.0, 0, 0, 4, 4]])
pooled = roi_align(torch.arange(16.0).view(1, 1, 4, 4), rois, 2, 1.0, 0, "avg", True)
matched = nms_match(torch.tensor([[0.0, 0, 4, 4, 0.5], [0, 0, 4, 3, 0.9]]), 0.5)
print(json.dumps(dict(
    mode=report.mode, mmcv=report.mmcv_distribution, providers=report.providers, reason=report.reason,
    extension=mmcv._ext.__file__, same=sys.modules["mmcv._ext"] is mmcv._ext,
    doctor=sorted(set(doctor.collect()["mmcv"]["operators"].values())),
    pooled=pooled.flatten().tolist(), matched=[m.tolist() for m in matched],
)))
"""


@pytest.mark.slow
def test_full_mmcv_is_left_alone(tmp_path: Path, shared_dir: Path) -> None:
    """With a compiled mmcv ahead of mmcv-lite nothing of it is replaced, and its other operators work."""
    with zipfile.ZipFile(compiled_wheel(shared_dir)) as archive:
        archive.extractall(tmp_path, [n for n in archive.namelist() if "/csrc/" not in n])
    result = subprocess.run(
        [sys.executable, "-c", FULL],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(REPO)]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert Path(found.pop("extension")).parent == tmp_path / "mmcv"
    assert found == dict(
        mode="compiled", mmcv="mmcv", providers={}, reason=None, same=True, doctor=["compiled"],
        pooled=[2.5, 4.5, 10.5, 12.5], matched=[[1, 0]],
    )  # fmt: skip
