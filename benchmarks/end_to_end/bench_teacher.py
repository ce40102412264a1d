"""What each option of the frozen teacher's engine brings: features without a graph, and features with the gradient to the images.

``python -m benchmarks.end_to_end.bench_teacher [--device cuda] [--compile]`` prints the table with errors, compilation and CUDA
graphs included where they are asked for; under pytest-benchmark the options that need no compiler are measured.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.comparison import TIMED, label
from ikd_fast import FrozenTeacher

from .nets import Detector

pytestmark = pytest.mark.benchmark(**TIMED)

AS_GIVEN = "as given"
OPTIONS: dict[str, dict[str, Any] | None] = {
    AS_GIVEN: None,
    "fold_bn": dict(fold_bn=True, channels_last=False),
    "channels_last": dict(fold_bn=False, channels_last=True),
    "fold_bn, channels_last": dict(fold_bn=True, channels_last=True),
    "bfloat16": dict(fold_bn=False, channels_last=False, dtype="bfloat16"),
    "fold_bn, bfloat16": dict(fold_bn=True, channels_last=False, dtype="bfloat16"),
    "fold_bn, channels_last, bfloat16": dict(fold_bn=True, channels_last=True, dtype="bfloat16"),
}
FLOAT16 = {"fold_bn, channels_last, float16": dict(fold_bn=True, channels_last=True, dtype="float16")}
COMPILED = {
    "fold_bn, compile": dict(fold_bn=True, channels_last=False, compile=True),
    "fold_bn, channels_last, bfloat16, compile": dict(
        fold_bn=True, channels_last=True, dtype="bfloat16", compile=True
    ),
}
GRAPHS = {
    "fold_bn, channels_last, bfloat16, cuda_graphs": dict(
        fold_bn=True, channels_last=True, dtype="bfloat16", cuda_graphs=True
    ),
}
PASSES = ("features", "features and gradient")


def plain_detector() -> tuple[nn.Module, Any, Any, str]:
    """The net of ``bench_step.py``, statistics of its norms as a trained net has them."""
    net = Detector(width=24, depth=2)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return net, lambda n, x: n(x), lambda n, x: n.features(x), "plain detector"


def demo_teacher() -> tuple[nn.Module, Any, Any, str]:
    """mmdet's RetinaNet of the demo, ResNet-18 of 32 channels, with its trained weights."""
    pytest.importorskip("mmdet", reason="needs the mmdet extra")
    import ikd_fast.mmdet  # noqa: F401
    from ikd_fast.distill import load_strict
    from ikd_fast.mmdet.build import build_detector, model_config, read_checkpoint, resolve_path
    from ikd_fast.mmdet.settings import dense_forward

    from mmengine.registry import init_default_scope

    init_default_scope("mmdet")
    net = build_detector(model_config("ikd_fast::_base_/demo_retinanet.py"))
    load_strict(net, read_checkpoint(resolve_path("ikd_fast::demo_teacher.safetensors", "assets")))
    return net, dense_forward, "neck", "mmdet RetinaNet R18"


def large_teacher() -> tuple[nn.Module, Any, Any, str]:
    """ResNeXt-101-64x4d RetinaNet in plain PyTorch, the papers' teacher."""
    from benchmarks.device.nets import teacher_net

    net = teacher_net()
    return net, lambda n, x: n(x), lambda n, x: n.features(x), "RetinaNet X101-64x4d"


NETS = {"plain": plain_detector, "mmdet": demo_teacher, "large": large_teacher}
SIZES = {"plain": (2, 256, 320), "mmdet": (4, 256, 256), "large": (2, 800, 1344)}


@functools.cache
def built(net: str) -> tuple[nn.Module, Any, Any, str]:
    torch.manual_seed(0)
    return NETS[net]()


@functools.cache
def images_for(net: str, device: str) -> Tensor:
    """Noise of a photograph's spectrum, about normalised."""
    n, h, w = SIZES[net]
    g = torch.Generator().manual_seed(1)
    coarse = torch.randn(n, 3, h // 16, w // 16, generator=g)
    smooth = nn.functional.interpolate(coarse, size=(h, w), mode="bilinear")
    return (smooth + 0.2 * torch.randn(n, 3, h, w, generator=g)).to(device)


def teacher_with(net: str, options: dict[str, Any] | None, device: str = "cpu") -> tuple[FrozenTeacher, Any]:
    module, call, source, _ = built(net)
    engine = None if options is None else {**options, "report": None}
    return FrozenTeacher(module.to(device), call=call, engine=engine), source


def pass_of(
    teacher: FrozenTeacher, source: Any, images: Tensor, kind: str
) -> Callable[[], list[Tensor] | Tensor]:
    """The work that is timed."""
    if kind == "features":
        return lambda: teacher.features(images, source)

    def gradient() -> Tensor:
        x = images.detach().clone().requires_grad_(True)
        maps = teacher.watch(x, [source])[0]
        (grad,) = torch.autograd.grad(torch.stack([m.square().mean() for m in maps]).sum(), x)
        return grad

    return gradient


def errors(net: str, side: str, options: dict[str, Any] | None, device: str) -> dict[str, float]:
    """Worst level, gradient, and the share of the gradient's signs that agree, against the net as given."""
    images = images_for(net, device)
    reference, source = teacher_with(net, None, device)
    teacher, _ = teacher_with(net, options, device)
    truth, found = (pass_of(t, source, images, PASSES[1])() for t in (reference, teacher))
    assert isinstance(truth, Tensor)
    assert isinstance(found, Tensor)
    pass_of(teacher, source, images, PASSES[0])()
    return {
        "level_error": max((check.worst for check in teacher.checks), default=0.0),
        "gradient_error": float((found - truth).norm() / truth.norm()),
        "gradient_signs": float((found.sign() == truth.sign()).float().mean()),
    }


@pytest.mark.parametrize("side", OPTIONS)
@pytest.mark.parametrize("kind", PASSES)
@pytest.mark.parametrize("net", ["plain", "mmdet"])
def test_teacher(benchmark, net: str, kind: str, side: str) -> None:
    teacher, source = teacher_with(net, OPTIONS[side])
    images = images_for(net, "cpu")
    run = pass_of(teacher, source, images, kind)
    run()  # checks itself against the net as given
    n, h, w = SIZES[net]
    group = f"frozen teacher, {built(net)[3]}, {n} images {h}x{w}, {kind}, CPU"
    label(benchmark, group, side, peer=side == AS_GIVEN, **errors(net, side, OPTIONS[side], "cpu"))
    benchmark(run)


def clock_for(device: str) -> tuple[Callable[[], float], str]:
    """Processor time where one thread does all the work, since others may use the machine; else time that passes."""
    alone = device == "cpu" and torch.get_num_threads() == 1
    return (time.process_time, "processor time") if alone else (time.perf_counter, "wall time")


def seconds(runs: dict[str, Callable[[], Any]], device: str, budget: float) -> dict[str, list[float]]:
    """Times of each, taken in turn, so that what else the machine does falls on all of them alike."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    clock, _ = clock_for(device)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        for _ in range(3):
            run()
    synchronize()
    start = time.perf_counter()
    while len(next(iter(times.values()))) < 5 or time.perf_counter() - start < budget:
        for name, run in runs.items():
            begin = clock()
            run()
            synchronize()
            times[name].append(clock() - begin)
    return times


def table(net: str, device: str, options: dict[str, dict[str, Any] | None], budget: float) -> list[str]:
    """Markdown rows: milliseconds, ratio to the net as given, errors."""
    images = images_for(net, device)
    n, h, w = SIZES[net]
    lines = [
        f"\n{built(net)[3]}, {n} images {h}x{w}, {device}, {torch.get_num_threads()} threads, {clock_for(device)[1]}",
        "\n| engine | features ms (IQR) | x | features + gradient ms (IQR) | x | level error | gradient error | signs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    made = {name: teacher_with(net, chosen, device) for name, chosen in options.items()}
    columns = []
    for kind in PASSES:
        runs = {name: pass_of(t, source, images, kind) for name, (t, source) in made.items()}
        columns.append(seconds(runs, device, budget))
    for name in options:
        cells = []
        for times in columns:
            q1, median, q3 = statistics.quantiles(times[name], n=4)
            ratio = statistics.median(times[AS_GIVEN]) / median
            cells += [f"{1e3 * median:.1f} ({1e3 * q1:.1f}-{1e3 * q3:.1f})", f"{ratio:.2f}"]
        e = errors(net, name, options[name], device)
        cells += [f"{e['level_error']:.1e}", f"{e['gradient_error']:.1e}", f"{e['gradient_signs']:.1%}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--compile", action="store_true", help="the compiled sides too (minutes)")
    parser.add_argument(
        "--nets", nargs="+", choices=sorted(NETS), help="default: plain mmdet; on cuda large too"
    )
    parser.add_argument("--seconds", type=float, default=8.0, help="of timing for each column")
    given = parser.parse_args()
    cuda = given.device == "cuda"
    options = {**OPTIONS, **(FLOAT16 | GRAPHS if cuda else {}), **(COMPILED if given.compile else {})}
    for net in given.nets or ["plain", "mmdet", *(["large"] if cuda else [])]:
        print("\n".join(table(net, given.device, options, given.seconds)), flush=True)


if __name__ == "__main__":
    main()
