"""One config a family: the same step under mmcv-lite with compat and under the compiled mmcv, in a process each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.configs

REPO = Path(__file__).parents[2]
NAMES = [
    "retinanet_x101-64x4d_r50_fgd_ikd_2x_coco",
    "reppoints_x101-dconv_r50_fgd_ikd_2x_coco",
    "mask-rcnn_cascade-x101-dconv_r50_fgd_ikd_2x_coco",
]
# In a process of its own: the losses of one step. The first process writes its perturbation, the second takes that one
# after making its own, and says in how many values the two differ. A mask's target is whether a mean of pixels is a half or more:
# rounded to 2^-16, so that means of exactly a half, which crops on whole pixels make, are that in both.
CODE = """
import dataclasses, json, sys
from pathlib import Path
import torch
from tests.configs.reduced import build, fill, load, reduce, step
name, file = sys.argv[1], Path(sys.argv[2])
config = reduce(load(name))
net = build(config)
fill(net)
fill(net.ikd.teacher.net)
ikd = net.ikd
craft = ikd._craft
differ = []
def shared(batch, clean_maps, *, with_maps):
    out = craft(batch, clean_maps, with_maps=with_maps)
    if not file.exists():
        torch.save(out.delta, file)
        return out
    delta = torch.load(file)
    differ.append(float(((delta - out.delta).abs() > 1e-4).float().mean()))
    images = out.images - out.delta + delta
    maps = ikd.teacher.features(images, *ikd._teacher_sources([ikd.adv_loss]), batch.sizes)
    return dataclasses.replace(out, images=images, delta=delta, maps=maps)
ikd._craft = shared
import mmdet.structures.mask.structures as masks
align = masks.roi_align
masks.roi_align = lambda *args, **kwargs: (align(*args, **kwargs) * 2**16).round() / 2**16
import mmcv._ext
compiled = str(getattr(mmcv._ext, '__file__', '')).endswith('.so')
print(json.dumps(dict(compiled=compiled, logs=step(config, net), differ=differ)))
"""


@pytest.fixture(scope="session")
def compiled_mmcv(shared_dir, tmp_path_factory) -> Path:
    if sys.version_info[:2] != (3, 11):
        pytest.skip("the compiled mmcv to compare with is for CPython 3.11")
    wheels = sorted((shared_dir / "wheels").glob("mmcv-2.1.0-cp311-*.whl"))
    if not wheels:
        pytest.skip("needs a compiled mmcv 2.1.0 wheel in ../shared/wheels")
    home = tmp_path_factory.mktemp("compiled")
    with zipfile.ZipFile(wheels[0]) as wheel:
        wheel.extractall(home)
    return home


def run_step(name: str, delta: Path, *path: Path) -> dict:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (*path, REPO)))}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CODE, name, delta],
        cwd=REPO, env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", NAMES)
def test_losses_agree_with_compiled_mmcv(name, compiled_mmcv, tmp_path):
    """Every logged number to 1e-4 relative (float32 sums in another order).

    Where the attack's gradient is zero but for rounding, its sign is arbitrary, and each such value moves the loss on the
    adversarial images: both processes read the same images, and at most one value in a thousand may be perturbed otherwise.
    """
    lite = run_step(name, tmp_path / "delta.pt")
    full = run_step(name, tmp_path / "delta.pt", compiled_mmcv)
    assert (lite["compiled"], full["compiled"]) == (False, True)
    assert (len(lite["differ"]), len(full["differ"])) == (0, 1)
    assert full["differ"][0] <= 1e-3
    assert lite["logs"].keys() == full["logs"].keys()
    for key, value in full["logs"].items():
        assert lite["logs"][key] == pytest.approx(value, rel=1e-4, abs=1e-9), key
