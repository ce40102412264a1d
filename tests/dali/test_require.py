"""DALI absent: an error that names the package for the CUDA version found."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from ikd_fast.dali import CocoImages, DALIDetLoader, package, require_dali


@pytest.mark.parametrize(
    ("cuda", "name"),
    [
        (None, "nvidia-dali-cuda120"),
        ("11.8", "nvidia-dali-cuda120"),
        ("12.6", "nvidia-dali-cuda120"),
        ("13.0", "nvidia-dali-cuda130"),
        ("14.1", "nvidia-dali-cuda130"),
    ],
)
def test_the_package_for_the_cuda_version(monkeypatch, cuda: str | None, name: str) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    assert package() == name
    with pytest.raises(ImportError, match=f"needs NVIDIA DALI .*pip install {name}$") as caught:
        require_dali()
    assert ("no CUDA" if cuda is None else f"CUDA {cuda}") in str(caught.value)


def test_the_loader_says_so_before_anything_else(monkeypatch, tmp_path) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    images = object.__new__(CocoImages)
    images.seed = 0
    with pytest.raises(ImportError, match="pip install nvidia-dali-cuda1[23]0"):
        DALIDetLoader(images, output="torch")


def test_importing_loads_neither_dali_nor_mmdet() -> None:
    code = (
        "import sys, ikd_fast.dali as d\n"
        "for name in d.__all__: getattr(d, name)\n"
        "print([m for m in ('nvidia.dali', 'mmdet', 'mmengine', 'cv2') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
