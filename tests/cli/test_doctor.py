"""The doctor's report: true values where the stack is whole, a line and a remedy where it is broken or missing."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch

from ikd_fast import doctor

REPO = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def report() -> dict:
    return doctor.collect()


def test_values_of_this_environment(report: dict) -> None:
    assert json.loads(json.dumps(report)) == report
    assert set(report) == {
        "python", "ikd_fast", "torch", "packages", "mmcv", "kernels", "missing", "problems", "ok",
    }  # fmt: skip
    assert report["python"]["version"] == platform.python_version()
    assert report["torch"]["version"] == torch.__version__
    assert report["torch"]["cuda"] == torch.version.cuda
    assert len(report["torch"]["gpus"]) == torch.cuda.device_count()
    assert report["packages"]["numpy"]["version"] == np.__version__
    assert report["packages"]["mmengine"]["version"] == metadata.version("mmengine")
    assert report["kernels"]["backend"] == doctor._kernels(report["torch"])["backend"]
    assert report["missing"] == []
    assert report["problems"] == []
    assert report["ok"] is True


@pytest.mark.parametrize(
    ("gpus", "problem", "backend", "note"),
    [
        ([], None, "reference", "no CUDA device: plain PyTorch; triton would serve one"),
        ([], "triton is missing", "reference", "no CUDA device: plain PyTorch; triton is missing"),
        (["a GPU"], None, "triton", "on CUDA tensors; PyTorch on the CPU"),
        (["a GPU"], "expected triton >= 3.6, got 3.1", "reference", "expected triton >= 3.6, got 3.1"),
    ],
)
def test_what_serves_the_kernels(monkeypatch, gpus, problem, backend, note) -> None:
    from ikd_fast.kernels.ops import backend as choice

    monkeypatch.setattr(choice, "triton_problem", lambda: problem)
    assert doctor._kernels({"error": None, "gpus": gpus}) == {"backend": backend, "note": note}
    assert doctor._kernels({"error": "broken", "gpus": []})["backend"] == "none"


def test_operators_and_their_providers(report: dict) -> None:
    from ikd_fast.mmdet import compat

    activated = compat.activate()
    assert report["mmcv"]["mode"] == activated.mode
    assert report["mmcv"]["flavour"] == activated.mmcv_distribution
    operators = report["mmcv"]["operators"]
    if activated.mode == "compiled":
        assert set(operators.values()) == {"compiled"}
    else:
        assert operators.pop("soft_nms") == operators.pop("sigmoid_focal_loss") == "ikd_fast"
        through = {operators.pop(n) for n in ("nms", "roi_align", "deform_conv2d", "modulated_deform_conv2d")}
        assert through in ({"torchvision"}, {"ikd_fast"})
        assert (report["mmcv"]["torchvision_unused"] is None) == (through == {"torchvision"})
        assert set(operators.values()) == {"none"}
        assert {"carafe", "roi_pool", "nms_rotated"} <= set(operators)


def test_rendered_text_holds_the_facts() -> None:
    report = doctor.collect()
    text = doctor.render(report)
    assert torch.__version__ in text
    assert report["kernels"]["note"][:40] in " ".join(text.split())
    assert "nothing is missing for the mmdet lane and the demo" in text
    assert "\x1b" not in text
    for name, provider in report["mmcv"]["operators"].items():
        assert any(line.split() == [name, provider] for line in text.splitlines())
    if reason := report["mmcv"]["torchvision_unused"]:
        assert f"operators served by ikd_fast are plain PyTorch: {reason}" in text
    if "none" in report["mmcv"]["operators"].values():
        assert "operators served by none need full mmcv:\n  pip uninstall -y mmcv-lite" in text


def test_missing_packages_come_with_the_line_to_install_them(monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if name in ("pycocotools", "kornia"):
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(doctor.metadata, "version", version)
    report = doctor.collect()
    # kornia is optional: listed as not installed, but nothing is wrong without it.
    assert report["packages"]["kornia"]["install"] == 'pip install "kornia>=0.9"'
    assert report["missing"] == [
        {"name": "pycocotools", "needed_for": "box AP", "install": 'pip install "pycocotools>=2.0.7"'}
    ]
    assert report["ok"] is False
    text = doctor.render(report)
    assert 'missing: pycocotools (for box AP)\n  pip install "pycocotools>=2.0.7"' in text
    assert "nothing is missing" not in text


@pytest.mark.parametrize(
    ("cuda", "found", "wanted"),
    [
        (None, None, 'not installed  (pip install "nvidia-dali-cuda120>=2.0")'),
        ("12.9", None, 'not installed  (pip install "nvidia-dali-cuda120>=2.0")'),
        ("13.0", None, 'not installed  (pip install "nvidia-dali-cuda130>=2.0")'),
        ("13.0", "2.4.0", "2.4.0  (nvidia-dali-cuda120)"),
        (
            "13.0",
            "1.53.0",
            '1.53.0  (nvidia-dali-cuda120)  (too old for ikd_fast.dali: pip install "nvidia-dali-cuda130>=2.0")',
        ),
    ],
)
def test_the_dali_that_belongs_to_torchs_cuda(monkeypatch, cuda, found, wanted) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if not name.startswith("nvidia-dali"):
            return real(name)
        if found is None or name != "nvidia-dali-cuda120":
            raise metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(doctor.metadata, "version", version)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    report = doctor.collect()
    assert dict(doctor._rows(report))["dali"] == wanted
    assert report["ok"] is True  # optional


def test_a_broken_stack_is_reported_not_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    from ikd_fast.mmdet import compat

    def broken() -> None:
        raise compat.CompatError("mmcv [2.2.0] is installed. Run:\n  pip install this")

    monkeypatch.setattr(compat, "activate", broken)
    monkeypatch.setitem(sys.modules, "numpy", None)  # what `import numpy` meets is an ImportError
    report = doctor.collect()
    json.dumps(report)
    assert report["ok"] is False
    assert report["mmcv"]["error"] == "CompatError: mmcv [2.2.0] is installed. Run:\n  pip install this"
    assert set(report["mmcv"]["operators"].values()) == {"none"}
    assert any(line.startswith("numpy does not import: ModuleNotFoundError") for line in report["problems"])
    text = doctor.render(report)
    assert "problem: CompatError: mmcv [2.2.0] is installed. Run:\n  pip install this" in text


def test_broken_and_heavy_packages_in_a_fresh_process(tmp_path: Path) -> None:
    """torch that does not import is one line; kornia and DALI are looked up, not imported."""
    for name, distribution in (("torch", "torch"), ("kornia", "kornia"), ("nvidia", "nvidia-dali-cuda120")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise OSError('lib{name}.so: cannot open\\nmore')\n")
        info = tmp_path / f"{distribution.replace('-', '_')}-9.9.9.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 9.9.9\n")
    code = (
        "import json, sys\nfrom ikd_fast import doctor\nreport = doctor.collect()\ndoctor.render(report)\n"
        "print(json.dumps([report, sorted({'kornia', 'nvidia', 'mmdet'} & set(sys.modules))]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(REPO)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    report, imported = json.loads(result.stdout)
    assert report["torch"]["version"] == "9.9.9"
    assert report["torch"]["error"] == "OSError: libtorch.so: cannot open"
    assert "torch does not import: OSError: libtorch.so: cannot open" in report["problems"]
    assert report["packages"]["kornia"]["version"] == "9.9.9"
    assert report["packages"]["dali"]["version"] == "9.9.9"
    assert imported == []
