"""``ikd-fast export``: a plain student and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from ikd_fast.cli import app
from ikd_fast.mmdet.export import export

STUDENT = {"backbone.w": torch.arange(6.0).reshape(2, 3), "neck.n": torch.tensor(3)}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "epoch_3.pth"
    torch.save(
        {
            "meta": {
                "epoch": 3,
                "cfg": "x = 1",
                "dataset_meta": {"classes": ("tree",), "palette": [(1, 2, 3)]},
            },
            "state_dict": {**STUDENT, "kd.losses.0.align.weight": torch.ones(4)},
            "kd_state_dict": {"kd.losses.0.align.weight": torch.ones(4)},
            "optimizer": {"state": {0: torch.zeros(1000)}},
            "message_hub": {"log_scalars": {}},
            "param_schedulers": [{}],
        },
        path,
    )
    return path


def test_pth_has_the_student_and_its_classes(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "student.pth"
    export(checkpoint, out)
    saved = torch.load(out, weights_only=True)
    assert sorted(saved) == ["meta", "state_dict"]
    assert saved["meta"] == {"dataset_meta": {"classes": ("tree",), "palette": [(1, 2, 3)]}}
    assert sorted(saved["state_dict"]) == sorted(STUDENT)
    assert all(torch.equal(saved["state_dict"][k], v) for k, v in STUDENT.items())
    assert sorted(p.name for p in out.parent.iterdir()) == ["student.pth"]


def test_safetensors(checkpoint: Path, tmp_path: Path) -> None:
    from safetensors import safe_open

    export(checkpoint, tmp_path / "s.safetensors")
    with safe_open(tmp_path / "s.safetensors", "pt") as file:
        assert sorted(file.keys()) == sorted(STUDENT)
        assert torch.equal(file.get_tensor("backbone.w"), STUDENT["backbone.w"])
        assert json.loads(file.metadata()["classes"]) == ["tree"]


@pytest.mark.parametrize(
    "content", [{f"module.{k}": v for k, v in STUDENT.items()}, {"state_dict": dict(STUDENT)}]
)
def test_bare_and_wrapped_weights(content: dict, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pth")
    assert sorted(export(tmp_path / "w.pth", tmp_path / "s.pth")) == sorted(STUDENT)


def test_refusals_leave_no_file(checkpoint: Path, tmp_path: Path) -> None:
    before = checkpoint.read_bytes()
    with pytest.raises(ValueError, match=r"writes .pth or .safetensors, got 's.onnx'"):
        export(checkpoint, tmp_path / "s.onnx")
    with pytest.raises(ValueError, match="the checkpoint itself"):
        export(checkpoint, checkpoint)
    torch.save({"state_dict": {"kd.a": torch.ones(1)}}, tmp_path / "empty.pth")
    with pytest.raises(ValueError, match="holds no weights"):
        export(tmp_path / "empty.pth", tmp_path / "s.pth")
    assert checkpoint.read_bytes() == before
    assert not list(tmp_path.glob("s.*"))


def test_command(checkpoint: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["export", str(checkpoint), str(tmp_path / "s.pth"), "--json"])
    assert result.exit_code == 0
    facts = json.loads(result.stdout)
    assert facts == {
        "out": str(tmp_path / "s.pth"),
        "tensors": 2,
        "bytes": (tmp_path / "s.pth").stat().st_size,
    }
    result = CliRunner().invoke(app, ["export", str(checkpoint), str(tmp_path / "s.txt")])
    assert result.exit_code == 2
    assert "got 's.txt'" in " ".join(result.stderr.split())
    result = CliRunner().invoke(app, ["export", str(checkpoint), str(checkpoint)])
    assert result.exit_code == 2
    assert "the checkpoint itself" in " ".join(result.stderr.split())


class Strange:
    """Not on the allow-list of checkpoints."""


def bad_files(folder: Path) -> dict[str, tuple[Path, str]]:
    def saved(name: str, value: object) -> Path:
        torch.save(value, folder / name)
        return folder / name

    whole = saved("whole.pth", STUDENT).read_bytes()
    files = {"text.pth": b"hello\n", "empty.pth": b"", "cut.pth": whole[:-300], "pickle.pth": b"\x80\x02}q"}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return {
        "text": (folder / "text.pth", "is not a checkpoint: expected a .pth file that torch.save wrote"),
        "empty": (folder / "empty.pth", "found an empty file"),
        "cut": (folder / "cut.pth", "is not a whole checkpoint"),
        "pickle": (folder / "pickle.pth", "is not a whole checkpoint"),
        "list": (saved("list.pth", [1, 2]), "found a list"),
        "tensor": (saved("tensor.pth", torch.ones(2)), "found a Tensor"),
        "no tensors": (saved("facts.pth", {"a": 1}), "holds no weights: expected a .pth"),
        "odd state": (saved("odd.pth", {"state_dict": [1]}), "holds no weights: expected a .pth"),
        "other net": (saved("net.pth", {"conv1.weight": torch.ones(1)}), "holds no detector"),
        "strange": (saved("strange.pth", {"a": Strange()}), "Strange, which is not on the allow-list"),
    }


@pytest.mark.parametrize(
    "case",
    ["text", "empty", "cut", "pickle", "list", "tensor", "no tensors", "odd state", "other net", "strange"],
)
def test_what_is_no_student_is_said_in_one_line(
    tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("IKD_FAST_TRACEBACK", raising=False)
    path, message = bad_files(tmp_path)[case]
    result = CliRunner().invoke(app, ["export", str(path), str(tmp_path / "out/s.pth")])
    assert result.exit_code == 1
    assert message in " ".join(result.stderr.split())
    assert path.name in result.stderr
    assert isinstance(result.exception, SystemExit)  # not a traceback
    assert ("IKD_FAST_ALLOW_UNSAFE_PICKLE" in result.stderr) == (case == "strange")
    assert not (tmp_path / "out").exists()
