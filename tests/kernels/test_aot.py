"""The ahead-of-time gate: what it reads from PTX and sources, what it refuses, and that every kernel passes it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytest.importorskip("triton", minversion="3.6", reason="kernels are compiled by triton >= 3.6")

from ikd_fast.kernels.aot.compiling import Build
from ikd_fast.kernels.aot.ptx import float_atomics, stream_lines, widest_accesses
from ikd_fast.kernels.aot.report import row_of, table, uncovered

PTX = """
	.loc	1 10 5
	ld.global.b32 %r1, [%rd1];
	// begin inline asm
	.loc	1 12 9
	mov.u32 %r2, 0;
	.loc	1 13 9
	@%p1 ld.global.v4.b32 { %r2, %r3, %r4, %r5 }, [ %rd1 + 0 ];
	// end inline asm
	.loc	2 7 1, function_name $L__info_string0, inlined_at 1 20 4
	st.global.L1::evict_first.v2.b64 [%rd2], {%rd3, %rd4};
	st.global.b16 [%rd2], %rs1;
	// begin inline asm
	@%p2 ld.global.L1::evict_last.v2.b16 { %rs2, %rs3 }, [ %rd1 + 0 ];
	// end inline asm
	.loc	1 31 1
	cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r5;
	.loc	1 32 1
	ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [%r9];
	.file	1 "/somewhere/kernels/a.py"
	.file	2 "/somewhere/kernels" "b.py"
"""


def test_access_widths_belong_to_the_statement_that_makes_them() -> None:
    """An asm block counts as its first line; the file table may follow the code; shared memory does not count."""
    assert widest_accesses(PTX) == {("a.py", 10): 4, ("a.py", 12): 16, ("b.py", 7): 16, ("a.py", 31): 16}


def test_accesses_without_line_information_are_refused() -> None:
    with pytest.raises(ValueError, match="TRITON_DISABLE_LINE_INFO"):
        widest_accesses("ld.global.b32 %r1, [%rd1];")


def test_float_atomics_are_told_from_integer_ones() -> None:
    text = "atom.global.gpu.acq_rel.add.u32 %r1, [%rd1], 1;\n@%p1 red.global.add.f32 [%rd1], %f1;\natom.shared.add.f32 %f1, [%r1], %f2;"
    assert float_atomics(text) == ["red.global.add.f32"]


def test_marked_lines_are_those_where_the_access_begins() -> None:
    source = textwrap.dedent(
        """
        def kernel(p, q):
            a = tl.load(p)  # stream
            b = tl.load(p + 1)
            tl.store(
                q,
                tl.load(p + 2).to(
                    tl.float32
                ),
            )  # stream
            c = "# stream"
        """
    ).lstrip()
    assert stream_lines(source) == {2: "a = tl.load(p)  # stream", 4: "tl.store(", 6: "tl.load(p + 2).to("}
    with pytest.raises(ValueError, match="line 1 is marked"):
        stream_lines("a = b + c  # stream\n")


def _build(**change) -> Build:
    usual = dict(
        kernel="k",
        op="o",
        target="sm_90",
        registers=32,
        stack=0,
        local=0,
        shared=0,
        widths={("a.py", 3): 16},
        atomics=[],
    )
    return Build(**{**usual, "cases": ["c"], "aligned": True, **change})


MARKED = {("a.py", 3): "x = tl.load(p)  # stream"}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (dict(stack=8), "registers spill: 8 bytes of stack, 0 of local memory"),
        (dict(local=16), "registers spill: 0 bytes of stack, 16 of local memory"),
        (dict(widths={("a.py", 3): 8}), "a.py:3 moves 8 bytes at a time, expected 16: x = tl.load"),
        (dict(atomics=["red.global.add.f32"]), "floats are added atomically (red.global.add.f32)"),
    ],
)
def test_gate_names_what_is_wrong(change: dict, problem: str) -> None:
    row = row_of(_build(**change), MARKED)
    assert not row.ok
    assert len(row.problems) == 1
    assert problem in row.problems[0]
    assert "FAIL" in table([row])


def test_gate_passes_what_is_wide_or_need_not_be() -> None:
    assert row_of(_build(), MARKED).ok
    assert row_of(_build(widths={("a.py", 3): 4}, aligned=False), MARKED).ok
    assert row_of(_build(widths={("a.py", 3): 32, ("a.py", 4): 1}), MARKED).stream == {"a.py:3": 32}


def test_what_nothing_compiles_is_named() -> None:
    row = row_of(_build(), MARKED)
    assert uncovered([row], {"k"}, MARKED) == []
    found = uncovered([row], {"k", "other"}, {**MARKED, ("a.py", 9): "tl.store(q, x)  # stream"})
    assert found == [
        "kernel other is launched by no case",
        "a.py:9 is marked as streaming but compiled by no case: tl.store(q, x)  # stream",
    ]


def _run(args: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *args], capture_output=True, text=True, env={**env, **environment}, timeout=600
    )


MODULE = ["-m", "ikd_fast.kernels.aot"]
NO_TRITON = """
import sys
sys.modules["triton"] = None
from ikd_fast.kernels.aot.__main__ import main
sys.exit(main([]))
"""


@pytest.mark.slow
def test_operations_pass_for_one_target() -> None:
    """Three of them; all, for every target and under both Tritons, are `make kernels`, which fails where one does."""
    operations = ["masked_l2", "add_noise", "apply_delta"]
    done = _run([*MODULE, "--json", "--target", "sm_90", "--op", *operations])
    assert done.returncode in (0, 1), done.stderr
    found = json.loads(done.stdout)
    assert [(row["kernel"], row["cases"][0], row["problems"]) for row in found["rows"] if not row["ok"]] == []
    assert found["ok"]
    assert done.returncode == 0
    assert found["targets"] == ["sm_90"]
    assert {row["target"] for row in found["rows"]} == {"sm_90"}
    assert all(row["registers"] > 0 for row in found["rows"])
    assert {width for row in found["rows"] for width in row["stream"].values()} >= {16}


BAD = """
import json, torch, triton
import triton.language as tl
from pathlib import Path
from ikd_fast.kernels.aot.compiling import Case, build
from ikd_fast.kernels.aot.ptx import stream_lines
from ikd_fast.kernels.aot.report import row_of
from ikd_fast.kernels.triton_ops.launch import launch
from triton.runtime.driver import driver

@triton.jit
def good(p, q, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(q + o, tl.load(p + o) * 2.0)  # stream

@triton.jit
def narrow(p, q, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b = tl.load(p + o * 3)  # stream
    tl.store(q + o, b)

@triton.jit
def spilling(p, q, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    b = tl.load(p + o)
    tl.store(q + o, b - tl.sum(b))

@triton.jit
def atomic(p, q, BLOCK: tl.constexpr):
    tl.atomic_add(q, tl.sum(tl.load(p + tl.arange(0, BLOCK))))

def case(kernel, block, warps):
    x = torch.empty(1 << 20, device="meta")
    return Case("bad", kernel.fn.__name__, lambda: launch(kernel, 1, x.device, x, x, BLOCK=block, num_warps=warps))

cases = [case(good, 1024, 4), case(good, 1024, 4), case(narrow, 1024, 4), case(spilling, 16384, 1), case(atomic, 1024, 4)]
source = Path(__file__)
marked = {(source.name, line): text for line, text in stream_lines(source.read_text()).items()}
before = driver._active
rows = [row_of(found, marked) for found in build([(c, c.launches()) for c in cases], "sm_90")]
assert driver._active is before
print(json.dumps([[row.kernel, len(row.cases), row.problems] for row in rows]))
"""


@pytest.mark.slow
def test_bad_kernels_are_caught(tmp_path: Path) -> None:
    """Compiled for real: a strided access, registers that spill, and a float atomic, beside a kernel without fault."""
    script = tmp_path / "bad_kernels.py"
    script.write_text(BAD)
    done = _run([str(script)])
    assert done.returncode == 0, done.stderr
    found = {kernel: (cases, problems) for kernel, cases, problems in json.loads(done.stdout)}
    assert found["good"] == (1, [])
    assert found["narrow"][1] == [
        "bad_kernels.py:19 moves 4 bytes at a time, expected 16: b = tl.load(p + o * 3)  # stream"
    ]
    assert len(found["spilling"][1]) == 1
    assert found["spilling"][1][0].startswith("registers spill: ")
    assert len(found["atomic"][1]) == 1
    assert found["atomic"][1][0].startswith("floats are added atomically (atom.global")


SIZES = """
import collections, json
from ikd_fast.kernels.aot.cases import sized_cases
from ikd_fast.kernels.aot.compiling import build
cases = [(case, case.launches()) for case in sized_cases()]
print(json.dumps(collections.Counter(found.kernel for found in build(cases, "sm_90"))))
"""


@pytest.mark.slow
def test_image_sizes_and_batches_do_not_recompile() -> None:
    """Multi-scale training meets a new size at every step: a kernel has a form for aligned sizes and one for others."""
    done = _run(["-c", SIZES])
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert counts
    assert {kernel: count for kernel, count in counts.items() if count > 2} == {}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([*MODULE, "--target", "sm_1"], "invalid choice: 'sm_1'"),
        ([*MODULE, "--op", "nothing"], "got nothing"),
        (
            [
                "-c",
                NO_TRITON,
            ],
            "triton does not import",
        ),
    ],
)
def test_what_cannot_run_says_why_and_ends_with_2(args: list[str], message: str) -> None:
    done = _run(args)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_the_interpreter_is_refused() -> None:
    done = _run(MODULE, TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "TRITON_INTERPRET is set, which replaces the compiler: unset it" in done.stderr
