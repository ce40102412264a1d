"""Views of loaded images against their pixels: each pixel of a test image says where it is, and real transforms move it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ikd_fast.attack.memory import View
from ikd_fast.augment import AugPlan
from ikd_fast.mmdet.preprocessor import IKDDetDataPreprocessor
from ikd_fast.mmdet.views import loader_view
from tests.mmdet.conftest import sample_of

from mmdet.registry import TRANSFORMS

HEIGHT, WIDTH = 40, 60
KEYS = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor", "flip", "flip_direction")


def ramp() -> np.ndarray:
    """``[H, W, 3]`` uint8: a pixel's channels are its column, its row and 0."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    return np.stack([x, y, 0 * x], axis=-1).astype(np.uint8)


def loaded(transforms, seed=0, keys=KEYS, image=None):
    """The packed image and sample after mmdet's own transforms."""
    from mmcv.transforms import Compose

    np.random.seed(seed)  # noqa: NPY002  (mmdet's transforms draw from it)
    image = ramp() if image is None else image
    results = dict(
        img=image, img_shape=image.shape[:2], ori_shape=image.shape[:2], img_id=3, img_path="set/3.png",
        gt_bboxes=np.array([[2.0, 2.0, 50.0, 35.0]], np.float32), gt_bboxes_labels=np.zeros(1, np.int64),
        gt_ignore_flags=np.zeros(1, bool),
    )  # fmt: skip
    pack = dict(type="PackDetInputs", meta_keys=keys)
    out = Compose([TRANSFORMS.build(t) if isinstance(t, dict) else t for t in [*transforms, pack]])(results)
    return out["inputs"].numpy(), out["data_samples"]


def agree(pixels: np.ndarray, view: View, original: np.ndarray) -> None:
    """Every loaded pixel has the values of the canonical pixel that the view names."""
    table = view.cells(stride=1)
    y, x = table.y_cell.numpy(), table.x_cell.numpy()
    assert pixels.shape[1:] == (len(y), len(x)) == view.size
    assert min(y.min(), x.min()) >= 0
    assert np.array_equal(pixels, original[y][:, x].transpose(2, 0, 1))


NEAREST = dict(type="Resize", interpolation="nearest")
FLIP = dict(type="RandomFlip", prob=[0.3, 0.3, 0.3], direction=["horizontal", "vertical", "diagonal"])
CROP = dict(type="RandomCrop", crop_size=(47, 31), allow_negative_crop=True)
SIMPLE = [
    [],
    [FLIP],
    [NEAREST | dict(scale=(120, 80))],
    [NEAREST | dict(scale=(120, 80)), FLIP],
    [FLIP, NEAREST | dict(scale=(180, 80))],
]
MORE = [
    [CROP],
    [FLIP, CROP, FLIP],
    [NEAREST | dict(scale=(180, 160)), CROP, FLIP],
    [CROP, NEAREST | dict(scale=(94, 62)), FLIP, dict(type="RandomCrop", crop_size=(33, 20))],
]


@pytest.mark.parametrize("transforms", SIMPLE)
@pytest.mark.parametrize("with_matrix", [False, True])
def test_resize_and_flip_by_meta_keys_and_by_matrix(transforms, with_matrix):
    """Whole factors: there mmdet's nearest resize repeats pixels, which is what the view reads."""
    for seed in range(6):
        pixels, sample = loaded(transforms, seed, (*KEYS, "homography_matrix") if with_matrix else KEYS)
        agree(pixels, loader_view(sample.metainfo), ramp())


@pytest.mark.parametrize("transforms", MORE)
def test_crops_by_matrix(transforms):
    for seed in range(6):
        pixels, sample = loaded(transforms, seed, (*KEYS, "homography_matrix"))
        agree(pixels, loader_view(sample.metainfo), ramp())


def test_a_crop_that_is_not_packed_is_noticed():
    _, sample = loaded([CROP])
    with pytest.raises(ValueError, match=r"img_shape is 31 x 47.*homography_matrix"):
        loader_view(sample.metainfo)


@pytest.mark.parametrize("seed", range(4))
def test_keyed_random_crop_by_matrix(seed):
    """Bilinear at any scale: on a ramp the loaded value is the column that the pixel's centre lies in, give or take rounding."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    image = np.stack([4 * x, 6 * y, 0 * x], axis=-1).astype(np.uint8)
    crop = TRANSFORMS.build(
        dict(type="KeyedRandomCrop", size=32, scale=(0.8, 2.5), brightness=0.0, min_kept=0.0, seed=seed)
    )
    crop.set_epoch(0)
    pixels, sample = loaded([crop], keys=(*KEYS, "homography_matrix"), image=image)
    view = loader_view(sample.metainfo)
    table = view.cells(stride=1)
    inner = (slice(2, -2), slice(2, -2))  # the resize repeats the window's border pixels
    columns, rows = pixels[0] / 4, pixels[1] / 6
    assert (
        np.abs(columns - table.x_cell.numpy()[None, :])[inner].max() <= 0.5 + 0.2
    )  # half a pixel, and uint8
    assert np.abs(rows - table.y_cell.numpy()[:, None])[inner].max() <= 0.5 + 0.2


def test_the_adaptive_crop_in_the_pipeline_records_itself():
    augment = dict(
        type="AdaptiveFreqAug",
        area_threshold=1,
        crop_ratio=0.3,
        crop_prob=1.0,
        hflip_prob=0.5,
        noise_prob=0.0,
    )
    seen = set()
    for seed in range(6):
        module = TRANSFORMS.build(augment | dict(seed=seed))
        module.set_epoch(0)
        pixels, sample = loaded([*SIMPLE[3], module], seed, (*KEYS, "homography_matrix"))
        view = loader_view(sample.metainfo)
        agree(pixels, view, ramp())
        seen.add((view.size != (80, 120), view.scale[1] < 0))
    assert {cropped for cropped, _ in seen} == {True}
    assert {mirrored for _, mirrored in seen} == {True, False}


@pytest.mark.parametrize("transforms", [SIMPLE[3], MORE[2]])
def test_network_resolution_is_the_image_after_its_resize(transforms):
    """Then flips and crops are all that is left: one canonical pixel for one network pixel."""
    resized, _ = loaded(transforms[:1])
    for seed in range(4):
        pixels, sample = loaded(transforms, seed, (*KEYS, "homography_matrix"))
        view = loader_view(sample.metainfo, "network")
        assert view.canonical == resized.shape[1:]
        assert [abs(s) for s in view.scale] == pytest.approx([1, 1], abs=1e-6)
        agree(pixels, view, resized.transpose(1, 2, 0))


@pytest.mark.parametrize(("kind", "entry"), [("Rotate", r"\[0\]\[1\]"), ("ShearY", r"\[1\]\[0\]")])
def test_rotations_and_shears_are_refused_by_name(kind, entry):
    transform = dict(type=kind, prob=1.0, level=5)
    _, sample = loaded([transform], keys=(*KEYS, "homography_matrix"))
    with pytest.raises(ValueError, match=rf"set/3.png.*rotates or shears.*{entry}"):
        loader_view(sample.metainfo)


def test_a_translation_leaves_pixels_without_a_cell():
    transform = dict(type="TranslateX", prob=1.0, level=5)
    pixels, sample = loaded([transform], keys=(*KEYS, "homography_matrix"))
    view = loader_view(sample.metainfo)
    table = view.cells(stride=1)
    x, y = table.x_cell.numpy(), table.y_cell.numpy()
    assert 0 < (x < 0).sum() < WIDTH
    # warpPerspective shifts by whole pixels and fractions alike; a whole part is at most half a pixel off.
    good = np.flatnonzero(x >= 0)[2:-2]
    assert np.abs(pixels[0][:, good].astype(int) - x[good][None, :]).max() <= 1
    assert np.array_equal(y, np.arange(HEIGHT))


class FixedPlan:
    """An augmentation whose plan is given."""

    def __init__(self, windows, flips, sizes):
        self.windows, self.flips, self.sizes = windows, flips, sizes

    def plan(self, boxes, sizes, ids, epoch, scale=None):
        n = len(self.windows)
        return AugPlan(
            ids=torch.arange(n), branch=torch.ones(n, dtype=torch.int64), window=torch.tensor(self.windows),
            flip=torch.tensor(self.flips), sigma=torch.zeros(n), sizes=torch.tensor(self.sizes), epoch=epoch, seed=0,
        )  # fmt: skip


def preprocess(windows, flips, transforms, prepare=None):
    """What IKDDetDataPreprocessor returns for as many loaded images, cropped and mirrored by a plan."""
    packed = [loaded(transforms, seed, (*KEYS, "homography_matrix")) for seed in range(len(windows))]
    module = IKDDetDataPreprocessor(pad_size_divisor=32, return_geo=True)
    module.augment = FixedPlan(windows, flips, [pixels.shape[1:] for pixels, _ in packed])
    module.needs_views = True
    module.set_progress(0, 0)
    if prepare is not None:
        prepare(module)
    data = dict(
        inputs=[torch.from_numpy(pixels) for pixels, _ in packed], data_samples=[s for _, s in packed]
    )
    return module(data, training=True)


def test_the_preprocessor_composes_the_plan_with_the_loader():
    windows, flips = [(0, 0, 120, 80), (7, 3, 100, 61), (20, 10, 119, 78)], [False, True, False]
    out = preprocess(windows, flips, SIMPLE[3])
    frame = tuple(out["geo"].shape[-2:])
    assert frame[0] % 32 == 0
    original = torch.from_numpy(ramp()).permute(2, 0, 1).float()
    for image, view in zip(out["geo"], out["views"], strict=True):
        table = view.cells(stride=1, frame=frame)
        y, x = table.y_cell.long(), table.x_cell.long()
        h, w = view.size
        assert set(x[w:].tolist()) | set(y[h:].tolist()) <= {-1}
        assert min(x[:w].min(), y[:h].min()) >= 0
        assert torch.equal(image[:, :h, :w], original[:, y[:h]][:, :, x[:w]])


def test_no_views_unless_they_are_asked_for_and_the_branch_is_on():
    whole = ([(0, 0, 60, 40)], [False], [])
    assert len(preprocess(*whole)["views"]) == 1
    assert "views" not in preprocess(*whole, prepare=lambda m: setattr(m, "needs_views", False))
    assert "views" not in preprocess(*whole, prepare=lambda m: setattr(m, "is_active", lambda: False))


class Halves(torch.nn.Module):
    """A batch augment that resizes, as BatchSyncRandomResize does."""

    def forward(self, inputs, data_samples):
        for sample in data_samples:
            h, w = sample.img_shape
            sample.set_metainfo({"img_shape": (h // 2, w // 2)})
        return inputs[..., ::2, ::2], data_samples


def test_a_batch_augment_that_resizes_is_refused():
    with pytest.raises(
        ValueError, match=r"set/3.png is 20 x 30 after the data preprocessor, 40 x 60 before.*batch_augments"
    ):
        preprocess([(0, 0, 60, 40)], [False], [], prepare=lambda m: setattr(m, "batch_augments", [Halves()]))


def test_missing_shapes_are_named():
    sample = sample_of(0, [[0.0, 0.0, 5.0, 5.0]], (40, 60))
    with pytest.raises(ValueError, match=r"set/0.png.*no \['ori_shape'\].*PackDetInputs"):
        loader_view({k: v for k, v in sample.metainfo.items() if k != "ori_shape"})
