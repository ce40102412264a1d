"""What is installed, what serves the mmcv operators and the kernels, and how to get what is missing."""

from __future__ import annotations

import importlib
import importlib.util
import io
import platform
import sys
import warnings
from importlib import metadata
from typing import Any

# Distributions to look for, in order of preference, and the line that installs the first.
PACKAGES: dict[str, tuple[tuple[str, ...], str]] = {
    "numpy": (("numpy",), 'pip install "numpy>=1.26"'),
    "triton": (("triton", "pytorch-triton"), 'pip install "triton>=3.6"'),
    "torchvision": (("torchvision",), "pip install torchvision"),
    "mmdet": (("mmdet", "onedl-mmdetection"), 'pip install "mmdet==3.3.0" "setuptools<81"'),
    "mmengine": (("mmengine", "mmengine-lite", "onedl-mmengine"), 'pip install "mmengine==0.10.7"'),
    "mmcv": (("mmcv", "mmcv-lite", "onedl-mmcv"), 'pip install "mmcv-lite==2.1.0"'),
    "pycocotools": (("pycocotools",), 'pip install "pycocotools>=2.0.7"'),
    "safetensors": (("safetensors",), 'pip install "safetensors>=0.4"'),
    "kornia": (("kornia",), 'pip install "kornia>=0.9"'),
    "dali": (
        ("nvidia-dali-cuda130", "nvidia-dali-cuda120", "nvidia-dali-cuda110"),
        'pip install "nvidia-dali-cuda120>=2.0"',
    ),
}

# What each package is for; those the first mmdet lane cannot do without come under "missing".
NEEDED_FOR = {
    "mmdet": "ikd_fast.mmdet, the demo",
    "mmengine": "ikd_fast.mmdet, the demo",
    "mmcv": "ikd_fast.mmdet, the demo",
    "pycocotools": "box AP",
    "safetensors": "the teacher shipped with the demo",
}

# mmcv operator as users know it -> its names in mmcv._ext.
OPERATORS = {
    "nms": ("nms",),
    "sigmoid_focal_loss": ("sigmoid_focal_loss_forward", "sigmoid_focal_loss_backward"),
    "softmax_focal_loss": ("softmax_focal_loss_forward", "softmax_focal_loss_backward"),
    "soft_nms": ("softnms",),
    "nms_rotated": ("nms_rotated",),
    "roi_align": ("roi_align_forward", "roi_align_backward"),
    "roi_pool": ("roi_pool_forward", "roi_pool_backward"),
    "deform_conv2d": (
        "deform_conv_forward",
        "deform_conv_backward_input",
        "deform_conv_backward_parameters",
    ),
    "modulated_deform_conv2d": ("modulated_deform_conv_forward", "modulated_deform_conv_backward"),
    "multi_scale_deformable_attn": ("ms_deform_attn_forward", "ms_deform_attn_backward"),
    "border_align": ("border_align_forward", "border_align_backward"),
    "carafe": ("carafe_forward", "carafe_backward"),
    "masked_conv2d": ("masked_im2col_forward", "masked_col2im_forward"),
}


def _line(error: BaseException) -> str:
    """One line for an exception: its type and the first line of its message."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
    except Exception as error:  # unreadable metadata must not stop the report
        return f"unreadable ({_line(error)})"


def _package(name: str) -> dict[str, Any]:
    """Version by metadata alone: importing kornia or DALI for a version is too slow."""
    distributions, install = PACKAGES[name]
    found = {dist: version for dist in distributions if (version := _version(dist)) is not None}
    return {
        "installed": bool(found),
        "distribution": next(iter(found), None),
        "version": next(iter(found.values()), None),
        "install": None if found else install,
    }


def _dali(found: dict[str, Any], torch_report: dict[str, Any]) -> None:
    """Say which DALI belongs to torch's CUDA version, where there is none or one that is too old."""
    if torch_report["error"]:
        return
    from ikd_fast.dali.require import package

    install = f'pip install "{package()}>=2.0"'
    if not found["installed"]:
        found["install"] = install
    elif (major := found["version"].partition(".")[0]).isdigit() and int(major) < 2:
        found["note"] = f"too old for ikd_fast.dali: {install}"


def _torch() -> dict[str, Any]:
    report: dict[str, Any] = {"version": _version("torch"), "cuda": None, "gpus": [], "error": None}
    try:
        import torch

        report["version"] = torch.__version__
        report["cuda"] = torch.version.cuda
        if torch.cuda.is_available():
            report["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    except Exception as error:
        report["error"] = _line(error)
    return report


def _numpy_error() -> str | None:
    try:
        importlib.import_module("numpy")
    except Exception as error:
        return _line(error)
    return None


def _mmcv(packages: dict[str, Any]) -> dict[str, Any]:
    """Activate the compat layer, the only way to know what will serve an operator, and read its report."""
    report: dict[str, Any] = {
        "flavour": packages["mmcv"]["distribution"],
        "mode": None,
        "operators": dict.fromkeys(OPERATORS, "none"),
        "torchvision_unused": None,
        "error": None,
        "problems": [],
    }
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from ikd_fast.mmdet import compat

            activated = compat.activate()
            from ikd_fast.mmdet.compat.operators import find_torchvision

            if activated.mode == "substitutes" and activated.provider("nms") != "torchvision":
                report["torchvision_unused"] = find_torchvision()[1]
    except Exception as error:
        report["error"] = f"{type(error).__name__}: {error}"
        return report
    report.update(mode=activated.mode, problems=list(activated.problems), reason=activated.reason)
    report["flavour"] = activated.mmcv_distribution
    report["operators"] = {
        name: next(iter(served)) if len(served := {activated.provider(n) for n in names}) == 1 else "partly"
        for name, names in OPERATORS.items()
    }
    return report


def _kernels(torch_report: dict[str, Any]) -> dict[str, str]:
    """What computes the operations of ``ikd_fast.kernels`` here, and why."""
    if torch_report["error"]:
        return {"backend": "none", "note": "torch does not import"}
    from ikd_fast.kernels.ops.backend import triton_problem

    problem = triton_problem()
    if torch_report["gpus"]:
        return {
            "backend": "reference" if problem else "triton",
            "note": problem or "on CUDA tensors; PyTorch on the CPU",
        }
    return {
        "backend": "reference",
        "note": "no CUDA device: plain PyTorch; " + (problem or "triton would serve one"),
    }


def _missing(packages: dict[str, Any]) -> list[dict[str, str]]:
    return [
        {"name": name, "needed_for": NEEDED_FOR[name], "install": packages[name]["install"]}
        for name in NEEDED_FOR
        if not packages[name]["installed"]
    ]


def _problems(report: dict[str, Any]) -> list[str]:
    found = [f"torch does not import: {report['torch']['error']}"] if report["torch"]["error"] else []
    if error := report["packages"]["numpy"]["error"]:
        found.append(f"numpy does not import: {error}")
    if not report["missing"] and report["mmcv"]["error"]:
        found.append(report["mmcv"]["error"])
    return found + report["mmcv"]["problems"]


def collect() -> dict[str, Any]:
    """Everything ``ikd-fast doctor`` shows, as plain JSON values. Broken packages are reported, never raised.

    Keys: ``python``, ``ikd_fast``, ``torch`` (version, cuda, gpus, error), ``packages`` (per name: installed,
    distribution, version, install, for dali perhaps a note), ``mmcv`` (flavour, mode, operators by provider: compiled, torchvision,
    ikd_fast, none), ``kernels`` (backend, note), ``missing`` (name, needed_for, install), ``problems``, ``ok``.
    """
    packages = {name: _package(name) for name in PACKAGES}
    packages["numpy"]["error"] = _numpy_error()
    report: dict[str, Any] = {
        "python": {
            "version": platform.python_version(),
            "executable": sys.executable,
            "platform": platform.platform(),
        },
        "ikd_fast": {"version": _version("ikd_fast")},
        "torch": _torch(),
        "packages": packages,
        "mmcv": _mmcv(packages),
        "missing": _missing(packages),
    }
    _dali(packages["dali"], report["torch"])
    report["kernels"] = _kernels(report["torch"])
    report["problems"] = _problems(report)
    report["ok"] = not report["missing"] and not report["problems"]
    return report


def _rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    torch = report["torch"]
    gpus = ", ".join(torch["gpus"]) or "no GPU"
    rows = [
        ("python", f"{report['python']['version']}  ({report['python']['executable']})"),
        ("ikd_fast", str(report["ikd_fast"]["version"])),
        ("torch", torch["error"] or f"{torch['version']}  (CUDA {torch['cuda'] or 'none'}; {gpus})"),
    ]
    for name, package in report["packages"].items():
        if package["installed"]:
            alias = "" if package["distribution"] == name else f"  ({package['distribution']})"
            note = f"  ({package['note']})" if package.get("note") else ""
            rows.append((name, f"{package['version']}{alias}{note}"))
        else:
            rows.append((name, f"not installed  ({package['install']})"))
    rows.append(("kernels", f"{report['kernels']['backend']}  ({report['kernels']['note']})"))
    return rows


def render(report: dict[str, Any]) -> str:
    """The report of :func:`collect` as text for a terminal (plain, no colour codes)."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(file=io.StringIO(), width=120, color_system=None, highlight=False)
    installed = Table("component", "found", box=SIMPLE_HEAD)
    for name, text in _rows(report):
        installed.add_row(escape(name), escape(text))
    console.print(installed)

    operators = Table("mmcv operator", "served by", box=SIMPLE_HEAD)
    for name, provider in report["mmcv"]["operators"].items():
        operators.add_row(escape(name), escape(provider))
    console.print(operators)
    if "none" in report["mmcv"]["operators"].values() and report["mmcv"]["mode"] == "substitutes":
        from ikd_fast.mmdet.compat.operators import FULL_MMCV

        console.print(
            f"operators served by none need full mmcv:\n  {FULL_MMCV}", markup=False, soft_wrap=True
        )
    if reason := report["mmcv"]["torchvision_unused"]:
        console.print(
            f"operators served by ikd_fast are plain PyTorch: {reason}", markup=False, soft_wrap=True
        )
    for item in report["missing"]:
        console.print(
            f"missing: {item['name']} (for {item['needed_for']})\n  {item['install']}",
            markup=False,
            soft_wrap=True,
        )
    for problem in report["problems"]:
        console.print(f"problem: {problem}", markup=False, soft_wrap=True)
    if report["ok"]:
        console.print("nothing is missing for the mmdet lane and the demo")
    output = console.file
    assert isinstance(output, io.StringIO)
    return output.getvalue()
