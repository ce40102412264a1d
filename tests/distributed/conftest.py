"""Two gloo processes that serve a whole session, and the tiny data set of the mmdet tests."""

from __future__ import annotations

import pytest

pytest.importorskip("mmengine", reason="needs the mmdet extra: pip install 'ikd_fast[mmdet]'")

from tests.distributed.pair import Pair
from tests.mmdet.conftest import _mmdet_scope, coco_root  # noqa: F401


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    processes = Pair(tmp_path_factory.mktemp("pair"))
    yield processes
    processes.close()
