"""mmdet's own scripts on the library's checkpoints, as a user runs them."""

from __future__ import annotations

import json
import pprint
import re
import subprocess
import sys

import pytest

from tests.mmdet.conftest import run, stock_config, with_ikd

from mmengine.config import Config
from mmengine.runner import Runner


@pytest.mark.slow
def test_mmdets_test_script_gives_the_ap_of_the_run(coco_root, tmp_path):
    """The checkpoint of an IKD run under the plain student config: ``tools/test.py`` finds what the Runner finds."""
    config = stock_config(coco_root, epochs=1)
    run(with_ikd(config), tmp_path / "ikd")
    plain = tmp_path / "student.py"
    plain.write_text("\n".join(f"{key} = {pprint.pformat(value)}" for key, value in config.items()))
    command = [
        sys.executable,
        "-m",
        "ikd_fast.mmdet",
        "tools/test.py",
        str(plain),
        str(tmp_path / "ikd/epoch_1.pth"),
    ]
    done = subprocess.run(
        [*command, "--work-dir", str(tmp_path / "test")],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert not re.search(r"unexpected key|missing keys", done.stdout + done.stderr)
    (found,) = (tmp_path / "test").glob("*/*.json")
    theirs = json.loads(found.read_text())
    runner = Runner.from_cfg(
        Config(config | dict(work_dir=str(tmp_path / "ours"), load_from=str(tmp_path / "ikd/epoch_1.pth")))
    )
    ours = runner.test()
    assert ours
    for key, value in ours.items():
        assert theirs[key] == pytest.approx(value, abs=1e-9), key


@pytest.mark.slow
def test_mmdets_train_script_runs_the_diff(coco_root, tmp_path):
    """``tools/train.py`` on a file that inherits a stock config and adds the documented lines, nothing else."""
    stock, teacher = stock_config(coco_root, epochs=1), tmp_path / "teacher.py"
    (tmp_path / "my_student.py").write_text("\n".join(f"{k} = {pprint.pformat(v)}" for k, v in stock.items()))
    teacher.write_text(f"model = {pprint.pformat(stock['model'])}")
    (tmp_path / "ikd.py").write_text(
        "_base_ = './my_student.py'\n"
        "custom_imports = dict(imports=['ikd_fast.mmdet'])\n"
        "model = dict(_delete_=True, type='IKDDistiller', student=_base_.model,\n"
        f"    teacher_config='{teacher}', allow_random_teacher=True,\n"
        "    losses=[dict(type='FGDLoss', preset='retinanet')],\n"
        "    adv=dict(beta=1e-5, attack=dict(type='OnlineDIFGSM', mode='single')),\n"
        "    augment=dict(type='AdaptiveFreqAug'), stop_at=dict(epoch=16))\n"
    )
    command = [
        sys.executable,
        "-m",
        "ikd_fast.mmdet",
        "tools/train.py",
        str(tmp_path / "ikd.py"),
        "--work-dir",
        str(tmp_path / "work"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "work/epoch_1.pth").is_file()
