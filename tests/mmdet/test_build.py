"""What a config may say of a distiller, what its checkpoints say of classes, and the errors between the two."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch

import ikd_fast.mmdet  # noqa: F401
from ikd_fast import FGDLoss
from ikd_fast.mmdet import build as build_module
from ikd_fast.mmdet import published
from ikd_fast.mmdet.classes import check_names, names_of, names_of_data
from ikd_fast.mmdet.export import export
from tests.mmdet.conftest import retinanet, run, stock_config, with_ikd
from tests.mmdet.detectors import batch, data_batch, distiller

from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.runner import Runner

FEATURE = dict(beta=1e-5, attack=dict(type="OnlineDIFGSM", objective="feature"))


def build(**changes):
    torch.manual_seed(0)
    return MODELS.build(with_ikd(dict(model=retinanet()), **changes)["model"])


def checkpoint(path, meta: dict, classes: int = 1):
    weights = MODELS.build(retinanet(12, classes)).state_dict()
    torch.save(dict(meta=meta, state_dict=weights), path)
    return str(path)


def before_training(coco_root, tmp_path, model_changes: dict, classes: int = 1):
    """A Runner whose hooks have seen ``before_train`` and whose first step was not made."""
    config = stock_config(coco_root, epochs=1)
    config["model"] = retinanet(classes=classes)
    config = with_ikd(config, teacher_config=retinanet(12, classes), **model_changes) | dict(log_level="INFO")
    # Without a name, a Runner made in the same second as another writes into that one's log.
    config["experiment_name"] = "before_training"
    runner = Runner.from_cfg(Config(config | dict(work_dir=str(tmp_path / "work"))))
    runner._train_loop = runner.build_train_loop(runner._train_loop)
    runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    runner.call_hook("before_train")
    (log,) = (tmp_path / "work").glob("*/*.log")
    return log.read_text()


@pytest.mark.parametrize(
    "meta",
    [
        dict(dataset_meta=dict(classes=("other",))),
        dict(CLASSES=("other",)),  # mmdet 2, and so the published teachers
        dict(dataset_meta=dict(CLASSES=["other"])),
    ],
    ids=["mmengine", "mmdet2", "early"],
)
def test_a_teacher_of_other_classes_is_refused(coco_root, tmp_path, meta):
    path = checkpoint(tmp_path / "other.pth", meta)
    given = dict(teacher_ckpt=path, allow_random_teacher=False)
    with pytest.raises(
        ValueError,
        match=r"differ at 1 of 1 positions, first 0: 'box' in the data set, 'other' in the teacher's checkpoint.*objective='feature'",
    ):
        before_training(coco_root, tmp_path, given)


def test_what_needs_no_class_names_goes_on(coco_root, tmp_path):
    other = dict(
        teacher_ckpt=checkpoint(tmp_path / "other.pth", dict(CLASSES=("other",))), allow_random_teacher=False
    )
    text = before_training(coco_root, tmp_path / "feature", other | dict(adv=FEATURE))
    assert "the teacher's are other; the data set's box differ at 1 of 1 positions" in text
    before_training(coco_root, tmp_path / "off", other | dict(adv=None))
    unnamed = dict(teacher_ckpt=checkpoint(tmp_path / "unnamed.pth", {}), allow_random_teacher=False)
    assert "the teacher's are" not in before_training(coco_root, tmp_path / "unnamed", unnamed)


def test_a_teacher_that_mmengine_saved_is_accepted_and_its_names_are_shown(coco_root, tmp_path):
    plain = stock_config(coco_root, epochs=1)
    plain["model"] = retinanet(12)
    run(plain, tmp_path / "teacher")
    path = tmp_path / "teacher" / "epoch_1.pth"
    given = dict(teacher_ckpt=str(path), allow_random_teacher=False)
    text = before_training(coco_root, tmp_path / "pth", given)
    assert "classes  the teacher's are box; the data set's are the same" in text
    export(path, tmp_path / "t.safetensors")
    loaded = build(
        teacher_ckpt=str(tmp_path / "t.safetensors"), allow_random_teacher=False
    ).ikd.teacher.loaded
    assert loaded.classes == ("box",)
    assert loaded.loaded == loaded.total


class Data:
    def __init__(self, *classes: str) -> None:
        self.metainfo = dict(classes=classes)


def test_names_are_compared_by_position():
    check_names(("Traffic_Light", "car", "bus"), Data("traffic light", "car"), attacked=True)
    check_names(("a", "b"), Data("b", "a"), attacked=False)
    check_names(None, Data("b", "a"), attacked=True)
    check_names(("a", "b"), object(), attacked=True)
    with pytest.raises(
        ValueError, match=re.escape("write metainfo=dict(classes=('a', 'b')) in every data set")
    ):
        check_names(("a", "b", "c"), Data("b", "a"), attacked=True)
    message = r"differ at 2 of 3 positions, first 1: 'c' in the data set, 'b' .*2: 'd' in the data set, none in .*use a teacher of"
    with pytest.raises(ValueError, match=message):
        check_names(("a", "b"), Data("a", "c", "d"), attacked=True)


def test_parts_of_a_joined_set_may_differ():
    joined = type("Joined", (), dict(metainfo=[dict(classes=("a",)), dict(classes=("b",))]))()
    assert names_of_data(joined) == [("a",), ("b",)]
    with pytest.raises(ValueError, match="0: 'b' in the data set"):
        check_names(("a",), joined, attacked=True)
    assert names_of(dict(classes="box")) == ("box",)


def test_more_classes_than_the_student_are_compared_by_their_first(coco_root, tmp_path, monkeypatch):
    """With names they are checked; without, there is nothing but a warning."""
    logged = []
    monkeypatch.setattr("ikd_fast.mmdet.classes.print_log", lambda text, **_: logged.append(text))
    for names, meta in ((True, dict(CLASSES=("box", "car"))), (False, {})):
        logged.clear()
        path = checkpoint(tmp_path / f"{names}.pth", meta, classes=2)
        model = build(teacher_config=retinanet(12, 2), teacher_ckpt=path, allow_random_teacher=False)
        assert bool(logged) != names
        check_names(model.ikd.teacher.loaded.classes, Data("box"), attacked=True)
    path = checkpoint(tmp_path / "turned.pth", dict(CLASSES=("car", "box")), classes=2)
    model = build(teacher_config=retinanet(12, 2), teacher_ckpt=path, allow_random_teacher=False)
    with pytest.raises(ValueError, match="0: 'box' in the data set, 'car' in the teacher's"):
        check_names(model.ikd.teacher.loaded.classes, Data("box"), attacked=True)


@pytest.mark.parametrize("key", [None, "state_dict", "model"])
@pytest.mark.parametrize("remote", [True, False])
def test_weights_are_renamed_wherever_they_are(tmp_path, monkeypatch, key, remote):
    """Under "model" behind a URL too: deformable convolutions by today's names, floats, no ``module.``."""
    held = {"module.layer2.0.conv2_offset.weight": torch.ones(2, dtype=torch.float16)}
    path = tmp_path / "net.pth"
    torch.save(held if key is None else {key: held, "meta": dict(CLASSES=("a",))}, path)
    monkeypatch.setattr(build_module, "fetch", lambda url: path)
    read = build_module.read_named("https://example.org/net.pth" if remote else str(path))
    assert list(read.weights) == ["layer2.0.conv2.conv_offset.weight"]
    assert read.weights["layer2.0.conv2.conv_offset.weight"].dtype == torch.float32
    assert read.classes == (None if key is None else ("a",))


def test_safetensors_behind_a_url(tmp_path, monkeypatch):
    from safetensors.torch import save_file

    path = tmp_path / "net.safetensors"
    save_file({"neck.conv2_offset.bias": torch.ones(2)}, path, metadata={"classes": '["a", "b"]'})
    monkeypatch.setattr(build_module, "fetch", lambda url: path)
    read = build_module.read_named("https://example.org/net.safetensors")
    assert list(read.weights) == ["neck.conv2.conv_offset.bias"]
    assert read.classes == ("a", "b")
    assert published.published_hash("https://example.org/net.safetensors") is None


def test_one_loss_needs_no_list():
    one = build(losses=dict(type="FGDLoss", preset="retinanet"))
    assert [type(x) for x in one.ikd.losses] == [FGDLoss]
    assert [type(x) for x in build(losses=FGDLoss(preset="retinanet")).ikd.losses] == [FGDLoss]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (dict(losses="FGDLoss"), r"losses must be a list of dicts, \[dict\(type='FGDLoss'.*got 'FGDLoss'"),
        (dict(losses=["FGDLoss"]), r"losses must be a list of dicts.*got \['FGDLoss'\]"),
        (dict(losses=None), "losses must be a list of dicts.*got None"),
        (
            dict(adv=[dict(beta=1)]),
            r"adv must be dict\(beta=1e-5, .*or None for no adversarial branch, got \[",
        ),
        (dict(adv=True), "adv must be dict.*got True"),
        (
            dict(adv=dict(attack=None)),
            r"adv.attack must be dict\(type='OnlineDIFGSM', ...\), got None; for no .*adv=None",
        ),
        (dict(adv=dict(beta="1")), "adv.beta must be a number, got '1'"),
        (dict(adv=dict(loss="l2")), "adv.loss must be dict.*got 'l2'"),
        (dict(adv=dict(betta=1)), r"adv takes beta, attack and loss, got also \['betta'\]"),
        (dict(augment=True), r"augment must be dict\(type='AdaptiveFreqAug', ...\) or None, got True"),
        (dict(augment="AdaptiveFreqAug"), "augment must be dict.*got 'AdaptiveFreqAug'"),
        (
            dict(adv=dict(attack=dict(mod="single"))),
            "adv.attack: OnlineDIFGSM has no.*'mod'; did you mean 'mode'",
        ),
        (
            dict(augment=dict(crop_probb=0)),
            "augment: AdaptiveFreqAug has no.*'crop_probb'; did you mean 'crop_prob'",
        ),
        (dict(data_preprocessor=dict(batch_augments=[])), "write it .* in the student"),
    ],
)
def test_values_of_another_kind(changes, expected):
    with pytest.raises(TypeError, match=expected):
        build(**changes)


def test_an_empty_adv_is_the_defaults():
    empty, given, off = build(adv={}), build(adv=dict(beta=1e-5)), build(adv=None)
    assert empty.ikd.adversarial
    assert given.ikd.adversarial
    assert not off.ikd.adversarial
    assert empty.ikd.beta == given.ikd.beta == 1e-5
    assert repr(empty.ikd.attack) == repr(given.ikd.attack)
    assert type(empty.ikd.adv_loss) is type(given.ikd.adv_loss)


def test_a_distilled_config_is_no_teacher_and_no_student(tmp_path):
    distilled = with_ikd(dict(model=retinanet()))["model"]
    config = tmp_path / "ikd.py"
    config.write_text(f"model = {distilled!r}\n")
    message = "is itself a distilled config.*give the plain student config it was made from.*ikd-fast export"
    for given in (distilled, str(config), Config(dict(model=distilled))):
        with pytest.raises(ValueError, match=message):
            build(teacher_config=given)
    with pytest.raises(ValueError, match=r"teacher_config='.*ikd.py' is itself"):
        build(teacher_config=str(config))
    with pytest.raises(ValueError, match="student is itself a distilled config.*student=_base_.model"):
        build(student=distilled)


@pytest.mark.parametrize("source", ["neck", "bbox_head.retina_cls"])
def test_a_distiller_survives_pickle(source):
    """Spawned workers and some launchers send the model; the copy makes the same step."""
    model = distiller(
        retinanet(classes=2),
        retinanet(12, 2),
        losses=[dict(type="FGDLoss", preset="retinanet", source=source)],
    )
    twin = pickle.loads(pickle.dumps(model))
    assert twin.data_preprocessor.is_active.__self__ is twin
    assert twin.ikd.teacher.fingerprint() == model.ikd.teacher.fingerprint()
    out, again = (m(**batch(m, [0, 1]), mode="loss") for m in (model, twin))
    assert {k: float(v) for k, v in out.items()} == pytest.approx({k: float(v) for k, v in again.items()})
    plain = model.data_preprocessor
    alone = MODELS.build(dict(type="IKDDetDataPreprocessor", augment=dict(type="AdaptiveFreqAug")))
    assert pickle.loads(pickle.dumps(alone)).is_active()
    assert copy.deepcopy(plain)(data_batch([0]), False)["inputs"] is not None
