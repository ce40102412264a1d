"""Whose adversarial images a run trains on, in its log."""

from __future__ import annotations

import logging
from typing import Any

from ikd_fast.attack.offline import AdversarialSet, SetManifest
from ikd_fast.attack.offline.adversarial_set import IDS
from ikd_fast.mmdet.pipeline_checks import leaves, pipeline_of
from ikd_fast.mmdet.samples import image_key

from mmengine.logging import print_log


def log_sets(dataset: Any, model: Any) -> None:
    """A line for each set that the pipelines read; a warning where it was made from another teacher than the one that is distilled.

    Raises:
        ValueError: a set lacks images of its data set.
    """
    seen = set()
    for leaf, transforms in leaves(dataset, "train_dataloader.dataset"):
        for directory in [str(t.directory) for _, t in transforms if hasattr(t, "adversarial")]:
            adversarial = AdversarialSet(directory)
            require_all(adversarial, leaf)
            if directory not in seen:
                _log(adversarial, model.ikd.teacher.fingerprint()[:16])
            seen.add(directory)


def sets_of(dataset: Any) -> list[str]:
    """Folder and contents of each set that the pipelines read."""
    transforms = [t for _, t in pipeline_of(dataset, "train_dataloader.dataset")]
    return [
        f"{t.directory}: {described(t.adversarial.manifest)}" for t in transforms if hasattr(t, "adversarial")
    ]


def require_all(adversarial: AdversarialSet, leaf: Any) -> None:
    """Raise unless the set has every image of a data set: not after some thousand steps."""
    files = adversarial.files
    infos = (leaf.get_data_info(i) for i in range(len(leaf)))
    missing = [info for info in infos if image_key(info) & IDS not in files]
    if missing:
        raise ValueError(
            f"{adversarial.directory} has {len(files)} adversarial images, {len(missing)} of the {len(leaf)} training images have none, "
            f"{missing[0].get('img_path')} for one; the same `ikd-fast attack` command, without --images, makes those of its data set"
        )


def _log(adversarial: AdversarialSet, teacher: str) -> None:
    manifest = adversarial.manifest
    other = manifest.teacher != teacher
    text = f"ikd_fast adversarial images of {adversarial.directory}: {described(manifest)}"
    if other:
        text += (
            f". They were made from another teacher ({manifest.teacher}) than the one that is distilled ({teacher}): what they do to it is "
            "what transfers"
        )
    print_log(text, logger="current", level=logging.WARNING if other else logging.INFO)


def described(manifest: SetManifest) -> str:
    """What a set holds, in a line."""
    fmt, attack = manifest.format, manifest.attack
    kind = fmt.kind if fmt.kind != "jpeg" else f"JPEG of quality {fmt.quality}"
    saved = {1.0: "", "original": ", saved at the size of their files"}.get(
        fmt.scale, f", saved at {fmt.scale} of the size"
    )
    summary = manifest.summary
    text = f"{manifest.images} {kind}{saved}, {attack['mode']}, eps {manifest.eps:g}, at {manifest.size} resolution"
    if summary:
        text += (
            f", teacher's class loss {summary['class_loss']:.3f} -> {summary['adversarial_class_loss']:.3f}"
        )
    return text
