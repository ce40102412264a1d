"""Loading teachers whole, taps, pixel conversion, schedule."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ikd_fast import FrozenTeacher, PixelUnits
from ikd_fast.distill import FeatureTap, Renormalize, StopAt, load_strict, read_weights, suspend_running_stats
from tests.distill.nets import Net


@pytest.fixture
def weights():
    torch.manual_seed(3)
    return Net().state_dict()


def test_checkpoint_is_loaded_whole(weights, tmp_path):
    torch.save(dict(state_dict=weights, meta=dict(epoch=3)), tmp_path / "t.pth")
    teacher = FrozenTeacher.from_checkpoint(Net(), tmp_path / "t.pth")
    assert all(torch.equal(v, weights[k]) for k, v in teacher.net.state_dict().items())
    torch.save({"module." + k: v for k, v in weights.items()}, tmp_path / "ddp.pth")
    assert FrozenTeacher.from_checkpoint(Net(), tmp_path / "ddp.pth").fingerprint() == teacher.fingerprint()


def test_half_precision_safetensors(weights, tmp_path):
    save = pytest.importorskip("safetensors.torch").save_file
    save(
        {k: v.half() if v.is_floating_point() else v for k, v in weights.items()}, tmp_path / "t.safetensors"
    )
    loaded = read_weights(tmp_path / "t.safetensors")
    for key, value in weights.items():
        # fp16 keeps 11 bits: 5e-4 relative.
        torch.testing.assert_close(loaded[key], value, rtol=5e-4, atol=1e-7)


def test_keys_that_do_not_fit_are_listed(weights):
    missing = {k: v for k, v in weights.items() if k not in ("head.bias", "neck.down.weight")}
    with pytest.raises(ValueError, match=r"2 missing in the checkpoint: head.bias, neck.down.weight"):
        load_strict(Net(), missing)
    with pytest.raises(ValueError, match=r"1 unexpected in the checkpoint: bbox_head.fc"):
        load_strict(Net(), {**weights, "bbox_head.fc": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"1 of another shape: head.bias \(checkpoint \[7\], model \[4\]\)"):
        load_strict(Net(), {**weights, "head.bias": torch.zeros(7)})
    load_strict(Net(), missing, allow_missing=True)


def test_missing_file():
    with pytest.raises(FileNotFoundError, match="teacher checkpoint not found: /nowhere/t.pth"):
        FrozenTeacher.from_checkpoint(Net(), "/nowhere/t.pth")


def test_teacher_stays_in_eval_mode_and_moves():
    teacher = FrozenTeacher(Net())
    teacher.net.train()
    teacher.features(torch.rand(1, 3, 16, 16), "neck")
    assert not teacher.net.training
    assert teacher.to(torch.float64).net.head.weight.dtype == torch.float64
    assert teacher.features(torch.rand(1, 3, 16, 16).double(), "neck")[0].dtype == torch.float64
    with pytest.raises(TypeError, match=r"must be a torch.nn.Module, got function"):
        FrozenTeacher(lambda x: x)


def test_tap_forms():
    net = nn.ModuleDict(dict(a=nn.Identity(), bs=nn.ModuleList([nn.Identity(), nn.Identity()])))
    x = [torch.full((1, 1, 2, 2), float(i)) for i in range(3)]
    tap = FeatureTap(net, "bs.{i}")
    with tap.capture() as maps:
        net["bs"][1](x[1])
        net["bs"][0](x[0])
    assert [float(m.mean()) for m in maps] == [0, 1]  # by place, not by call
    with FeatureTap(net, "a").capture() as maps:
        for v in x:
            net["a"](v)
    assert [float(m.mean()) for m in maps] == [0, 1, 2]  # a shared module, by call
    assert not any(m._forward_hooks for m in net.modules())
    with pytest.raises(RuntimeError, match=r"module 'bs.1' was not called"), tap.capture():
        net["bs"][0](x[0])
    calls = [net["bs"][0], net["bs"][0], net["bs"][1]]
    with pytest.raises(RuntimeError, match=r"module 'bs.0' was called 2 times"), tap.capture():
        [module(x[0]) for module in calls]
    with pytest.raises(ValueError, match=r"no module 'cs.0'"):
        FeatureTap(net, "cs.{i}")
    with (
        pytest.raises(ValueError, match=r"L=12 do not fill a 3x3 grid; give token_grid"),
        FeatureTap(net, "a").capture(),
    ):
        net["a"](torch.zeros(1, 12, 4))


def test_padding_is_zero_in_either_unit():
    convert = Renormalize(PixelUnits(mean=(10.0,), std=(5.0,)), PixelUnits(mean=(100.0,), std=(20.0,)))
    pixels = torch.tensor([[[[30.0, 50.0], [70.0, 0.0]]]])
    source = (pixels - 10) / 5
    source[..., 1, 1] = 0  # padding
    out = convert(source, [(2, 1)])
    assert out[0, 0, :, 0].tolist() == pytest.approx([(30 - 100) / 20, (70 - 100) / 20])
    assert out[0, 0, :, 1].tolist() == [0, 0]
    same = PixelUnits(value_range=(0, 1))
    assert Renormalize(same, same)(source, None) is source


def test_suspended_norms_use_batch_statistics():
    bn = nn.BatchNorm1d(3).train()
    x = torch.randn(50, 3) * 4 + 7
    with suspend_running_stats(bn):
        y = bn(x)
    assert torch.equal(bn.running_mean, torch.zeros(3))
    torch.testing.assert_close(y.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    bn(x)
    torch.testing.assert_close(bn.running_mean, 0.1 * x.mean(0))
    frozen = nn.BatchNorm1d(3).eval()
    with suspend_running_stats(frozen):
        torch.testing.assert_close(frozen(x), x / (1 + 1e-5) ** 0.5)


def test_schedule():
    assert StopAt(None).active(epoch=10**6, step=10**6)
    assert [StopAt(0.5, total_steps=5).active(epoch=0, step=s) for s in range(5)] == [
        True,
        True,
        True,
        False,
        False,
    ]
    for bad in (0, 1.5, True, {}, dict(epoch=1, iter=2), dict(epoch=-1), "epoch"):
        with pytest.raises(ValueError, match="stop_at must be"):
            StopAt(bad)


def test_files_that_are_no_checkpoints(weights, tmp_path):
    (tmp_path / "text.pth").write_text("not a checkpoint")
    with pytest.raises(
        ValueError, match=r"text.pth cannot be read as a checkpoint: expected a .pth of torch.save"
    ):
        read_weights(tmp_path / "text.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(
        TypeError, match="must hold a dict of weights, or one under 'state_dict' or 'model'; got list"
    ):
        read_weights(tmp_path / "list.pth")
    torch.save(dict(model=weights, epoch=3), tmp_path / "model.pth")
    net = Net()
    load_strict(net, tmp_path / "model.pth")
    other = Net()
    load_strict(other, dict(state_dict={"module." + k: v for k, v in weights.items()}))
    assert all(torch.equal(v, weights[k]) for n in (net, other) for k, v in n.state_dict().items())
