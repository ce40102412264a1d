"""The tiny COCO set of the mmdet tests with the 80 categories that paper-scale heads have."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("mmengine", reason="needs the mmdet extra: pip install 'ikd_fast[mmdet]'")

from tests.mmdet.conftest import coco_root  # noqa: F401


@pytest.fixture(scope="session")
def coco80_root(coco_root: Path, tmp_path_factory) -> Path:  # noqa: F811
    from mmdet.datasets import CocoDataset

    root = tmp_path_factory.mktemp("coco80")
    (root / "images").symlink_to(coco_root / "images")
    annotations = json.loads((coco_root / "ann.json").read_text())
    names = CocoDataset.METAINFO["classes"]
    annotations["categories"] = [dict(id=i + 1, name=name) for i, name in enumerate(names)]
    (root / "ann.json").write_text(json.dumps(annotations))
    return root
