"""Other people's classes of the same names keep theirs, whoever is imported first."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

USERS = """
from mmdet.registry import MODELS
from torch import nn

@MODELS.register_module()
class FGDLoss(nn.Module):
    owner = "user"
"""

CHECK = """
import ikd_fast.mmdet as ours
from mmdet.registry import MODELS

assert MODELS.build(dict(type="FGDLoss")).owner == "user"
assert MODELS.get("L1Loss").__module__.startswith("mmdet.")
loss = ours.KD_LOSSES.build(dict(type="FGDLoss", preset="retinanet"))
assert type(loss).__module__ == "ikd_fast.losses.fgd", type(loss).__module__
assert type(ours.KD_LOSSES.build(dict(type="ikd_fast.FGDLoss", preset="retinanet"))) is type(loss)
distiller = MODELS.get("IKDDistiller")
assert distiller is ours.IKDDistiller
"""


def run(*parts: str) -> None:
    """In a process of its own: registries are global."""
    code = "\n".join(textwrap.dedent(part) for part in parts)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_a_users_fgd_loss_in_mmdets_registry(first):
    """compat must come before mmdet, so "theirs first" means first after it."""
    head = "from ikd_fast.mmdet.compat import activate; activate()"
    run(*((CHECK.splitlines()[1], USERS) if first == "ours" else (head, USERS)), CHECK)


@pytest.mark.slow
def test_another_library_with_its_own_scope():
    """As mmrazor does it: a child of mmengine's registry, a scope of its own, and names that are ours too."""
    run(
        """
        import ikd_fast.mmdet
        from mmengine.registry import MODELS as ROOT, Registry
        from torch import nn

        THEIRS = Registry("model", parent=ROOT, scope="another", locations=[])
        for name in ("FGDLoss", "MGDLoss", "IKDDistiller", "AdaptiveFreqAug"):
            THEIRS.register_module(name=name, module=type(name, (nn.Module,), {"owner": "another"}))
        """,
        USERS,
        CHECK,
        """
        assert THEIRS.build(dict(type="FGDLoss")).owner == "another"
        assert MODELS.build(dict(type="another.FGDLoss")).owner == "another"
        """,
    )


@pytest.mark.slow
def test_beside_mmrazor():
    """mmrazor 1.0.0 is on PyPI, but its models import parts of torch that torch 2.13 has no more."""
    pytest.importorskip("mmrazor", reason="mmrazor is not installed")
    pytest.importorskip(
        "mmrazor.models", reason="mmrazor does not import on this torch", exc_type=ImportError
    )
    run(
        "import ikd_fast.mmdet, mmrazor.models",
        USERS,
        CHECK,
        """
        from mmrazor.registry import MODELS as THEIRS
        assert THEIRS.get("ChannelWiseDivergence").__module__.startswith("mmrazor.")
        assert MODELS.get("mmrazor.L1Loss").__module__.startswith("mmrazor.")
        """,
    )
