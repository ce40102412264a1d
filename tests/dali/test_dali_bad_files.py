"""Files that cannot be used: one line that names the file, the rest of the batch kept, no hang."""

from __future__ import annotations

import json
import logging
import math

import pytest

pytest.importorskip("nvidia.dali", reason="needs NVIDIA DALI: pip install 'ikd_fast[dali]'")
pytest.importorskip("mmengine", reason="needs the mmdet extra: pip install 'ikd_fast[mmdet]'")

import ikd_fast.mmdet  # noqa: F401  (before anything imports mmdet)
from ikd_fast.dali import BadImage, CocoImages, DALIDetLoader, KeyedShardSampler
from tests.dali.files import bad_check_sum, bad_tables, exif, picture, save, with_blocks
from tests.dali.made import IMAGES, dataset, write_set

from mmdet.registry import DATASETS
from mmengine.config import Config
from mmengine.runner import Runner

JPEG = save(picture(33, 61))
BAD = {
    1: (None, "No such file or directory"),
    2: (JPEG[: len(JPEG) // 2], "truncated: the file ends inside its head"),
    4: (bad_tables(JPEG), r"DALI cannot decode it \(Failed to decode sample #0\)"),
    6: (JPEG[:-40], "truncated: no end-of-image marker"),
    7: (b"GIF89a" + bytes(9), "expected JPEG or PNG, got GIF"),
    8: (bad_check_sum(save(picture(33, 61), "PNG")), "DALI cannot decode it"),
    9: (with_blocks(JPEG, exif(6), exif(3)), "Exif blocks with orientations"),
}
GOOD = [i for i in range(IMAGES) if i not in BAD]


def made(tmp_path, bad):
    return write_set(tmp_path, replace={i: BAD[i][0] for i in bad})


def torch_loader(root, workers=0, batch_size=4, shuffle=False, **options):
    images = CocoImages(root / "ann.json", root / "images", resize=(70, 50), min_size=1)
    sampler = KeyedShardSampler(images, batch_size, shuffle=shuffle, seed=1)
    settings = dict(device="cpu", threads=1) | options
    return DALIDetLoader(images, output="torch", batch_sampler=sampler, num_workers=workers, **settings)


def mmdet_loader(root, workers=0, batch_size=4, shuffle=False, **options):
    config = dict(
        type="DALIDetLoader", batch_size=batch_size, num_workers=workers, device="cpu", threads=1,
        sampler=dict(type="KeyedSampler", seed=1, shuffle=shuffle),
        dataset=dataset(root, [dict(type="Resize", scale=(70, 50), keep_ratio=True)]),
    ) | options  # fmt: skip
    return Runner.build_dataloader(Config(config), seed=0)


def rows(loader) -> list[list[int]]:
    if isinstance(loader.dataset, CocoImages):
        return [[t["image_id"] for t in targets] for _, targets, _ in loader]
    return [[s.img_id for s in batch["data_samples"]] for batch in loader]


LOADERS = pytest.mark.parametrize("build", [torch_loader, mmdet_loader])


@LOADERS
@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_files_are_counted_named_and_cost_their_place_only(tmp_path, caplog, build, workers) -> None:
    loader = build(made(tmp_path, BAD), workers, on_error="skip")
    expected = [[i for i in range(k, min(k + 4, IMAGES)) if i in GOOD] for k in (0, 4, 8)]
    caplog.set_level(logging.WARNING, logger="ikd_fast")
    # A second epoch after failures of DALI is as good as the first.
    assert rows(loader) == rows(loader) == expected
    assert loader.skips.count == 2 * len(BAD)
    assert loader.skips.stand_ins == 0
    named = {int(path.rpartition("/")[2].split(".")[0]): why for path, why in loader.skips.reasons.items()}
    assert named.keys() == BAD.keys()
    lines = [r.getMessage() for r in caplog.records if r.name == "ikd_fast"]
    for i, (_, message) in BAD.items():
        with pytest.raises(AssertionError, match=message):
            raise AssertionError(named[i])
        (line,) = [x for x in lines if f"images/{i}.jpg" in x]
        assert line.startswith("ikd_fast DALIDetLoader leaves out ")
        assert "\n" not in line
    assert (
        lines[-1]
        == f"ikd_fast DALIDetLoader: {2 * len(BAD)} times one of {len(BAD)} files that cannot be used was left out"
    )


@LOADERS
@pytest.mark.parametrize("i", BAD)
def test_raising_names_the_file_and_comes_in_its_turn(tmp_path, build, i: int) -> None:
    loader = build(made(tmp_path, [i]), batch_size=2)
    given = []
    with pytest.raises(
        BadImage, match=rf"images/{i}\.jpg: .*{BAD[i][1]}.*on_error='skip' leaves such files out"
    ) as caught:
        given.extend(loader)
    assert len(given) == i // 2
    assert "\n" not in str(caught.value)


@LOADERS
def test_a_batch_with_nothing_usable_gets_a_stand_in(tmp_path, build) -> None:
    """Batches of two: (0, 1), (2, 3), (4, 5), (6, 7), (8, 9), (10): of the fourth and fifth none can be used, and half of the others."""
    loader = build(made(tmp_path, BAD), batch_size=2, on_error="skip")
    assert rows(loader) == [[0], [3], [5], [0], [0], [10]]
    assert (loader.skips.count, loader.skips.stand_ins) == (7, 2)
    assert "2 batches had nothing else and got another image" in str(loader.skips)


@LOADERS
def test_nothing_usable_at_the_beginning(tmp_path, build) -> None:
    """Files that only DALI finds out about, so that a stand-in has to be tried first."""
    root = write_set(tmp_path, replace={0: BAD[4][0], 1: BAD[4][0], 2: BAD[8][0], 3: None})
    loader = build(root, batch_size=1, on_error="skip")
    assert rows(loader) == [[4]] * 5 + [[i] for i in range(5, IMAGES)]
    assert (loader.skips.count, loader.skips.stand_ins) == (4, 4)


@LOADERS
@pytest.mark.parametrize("data", [None, BAD[4][0]])
@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_nothing_usable_at_all(tmp_path, build, data, on_error: str) -> None:
    root = write_set(tmp_path, 3, replace=dict.fromkeys(range(3), data))
    error, message = {
        "raise": (BadImage, r"images/0\.jpg: .*on_error='skip'"),
        "skip": (
            RuntimeError,
            r"none of the images that were asked for could be used; the first is .*images/0\.jpg: ",
        ),
    }[on_error]
    with pytest.raises(error, match=message):
        list(build(root, batch_size=2, on_error=on_error))


def changed(root, **change):
    """The first annotation of image 0, as the file has it."""
    content = json.loads((root / "ann.json").read_text())
    content["annotations"][0] |= change
    (root / "ann.json").write_text(json.dumps(content))
    return root


@LOADERS
@pytest.mark.parametrize("at", range(4))
def test_a_number_that_is_none_in_the_file_is_named(tmp_path, build, at: int) -> None:
    """mmdet's CocoDataset leaves such boxes out without a word, and would train on the image as one without objects."""
    box = [10.0, 8.0, 9.5, 7.0]
    box[at] = math.nan
    root = changed(write_set(tmp_path), bbox=box)
    loader = build(root, on_error="skip")
    assert rows(loader) == [[1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    ((path, reason),) = loader.skips.reasons.items()
    assert path.endswith("images/0.jpg")
    assert f"bbox {'as four finite numbers, got' if build is torch_loader else 'is'} {box}" in reason
    with pytest.raises(
        BadImage, match=r"images/0\.jpg: .*nan.*four finite|images/0\.jpg: .*four finite.*nan"
    ):
        list(build(root))


@LOADERS
@pytest.mark.parametrize("resizer", ["cv2", "dali"])
@pytest.mark.parametrize("size", [(1, 5000), (5000, 1)])
def test_an_image_too_thin_to_be_resized(tmp_path, build, resizer: str, size: tuple[int, int]) -> None:
    """To (70, 50) its short side would be no pixel."""
    root = write_set(tmp_path, replace={2: save(picture(*size))})
    loader = build(root, on_error="skip", resizer=resizer)
    assert rows(loader) == [[0, 1, 3], [4, 5, 6, 7], [8, 9, 10]]
    ((path, reason),) = loader.skips.reasons.items()
    assert path.endswith("images/2.jpg")
    assert "0" in reason


def test_masks_of_another_size_are_named(tmp_path) -> None:
    root = changed(write_set(tmp_path), segmentation=dict(size=[10, 10], counts=[0, 100]))
    data = dataset(root, [dict(type="Resize", scale=(70, 50), keep_ratio=True)], masks=True)
    loader = mmdet_loader(root, on_error="skip", dataset=data)
    assert rows(loader) == [[1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    ((path, reason),) = loader.skips.reasons.items()
    assert path.endswith("images/0.jpg")
    assert "its annotations cannot be used (ValueError: " in reason


def test_a_name_with_a_line_break_is_one_line() -> None:
    assert str(BadImage("a\nb.jpg", "gone\n  away")) == "'a\\nb.jpg': gone away"


def test_boxes_that_cannot_be(tmp_path) -> None:
    root = write_set(tmp_path)
    config = dataset(root, [dict(type="AdaptiveFreqAug", seed=0)])
    data = DATASETS.build(config)
    data.data_list[0]["instances"][0]["bbox"] = [1, 2, float("nan"), 9]
    data.data_list[3]["instances"][0]["bbox"] = [-50, -50, -40, -40]
    data.data_list[5]["instances"] = []
    next(t for t in data.pipeline.transforms if hasattr(t, "set_epoch")).set_epoch(0)
    loader = DALIDetLoader(data, batch_size=4, device="cpu", threads=1, on_error="skip")
    assert rows(loader) == [[1, 2], [4, 5, 6, 7], [8, 9, 10]]
    assert {p.rpartition("/")[2]: r for p, r in loader.skips.reasons.items()}.keys() == {"0.jpg", "3.jpg"}
    strict = DALIDetLoader(DATASETS.build(dataset(root, [])), batch_size=4, device="cpu", threads=1)
    strict.dataset.data_list[0]["instances"][0]["bbox"] = [1, 2, float("nan"), 9]
    with pytest.raises(BadImage, match=r"images/0\.jpg: box 0 is \[1, 2, nan, 9\]; expected finite numbers"):
        next(iter(strict))
