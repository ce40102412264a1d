"""``ikd-fast strength`` on the tiny data set: files, resuming, an IKD config's own attack, and errors with their exit codes."""

from __future__ import annotations

import json
from functools import partial

import pytest
from PIL import Image

pytest.importorskip("mmengine", reason="needs the mmdet extra: pip install 'ikd_fast[mmdet]'")

from tests.mmdet.conftest import with_ikd

QUICK = ("--images", "2", "--batch", "2", "--eps", "8", "--seeds", "1")


def test_files_and_resuming(ikd, configs, tmp_path, monkeypatch) -> None:
    from ikd_fast.analysis.strength import StrengthSettings

    # Fewer visits and steps than the command's, for time.
    quick = partial(StrengthSettings, visits=(1, 2), steps=8)
    monkeypatch.setattr("ikd_fast.commands.strength.StrengthSettings", quick)
    arguments = ("strength", configs["teacher"], configs["weights"], "--out", tmp_path / "o", *QUICK)
    first = ikd(*arguments, "--json")
    assert first.exit_code == 0, first.stderr
    # Off a terminal a line for each part.
    lines = [line for line in first.stderr.splitlines() if " %  " in line]
    assert lines[0].strip().startswith("0 %")
    assert "eps 8, seed 0" in lines[-1]
    report = json.loads(first.stdout)
    names = [row["name"] for row in report["rows"]]
    assert names[:3] == ["clean", "clean, published round trip", "random sign"]
    assert names[-1] == "PGD-8"
    assert {"single", "iterative", "carry, visit 1", "carry, fresh, visit 2"} <= set(names)
    rows = {row["name"]: row for row in report["rows"]}
    # On random weights too, more gradients raise the loss more, by far.
    assert (
        rows["PGD-8"]["class_loss"]["mean"]
        > rows["iterative"]["class_loss"]["mean"]
        > rows["random sign"]["class_loss"]["mean"]
    )
    assert all(set(row["metrics"]) == {"AP50", "AP"} for row in report["rows"])
    assert report["images"] == 2
    assert json.loads((tmp_path / "o/strength.json").read_text()) == report
    with Image.open(tmp_path / "o/strength.png") as picture:
        assert min(picture.size) > 700
    (parts,) = (tmp_path / "o/parts").iterdir()
    kept = {file.name: file.stat().st_mtime_ns for file in parts.iterdir()}
    assert set(kept) == {"clean.json", "eps8-seed0.json"}
    again = ikd(*arguments)
    assert again.exit_code == 0, again.stderr
    assert {file.name: file.stat().st_mtime_ns for file in parts.iterdir()} == kept
    assert again.stdout.startswith((tmp_path / "o/strength.md").read_text())


def test_an_ikd_config_brings_teacher_and_attack(configs, tmp_path, coco_root) -> None:
    """Without measuring: what the config's attack becomes, and which net is attacked."""
    from ikd_fast.analysis.strength.plan import StrengthSettings, candidates
    from ikd_fast.commands.strength import _from_attack
    from ikd_fast.mmdet.strength import configured_attack, teacher_model
    from tests.mmdet.conftest import stock_config

    from mmengine.config import Config

    attack = dict(type="OnlineDIFGSM", mode="iterative", eps=4, step_size=1.0, diversity_rate=0.8)
    cfg = Config(with_ikd(stock_config(coco_root), adv=dict(attack=attack)))
    assert teacher_model(cfg)["backbone"]["base_channels"] == 12
    own = configured_attack(cfg)
    plan = {c.name: c for c in candidates(StrengthSettings(**_from_attack(own)), 8.0)}
    mine = plan["as configured (iterative)"].build(3)
    assert (mine.eps, mine.step_size, mine.diversity_rate, mine.seed) == (8, 2, 0.8, 3)
    assert plan["iterative"].build(0).diversity_rate == 0.8
    kept = dict(type="OnlineDIFGSM", mode="carry", memory=dict(bits=8, stride=2))
    cfg = Config(with_ikd(stock_config(coco_root), adv=dict(attack=kept)))
    plan = {c.name: c for c in candidates(StrengthSettings(**_from_attack(configured_attack(cfg))), 8.0)}
    assert plan["carry"].build(0).memory.bits == 8
    assert plan["as configured (carry)"].kind == "carry"
    assert configured_attack(Config(stock_config(coco_root))) is None


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["{teacher}", "{folder}/none.pth"], 2, "no checkpoint"),
        (["{folder}/none.py", "{weights}"], 2, "no config"),
        (["{teacher}", "{weights}", "--eps", "1;2"], 2, "--eps takes numbers"),
        (["{teacher}", "{weights}", "--eps", "300"], 1, "eps are grey levels"),
        (["{teacher}", "{weights}", "--images", "0"], 2, "--images must be at least 1"),
        (["{ikd}", "{weights}"], 1, "of another shape"),
        (["{teacher}", "{weights}", "--cfg-options", "test_dataloader.dataset.data_root=none/"], 1, "the test data is not there"),
    ],
)  # fmt: skip
def test_errors(ikd, configs, tmp_path, arguments, code, says) -> None:
    given = [text.format(**configs) for text in arguments]
    result = ikd("strength", *given[:2], "--out", tmp_path, *given[2:])
    assert result.exit_code == code, result.stderr
    assert says in " ".join(result.stderr.split())
