"""The commands of docs/distributed.md, in two real processes of torchrun on a machine without a GPU."""

from __future__ import annotations

import contextlib
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
        return subprocess.run(command, capture_output=True, text=True, timeout=240)
    except subprocess.TimeoutExpired as error:
        pytest.fail(
            f"{' '.join(map(str, arguments))} did not end in 240 s; it said\n{(error.stderr or b'')[-3000:]!r}"
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


LEAVER = """
import sys
import torch
import torch.distributed as dist
from ikd_fast.mmdet.compat.distributed import leaving_together

rank, port, wrapped = map(int, sys.argv[1:])
with leaving_together():
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    if wrapped:
        # holds on to the process group: destroying that does not end its threads
        module = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 3))
        module(torch.ones(2, 3)).sum().backward()
    dist.barrier()
    sys.setswitchinterval(1000)
    tensor = torch.ones(3)
    tensor.kept = "by gloo's thread, until it gets the interpreter"
    work = dist.all_reduce(tensor, async_op=True)
    del tensor, work
    sum(range(10_000_000))  # the collective ends meanwhile, and its thread waits
assert not dist.is_initialized()
"""
"""Where nobody waits for gloo's threads one of the two or both end by SIGABRT, most of the times."""


def _leave(wrapped):
    port = free_port()
    command = [sys.executable, "-W", "ignore", "-c", LEAVER]
    processes = [
        subprocess.Popen([*command, *map(str, (rank, port, wrapped))], stderr=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    try:
        return [(process.communicate(timeout=240)[1], process.returncode) for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.parametrize("wrapped", [0, 1], ids=["plain", "DistributedDataParallel"])
def test_processes_end_only_when_gloo_has_given_back_the_last_tensors(wrapped):
    for said, code in _leave(wrapped):
        assert code == 0, said


def test_own_process_groups_are_left_alone_and_errors_wait_for_nobody(monkeypatch):
    state = {"joined": True}
    called = []
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: state["joined"])
    monkeypatch.setattr(distributed.dist, "get_backend", lambda: state["backend"])
    monkeypatch.setattr(distributed.dist, "barrier", lambda: called.append("barrier"))
    monkeypatch.setattr(distributed.dist, "destroy_process_group", lambda: called.append("destroy"))

    with distributed.leaving_together():
        pass
    for backend, error in (("nccl", None), ("gloo", ValueError)):
        state["joined"] = False
        with contextlib.suppress(ValueError), distributed.leaving_together():
            state |= dict(joined=True, backend=backend)
            if error is not None:
                raise error
    assert called == []

    state["joined"] = False
    with distributed.leaving_together():
        state |= dict(joined=True, backend="gloo")
    assert called == ["barrier", "destroy"]


def test_nccl_by_name_is_an_error_with_the_line_to_write(config):
    options = ["--cfg-options", "env_cfg.dist_cfg.backend=nccl"]
    done = torchrun("-m", "ikd_fast", "train", config, "--launcher", "pytorch", *options, processes=1)
    assert done.returncode != 0
    assert "--cfg-options env_cfg.dist_cfg.backend=gloo" in done.stdout + done.stderr
