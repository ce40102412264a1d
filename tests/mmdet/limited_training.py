"""``python -m tests.mmdet.limited_training DIR BYTES``: a training whose process may write no file beyond so many bytes.

A record of its images takes 154 kB, the log a tenth.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import ikd_fast.mmdet  # noqa: F401
from tests.mmdet.conftest import write_coco
from tests.mmdet.test_memory_files import config_for

from mmengine.config import Config
from mmengine.runner import Runner


def main(folder: Path, limit: int) -> None:
    config = config_for(write_coco(folder / "data"), folder / "memory")
    for transform in config["train_dataloader"]["dataset"]["pipeline"]:
        if transform["type"] == "Resize":
            transform["scale"] = (320, 320)
    config["train_cfg"]["max_epochs"] = 1
    config["default_hooks"]["checkpoint"] = None
    config |= dict(work_dir=str(folder / "work"), log_level="INFO")
    runner = Runner.from_cfg(Config(config))
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    runner.train()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
