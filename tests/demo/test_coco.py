"""Bad annotation files: an error that names the file, the entry, what was expected and what came."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ikd_fast.demo import coco as module
from ikd_fast.demo.coco import find_split, find_splits, leaves_folder
from ikd_fast.demo.errors import DemoError

GOOD: dict[str, Any] = {
    "images": [{"id": 4, "file_name": "a.png", "width": 20, "height": 10}],
    "annotations": [{"id": 1, "image_id": 4, "category_id": 9, "bbox": [1, 2, 5, 5], "area": 25}],
    "categories": [{"id": 9, "name": "cat"}, {"id": 2, "name": "dog"}],
}


@pytest.fixture(params=[("annotations/{}.json", "{}"), ("annotations/instances_{}2017.json", "{}2017")])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    ann, folder = request.param
    for split in ("train", "val"):
        write(tmp_path / ann.format(split), GOOD)
        (tmp_path / folder.format(split)).mkdir()
        picture(tmp_path / folder.format(split) / "a.png")
    return tmp_path


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    write(tmp_path / "annotations/train.json", GOOD)
    (tmp_path / "train").mkdir()
    picture(tmp_path / "train/a.png")
    (tmp_path / "secret.png").write_bytes(b"png")
    return tmp_path


def picture(path: Path, size: tuple[int, int] = (20, 10), **save: Any) -> None:
    Image.new("RGB", size).save(path, **save)


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value))


def test_both_layouts(root: Path) -> None:
    splits = find_splits(root)
    assert sorted(splits) == ["train", "val"]
    assert splits["val"].classes == ("cat", "dog")
    assert (splits["val"].images, splits["val"].boxes) == (1, 1)
    assert (root / splits["train"].prefix / "a.png").is_file()


@pytest.mark.parametrize(
    "name", ["/etc/passwd.png", "../secret.png", "sub/../../secret.png", "..\\secret.png", "C:\\x.png", ""]
)
def test_a_file_name_that_leaves_the_data_root(plain: Path, name: str) -> None:
    assert leaves_folder(name)
    bad = copy.deepcopy(GOOD)
    bad["images"][0]["file_name"] = name
    write(plain / "annotations/train.json", bad)
    with pytest.raises(DemoError, match=r"images\[0\] has file_name .* which leaves the data folder"):
        find_split(plain, "train")


@pytest.mark.parametrize("name", ["a.png", "sub/a.png", "sub/../a.png", "..a.png", "a..png"])
def test_a_file_name_that_stays(name: str) -> None:
    assert not leaves_folder(name)


def change(table: str, key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda coco: coco[table][0].__setitem__(key, value)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c["categories"].clear(), 'no categories .*"categories" is an empty list'),
        (lambda c: c["images"].clear(), "no images"),
        (lambda c: c["annotations"].clear(), "no annotations"),
        (
            lambda c: c.pop("categories"),
            r"not COCO JSON: expected .*'categories'.*found keys \['annotations', 'images'\]",
        ),
        (change("images", "file_name", "b.png"), r"images\[0\]: image .*b.png is missing"),
        (change("images", "file_name", None), r'images\[0\] needs "file_name" of type str, found None'),
        (change("images", "width", 0), r'images\[0\] has "width" 0'),
        (change("annotations", "image_id", 5), r"annotations\[0\] has image_id 5, which no entry declares"),
        (change("annotations", "category_id", 1), r"annotations\[0\] has category_id 1"),
        (change("annotations", "bbox", [1, 2, -3, 4]), r"annotations\[0\] has bbox \[1, 2, -3, 4\]"),
        (
            change("annotations", "bbox", [1, 2, float("nan"), 4]),
            r"bbox \[1, 2, nan, 4\], expected .* finite",
        ),
        (change("annotations", "bbox", [1, 2, 3]), r"bbox \[1, 2, 3\], expected \[x, y, width, height\]"),
        (change("annotations", "area", None), r'annotations\[0\] needs "area"'),
        (lambda c: c["images"].append(c["images"][0]), "image ids must be unique"),
        (
            change("images", "width", 21),
            r"images\[0\] says width 21, height 10, but .*a.png is 20 wide, 10 high",
        ),
        (
            change("annotations", "bbox", [1, 2, 0, 0]),
            r"none of the 1 annotations .*1 thinner than 1 pixel or of area 0; .*annotations\[0\] with bbox \[1, 2, 0, 0\]",
        ),
        (change("annotations", "area", 0), "1 thinner than 1 pixel or of area 0"),
        (change("annotations", "iscrowd", 1), r"1 crowd regions \(iscrowd 1\)"),
        (change("annotations", "bbox", [20, 2, 5, 5]), "1 outside their image"),
        (change("categories", "name", "dog"), "names and ids must be unique"),
    ],
)
def test_what_is_wrong_is_named(plain: Path, edit: Callable[[dict[str, Any]], Any], message: str) -> None:
    bad = copy.deepcopy(GOOD)
    edit(bad)
    write(plain / "annotations/train.json", bad)
    with pytest.raises(DemoError, match=message) as caught:
        find_split(plain, "train")
    assert "train.json" in str(caught.value)
    assert not caught.value.usage


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "is empty"), ("  \n", "is empty"), ("{", "is not JSON"), ("[1]", "not COCO JSON: .* found a list")],
)
def test_not_even_an_object(plain: Path, text: str, message: str) -> None:
    (plain / "annotations/train.json").write_text(text)
    with pytest.raises(DemoError, match=message):
        find_split(plain, "train")


def test_a_missing_file_names_both_layouts(plain: Path) -> None:
    with pytest.raises(
        DemoError, match=r"annotation file missing: expected .*val\.json .* or .*instances_val2017\.json"
    ) as caught:
        find_splits(plain)
    assert caught.value.usage


def test_a_missing_folder_is_wrong_usage(tmp_path: Path) -> None:
    with pytest.raises(DemoError, match="no such folder") as caught:
        find_split(tmp_path / "no", "train")
    assert caught.value.usage


@pytest.mark.parametrize("content", [b"not an image", b"", b"\x89PNG\r\n\x1a\n"])
def test_a_file_that_is_no_image(plain: Path, content: bytes) -> None:
    (plain / "train/a.png").write_bytes(content)
    with pytest.raises(DemoError, match=r"train.json: images\[0\]: .*a.png is not an image that can be read"):
        find_split(plain, "train")


def test_sizes_are_those_the_loader_sees(plain: Path) -> None:
    """EXIF orientation 6 turns a file of 10 x 20 pixels by 90 degrees, as mmcv's loader does."""
    import mmcv

    exif = Image.Exif()
    exif[0x0112] = 6
    picture(plain / "train/a.jpg", (10, 20), exif=exif)
    turned = copy.deepcopy(GOOD)
    turned["images"][0]["file_name"] = "a.jpg"
    write(plain / "annotations/train.json", turned)
    assert mmcv.imread(plain / "train/a.jpg").shape == (10, 20, 3)
    assert find_split(plain, "train").opened == 1
    turned["images"][0].update(width=10, height=20)
    write(plain / "annotations/train.json", turned)
    with pytest.raises(DemoError, match="20 wide, 10 high by its EXIF orientation"):
        find_split(plain, "train")


def test_one_good_box_is_enough_and_only_the_first_files_are_opened(
    plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "OPENED", 1)
    more = copy.deepcopy(GOOD)
    more["annotations"].insert(0, {**more["annotations"][0], "id": 2, "iscrowd": 1})
    more["images"].append({**more["images"][0], "id": 5, "file_name": "b.png"})
    (plain / "train/b.png").write_bytes(b"not opened")
    write(plain / "annotations/train.json", more)
    split = find_split(plain, "train")
    assert (split.images, split.opened, split.boxes) == (2, 1, 2)


def test_splits_must_agree_on_the_classes(root: Path) -> None:
    path = next((root / "annotations").glob("*val*"))
    turned = copy.deepcopy(GOOD)
    turned["categories"].reverse()
    write(path, turned)
    with pytest.raises(DemoError, match=r"in their order, \['cat', 'dog'\], found \['dog', 'cat'\]"):
        find_splits(root)
