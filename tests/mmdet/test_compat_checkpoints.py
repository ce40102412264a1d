"""Checkpoints of a real mmengine run load on torch >= 2.6; anything that could run code does not."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ikd_fast.mmdet  # noqa: F401  activates compat
from ikd_fast.mmdet.compat import UnsafeCheckpointError, checkpoints, load_checkpoint


class _Rows(torch.utils.data.Dataset[Tensor]):
    metainfo = {"classes": ("tree",), "palette": [(0, 255, 0)], "areas": np.arange(3)}  # noqa: RUF012

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Tensor:
        return torch.full((4,), float(index))


def _collate(rows: list[Tensor]) -> dict[str, Tensor]:
    return {"inputs": torch.stack(rows)}


def _runner(work_dir: Path, epochs: int, *, resume: bool = False) -> Any:
    from mmengine.model import BaseModel
    from mmengine.runner import Runner

    class Model(BaseModel):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.linear = nn.Linear(4, 2)

        def forward(self, inputs: Tensor, mode: str = "tensor") -> Any:
            output = self.linear(inputs)
            return {"loss": output.pow(2).mean()} if mode == "loss" else output

    return Runner(
        Model(),
        work_dir=str(work_dir),
        train_dataloader=torch.utils.data.DataLoader(_Rows(), batch_size=2, collate_fn=_collate),
        train_cfg={"by_epoch": True, "max_epochs": epochs},
        optim_wrapper={"type": "OptimWrapper", "optimizer": {"type": "Adam", "lr": 0.01}},
        param_scheduler=[
            {"type": "LinearLR", "start_factor": 0.1, "by_epoch": False, "begin": 0, "end": 4},
            {"type": "MultiStepLR", "milestones": [1]},
        ],
        custom_hooks=[{"type": "EMAHook"}],
        resume=resume,
        log_level="ERROR",
        experiment_name=work_dir.name + str(epochs),
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A finished run of two epochs whose message hub also holds the numpy values hooks put there."""
    work_dir = tmp_path_factory.mktemp("run")
    runner = _runner(work_dir, 2)
    runner.message_hub.update_info("array", np.arange(4, dtype=np.float32))
    runner.message_hub.update_info("names", np.array(["a", "bc"]))
    runner.message_hub.update_info("numbers", [np.float64(2.5), np.int32(7), np.bool_(True)])
    runner.train()
    return work_dir, runner


def test_training_checkpoint_loads_with_plain_torch_load(trained: tuple[Path, Any]) -> None:
    from mmengine.logging import HistoryBuffer

    work_dir, runner = trained
    path = work_dir / "epoch_2.pth"
    assert torch.serialization.get_unsafe_globals_in_checkpoint(path) == []
    loaded = torch.load(path)  # weights_only is the default
    assert set(loaded) >= {
        "state_dict",
        "ema_state_dict",
        "optimizer",
        "param_schedulers",
        "message_hub",
        "meta",
    }
    hub = loaded["message_hub"]
    history = hub["log_scalars"]["train/loss"]
    assert isinstance(history, HistoryBuffer)
    expected = runner.message_hub.log_scalars["train/loss"]
    for ours, theirs in zip(history.data, expected.data, strict=True):
        assert np.array_equal(ours, theirs)
    assert history.statistics("mean") == expected.statistics("mean")  # the getattr stand-in gave real methods
    info = hub["runtime_info"]
    assert info["array"].tolist() == [0.0, 1.0, 2.0, 3.0]
    assert info["names"].tolist() == ["a", "bc"]
    assert info["numbers"] == [2.5, 7, True]
    assert loaded["meta"]["dataset_meta"]["areas"].tolist() == [0, 1, 2]
    assert torch.equal(
        loaded["optimizer"]["state"][0]["exp_avg"], runner.optim_wrapper.state_dict()["state"][0]["exp_avg"]
    )


def test_mmengine_resumes_from_it(trained: tuple[Path, Any]) -> None:
    work_dir, _ = trained
    resumed = _runner(work_dir, 3, resume=True)
    resumed.train()
    assert resumed.epoch == 3
    assert resumed.iter == 9
    assert len(resumed.message_hub.log_scalars["train/loss"].data[0]) == 9


def test_config_dict_round_trip(tmp_path: Path) -> None:
    from mmengine.config import ConfigDict

    torch.save({"meta": ConfigDict(classes=("tree",), nested={"a": 1})}, tmp_path / "a.pth")
    loaded = load_checkpoint(tmp_path / "a.pth")["meta"]
    assert type(loaded) is ConfigDict
    assert loaded == {"classes": ("tree",), "nested": {"a": 1}}


@pytest.mark.parametrize("package", ["numpy.core", "numpy._core"])
def test_numpy_names_of_both_generations(package: str) -> None:
    names = {f"{f.__module__}.{f.__qualname__}": f for f in checkpoints.allowed_globals()}
    scalar = names[f"{package}.multiarray.scalar"]
    assert scalar(np.dtype("f4"), np.float32(1.5).tobytes()) == 1.5
    assert names[f"{package}.multiarray._reconstruct"](np.ndarray, (0,), b"b").shape == (0,)


class _Touch:
    """Pickles to a call that creates a file: a stand-in for any code."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def hostile(tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint and the folder that appears if it is unpickled without restriction."""
    made = tmp_path / "made"
    torch.save({"state_dict": {}, "extra": _Touch(made)}, tmp_path / "hostile.pth")
    return tmp_path / "hostile.pth", made


def test_unsafe_checkpoint_is_refused_and_named(hostile: tuple[Path, Path]) -> None:
    from mmengine.runner import CheckpointLoader

    path, made = hostile
    for load in (load_checkpoint, CheckpointLoader.load_checkpoint):
        with pytest.raises(
            UnsafeCheckpointError, match=r"hostile\.pth was not loaded.*IKD_FAST_ALLOW_UNSAFE_PICKLE=1"
        ):
            load(str(path))
    assert not made.exists()


def test_refusal_names_the_class_and_how_to_allow_it(tmp_path: Path) -> None:
    from fractions import Fraction

    torch.save({"ratio": Fraction(1, 2)}, tmp_path / "a.pth")
    with pytest.raises(
        UnsafeCheckpointError,
        match=r"it holds fractions\.Fraction, .*add_safe_globals\(\[fractions\.Fraction\]\)",
    ):
        load_checkpoint(tmp_path / "a.pth")


def test_downloads_pass_the_same_gate(hostile: tuple[Path, Path], tmp_path: Path) -> None:
    from mmengine.runner import checkpoint as mmengine_checkpoint

    path, made = hostile
    with pytest.raises(UnsafeCheckpointError, match=r"file://.* was not loaded"):
        mmengine_checkpoint.load_url(path.as_uri(), model_dir=str(tmp_path / "hub"), progress=False)
    assert not made.exists()
    torch.save({"w": torch.arange(3)}, tmp_path / "fine.pth")
    loaded = mmengine_checkpoint.load_url(
        (tmp_path / "fine.pth").as_uri(), model_dir=str(tmp_path / "hub"), progress=False
    )
    assert loaded["w"].tolist() == [0, 1, 2]


def test_unsafe_pickle_by_variable_or_argument_and_never_silently(
    hostile: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, made = hostile
    with pytest.warns(RuntimeWarning, match="without restriction"):
        load_checkpoint(path, allow_unsafe_pickle=True)
    assert made.is_dir()
    made.rmdir()
    monkeypatch.setenv(checkpoints.UNSAFE_VARIABLE, "1")
    with pytest.warns(RuntimeWarning, match="without restriction"):
        load_checkpoint(path)
    assert made.is_dir()
    made.rmdir()
    monkeypatch.setenv(checkpoints.UNSAFE_VARIABLE, "0")
    with pytest.raises(UnsafeCheckpointError):
        load_checkpoint(path)
    monkeypatch.setenv(checkpoints.UNSAFE_VARIABLE, "yes please")
    with pytest.raises(ValueError, match="must be 0 or 1, got 'yes please'"):
        load_checkpoint(path)
    assert not made.exists()


class _Attribute:
    """Pickles to ``getattr(owner, name)``."""

    def __init__(self, owner: Any, name: str) -> None:
        self.owner, self.name = owner, name

    def __reduce__(self) -> Any:
        return getattr, (self.owner, self.name)


@pytest.mark.parametrize("name", ["__init__", "__dict__", "mro", "register_statistics"])
def test_getattr_in_a_file_reaches_only_history_statistics(tmp_path: Path, name: str) -> None:
    from mmengine.logging import HistoryBuffer

    torch.save({"x": _Attribute(HistoryBuffer, name)}, tmp_path / "a.pth")
    with pytest.raises(UnsafeCheckpointError, match=rf"getattr\(.*HistoryBuffer.*{name}"):
        load_checkpoint(tmp_path / "a.pth")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "a.pth")


def test_getattr_of_other_owners_is_refused(tmp_path: Path) -> None:
    torch.save({"x": _Attribute(np.ndarray, "mean")}, tmp_path / "a.pth")
    with pytest.raises(UnsafeCheckpointError, match=r"it holds getattr\(.*ndarray.*mean"):
        load_checkpoint(tmp_path / "a.pth")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"checkpoint not found: .*none\.pth"):
        load_checkpoint(tmp_path / "none.pth")
