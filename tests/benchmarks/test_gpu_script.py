"""The GPU script on a machine without one: its parts, its guards, and a dry run of all of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from benchmarks.device.budget import Budget, reason_of
from benchmarks.device.checks import Outcome, problem_of, read_report, run_tests
from benchmarks.device.measure import measure, measure_side, relative_error, row
from benchmarks.device.meter import Meter, Spread
from benchmarks.device.nets import CLASSES, class_loss, student_net, teacher_net
from benchmarks.device.output import SMOKE, markdown
from benchmarks.device.problem import Problem, Scale
from benchmarks.device.run import OPS, Found
from benchmarks.device.steps import CountFlops
from benchmarks.schema import validate

CPU = torch.device("cpu")


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_budget_lists_what_no_longer_fits() -> None:
    clock = Clock()
    budget = Budget(100, clock)
    budget.section(30)
    assert budget.allows("first", 30)
    clock.now = 25
    assert not budget.allows("second", 10)
    budget.section(500)
    assert budget.left == 75  # a section does not outlast the run
    clock.now = 99
    assert not budget.allows("third", 2)
    assert budget.skipped == [
        {"name": "second", "reason": "no time left: it takes about 10 s and 5 s were left"},
        {"name": "third", "reason": "no time left: it takes about 2 s and 1 s were left"},
    ]


def test_reasons_hold_no_paths() -> None:
    error = FileNotFoundError("no 'cuobjdump' in /home/me/env/bin,\n  see https://x.org/a/b")
    assert reason_of(error) == "FileNotFoundError: no 'cuobjdump' in (path), see https:/(path)"


def _outcome(name: str, problem: str = "") -> Outcome:
    return Outcome(name, 3, 0, problem, 1.0)


def test_an_operation_needs_its_own_tests_and_the_launcher() -> None:
    passed = [
        _outcome("test_launch"),
        _outcome("test_fgd"),
        _outcome("test_fgd_backward"),
        _outcome("test_add_noise"),
    ]
    assert problem_of("fgd", passed) == ""
    assert problem_of("masked_l2", passed) == "no test file of masked_l2 ran"
    broken = [*passed[:2], _outcome("test_fgd_backward", "1 of 3 tests failed"), passed[3]]
    assert problem_of("fgd", broken) == "test_fgd_backward: 1 of 3 tests failed"
    assert problem_of("add_noise", broken) == ""
    assert problem_of("*", broken) == "test_fgd_backward: 1 of 3 tests failed"
    assert "test_launch" in problem_of("add_noise", [_outcome("test_launch", "no test ran"), *passed[1:]])


def test_every_operation_has_a_test_file(repo_root: Path) -> None:
    names = {path.stem for path in (repo_root / "tests" / "kernels" / "triton_ops").glob("test_*.py")}
    assert {f"test_{op}" for op in OPS} <= names


def test_files_are_run_in_processes_and_their_outcomes_read(tmp_path: Path) -> None:
    (tmp_path / "test_good.py").write_text(
        "import pytest\n\ndef test_a(): pass\n\n@pytest.mark.skip(reason='x')\ndef test_b(): pass\n"
    )
    (tmp_path / "test_bad.py").write_text("def test_a(): assert 0\n\ndef test_b(): pass\n")
    (tmp_path / "test_slow.py").write_text("import time\n\ndef test_a(): time.sleep(600)\n")
    log = tmp_path / "log"
    found = run_tests([tmp_path / "test_bad.py", tmp_path / "test_good.py"], 300.0, 2, log)
    assert [(o.name, o.passed, o.skipped) for o in found] == [("test_bad", 1, 0), ("test_good", 1, 1)]
    assert [o.problem for o in found] == ["1 of 2 tests failed", ""]
    assert "=== test_bad" in log.read_text()
    stopped = run_tests([tmp_path / "test_slow.py", tmp_path / "test_good.py"], 0.5, 1, log)
    assert [o.name for o in stopped] == ["test_good", "test_slow"]
    assert stopped[0].problem == "not started: no time left"
    assert stopped[1].problem.startswith("stopped after")


def test_a_report_of_skips_alone_is_no_pass() -> None:
    xml = '<testsuites><testsuite tests="4" failures="0" errors="0" skipped="4"/></testsuites>'
    assert read_report("x", xml, 1.0).problem == "no test ran"


def test_relative_error() -> None:
    one = torch.ones(4)
    assert relative_error([one, one * 1.01], [one, one]) == pytest.approx(0.01, rel=1e-4)
    nan = relative_error([one, torch.tensor([float("nan")]), one], [one, torch.ones(1), one])
    assert nan != nan
    with pytest.raises(ValueError, match=r"shape \(4,\), got \(2, 2\)"):
        relative_error([one.view(2, 2)], [one])
    with pytest.raises(ValueError, match="expected 2 outputs, got 1"):
        relative_error([one], [one, one])


def _problem(**change) -> Problem:
    usual = dict(
        op="x",
        group="doubling",
        make=lambda seed: torch.full((3,), 1.0 + seed),
        ours=("ours", lambda x: [x * 2]),
        peers={"wrong": lambda x: [x * 2.5], "right": lambda x: [x + x], "broken": lambda x: x.nothing},
        reference=lambda x: [x.double() * 2],
        moved=24,
        inputs=12,
        tolerance=1e-6,
        targets={"right": 1.0, "wrong": 2.0},
    )
    return Problem(**{**usual, **change})


def test_a_side_that_disagrees_or_fails_gets_no_figure_and_is_listed() -> None:
    budget, meter = Budget(1000), Meter(CPU, rounds=5, seconds=0.0)
    rows = measure(meter, _problem(), budget, None, compile_peers=False)
    assert [(r["side"], r["role"]) for r in rows] == [("ours", "ours"), ("right", "peer")]
    assert rows[0]["targets"] == {"right": 1.0}
    assert rows[0]["notes"] == {"moved_bytes": 24, "error": 0.0}
    assert [s["name"] for s in budget.skipped] == ["doubling: wrong", "doubling: broken"]
    assert (
        budget.skipped[0]["reason"]
        == "ArithmeticError: error 0.25 against the reference, expected at most 1e-06"
    )
    assert budget.skipped[1]["reason"].startswith("AttributeError")


def test_a_problem_that_cannot_be_made_is_listed() -> None:
    def make(seed: int) -> None:
        raise torch.OutOfMemoryError("too much")

    budget = Budget(1000)
    assert measure(Meter(CPU), _problem(make=make), budget, None, False) == []
    assert budget.skipped == [{"name": "doubling", "reason": "OutOfMemoryError: too much"}]
    assert Found(rows=[{}], skipped=budget.skipped).ok
    assert not Found(rows=[{}], skipped=[{"name": "a", "reason": "ArithmeticError: b"}]).ok
    assert not Found(rows=[{}], tests=[_outcome("test_fgd", "1 of 2 tests failed")]).ok
    assert not Found().ok


def test_input_sets_outgrow_the_cache() -> None:
    meter = Meter(CPU)
    assert meter.sets_for(10) == 2
    meter.cuda, meter.cache_bytes = True, 60 * 2**20
    assert meter.sets_for(23_000_000) == 9
    assert meter.sets_for(10**9) == 2
    assert meter.sets_for(1) == 32


class _Event:
    """A CUDA event of a device on which a call takes a fixed time."""

    work = 0

    def __init__(self, enable_timing: bool) -> None:
        self.at = 0

    def record(self) -> None:
        self.at = _Event.work

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: _Event) -> float:
        return (end.at - self.at) * 0.25


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Meter:
    """A meter that believes in a GPU: each call takes 0.25 ms, waits once and allocates 100 bytes beyond 7."""
    cuda = torch.cuda
    monkeypatch.setattr(cuda, "Event", _Event)
    for name in ("_sleep", "synchronize", "set_sync_debug_mode", "reset_peak_memory_stats"):
        monkeypatch.setattr(cuda, name, lambda *_: None)
    monkeypatch.setattr(cuda, "memory_allocated", lambda _: 7)
    monkeypatch.setattr(cuda, "max_memory_allocated", lambda _: 107)
    meter = Meter(CPU, rounds=6, seconds=5.0)
    meter.cuda, meter.cache_bytes = True, 100
    return meter


def _call(x: int) -> int:
    _Event.work += 1
    warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
    return x


@pytest.mark.filterwarnings("ignore:called a sync", "ignore:CUDA is not available")
@pytest.mark.parametrize("launches", [1, 300, 5000])
def test_gpu_time_is_that_of_one_call(fake_cuda: Meter, launches: int) -> None:
    spread = fake_cuda.gpu(_call, [1, 2, 3], 1e-4, launches)
    assert spread == Spread(2.5e-4, 2.5e-4, 2.5e-4, 2.5e-4, 6)


@pytest.mark.filterwarnings("ignore:called a sync", "ignore:CUDA is not available")
def test_gpu_notes(fake_cuda: Meter) -> None:
    """A share of the copy, syncs and memory, from a device with known answers."""
    _, notes = measure_side(fake_cuda, _problem(moved=10**6, maps=200), _call, [1, 2], 8e9)
    assert notes["gpu_us"] == 250.0
    assert notes["copy_share"] == 0.5
    assert notes["syncs"] == 1
    assert (notes["peak_extra_bytes"], notes["peak_of_maps"]) == (100, 0.5)


def test_shares_of_the_copy_and_ratios_are_printed() -> None:
    spread = Spread(2e-4, 1.9e-4, 2.1e-4, 1.8e-4, 9)
    notes = dict(gpu_us=100.0, gpu_q1_us=99.0, gpu_q3_us=101.0, copy_share=0.83, syncs=0, peak_of_maps=0.5)
    rows = [
        row("work", "ours", "ours", spread, notes, {"theirs": 2.0}),
        row("work", "theirs", "peer", Spread(3e-4, 3e-4, 3e-4, 3e-4, 9), {"gpu_us": None}),
    ]
    facts = dict(gpu="GPU", cpu="CPU", cores=2)
    result = dict(
        machine=facts,
        versions={"torch": "2"},
        commit=dict(id="abc", dirty=True),
        created="now",
        benchmarks=rows,
        skipped=[],
    )
    text = markdown(result, Found(rows, copy=4.3e12), smoke=False)
    assert "| ours | 100.0 (99.0..101.0) | 200 (190..210) | 83% | 0 | 0.50x |" in text
    assert "ours against theirs: 1.50x; target 2x MISSED" in text
    assert "4.300 TB/s" in text
    assert "dry run" not in text


@pytest.mark.parametrize(("make", "gmac"), [(student_net, 106), (teacher_net, 349)])
def test_nets_cost_what_the_published_ones_do(make, gmac: int) -> None:
    """RetinaNet with these backbones at 800x1344, backbone with FPN; its heads have 144.7 GMAC."""
    with torch.device("meta"):
        net, image = make().eval(), torch.empty(1, 3, 800, 1344)
    with torch.no_grad(), CountFlops() as count:
        maps = net.features(image)
        body = count.total / 2e9
        net.logits(maps)
        net.boxes(maps)
    # P6 is made of P5 here and of the backbone's last map in some configs.
    assert body == pytest.approx(gmac, rel=0.02)
    assert count.total / 2e9 - body == pytest.approx(144.7, rel=0.001)
    assert [tuple(m.shape[2:]) for m in maps] == Scale().levels()


def test_class_loss_against_one_box_written_out() -> None:
    levels = [(8, 12), (4, 6), (2, 3), (1, 2), (1, 1)]
    torch.manual_seed(0)
    logits = [torch.randn(1, 9 * CLASSES, h, w, dtype=torch.float64) for h, w in levels]
    # 40 pixels wide: the level of sizes 32 to 64; centre (30, 34), in column 3 and row 4 of stride 8.
    target = [{"boxes": torch.tensor([[10.0, 14.0, 50.0, 54.0]]), "labels": torch.tensor([5])}]
    expected = 0.0
    for i, x in enumerate(logits):
        p = x.float().double().view(9, CLASSES, *levels[i]).sigmoid()
        loss = -0.75 * p**2 * (1 - p).log()
        if i == 0:
            hit = p[:, 5, 4, 3]
            loss[:, 5, 4, 3] = -0.25 * (1 - hit) ** 2 * hit.log()
        expected += float(loss.sum())
    # float32 sums of 8e4 terms
    assert float(class_loss(logits, target)) == pytest.approx(expected, rel=1e-5)


def test_mmdet_nets_fit_the_same_losses() -> None:
    pytest.importorskip("mmdet")
    from benchmarks.device.mmdet_nets import STUDENT, MMDetRetinaNet, importable

    assert importable()
    net = MMDetRetinaNet(STUDENT).eval()
    with torch.no_grad():
        maps = net.features(torch.rand(1, 3, 64, 96))
        loss = class_loss(
            net.logits(maps), [{"boxes": torch.tensor([[0.0, 0, 9, 9]]), "labels": torch.tensor([0])}]
        )
    assert [tuple(b.shape) for b in net.boxes(maps)] == [(1, 36, *m.shape[2:]) for m in maps]
    assert bool(loss.isfinite().all())


def _run(args: list[str], root: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.gpu", *args]
    return subprocess.run(command, capture_output=True, text=True, cwd=root, env=env, timeout=600)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so_and_ends_with_1(tmp_path: Path, repo_root: Path) -> None:
    done = _run(["--out", str(tmp_path / "out")], repo_root)
    assert done.returncode == 1
    assert "expected a CUDA device, found none; --device cpu --smoke" in done.stderr
    assert not (tmp_path / "out").exists()


def test_wrong_usage_ends_with_2(tmp_path: Path, repo_root: Path) -> None:
    done = _run(["--out", str(tmp_path), "--device", "cpu"], repo_root)
    assert done.returncode == 2
    assert "--device cpu is for the dry run alone: add --smoke" in done.stderr


@pytest.mark.slow
def test_dry_run(tmp_path: Path, repo_root: Path) -> None:
    """Every operation and step, kernels interpreted, marked as no measurement; the files pass the schema."""
    pytest.importorskip("triton", minversion="3.6", reason="kernels are interpreted by triton >= 3.6")
    done = _run(["--out", str(tmp_path), "--device", "cpu", "--smoke", "--commit", "0123456789ab"], repo_root)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads((tmp_path / "gpu.json").read_text())
    validate(result)
    assert result["machine"]["gpu"] is None
    assert result["commit"]["id"] == "0123456789ab"
    assert result["skipped"] == []
    rows = result["benchmarks"]
    assert all(r["group"].startswith(SMOKE) and r["notes"]["smoke"] == 1 for r in rows)
    sides = {r["side"] for r in rows}
    operations = {"pyramid_l2", "fgd_sums", "mask_maps", "augment_batch", "add_noise"}
    operations |= {"apply_delta", "fgsm_step_packed", "input_diversity", "sign_step"}
    operations |= {"attention_stats", "channel_kl", "pearson", "ssim"}
    assert operations | {"FGDLoss"} <= sides
    assert {
        "PyTorch",
        "PyTorch, compiled",
        "published form",
        "FGD",
        "FGD + IKD, single",
        "FGD + IKD, iterative",
    } <= sides
    kernels = {r["side"]: r["notes"]["launches"] for r in rows if "launches" in r["notes"]}
    assert operations == set(kernels)
    text = (tmp_path / "gpu.md").read_text()
    assert "none of these figures is a measurement" in text
    assert "| test_launch |" in text


@pytest.mark.slow
def test_it_runs_from_a_checkout_that_is_not_installed(tmp_path: Path, repo_root: Path) -> None:
    """As on a bare machine: the package resolves to the checkout, and `ikd_fast.kernels` to its folder `kernels`."""
    script = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
        f"sys.path.insert(0, {str(repo_root)!r})\n"
        "import benchmarks.device.uninstalled, ikd_fast.kernels, ikd_fast.kernels.ops.backend as b\n"
        "print(b.__file__)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == repo_root / "kernels" / "ops" / "backend.py"
