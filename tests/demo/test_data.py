"""The demo's data set: no pixel in two splits, boxes where the pixels are, files that pycocotools reads."""

from __future__ import annotations

import io
import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from ikd_fast.demo import data
from ikd_fast.demo.coco import find_splits
from ikd_fast.demo.errors import DemoError
from ikd_fast.demo.tiles import Rect

REAL_SIZES = {
    "2019_YELL_2_528000_4978000_image_crop2": (2299, 2472),
    "2019_YELL_2_541000_4977000_image_crop": (1249, 1035),
    "OSBS_029": (400, 400),
    "SOAP_061": (400, 400),
}
SMALL_SIZES = {name: ((1100, 640) if "YELL" in name else (90, 70)) for name in REAL_SIZES}


def voc(boxes: list[list[int]]) -> bytes:
    keys = ("xmin", "ymin", "xmax", "ymax")
    rows = ("".join(f"<{k}>{v}</{k}>" for k, v in zip(keys, box, strict=True)) for box in boxes)
    objects = "".join(f"<object><name>Tree</name><bndbox>{row}</bndbox></object>" for row in rows)
    return f"<annotation>{objects}</annotation>".encode()


@pytest.fixture
def fake_source(monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """Photographs in which every pixel has its own colour, with a box every 60 pixels."""
    photos, files = {}, {}
    for k, (name, (w, h)) in enumerate(SMALL_SIZES.items()):
        number = np.arange(w * h).reshape(h, w) + k * 1_000_000
        photos[name] = np.stack([number // 65536, number // 256 % 256, number % 256], axis=-1).astype(
            np.uint8
        )
        buffer = io.BytesIO()
        Image.fromarray(photos[name]).save(buffer, "PNG")
        files[f"{name}.png"] = buffer.getvalue()
        files[f"{name}.xml"] = voc(
            [[x, y, x + 25, y + 30] for x in range(0, w - 25, 60) for y in range(0, h - 30, 60)]
        )
    monkeypatch.setattr(data, "read_source", lambda **_: files)
    return photos


def test_no_pixel_of_the_real_photographs_is_in_two_splits() -> None:
    tiles = data.layout(REAL_SIZES)
    assert {s: sum(t.split == s for t in tiles) for s in ("train", "val", "test")} == {
        "train": 86,
        "val": 22,
        "test": 2,
    }
    for a, b in combinations(tiles, 2):
        if a.source == b.source and a.split != b.split:
            assert not a.rect.overlaps(b.rect), (a, b)
    used = {split: {t.source for t in tiles if t.split == split} for split in ("train", "val", "test")}
    assert used["test"].isdisjoint(used["train"] | used["val"])


def test_training_tiles_end_where_the_right_quarter_begins() -> None:
    tiles = data.layout(REAL_SIZES)
    for name in data.TRAIN_IMAGES:
        line = round(0.75 * REAL_SIZES[name][0])
        assert max(t.rect.x2 for t in tiles if t.source == name and t.split == "train") == line
        assert min(t.rect.x1 for t in tiles if t.source == name and t.split == "val") >= line


def test_written_tiles_are_the_pixels_their_rectangle_names(tmp_path: Path, fake_source) -> None:
    root = data.prepare(tmp_path)
    colours: dict[str, set[int]] = {}
    for split in ("train", "val", "test"):
        coco = json.loads((root / f"annotations/{split}.json").read_text())
        colours[split] = set()
        for image in coco["images"]:
            pixels = np.asarray(Image.open(root / split / image["file_name"]))
            x1, y1, x2, y2 = image["rect"]
            np.testing.assert_array_equal(pixels, fake_source[image["source"]][y1:y2, x1:x2])
            colours[split] |= set((pixels.astype(np.int64) @ [65536, 256, 1]).ravel().tolist())
    for a, b in combinations(colours.values(), 2):
        assert a.isdisjoint(b)


def test_annotations_are_valid_coco_with_boxes_inside_their_tiles(tmp_path: Path, fake_source) -> None:
    root = data.prepare(tmp_path)
    for split in ("train", "val", "test"):
        coco = COCO(str(root / f"annotations/{split}.json"))
        assert coco.getCatIds(catNms=["tree"]) == [1]
        assert sorted(coco.getImgIds()) == list(range(1, len(coco.getImgIds()) + 1))
        for row in coco.loadAnns(coco.getAnnIds()):
            image = coco.loadImgs(row["image_id"])[0]
            x, y, w, h = row["bbox"]
            assert x >= 0
            assert y >= 0
            assert x + w <= image["width"]
            assert y + h <= image["height"]
            assert row["area"] == w * h >= data.MIN_KEPT * 25 * 30
    assert set(find_splits(root)) == {"train", "val", "test"}


def test_a_box_is_where_the_crown_is() -> None:
    tile = data.Tile("val", "a", Rect(100, 50, 200, 150))
    rows = data.coco_json([tile], {"a": np.array([[110.0, 60, 130, 90], [190, 60, 220, 90], [0, 0, 9, 9]])})[
        "annotations"
    ]
    assert [row["bbox"] for row in rows] == [[10, 10, 20, 30]]  # a third of the second is inside: dropped


def test_it_is_written_once(tmp_path: Path, fake_source, monkeypatch: pytest.MonkeyPatch) -> None:
    data.prepare(tmp_path)
    monkeypatch.setattr(data, "read_source", lambda **_: pytest.fail("read again"))
    data.prepare(tmp_path)


def test_an_interrupted_write_is_repeated(
    tmp_path: Path, fake_source, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = data.write_json
    calls: list[Path] = []

    def stop_at_second(path: Path, value: object) -> None:
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        original(path, value)

    monkeypatch.setattr(data, "write_json", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        data.prepare(tmp_path)
    monkeypatch.setattr(data, "write_json", original)
    assert set(find_splits(data.prepare(tmp_path))) == {"train", "val", "test"}


@pytest.mark.parametrize(
    "name", ["train/mine.png", "val/a/b.txt", "test/c", "annotations/train.json", "README.md"]
)
def test_what_the_demo_did_not_make_stays(tmp_path: Path, fake_source, name: str) -> None:
    mine = tmp_path / "data" / name
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"mine")
    with pytest.raises(
        DemoError, match=rf"data/{name.split('/')[0]}.* not the demo's.*\n.*--out FOLDER"
    ) as caught:
        data.prepare(tmp_path / "data")
    assert caught.value.usage
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [mine]
    assert mine.read_bytes() == b"mine"


def test_files_added_to_an_unfinished_data_folder_stay(tmp_path: Path, fake_source) -> None:
    root = data.prepare(tmp_path / "data")
    (root / "annotations/done.json").unlink()
    (root / "train/mine.png").write_bytes(b"mine")
    data.prepare(root)
    assert (root / "train/mine.png").read_bytes() == b"mine"
    assert (root / "annotations/done.json").is_file()


def test_the_marker_comes_before_the_first_tile(
    tmp_path: Path, fake_source, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    original = data.write_bytes
    monkeypatch.setattr(data, "write_bytes", lambda path, b: (written.append(path.name), original(path, b)))
    data.prepare(tmp_path)
    assert written[0] == data.MARKER
    assert written[1].endswith(".png")


def test_empty_folders_and_a_foreign_done_file(tmp_path: Path, fake_source) -> None:
    (tmp_path / "empty/train").mkdir(parents=True)
    assert set(find_splits(data.prepare(tmp_path / "empty"))) == {"train", "val", "test"}
    for number, text in enumerate(("[]", "{", '{"version": 1}')):
        root = tmp_path / str(number)
        (root / "annotations").mkdir(parents=True)
        (root / "annotations/done.json").write_text(text)
        with pytest.raises(DemoError, match="annotations/ is already and not the demo's"):
            data.prepare(root)


def test_the_licence_travels_with_the_data(tmp_path: Path, fake_source) -> None:
    root = data.prepare(tmp_path)
    assert "NEON" in (root / "README.md").read_text()
    licence = (root / "LICENSE.deepforest").read_text()
    assert "Copyright (c) 2019, Ben Weinstein" in licence
    assert "MIT License" in licence
