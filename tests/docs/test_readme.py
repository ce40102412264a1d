"""The README's code runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest


def blocks(root: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (root / "README.md").read_text(), re.S)


def test_plain_pytorch_example(repo_root, capsys):
    (code,) = [b for b in blocks(repo_root) if "ikd.step" in b]
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    for name in ("task/task", "kd/fgd", "kd/adv"):
        assert name in printed


def test_the_mmdet_diff_builds(repo_root, tmp_path):
    pytest.importorskip("mmengine", reason="needs the mmdet extra")
    import pprint

    import torch

    import ikd_fast.mmdet  # noqa: F401
    from tests.mmdet.conftest import retinanet

    from mmdet.registry import MODELS
    from mmengine.config import Config

    (diff,) = [b for b in blocks(repo_root) if "IKDDistiller" in b]
    (tmp_path / "my_student.py").write_text(f"model = {pprint.pformat(retinanet())}")
    (tmp_path / "my_teacher.py").write_text(f"model = {pprint.pformat(retinanet(12))}")
    from mmdet.utils import register_all_modules

    register_all_modules(init_default_scope=True)
    torch.save(
        MODELS.build(Config.fromfile(tmp_path / "my_teacher.py").model).state_dict(), tmp_path / "teacher.pth"
    )
    (tmp_path / "ikd.py").write_text(
        diff.replace("./my_teacher.py", str(tmp_path / "my_teacher.py")).replace(
            "'teacher.pth'", f"'{tmp_path / 'teacher.pth'}'"
        )
    )
    config = Config.fromfile(tmp_path / "ikd.py")
    model = MODELS.build(config.model)
    saved = torch.load(tmp_path / "teacher.pth")
    assert all(torch.equal(v, saved[k]) for k, v in model.ikd.teacher.net.state_dict().items())
    assert (model.ikd.beta, model.ikd.attack.mode, model.ikd.stop_at.rule) == (1e-5, "single", dict(epoch=16))
