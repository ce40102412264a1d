"""Configs on disk for the commands: a plain student, its teacher, and the student distilled, on the tiny data set of tests/mmdet."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.mmdet.conftest import coco_root, retinanet, stock_config, with_ikd  # noqa: F401  (a fixture)


@pytest.fixture
def ikd(monkeypatch: pytest.MonkeyPatch):
    """``ikd(*arguments)`` runs a command in this process."""
    from ikd_fast import cli

    monkeypatch.delenv("IKD_FAST_TRACEBACK", raising=False)
    runner = CliRunner()
    return lambda *args: runner.invoke(cli.app, [str(a) for a in args])


def written(path: Path, config: dict) -> Path:
    """``config`` as a file."""
    path.write_text("".join(f"{key} = {value!r}\n" for key, value in config.items()))
    return path


@pytest.fixture(scope="session")
def configs(tmp_path_factory: pytest.TempPathFactory, coco_root: Path) -> dict[str, Path]:  # noqa: F811
    """``student``, ``teacher``, its ``weights``, ``ikd`` (with a random teacher) and the ``folder`` they are in."""
    import torch

    from ikd_fast.mmdet.build import build_detector

    folder = tmp_path_factory.mktemp("configs")
    student = stock_config(coco_root, epochs=3)
    torch.save(dict(state_dict=build_detector(retinanet()).state_dict()), folder / "teacher.pth")
    return {
        "folder": folder,
        "student": written(folder / "student.py", student),
        "teacher": written(folder / "teacher.py", stock_config(coco_root)),
        "weights": folder / "teacher.pth",
        "ikd": written(folder / "distilled.py", with_ikd(student, stop_at=0.5)),
    }
