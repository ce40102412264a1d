"""``ikd-fast sweep`` as a command: processes of its own, Ctrl-C, exit codes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


def test_usage_errors_name_the_option(ikd, configs, tmp_path) -> None:
    for arguments, message in (
        (["--beta", "1e-5,x"], "--beta takes numbers"),
        (["--mode", "single,"], "--mode takes names"),
        (["--seeds", "0"], "--seeds must be at least 1"),
        (["--iters", "2", "--epochs", "1"], "--iters or --epochs"),
        (["--eps", "256"], "eps must be in 0..255"),
    ):
        result = ikd("sweep", configs["ikd"], "--out", tmp_path / "s", *arguments)
        assert result.exit_code == 2, result.stderr
        assert message in result.stderr
    result = ikd("sweep", "nowhere.py")
    assert result.exit_code == 2
    assert "no config nowhere.py" in result.stderr
    assert not (tmp_path / "s").exists()


@pytest.mark.slow
def test_ctrl_c_stops_the_worker_and_the_same_command_goes_on(configs, tmp_path) -> None:
    """Then a beta that overflows: recorded, the JSON still printed, exit code 1."""
    out = tmp_path / "s"

    def start(beta: str) -> subprocess.Popen[str]:
        command = [
            sys.executable, "-m", "ikd_fast", "sweep", str(configs["ikd"]), "--beta", beta, "--no-baseline", "--iters", "30",
            "--out", str(out), "--json",
        ]  # fmt: skip
        # A suite started in the background has inherited an ignored SIGINT, which would be inherited once more.
        mine = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        finally:
            signal.signal(signal.SIGINT, mine)

    home = out / "runs/single_eps8_beta1e-05/seed0"
    process = start("1e-5")
    deadline = time.monotonic() + 300
    while not (home / "last_checkpoint").is_file():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    assert stdout == ""
    assert "goes on from the last checkpoint" in stderr
    assert not (home / "result.json").is_file()
    assert _processes_of(home) == []

    process = start("1e-5,1e38")
    stdout, stderr = process.communicate(timeout=600)
    assert process.returncode == 1, stderr
    assert "resumed at step" in stderr
    found = json.loads(stdout)
    assert [row["runs"]["0"]["status"] for row in found["settings"]] == ["done", "failed"]
    assert [row["step"] for row in map(json.loads, (home / "losses.jsonl").read_text().splitlines())] == list(
        range(30)
    )


def _processes_of(home: Path) -> list[str]:
    """Command lines that name the run's folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = path.read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if str(home) in text:
            found.append(text)
    return found
