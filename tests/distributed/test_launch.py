"""The commands of docs/distributed.md, in two real processes of torchrun on a machine without a GPU."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ikd_fast.mmdet.compat import distributed
from tests.distributed.pair import free_port
from tests.mmdet.conftest import stock_config, with_ikd

from mmengine.config import Config

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(
        distributed.accelerated(), reason="the launcher is mmengine's own where torch sees an accelerator"
    ),
]


@pytest.fixture
def config(coco_root, tmp_path):
    config = with_ikd(stock_config(coco_root, epochs=1, batch_size=3), losses=[dict(type="MGDLoss")])
    config["train_dataloader"]["sampler"] = dict(type="KeyedSampler")
    config["env_cfg"] = config["env_cfg"] | dict(dist_cfg=dict(backend="gloo"))
    Config(config).dump(tmp_path / "config.py")
    return tmp_path / "config.py"


def torchrun(*arguments, processes=2):
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(processes),
    ]
    command += ["--master-port", str(free_port()), *map(str, arguments)]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=85)
    except subprocess.TimeoutExpired as error:
        pytest.fail(
            f"{' '.join(map(str, arguments))} did not end in 85 s; it said\n{(error.stderr or b'')[-3000:]!r}"
        )


DOC = Path(__file__).parents[2] / "docs" / "distributed.md"
COMMANDS = re.findall(r"^torchrun --nproc-per-node 2 (.+)$", DOC.read_text(), re.M)


def test_the_document_names_both_ways_in():
    assert sorted(command.split()[1] for command in COMMANDS) == ["ikd_fast", "ikd_fast.mmdet"]


@pytest.mark.parametrize("command", COMMANDS)
def test_train_under_torchrun(config, tmp_path, command):
    done = torchrun(*command.replace("CONFIG.py", str(config)).split(), "--work-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr[-3000:]
    checkpoint = torch.load(tmp_path / "run" / "epoch_1.pth", weights_only=True)
    assert checkpoint["meta"]["iter"] == 2  # 12 images, 2 ranks, 3 images each
    assert (checkpoint["ikd_sampler"]["world_size"], checkpoint["ikd_sampler"]["batches"]) == (2, 0)
    # The metric gathers both ranks' detections and is printed by the first.
    assert done.stdout.count("Average Recall     (AR) @[ IoU=0.50:0.95 | area=   all | maxDets=100 ]") == 1


def test_nccl_by_name_is_an_error_with_the_line_to_write(config):
    options = ["--cfg-options", "env_cfg.dist_cfg.backend=nccl"]
    done = torchrun("-m", "ikd_fast", "train", config, "--launcher", "pytorch", *options, processes=1)
    assert done.returncode != 0
    assert "--cfg-options env_cfg.dist_cfg.backend=gloo" in done.stdout + done.stderr
