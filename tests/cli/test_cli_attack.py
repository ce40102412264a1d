"""``ikd-fast attack`` on the tiny data set: files, strength, resuming, formats, and errors with their exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

pytest.importorskip("mmengine", reason="needs the mmdet extra: pip install 'ikd_fast[mmdet]'")

from ikd_fast import OnlineDIFGSM
from ikd_fast.attack import AdversarialSet
from ikd_fast.pixels import PixelUnits
from tests.mmdet.conftest import IMAGES, SIDE, draw, stock_config, with_ikd

from .conftest import written

QUICK = ("--workers", "0", "--batch", "5")


@pytest.fixture
def attack(ikd, configs):
    return lambda out, *more: ikd(
        "attack", configs["teacher"], configs["weights"], "--out", out, *QUICK, *more
    )


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((out / "images").iterdir())}


def lines(out: Path) -> dict[str, dict]:
    rows = [json.loads(line) for line in (out / "strength.jsonl").read_text().splitlines()]
    assert len({row["file"] for row in rows}) == len(rows)
    return {row["file"]: row for row in rows}


def test_a_set_is_what_the_attack_makes(attack, configs, coco_root, tmp_path) -> None:
    """One image, attacked here by the library's own attack on mmdet's own loss: the same pixels, the same strength."""
    out = tmp_path / "set"
    done = attack(out, "--json")
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["images"], report["made"], report["there"]) == (IMAGES, IMAGES, 0)
    files = contents(out)
    assert report["bytes"] == sum(map(len, files.values()))
    assert len(files) == IMAGES

    from ikd_fast.distill import FrozenTeacher
    from ikd_fast.mmdet.build import build_detector
    from ikd_fast.mmdet.samples import image_key
    from ikd_fast.mmdet.victim import MMDetVictim

    from mmengine.config import Config

    cfg = Config(stock_config(coco_root))
    net = build_detector(cfg.model.to_dict())
    net.load_state_dict(torch.load(configs["weights"])["state_dict"])
    victim = MMDetVictim(FrozenTeacher(net))
    means, stds = [
        torch.tensor(v)[:, None, None] for v in ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375])
    ]
    scale = 80 / SIDE
    key = image_key(dict(img_path=str(coco_root / "images/3.png"), img_id=3))
    clean, boxes = draw(3)
    clean = cv2.resize(clean, (80, 80), interpolation=cv2.INTER_LINEAR)
    pixels = torch.from_numpy(clean[..., ::-1].transpose(2, 0, 1).copy()).float()
    x = torch.zeros(1, 3, 96, 96)  # padded to a multiple of 32
    x[0, :, :80, :80] = (pixels - means) / stds
    target = dict(boxes=torch.tensor(boxes) * scale, labels=torch.zeros(2, dtype=torch.long), size=(80, 80))
    units = PixelUnits(mean=means_of(means), std=means_of(stds))
    made = OnlineDIFGSM("iterative")(victim, x, [target], image_ids=[key], epoch=0, units=units)
    truth = units.to_pixels(made.images)[0, :, :80, :80].round().byte().numpy()
    (name,) = [name for name in files if name.startswith("3.")]
    found = cv2.imread(str(out / "images" / name))
    gap = found[..., ::-1].astype(int) - truth.transpose(1, 2, 0)
    # Another batch rounds other sums: a sign may differ where a gradient is as good as zero.
    assert (gap != 0).mean() < 0.02
    assert np.abs(found.astype(int) - clean).max() == 8

    row = lines(out)[name]
    back = x.clone()
    back[0, :, :80, :80] = (
        torch.from_numpy(found[..., ::-1].transpose(2, 0, 1).copy()).float() - means
    ) / stds
    with torch.no_grad():
        before, after = (float(victim(images, [target])) for images in (x, back))
    assert row["class_loss"] == pytest.approx(before, rel=1e-4)
    assert row["adversarial_class_loss"] == pytest.approx(after, rel=1e-4)
    assert after > before
    assert row["linf"] == 8
    assert row["outside"] == 0
    assert row["mean_abs"] == pytest.approx(np.abs(found.astype(float) - clean).mean(), abs=1e-3)
    assert row["image"].endswith("images/3.png")
    summary = report["summary"]
    assert summary == json.loads((out / "adversarial.json").read_text())["summary"]
    assert summary["adversarial_class_loss"] == pytest.approx(
        np.mean([r["adversarial_class_loss"] for r in lines(out).values()]), rel=1e-4
    )
    assert summary["measured"] == IMAGES


def means_of(values: torch.Tensor) -> list[float]:
    return values.flatten().tolist()


def test_only_what_is_missing_is_made(attack, tmp_path) -> None:
    out = tmp_path / "set"
    assert attack(out).exit_code == 0
    before, rows = contents(out), lines(out)
    stamps = {path.name: path.stat().st_mtime_ns for path in (out / "images").iterdir()}
    gone = sorted(before)[2:9:3]
    for name in gone:
        (out / "images" / name).unlink()
    (out / "images" / ".half.png.x").write_bytes(b"of a process that was killed")
    (out / "strength").mkdir()
    (out / "strength" / "cafe-0.jsonl").write_text('{"file": "cut sho')
    again = attack(out, "--json")
    assert again.exit_code == 0, again.stderr
    report = json.loads(again.stdout)
    assert (report["made"], report["there"]) == (len(gone), IMAGES - len(gone))
    assert contents(out) == before  # the same bytes: groups are the same whatever is there
    after = {path.name: path.stat().st_mtime_ns for path in (out / "images").iterdir()}
    assert {name for name in after if after[name] != stamps[name]} == set(gone)
    assert lines(out) == rows
    assert not (out / "strength").exists()
    nothing = json.loads(attack(out, "--json").stdout)
    assert (nothing["made"], nothing["there"]) == (0, IMAGES)


def test_a_set_of_other_settings_is_left_alone(attack, tmp_path) -> None:
    out = tmp_path / "set"
    assert attack(out, "--images", 2).exit_code == 0
    before = contents(out)
    other = attack(out, "--images", 2, "--eps", "4", "--jpeg", "90")
    assert other.exit_code == 1
    said = " ".join(other.stderr.split())
    assert "kind: png there, jpeg now; quality: 95 there, 90 now; eps: 8.0 there, 4.0 now" in said
    assert "Write another --out, or delete it" in said
    assert contents(out) == before
    other = attack(out, "--images", 2, "--batch", "3")
    assert "batch: 5 there, 3 now" in " ".join(other.stderr.split())
    loss = attack(out, "--images", 2, "--cfg-options", "model.bbox_head.loss_cls.gamma=0.0")
    assert "model: " in loss.stderr
    assert loss.exit_code == 1


def test_a_few_first_and_the_rest_later(attack, tmp_path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "set"
    assert attack(whole).exit_code == 0
    reports = [
        json.loads(attack(out, *more, "--json").stdout) for more in (("--images", 2), ("--images", 7), ())
    ]
    assert [(r["made"], r["there"], r["images"], r["of_images"]) for r in reports] == [
        (2, 0, 2, IMAGES),
        (5, 2, 7, IMAGES),
        (IMAGES - 7, 7, IMAGES, IMAGES),
    ]
    assert contents(out) == contents(whole)
    assert lines(out) == lines(whole)
    assert (out / "adversarial.json").read_bytes() == (whole / "adversarial.json").read_bytes()
    text = attack(tmp_path / "few", "--images", 2).stdout
    assert f"2 of {IMAGES} adversarial images" in " ".join(text.split())


def test_lines_that_are_lost_are_said(attack, tmp_path) -> None:
    out = tmp_path / "set"
    assert attack(out).exit_code == 0
    before = (out / "adversarial.json").read_bytes()
    rows = (out / "strength.jsonl").read_text().splitlines(keepends=True)
    (out / "strength.jsonl").write_text("".join(rows[:2]))
    again = attack(out)
    assert again.exit_code == 0
    assert "(2 of them; lines of the others are lost)" in " ".join(again.stdout.split())
    assert (out / "adversarial.json").read_bytes() == before
    (out / "strength.jsonl").unlink()
    assert attack(out).exit_code == 0


def test_an_empty_file_is_made_again(attack, tmp_path) -> None:
    out = tmp_path / "set"
    assert attack(out, "--images", 3).exit_code == 0
    before = contents(out)
    (out / "images" / min(before)).write_bytes(b"")
    assert json.loads(attack(out, "--images", 3, "--json").stdout)["made"] == 1
    assert contents(out) == before


def test_an_ikd_config_that_will_read_the_set(ikd, configs, coco_root, tmp_path) -> None:
    """Its folder is not there yet, and it loads float images."""
    config = with_ikd(stock_config(coco_root), adv=dict(attack=dict(type="OfflineImages")))
    config["model"].update(
        teacher_config=stock_config(coco_root)["model"], teacher_ckpt=str(configs["weights"])
    )
    pipeline = config["train_dataloader"]["dataset"]["pipeline"]
    pipeline[0]["to_float32"] = True
    pipeline.insert(3, dict(type="LoadAdversarialImage", directory=str(tmp_path / "set")))
    file = written(tmp_path / "offline.py", config)
    done = ikd("attack", file, configs["weights"], "--out", tmp_path / "set", *QUICK, "--json")
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["made"] == IMAGES
    assert report["summary"]["linf"] == 8


def test_what_wraps_a_pipeline_does_not_hide_its_resize(ikd, configs, coco_root, tmp_path) -> None:
    config = stock_config(coco_root)
    dataset = config["train_dataloader"]["dataset"]
    dataset["pipeline"] = [dict(type="KeyedRandomness", transforms=dataset["pipeline"])]
    config["train_dataloader"]["dataset"] = dict(type="RepeatDataset", times=2, dataset=dataset)
    file = written(tmp_path / "wrapped.py", config)
    done = ikd("attack", file, configs["weights"], "--out", tmp_path / "set", *QUICK, "--json")
    assert done.exit_code == 0, done.stderr
    assert (
        json.loads((tmp_path / "set/adversarial.json").read_text())["size"] == "network (80, 80) keep_ratio"
    )
    assert len(contents(tmp_path / "set")) == IMAGES


def test_two_images_of_one_key_are_refused(ikd, configs, tmp_path) -> None:
    from tests.mmdet.conftest import write_coco

    config = stock_config(write_coco(tmp_path / "a"))
    other = stock_config(write_coco(tmp_path / "b"))["train_dataloader"]["dataset"]
    both = [config["train_dataloader"]["dataset"], other]
    config["train_dataloader"]["dataset"] = dict(type="ConcatDataset", datasets=both)
    file = written(tmp_path / "both.py", config)
    found = ikd("attack", file, configs["weights"], "--out", tmp_path / "set", *QUICK)
    assert found.exit_code == 1
    assert f"{tmp_path}/a/images/0.png and {tmp_path}/b/images/0.png have one key" in found.stderr.replace(
        "\n", ""
    )


def test_published_files_have_the_originals_size(attack, tmp_path) -> None:
    out = tmp_path / "set"
    assert attack(out, "--images", 2, "--jpeg", "95", "--original-size").exit_code == 0
    for path in (out / "images").iterdir():
        assert path.suffix == ".jpg"
        assert cv2.imread(str(path)).shape == (SIDE, SIDE, 3)
    assert all(row["outside"] > 0 for row in lines(out).values())  # the bound does not survive
    small = tmp_path / "small"
    assert attack(small, "--images", 2, "--save-scale", "0.5").exit_code == 0
    assert all(cv2.imread(str(path)).shape == (40, 40, 3) for path in (small / "images").iterdir())


def test_sizes_of_the_attack(attack, tmp_path) -> None:
    for text, side in (("none", SIDE), ("64x64", 64)):
        out = tmp_path / text
        assert attack(out, "--images", 2, "--resize", text).exit_code == 0
        assert all(cv2.imread(str(path)).shape == (side, side, 3) for path in (out / "images").iterdir())


def test_packed_perturbations_are_those_of_the_images(attack, coco_root, tmp_path) -> None:
    assert attack(tmp_path / "png").exit_code == 0
    assert attack(tmp_path / "packed", "--packed").exit_code == 0
    png, packed = AdversarialSet(tmp_path / "png"), AdversarialSet(tmp_path / "packed")
    from ikd_fast.mmdet.samples import image_key

    for i in range(IMAGES):
        path = str(coco_root / "images" / f"{i}.png")
        clean = cv2.resize(draw(i)[0], (80, 80), interpolation=cv2.INTER_LINEAR)
        key = image_key(dict(img_path=path, img_id=i))
        one, other = (s.load(key, path, clean).astype(int) for s in (png, packed))
        # Steps of 2 from the image are levels of the packed format, but where 0 and 255 stopped them.
        free = (one > 0) & (one < 255)
        assert np.array_equal(one[free], other[free])
    assert lines(tmp_path / "packed").keys() == {n.replace(".png", ".delta") for n in lines(tmp_path / "png")}


def test_a_run_starts_from_a_packed_set(attack, configs, coco_root, tmp_path) -> None:
    assert attack(tmp_path / "packed", "--packed").exit_code == 0

    from mmengine.config import Config
    from mmengine.runner import Runner

    config = stock_config(coco_root, epochs=1)
    for name in ("dataloader", "evaluator", "cfg"):
        config[f"val_{name}"] = None
    memory = dict(seed_from=str(tmp_path / "packed"))
    seeded = with_ikd(
        config,
        adv=dict(beta=1e-5, attack=dict(type="OnlineDIFGSM", mode="carry", step_size=2, memory=memory)),
        stop_at=None,
    )
    seeded["model"].update(
        teacher_config=stock_config(coco_root)["model"],
        teacher_ckpt=str(configs["weights"]),
        allow_random_teacher=False,
    )
    runner = Runner.from_cfg(Config(seeded | dict(work_dir=str(tmp_path / "run"))))
    runner.train()
    counters = runner.model.ikd.attack.memory.counters
    assert (counters["seeded"], counters["unknown"], counters["resized"]) == (IMAGES, 0, 0)
    # Of another teacher it is refused.
    weights = torch.load(configs["weights"])["state_dict"]
    weights["backbone.conv1.weight"] *= 1.5
    torch.save(dict(state_dict=weights), tmp_path / "other.pth")
    seeded["model"]["teacher_ckpt"] = str(tmp_path / "other.pth")
    other = Runner.from_cfg(Config(seeded | dict(work_dir=str(tmp_path / "other"), experiment_name="other")))
    with pytest.raises(ValueError, match="teacher: .* there, .* now"):
        other.train()


def test_processes_that_nobody_numbered(attack, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    found = attack(tmp_path / "set")
    assert found.exit_code == 2
    assert "WORLD_SIZE is 2, and RANK" in " ".join(found.stderr.replace("│", " ").split())


def test_a_file_in_the_folder_s_place(attack, tmp_path) -> None:
    (tmp_path / "set").write_text("")
    found = attack(tmp_path / "set")
    assert (found.exit_code, "a file is in the way" in " ".join(found.stderr.split())) == (1, True)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--mode", "carry"), "--mode must be one of iterative, single, random_sign, got 'carry'"),
        (("--resize", "80"), "--resize takes WIDTHxHEIGHT, e.g. 1333x800, or none; got '80'"),
        (("--packed", "--jpeg", "95"), "leave out --jpeg, --original-size and --save-scale"),
        (("--original-size", "--save-scale", "0.5"), "give one of --original-size and --save-scale"),
        (("--jpeg", "101"), "quality of a JPEG must be in 1..100, got 101"),
        (("--save-scale", "2"), "scale must be 'original' or a number in 0..1 above 0, got 2.0"),
        (("--eps", "-1"), "eps must be in 0..255, got -1"),
        (("--steps", "0"), "steps must be an integer >= 1, got 0"),
        (("--mode", "single", "--steps", "3"), "mode 'single' spends 1 gradients, got steps=3"),
        (("--objective", "bbox"), "'bbox'"),
        (("--batch", "0"), "--batch must be at least 1, got 0"),
        (("--images", "0"), "--images must be at least 1, got 0"),
        (("--workers", "-1"), "--workers must be at least 0, got -1"),
        (("--bits", "2"), "--bits and --stride are of --packed, which was not given"),
        (("--save-scale", "0"), "in 0..1 above 0, got 0.0"),
        (("--device", "tpu7"), "--device must be one of cpu"),
        (("--packed", "--bits", "3"), "bits must be one of [2, 4, 8], got 3"),
        (("--packed", "--bits", "2"), "would be rounded away"),
        (("stray",), "unexpected stray"),
    ],
)  # fmt: skip
def test_wrong_usage(attack, tmp_path, more: tuple, said: str) -> None:
    found = attack(tmp_path / "set", *more)
    assert found.exit_code == 2, found.stderr
    assert said in " ".join(found.stderr.replace("│", " ").split())
    assert not (tmp_path / "set").exists()


def test_files_that_are_not_there(ikd, configs, coco_root, tmp_path) -> None:
    out = tmp_path / "set"
    found = ikd("attack", tmp_path / "no.py", configs["weights"], "--out", out)
    assert (found.exit_code, "no config" in found.stderr) == (2, True)
    found = ikd("attack", configs["teacher"], tmp_path / "no.pth", "--out", out, *QUICK)
    assert (found.exit_code, "no checkpoint" in found.stderr) == (2, True)
    moved = stock_config(coco_root)
    moved["train_dataloader"]["dataset"]["data_root"] = str(tmp_path / "nowhere")
    found = ikd("attack", written(tmp_path / "moved.py", moved), configs["weights"], "--out", out, *QUICK)
    assert found.exit_code == 1
    assert "the training data is not there" in " ".join(found.stderr.split())
    random = stock_config(coco_root)
    pipeline = random["train_dataloader"]["dataset"]["pipeline"]
    pipeline[2] = dict(type="RandomResize", scale=(80, 80), ratio_range=(0.5, 1.5), keep_ratio=True)
    found = ikd("attack", written(tmp_path / "random.py", random), configs["weights"], "--out", out, *QUICK)
    assert found.exit_code == 2
    assert "--resize none for the size of its file" in " ".join(found.stderr.split())
    assert not out.exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_named(ikd, configs, tmp_path, workers: int) -> None:
    from tests.mmdet.conftest import write_coco

    root = write_coco(tmp_path / "coco")
    path = root / "images" / "7.png"
    path.write_bytes(path.read_bytes()[:50])
    config = written(tmp_path / "teacher.py", stock_config(root))
    more = ("--workers", workers, "--batch", "5")
    found = ikd("attack", config, configs["weights"], "--out", tmp_path / "set", *more)
    assert found.exit_code == 1
    assert f"{path}: cannot be read" in found.stderr.replace("\n", "")
    assert "Traceback" not in found.stderr
    # The others of earlier groups are there; mended, the same command goes on.
    assert len(list((tmp_path / "set/images").iterdir())) == 5
    cv2.imwrite(str(path), draw(7)[0])
    assert ikd("attack", config, configs["weights"], "--out", tmp_path / "set", *QUICK).exit_code == 0


def test_a_full_disk_is_foreseen(attack, tmp_path, monkeypatch) -> None:
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10**9, 10**9, 40_000))
    found = attack(tmp_path / "set", "--batch", "2")
    assert found.exit_code == 1
    said = " ".join(found.stderr.split())
    assert "12 files of about" in said
    assert "Write --packed" in said


@pytest.mark.parametrize(
    ("name", "rank", "expected"),
    [
        (None, "3", "cuda:3"),
        ("cuda", "3", "cuda:3"),
        ("cuda", None, "cuda:0"),
        ("cuda:1", "3", "cuda:1"),
        ("cpu", "3", "cpu"),
    ],
)
def test_each_process_has_its_own_gpu(monkeypatch, name: str | None, rank: str | None, expected: str) -> None:
    from ikd_fast.commands import attack

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert attack._device(name, torch) == expected
