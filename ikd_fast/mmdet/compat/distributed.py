"""mmengine's ``pytorch`` launcher on a machine without CUDA: gloo processes and DistributedDataParallel on the CPU.

mmengine 0.10 sets a CUDA device in every process before it makes the process group, and gives the wrapped model that
device's number. Where torch sees a GPU (or mmengine another accelerator) both are left as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

_MARK = "_ikd_fast"


class BackendError(RuntimeError):
    """``env_cfg.dist_cfg`` asks for a backend that this machine has no device for."""


def accelerated() -> bool:
    """Whether processes have a device to themselves."""
    from mmengine import device

    return torch.cuda.is_available() or any(
        check() for check in (device.is_npu_available, device.is_mlu_available, device.is_musa_available)
    )


def check_backend(backend: str) -> None:
    """Raise where ``backend`` cannot work without CUDA; nothing is replaced by something else.

    >>> check_backend("gloo")
    """
    if backend == "nccl":
        raise BackendError(
            "backend 'nccl' needs a CUDA device in every process, and torch sees none here (it is also what mmengine takes when the "
            "config says nothing). Write env_cfg=dict(dist_cfg=dict(backend='gloo')) in the config, or on the command line\n"
            "  --cfg-options env_cfg.dist_cfg.backend=gloo"
        )


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()


@contextmanager
def leaving_together() -> Iterator[None]:
    """Leave the gloo process group that was made inside, once every process has come to the end without an error.

    gloo's threads need the interpreter to give up the tensors of the last collective; one that asks while Python ends aborts the
    process ("terminate called without an active exception"). They do it while ``barrier`` waits. After an error the others may
    never come to a barrier, so there is none; one's own process group is one's own to leave.
    """
    before = _joined()
    yield
    if not before and _joined() and dist.get_backend() == "gloo":
        dist.barrier()
        dist.destroy_process_group()


def install() -> None:
    """Patch the launcher and ``MMDistributedDataParallel``; idempotent. Both look for devices when they are called."""
    from mmengine.dist import utils
    from mmengine.model import MMDistributedDataParallel

    launch = utils._init_dist_pytorch
    if not hasattr(launch, _MARK):

        @functools.wraps(launch)
        def init_dist_pytorch(backend: str, init_backend: str = "torch", **kwargs: Any) -> None:
            if init_backend != "torch" or accelerated():
                launch(backend, init_backend=init_backend, **kwargs)
                return
            check_backend(backend)
            dist.init_process_group(backend=backend, **kwargs)

        setattr(init_dist_pytorch, _MARK, True)
        utils._init_dist_pytorch = init_dist_pytorch

    construct = MMDistributedDataParallel.__init__
    if not hasattr(construct, _MARK):

        @functools.wraps(construct)
        def init(self: Any, module: Any, *args: Any, **kwargs: Any) -> None:
            # torch takes no device_ids for a module on the CPU, and mmengine always gives them.
            if {p.device.type for p in module.parameters()} == {"cpu"} and not accelerated():
                kwargs["device_ids"] = None
            construct(self, module, *args, **kwargs)

        setattr(init, _MARK, True)
        MMDistributedDataParallel.__init__ = init
