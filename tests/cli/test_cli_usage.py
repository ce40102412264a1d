"""Exit codes, one clear message, no traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ikd_fast import cli


@pytest.fixture
def ikd(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("IKD_FAST_TRACEBACK", raising=False)
    runner = CliRunner()
    return lambda *args: runner.invoke(cli.app, [str(a) for a in args])


def test_help_is_quick_and_imports_no_torch() -> None:
    code = (
        "import sys, ikd_fast.cli as c\n"
        "try: c.app(['--help'])\n"
        "except SystemExit as e: print('exit', e.code, 'torch' in sys.modules, 'mmdet' in sys.modules)"
    )
    started = time.perf_counter()
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "exit 0 False False"
    assert time.perf_counter() - started < 10  # about 0.6 s on an idle machine
    for command in ("demo", "train", "test", "export", "init", "explain", "preview", "doctor"):
        assert f" {command} " in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "No such command"),
        (["demo", "--steps", "many"], "integer"),
        (["demo", "--steps", "0"], "--steps must be at least 1, got 0"),
        (["demo", "--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["demo", "--seed", "-1"], "--seed must not be negative"),
        (["demo", "--data", "no/such"], "no/such: no such folder"),
        (["demo", "--teacher", "no.pth"], "--teacher no.pth: no such file"),
        (["demo", "--wheel", "a.whl", "--source", "b"], "--wheel or --source, not both"),
        (["demo", "--wheel", "no.whl"], "no.whl: no such file"),
        (["demo", "--train-teacher", "--data", "x"], "leave out --data and --teacher"),
        (["demo", "--data", "x", "--wheel", "y"], "leave them out with --data"),
        (
            ["demo", "--loader", "dalli"],
            "--loader must be 'torch' or 'dali', got 'dalli'. Did you mean 'dali'?",
        ),
        (["train", "no.py"], "does not exist"),
        (["test", __file__, "no.pth"], "does not exist"),
        (["test", __file__], "Missing argument"),
        (["export", "no.pth", "x.pth"], "does not exist"),
        (["demo", "--data", "."], "annotation file missing"),
    ],
)
def test_wrong_usage_is_2(
    ikd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = ikd(*arguments)
    text = " ".join((result.output + getattr(result, "stderr", "")).replace("│", " ").split())
    assert message in text
    assert result.exit_code == 2
    assert "Traceback" not in text


@pytest.mark.parametrize("arguments", [["demo"], ["demo", "--quick"], ["demo", "--train-teacher"]])
def test_the_dali_loader_without_dali_is_2(
    ikd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)  # what `import` then meets is an ImportError
    result = ikd(*arguments, "--loader", "dali")
    text = " ".join(result.output.split())
    assert result.exit_code == 2
    assert text.startswith("error: --loader dali: ikd_fast.dali needs NVIDIA DALI")
    assert "pip install nvidia-dali-cuda1" in text
    assert "Traceback" not in text
    assert list(tmp_path.iterdir()) == []


def test_version(ikd) -> None:
    import ikd_fast

    result = ikd("--version")
    assert (result.exit_code, result.stdout) == (0, f"ikd-fast {ikd_fast.__version__}\n")


def test_demo_help_says_what_data_needs(ikd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    text = " ".join(ikd("demo", "--help").output.replace("│", " ").split())
    assert "annotations/{train,val}.json" in text
    assert "annotations/instances_{train,val}2017.json beside train2017/ and val2017/" in text
    assert "A teacher is trained on it first" in text


@pytest.mark.parametrize("in_base", [False, True])
def test_a_syntax_error_in_a_config_is_one_line(ikd, tmp_path: Path, in_base: bool) -> None:
    bad, config = tmp_path / "bad.py", tmp_path / "good.py"
    bad.write_text("a = 1\nmodel = dict(type='X'\nb = 2\n")
    config.write_text("_base_ = './bad.py'\n")
    result = ikd("train", config if in_base else bad)
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"error: {bad}, line 2: syntax error: ")


def test_bad_data_is_1_and_names_the_file(ikd, tmp_path: Path) -> None:
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/train.json").write_text("")
    result = ikd("demo", "--data", tmp_path, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "train.json is empty" in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


def test_settings_must_be_key_value(ikd, tmp_path: Path) -> None:
    config = tmp_path / "c.py"
    config.write_text("model = dict(type='RetinaNet')\n")
    assert ikd("train", config, "stray").exit_code == 2
    result = ikd("train", config, "--cfg-options", "a.b")
    assert result.exit_code == 2
    assert "key=value, got 'a.b'" in result.stderr
    result = ikd("train", config, "--launcher", "ssh")
    assert result.exit_code == 2
    assert "'none', 'pytorch', 'slurm', 'mpi'" in " ".join(result.stderr.split())


def test_torchrun_without_a_launcher(ikd, tmp_path: Path, monkeypatch) -> None:
    config = tmp_path / "c.py"
    config.write_text("model = dict(type='RetinaNet')\n")
    for name, value in dict(TORCHELASTIC_RUN_ID="none", WORLD_SIZE="2", RANK="0", LOCAL_RANK="0").items():
        monkeypatch.setenv(name, value)
    result = ikd("train", config)
    assert result.exit_code == 2
    assert "torchrun started 2 processes" in " ".join(result.stderr.split())


def test_cfg_options_take_mmdets_form(tmp_path: Path) -> None:
    from ikd_fast.mmdet.launch import load_config

    config = tmp_path / "my.py"
    config.write_text("a = dict(b=1, c=[1, 2], d='x')\n")
    cfg = load_config(
        config, work_dir=None, options=["a.b=2.5", "a.c=[3,4]", "a.d=False", "e=(1,2)"], launcher="none"
    )
    assert (cfg.a.b, cfg.a.c, cfg.a.d, cfg.e) == (2.5, [3, 4], False, (1, 2))
    assert cfg.work_dir == os.path.join("work_dirs", "my")


def test_interrupt_is_130_and_says_how_to_go_on(ikd, monkeypatch: pytest.MonkeyPatch) -> None:
    import ikd_fast.demo.run as module

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "run", stopped)
    result = ikd("demo")
    assert result.exit_code == 130
    assert "Interrupted. The same command goes on" in result.output


def test_json_is_all_there_is_on_stdout(ikd, monkeypatch: pytest.MonkeyPatch) -> None:
    import ikd_fast.demo.run as module

    def run(options, console):
        console.print("words")
        return {"models": {}, "steps": options.steps}

    monkeypatch.setattr(module, "run", run)
    result = ikd("demo", "--json", "--steps", 7)
    assert result.exit_code == 0
    assert json.loads(result.stdout) == {"models": {}, "steps": 7}
    assert "words" in result.stderr
