"""``python -m ikd_fast.mmdet SCRIPT ARGS...`` behaves as ``python SCRIPT ARGS...`` with compat active."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ikd_fast.mmdet import __main__ as runner
from ikd_fast.mmdet.compat.environment import package_folder

REPO = Path(__file__).parents[2]


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ikd_fast.mmdet", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_script_sees_its_own_argv_path_and_name_and_its_exit_code_passes(tmp_path: Path) -> None:
    folder = tmp_path / "scripts"
    folder.mkdir()
    (folder / "neighbour.py").write_text("VALUE = 41\n")
    (folder / "script.py").write_text(
        "import json, sys\n"
        "from mmdet.models import RetinaHead\n"
        "from neighbour import VALUE\n"
        "if __name__ == '__main__':\n"
        "    print(json.dumps([sys.argv, sys.path[0], __file__, VALUE, RetinaHead.__name__]))\n"
        "    sys.exit(7)\n"
    )
    result = run("scripts/script.py", "--flag", "a b", "--help", cwd=tmp_path)
    assert result.returncode == 7, result.stderr
    argv, first, file, value, name = json.loads(result.stdout)
    assert argv == ["scripts/script.py", "--flag", "a b", "--help"]
    assert Path(first) == folder
    assert file == "scripts/script.py"
    assert (value, name) == (41, "RetinaHead")


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["ikd_fast.mmdet", *arguments])
    monkeypatch.setattr(sys, "path", list(sys.path))
    runner.main()


def test_mmdet_test_script_by_its_short_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"^0$"):
        call(monkeypatch, "tools/test.py", "--help")
    assert "MMDet test (and eval) a model" in capsys.readouterr().out


def test_keyboard_interrupt_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stop.py").write_text("raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        call(monkeypatch, str(tmp_path / "stop.py"))


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help(flag: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    call(monkeypatch, flag)
    assert capsys.readouterr().out.startswith("usage: python -m ikd_fast.mmdet SCRIPT [ARGS...]")


@pytest.mark.parametrize(("arguments", "came"), [((), "nothing"), (("--work-dir", "x"), "--work-dir")])
def test_no_script(
    arguments: tuple[str, ...], came: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        call(monkeypatch, *arguments)
    assert f"expected a script first, got {came}\n" in capsys.readouterr().err


def test_missing_script_lists_where_it_looked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"^2$"):
        call(monkeypatch, "tools/tset.py")
    error = capsys.readouterr().err
    mmdet = package_folder("mmdet")
    assert mmdet is not None
    assert "script 'tools/tset.py' not found" in error
    assert f"\n  {mmdet / '.mim' / 'tools/tset.py'}\n" in error


def test_a_script_in_the_working_directory_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = runner.candidates("tools/test.py")
    assert places[0] == Path("tools/test.py")
    assert places[1].is_file()
    assert runner.candidates(str(tmp_path / "a.py")) == [tmp_path / "a.py"]
