"""docs/memory.md: its table is what the script makes, its sizes are those of records, and what it links to is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from benchmarks.memory import sizes
from ikd_fast.attack.memory import MemorySettings, PerturbationMemory, Record

ROOT = Path(__file__).parents[2]
DOC = ROOT / "docs" / "memory.md"
TEXT = DOC.read_text()
UNITS = {"TB": 1e12, "GB": 1e9, "MB": 1e6}


def rows() -> list[list[str]]:
    lines = TEXT.split(sizes.BEGIN)[1].split(sizes.END)[0].strip().splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_table_is_what_the_script_makes() -> None:
    assert sizes.within(TEXT) == TEXT


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_its_sizes_are_those_of_records_that_a_memory_takes(momentum: float) -> None:
    """A memory refuses a record of any other size: each row's is put into one."""
    assert len(rows()) == 12
    for resolution, stride, bits, nbytes, coco, coco_moving, objects, objects_moving in rows():
        memory = PerturbationMemory(int(bits), int(stride))
        memory.bind(MemorySettings(eps=8, step=8, momentum=momentum))
        height, width = {"original": (480, 640), "network": (800, 1067)}[resolution]
        cells = (-(-height // int(stride)), -(-width // int(stride)))
        delta = torch.zeros(int(nbytes.replace(",", "")), dtype=torch.uint8)
        velocity = torch.zeros(3, *cells, dtype=torch.float16) if momentum else None
        record = Record((height, width), 1, 0, delta, velocity)
        memory.put(1, record)
        told = (coco_moving, objects_moving) if momentum else (coco, objects)
        for images, text in zip((118_287, 1_742_289), told, strict=True):
            number, unit = text.split()
            assert float(number) * UNITS[unit] == pytest.approx(images * record.nbytes, rel=5e-3)


def test_the_networks_size_is_what_mmcv_makes_of_the_originals() -> None:
    image = pytest.importorskip("mmcv.image", reason="needs the mmdet extra: pip install 'ikd_fast[mmdet]'")
    height, width = sizes.SIZES["original"]
    assert image.rescale_size((width, height), (1333, 800)) == sizes.SIZES["network"][::-1]


def test_what_it_links_to_and_names_is_there() -> None:
    for link in set(re.findall(r"\]\(([^)#]+)\)", TEXT)):
        assert (DOC.parent / link).exists(), link
    for module in set(re.findall(r"python -m ([\w.]+)", TEXT)):
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), module
    for other in ("docs/attack.md", "README.md"):
        assert "memory.md)" in (ROOT / other).read_text()


def test_what_it_says_of_failures_is_what_is_logged() -> None:
    """The words a reader will search for."""
    memory = PerturbationMemory()
    memory.bind(MemorySettings(eps=8, step=2))
    assert memory.report({"damaged": 3, "not written": 12}).endswith("; records 3 damaged, 12 not written")
    assert "; records 3 damaged, 12 not written" in TEXT
