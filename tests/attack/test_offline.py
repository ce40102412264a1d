"""Adversarial images made before training: formats, folders, the branch that takes them, and memories seeded from them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ikd_fast import IKD, AdaptiveFreqAug, AdvFeatureLoss, FGDLoss, OnlineDIFGSM
from ikd_fast.analysis.strength.round_trip import published_round_trip
from ikd_fast.attack import AdversarialSet, OfflineImages, PerturbationMemory, View
from ikd_fast.attack.memory import MemorySettings
from ikd_fast.attack.offline import Format, SetManifest
from ikd_fast.attack.offline.adversarial_set import IMAGES, file_name, listed
from ikd_fast.pixels import PixelUnits
from tests.distill.nets import Net, batch, class_loss

KEY, EPS = 0xF00D_0000_0000_0001, 8.0
H, W = 33, 46
ATTACK = {"mode": "iterative", "eps": EPS, "steps": 5, "objective": "cls"}


def picture(seed: int = 0) -> np.ndarray:
    """Smooth, so that JPEG has something to keep."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:H, :W]
    waves = [120 + 80 * np.sin(x / (5 + i) + y / 7 + rng.uniform(0, 6)) for i in range(3)]
    return np.stack(waves, -1).clip(0, 255).astype(np.uint8)


def perturbed(clean: np.ndarray, step: float = 2.0) -> torch.Tensor:
    """float [3, H, W]: moved by multiples of ``step`` up to EPS."""
    levels = int(EPS / step)
    rng = np.random.default_rng(1)
    delta = rng.integers(-levels, levels + 1, clean.shape) * step
    return torch.from_numpy((clean + delta).clip(0, 255).transpose(2, 0, 1).copy()).float()


def hwc(x: torch.Tensor) -> np.ndarray:
    return x.permute(1, 2, 0).numpy()


def test_a_png_holds_every_grey_level() -> None:
    clean, fmt = picture(), Format("png")
    moved = perturbed(clean)
    data = fmt.encode(KEY, clean, moved + 0.3, (H, W), EPS)  # rounded, not truncated
    assert np.array_equal(fmt.decode(KEY, data, clean, EPS), hwc(moved))


@pytest.mark.parametrize("scale", ["original", 0.5])
def test_a_jpeg_is_what_the_published_code_trains_on(scale) -> None:
    clean, fmt, original = picture(), Format("jpeg", quality=95, scale=scale), (20, 28)
    moved = perturbed(clean) + 0.7  # truncated
    saved = original if scale == "original" else (16, 23)  # 16.5 to the even side
    assert fmt.saved_size((H, W), original) == saved
    data = fmt.encode(KEY, clean, moved, original, EPS)
    units = PixelUnits(value_range=(0, 255))
    truth = published_round_trip(moved[None], [(H, W)], [saved], units, rgb=False, quality=95)
    found = fmt.decode(KEY, data, clean, EPS)
    assert np.array_equal(found, hwc(truth[0]))
    assert np.abs(found - hwc(moved)).max() > EPS  # the bound does not survive


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_perturbations_are_exact_where_their_levels_are(bits: int) -> None:
    clean, fmt = picture(), Format("packed", bits=bits, step=2)
    # Away from the ends, where clipping leaves other differences.
    clean = clean.clip(8, 247)
    moved = perturbed(clean)
    data = fmt.encode(KEY, clean, moved, (H, W), EPS)
    assert np.array_equal(fmt.decode(KEY, data, clean, EPS), hwc(moved))
    assert len(data) == 64 + 3 * H * (W if bits == 8 else W // 2)


def test_packed_with_stride_holds_the_mean_of_each_cell() -> None:
    clean = np.full((3, 5, 3), 100, np.uint8)
    moved = torch.full((3, 3, 5), 100.0)
    moved[0, :2, :2] = torch.tensor([[108.0, 108.0], [100.0, 100.0]])  # mean 4
    moved[2, 2, 4] = 94.0  # a cell of one pixel
    fmt = Format("packed", stride=2, step=2)
    found = fmt.decode(KEY, fmt.encode(KEY, clean, moved, (3, 5), EPS), clean, EPS).astype(int) - 100
    expected = np.zeros((3, 5, 3), int)
    expected[:2, :2, 0] = 4
    expected[2, 4, 2] = -6
    assert np.array_equal(found, expected)


def test_a_packed_perturbation_stays_in_range() -> None:
    clean = np.full((4, 4, 3), 251, np.uint8)
    moved = torch.full((3, 4, 4), 255.0)
    fmt = Format("packed", step=2)
    found = fmt.decode(KEY, fmt.encode(KEY, clean, moved, (4, 4), EPS), clean, EPS)
    assert (found == 255).all()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (dict(kind="webp"), r"kind must be one of \['png', 'jpeg', 'packed'\], got 'webp'"),
        (dict(kind="jpeg", quality=0), "in 1..100, got 0"),
        (dict(scale=1.5), "'original' or a number in 0..1 above 0, got 1.5"),
        (dict(scale="half"), "got 'half'"),
        (dict(kind="packed", scale="original"), "expected scale=1, got 'original'"),
        (dict(kind="packed", stride=3), "stride must be 1 or 2, got 3"),
    ],
)
def test_wrong_formats(settings: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Format(**settings)


def make_set(directory: Path, fmt: Format, images: dict[int, np.ndarray], **manifest) -> AdversarialSet:
    settings = dict(attack=ATTACK, teacher="abc", data="2 images x", size="original", channels="bgr")
    SetManifest(format=fmt, images=len(images), **{**settings, **manifest}).write(directory)
    (directory / IMAGES).mkdir(parents=True)
    for key, clean in images.items():
        content = fmt.encode(key, clean, perturbed(clean), clean.shape[:2], EPS)
        (directory / IMAGES / file_name(key, f"{key & 15}.jpg", fmt.suffix)).write_bytes(content)
    return AdversarialSet(directory)


def test_a_set_finds_its_files_and_names_them_in_errors(tmp_path) -> None:
    clean = picture()
    made = make_set(tmp_path / "set", Format(), {KEY: clean, 2: picture(2)})
    assert np.array_equal(made.load(KEY, "/elsewhere/1.jpg", clean), hwc(perturbed(clean)))
    assert made.files.keys() == {KEY, 2}
    with pytest.raises(
        FileNotFoundError,
        match=r"7\.0000000000000007\.png: 7\.jpg has no adversarial image in this set, which is of 2",
    ):
        made.load(7, "7.jpg", clean)
    with pytest.raises(
        ValueError,
        match=r"1\.f00d0000.*grey levels away from the image that was loaded, and the attack went 8",
    ):
        made.load(KEY, "1.jpg", np.ascontiguousarray(clean[:, ::-1]))
    with pytest.raises(
        ValueError,
        match=r"made for an image of 33x46, the one that was loaded has 33x40: .* behind the same Resize",
    ):
        made.load(KEY, "1.jpg", clean[:, :40])
    path = made.path(KEY, "1.jpg")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="the file is damaged"):
        made.load(KEY, "1.jpg", clean)


def test_damaged_perturbations_are_noticed(tmp_path) -> None:
    clean = picture()
    made = make_set(tmp_path / "set", Format("packed"), {KEY: clean})
    path = made.path(KEY, "1.jpg")
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)
    with pytest.raises(ValueError, match="its checksum differs"):
        made.load(KEY, "1.jpg", clean)
    with pytest.raises(ValueError, match="its checksum differs"):
        made.record(KEY)
    memory = PerturbationMemory(seed_from=tmp_path / "set")
    memory.bind(SETTINGS)
    with pytest.warns(UserWarning, match="its checksum differs; that image starts at random"):
        assert memory.fetch([KEY], [View.identity((H, W))], "cpu") == [None]
    assert "1 damaged seeds" in memory.report()


def test_a_perturbation_is_of_one_image(tmp_path) -> None:
    """Nothing in a packed file looks like the image; a checksum knows it."""
    clean = picture()
    made = make_set(tmp_path / "set", Format("packed"), {KEY: clean})
    with pytest.raises(
        ValueError, match="made from another image, or something before it has changed the image"
    ):
        made.load(KEY, "1.jpg", np.ascontiguousarray(clean[:, ::-1]))


def test_names_of_any_length_are_names_of_files(tmp_path) -> None:
    name = file_name(1, "/a/" + "\u56fe" * 120 + ".jpg", ".delta")
    assert name == "\u56fe" * 50 + ".0000000000000001.delta"
    (tmp_path / f".{name}.12345678").touch()  # as it is called while it is written


def test_an_empty_file_is_none(tmp_path) -> None:
    made = make_set(tmp_path / "set", Format(), {KEY: picture(), 2: picture(2)})
    made.path(KEY, "1.jpg").write_bytes(b"")
    assert made.files.keys() == {2}
    with pytest.raises(ValueError, match="the file is empty; delete it"):
        made.load(KEY, "1.jpg", picture())


def test_channels_of_a_packed_set_are_the_teachers(tmp_path) -> None:
    clean = picture().clip(8, 247)
    made = make_set(tmp_path / "set", Format("packed"), {KEY: clean[..., ::-1].copy()}, channels="rgb")
    moved = hwc(perturbed(clean[..., ::-1]))[..., ::-1]
    assert np.array_equal(made.load(KEY, "1.jpg", clean), moved)


def test_manifests_that_are_none(tmp_path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"adversarial\.json is not there; `ikd-fast attack CONFIG CKPT --out"
    ):
        AdversarialSet(tmp_path)
    (tmp_path / "adversarial.json").write_text("{")
    with pytest.raises(ValueError, match="expected what `ikd-fast attack` writes"):
        AdversarialSet(tmp_path)
    (tmp_path / "adversarial.json").write_text(json.dumps(dict(version=9)))
    with pytest.raises(ValueError, match="version 9, expected 1"):
        AdversarialSet(tmp_path)


def test_a_manifest_names_what_differs(tmp_path) -> None:
    manifest = make_set(tmp_path / "set", Format(), {1: picture()}).manifest
    assert manifest.differences(manifest) == []
    other = replace(manifest, attack={**ATTACK, "eps": 4.0}, format=Format("jpeg"), summary={"linf": 8})
    assert manifest.differences(other) == ["kind: png there, jpeg now", "eps: 8.0 there, 4.0 now"]


# ---- the branch ----


def build(**kwargs) -> IKD:
    torch.manual_seed(0)
    student, teacher = Net(), Net(10)
    settings = dict(
        features="neck", losses=[FGDLoss(levels=[0])], adv_loss=AdvFeatureLoss(), units=PixelUnits(value_range=(0, 1)),
        task_loss=class_loss, beta=1.0, victim=lambda x, y: class_loss(teacher, x, y), calibrate=0,
    )  # fmt: skip
    return IKD(student, teacher, **{**settings, **kwargs})


def test_images_made_before_are_worth_what_they_are_worth_in_the_step() -> None:
    images, targets = batch()
    online = build(attack=OnlineDIFGSM("single"))
    crafted = {}
    craft = online.attack.__call__

    class Watched(OnlineDIFGSM):
        def __call__(self, *args, **kwargs):
            crafted["out"] = craft(*args, **kwargs)
            return crafted["out"]

    online.attack = Watched("single")
    truth = online.step(images, targets, image_ids=[5, 6, 7], epoch=0)
    offline = build(attack=OfflineImages())
    found = offline.step(images, targets, image_ids=[5, 6, 7], epoch=0, adversarial=crafted["out"].images)
    assert found.terms.keys() == truth.terms.keys()
    for name, term in truth.terms.items():
        assert torch.equal(found.terms[name], term), name
    assert found.logs["attack/gradients"] == 0
    assert torch.equal(found.logs["attack/linf"], truth.logs["attack/linf"])


@pytest.mark.parametrize("kind", ["uint8", "float"])
def test_both_images_get_one_crop_and_flip_and_only_the_clean_one_noise(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randint(0, 256, (3, 64, 96), generator=generator, dtype=torch.uint8) for _ in range(6)]
    images = whole if kind == "uint8" else [x.float() / 255 for x in whole]
    big = dict(boxes=torch.tensor([[4.0, 4.0, 60.0, 60.0]]), labels=torch.tensor([0]))
    small = dict(boxes=torch.tensor([[4.0, 4.0, 14.0, 14.0]]), labels=torch.tensor([0]))
    targets = [big, small] * 3
    aug = AdaptiveFreqAug(hflip_prob=0.5, noise_prob=1.0, value_range=(0, 1))
    ikd = build(attack=OfflineImages(), augment=aug)
    seen = {}
    ikd.run = lambda batch: seen.setdefault("batch", batch)  # type: ignore[method-assign]
    ikd(images, targets, image_ids=list(range(6)), epoch=0, adversarial=images)
    got = seen["batch"]
    assert got.plan.crop_frac > 0
    assert got.plan.noise_frac > 0
    assert bool(got.plan.flip.any())
    # The adversarial images are the clean ones here: what differs is the noise alone.
    assert torch.equal(got.adversarial, got.geo)
    noisy = (got.clean != got.geo).flatten(1).any(1)
    assert noisy.tolist() == (got.plan.sigma > 0).tolist()


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        (None, ValueError, "adversarial images that come with the batch, and none came"),
        (lambda x: x[:2], ValueError, "one image of the same shape for each image"),
        (lambda x: x[..., :-1], ValueError, "one image of the same shape for each image"),
        (
            lambda x: (x * 255).to(torch.uint8),
            TypeError,
            r"of the dtype of the images, torch\.float32, got torch\.uint8",
        ),
    ],
)
def test_wrong_adversarial_images(given, error, said: str) -> None:
    images, targets = batch()
    ikd = build(attack=OfflineImages())
    adversarial = None if given is None else given(images)
    with pytest.raises(error, match=said):
        ikd.step(images, targets, image_ids=[5, 6, 7], epoch=0, adversarial=adversarial)


def test_an_attack_in_the_step_takes_no_images() -> None:
    images, targets = batch()
    for attack in (OnlineDIFGSM("single"), None):
        with pytest.raises(ValueError, match=r"which takes none; write attack=OfflineImages\(\)"):
            build(attack=attack).step(images, targets, image_ids=[5, 6, 7], epoch=0, adversarial=images)


def test_a_wrong_range_names_the_argument() -> None:
    images, targets = batch()
    with pytest.raises(ValueError, match="^adversarial "):
        build(attack=OfflineImages()).step(
            images, targets, image_ids=[5, 6, 7], epoch=0, adversarial=images * 255
        )


def test_a_branch_that_is_over_reads_nothing() -> None:
    images, targets = batch()
    ikd = build(attack=OfflineImages(), stop_at=dict(epoch=1))
    out = ikd.step(images, targets, image_ids=[5, 6, 7], epoch=1)
    assert "kd/adv" not in out.terms


# ---- seeds ----

SETTINGS = MemorySettings(
    eps=EPS, step=4, data="2 images x", size="original", teacher="abc", order="bgr", objective="cls"
)


@pytest.mark.parametrize(("step", "off"), [(2, 0), (4, 2)])
def test_a_memory_starts_from_a_packed_set(tmp_path, step: int, off: float) -> None:
    """In levels of the memory's own step: those of the set, or the nearest."""
    clean = picture().clip(8, 247)
    make_set(tmp_path / "set", Format("packed", step=2), {KEY: clean, 2: clean})
    memory = PerturbationMemory(bits=8, seed_from=tmp_path / "set")
    codes = memory.bind(replace(SETTINGS, step=step))
    view = View.identity((H, W))
    record, unknown = memory.fetch([KEY, 99], [view, view], "cpu")
    assert unknown is None
    grey = codes.decode(codes.unpack(record.delta, (3, H, W)))
    truth = perturbed(clean) - torch.from_numpy(clean.transpose(2, 0, 1).copy())
    assert (grey - truth).abs().max() == off
    assert record.visits == ATTACK["steps"]
    assert memory.counters["seeded"] == 1
    assert memory.counters["images"] == 1
    memory.fetch([KEY], [view], "cpu")
    assert memory.counters["hits"] == 1
    assert "1 seeded" in memory.report()


def test_a_seed_of_other_channels_is_turned_round(tmp_path) -> None:
    clean = picture().clip(8, 247)
    make_set(tmp_path / "set", Format("packed", step=2), {KEY: clean}, channels="rgb")
    rows = []
    for order in ("rgb", "bgr"):
        memory = PerturbationMemory(seed_from=tmp_path / "set")
        codes = memory.bind(replace(SETTINGS, order=order))
        (record,) = memory.fetch([KEY], [View.identity((H, W))], "cpu")
        rows.append(codes.unpack(record.delta, (3, H, W)))
    assert torch.equal(rows[0], rows[1].flip(0))
    assert not torch.equal(rows[0], rows[1])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(eps=4.0, step=2), r"eps: 8.0 there, 4.0 now"),
        (dict(objective="feature"), "objective: cls there, feature now"),
        (dict(teacher="xyz"), "teacher: abc there, xyz now"),
        (dict(data="3 images y"), "data: 2 images x there, 3 images y now"),
        (dict(size="network (80, 80)"), r"size: original there, network \(80, 80\) now"),
    ],
)
def test_a_foreign_seed_is_refused(tmp_path, change: dict, said: str) -> None:
    make_set(tmp_path / "set", Format("packed"), {KEY: picture()})
    memory = PerturbationMemory(seed_from=tmp_path / "set")
    with pytest.raises(ValueError, match=said):
        memory.bind(replace(SETTINGS, **change))


def test_an_image_that_cannot_be_kept_is_seeded_all_the_same(tmp_path) -> None:
    class Full:
        settings = None
        nbytes = 0

        def get(self, id, device):
            return None

        def put(self, id, record):
            pass

        def close(self):
            pass

        def __len__(self):
            return 0

        def __contains__(self, id):
            return False

    make_set(tmp_path / "set", Format("packed"), {KEY: picture()})
    memory = PerturbationMemory(store=Full(), seed_from=tmp_path / "set")
    memory.bind(SETTINGS)
    (record,) = memory.fetch([KEY], [View.identity((H, W))], "cpu")
    assert record is not None
    assert memory.counters["seeded"] == 1


def test_random_signs_are_no_seed_and_a_part_of_a_set_is_said(tmp_path) -> None:
    make_set(tmp_path / "signs", Format("packed"), {KEY: picture()}, attack={**ATTACK, "steps": 0})
    with pytest.raises(ValueError, match="random signs and no gradient in them"):
        PerturbationMemory(seed_from=tmp_path / "signs")
    made = make_set(tmp_path / "set", Format("packed"), {KEY: picture(), 2: picture()})
    made.path(2, "2.jpg").unlink()
    memory = PerturbationMemory(seed_from=tmp_path / "set")
    with pytest.warns(UserWarning, match="has 1 of 2 perturbations: the other images start at random"):
        memory.bind(SETTINGS)


def test_a_seed_must_be_perturbations_of_the_same_cells(tmp_path) -> None:
    make_set(tmp_path / "png", Format(), {KEY: picture()})
    with pytest.raises(
        ValueError, match=r"which `ikd-fast attack \.\.\. --packed` writes; .* has png images"
    ):
        PerturbationMemory(seed_from=tmp_path / "png")
    make_set(tmp_path / "packed", Format("packed", stride=2), {KEY: picture()})
    with pytest.raises(ValueError, match=r"stride 2, the memory has 1; write memory=dict\(stride=2\)"):
        PerturbationMemory(seed_from=tmp_path / "packed")
    memory = PerturbationMemory(stride=2, seed_from=tmp_path / "packed")
    memory.bind(SETTINGS)
    assert memory.fetch([KEY], [View.identity((H, W + 1))], "cpu") == [None]  # an image that has changed
    assert memory.counters["resized"] == 1


@pytest.mark.parametrize("name", [".hidden.jpg", "._x.png", "..jpg", "a b.jpg", None])
def test_every_name_makes_a_file_that_is_found(tmp_path: Path, name: str | None) -> None:
    """A dot in front is for files in the making."""
    (tmp_path / IMAGES).mkdir()
    path = tmp_path / IMAGES / file_name(KEY, name, ".png")
    path.write_bytes(b"x")
    assert list(listed(tmp_path, ".png")) == [(KEY, path)]
