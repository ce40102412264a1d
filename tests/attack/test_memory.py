"""Perturbations that are kept: what goes in comes out, nothing is mixed up, and the memory says what it takes."""

from __future__ import annotations

import math
import re

import pytest
import torch

from ikd_fast.attack.memory import (
    HostStore,
    MemorySettings,
    PerturbationMemory,
    Record,
    Store,
    View,
    available_bytes,
    record_bytes,
)

CPU = torch.device("cpu")


def bound(bits=4, stride=1, *, eps=8, step=2, momentum=0.0, **kwargs):
    memory = PerturbationMemory(bits, stride, **kwargs)
    memory.bind(MemorySettings(eps=eps, step=step, momentum=momentum))
    return memory


def record_of(memory, size, seed=0, *, visits=1, step=0):
    """A record with random codes of the memory's levels, and its codes."""
    g = torch.Generator().manual_seed(seed)
    cells = tuple(math.ceil(side / memory.stride) for side in size)
    codes = torch.randint(0, memory.codes.levels, (3, *cells), generator=g, dtype=torch.uint8)
    velocity = None
    if memory.settings.momentum:
        velocity = torch.randn(3, *cells, generator=g).half()
    return Record(size, visits, step, memory.codes.pack(codes), velocity), codes


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("bits", "step"), [(8, 2), (4, 2), (2, 8)])
def test_what_is_put_is_fetched(bits, step, stride, momentum):
    memory = bound(bits, stride, step=step, momentum=momentum)
    sizes = {11: (13, 7), 12: (6, 60), 2**64 - 1: (13, 7)}
    kept = {}
    for i, (id, size) in enumerate(sizes.items()):
        record, codes = record_of(memory, size, i, visits=i, step=100 + i)
        memory.put(id, record)
        kept[id] = record, codes
    found = memory.fetch(list(sizes), [View.identity(size) for size in sizes.values()], "cpu")
    for (id, size), record in zip(sizes.items(), found, strict=True):
        there, codes = kept[id]
        assert (record.size, record.visits, record.step) == (size, there.visits, there.step)
        assert torch.equal(memory.codes.unpack(record.delta, codes.shape), codes)
        if momentum:
            assert torch.equal(record.velocity, there.velocity)
        else:
            assert record.velocity is None
    assert len(memory.store) == 3


def test_a_value_survives_reading_writing_and_reading():
    """Codes of eps 8, step 2 at 4 bits are -8, -6, .. 8 exactly, whatever is around them in the byte."""
    memory = bound()
    values = torch.tensor([-8.0, -6, -4, -2, 0, 2, 4, 6, 8]).repeat(3, 5, 1)
    for _ in range(3):
        memory.put(1, Record((5, 9), 1, 0, memory.codes.pack(memory.codes.encode(values))))
        (record,) = memory.fetch([1], [View.identity((5, 9))], CPU)
        values = memory.codes.decode(memory.codes.unpack(record.delta, (3, 5, 9)))
    assert values[0, 0].tolist() == [-8, -6, -4, -2, 0, 2, 4, 6, 8]


def test_records_are_not_shared_with_the_caller():
    memory = bound()
    record, _ = record_of(memory, (4, 4))
    original = record.delta.clone()
    memory.put(1, record)
    record.delta.zero_()
    (found,) = memory.fetch([1], [View.identity((4, 4))], CPU)
    found.delta.fill_(255)
    (again,) = memory.fetch([1], [View.identity((4, 4))], CPU)
    assert torch.equal(again.delta, original)


def test_unknown_images_and_changed_sizes_are_cold_starts_counted_apart():
    memory = bound()
    memory.put(1, record_of(memory, (4, 6))[0])
    memory.put(2, record_of(memory, (4, 6))[0])
    views = [View.identity((4, 6)), View.identity((6, 4)), View.identity((4, 6)), View((4, 6), (3, 2)).flip()]
    found = memory.fetch([1, 2, 3, 2], views, CPU)
    assert [r is not None for r in found] == [True, False, False, True]
    assert memory.counters == dict(hits=2, unknown=1, resized=1, stored=2, images=2, bytes=2 * 3 * 4 * 3)
    assert memory.report() == (
        "perturbation memory: 2 images, 72 B of host memory; 2 of 4 visits had a perturbation, 1 cold starts of unknown images, "
        "1 of images whose size had changed"
    )
    # The image's new record takes the old one's place.
    memory.put(2, record_of(memory, (6, 5))[0])
    assert memory.counters["images"] == 2
    assert memory.counters["bytes"] == 3 * 4 * 3 + 3 * 6 * 3
    assert memory.fetch([2], [View.identity((6, 5))], CPU)[0] is not None


def test_the_store_reuses_what_a_resized_image_leaves():
    memory = bound()
    for i in range(200):
        memory.put(1, record_of(memory, [(40, 40), (50, 30)][i % 2])[0])
    assert memory.store.reserved == 1 << 20
    big, codes = record_of(memory, (1000, 1100), 5)  # more than the first block
    memory.put(2, big)
    (found,) = memory.fetch([2], [View.identity((1000, 1100))], CPU)
    assert torch.equal(memory.codes.unpack(found.delta, codes.shape), codes)
    memory.close()
    assert len(memory.store) == 0
    assert (memory.store.nbytes, memory.store.reserved) == (0, 0)


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        (dict(eps=4, step=1), r"eps: 8 there, 4 now; step: 2 there, 1 now"),
        (dict(step=4), r"\(step: 2 there, 4 now\)"),
        (dict(momentum=1.0), r"momentum: 0\.0 there, 1\.0 now"),
        (dict(channels=1), r"channels: 3 there, 1 now"),
        (dict(data="12 images ab"), r"data: 10 images cd there, 12 images ab now"),
        (dict(size="network (1333, 800)"), r"size: original there, network \(1333, 800\) now"),
    ],
)
def test_a_memory_of_other_settings_is_refused_by_name(changes, difference):
    ours = dict(eps=8, step=2, data="10 images cd", size="original")
    memory = PerturbationMemory()
    memory.bind(MemorySettings(**ours))
    memory.bind(MemorySettings(**ours))
    with pytest.raises(ValueError, match=difference):
        memory.bind(MemorySettings(**{**ours, **changes}))


def test_what_was_not_said_agrees_and_is_kept_once_said():
    memory = PerturbationMemory()
    memory.bind(MemorySettings(eps=8, step=2))
    memory.bind(MemorySettings(eps=8, step=2, data="a"))
    memory.bind(MemorySettings(eps=8, step=2))
    with pytest.raises(ValueError, match="data: a there, b now"):
        memory.bind(MemorySettings(eps=8, step=2, data="b"))


def test_a_store_made_with_other_bits_is_refused():
    store = HostStore()
    bound(4, store=store)
    assert isinstance(store, Store)
    with pytest.raises(ValueError, match=r"stride: 1 there, 2 now"):
        bound(4, 2, store=store)
    with pytest.raises(ValueError, match=r"bits: 4 there, 8 now"):
        bound(8, store=store)


def test_wrong_records_and_calls_are_named():
    memory = bound(momentum=0.5)
    good, _ = record_of(memory, (4, 6))
    with pytest.raises(ValueError, match=r"a record of \(4, 8\) is uint8 \[48\] .* got torch.uint8 \[36\]"):
        memory.put(1, Record((4, 8), 1, 0, good.delta, good.velocity))
    with pytest.raises(ValueError, match=r"momentum 0.5 needs a velocity \[3, 4, 6\], got None"):
        memory.put(1, Record((4, 6), 1, 0, good.delta))
    with pytest.raises(TypeError, match="velocity must be float16, got torch.float32"):
        memory.put(1, Record((4, 6), 1, 0, good.delta, good.velocity.float()))
    with pytest.raises(ValueError, match="one view per image: 2 ids, 1 views"):
        memory.fetch([1, 2], [View.identity((4, 6))], CPU)
    with pytest.raises(RuntimeError, match="bind"):
        PerturbationMemory().fetch([1], [View.identity((4, 6))], CPU)
    for wrong in (dict(bits=3), dict(stride=3), dict(resolution="half"), dict(max_bytes=0)):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            PerturbationMemory(**wrong)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_the_forecast_is_what_is_stored(bits, stride, momentum):
    memory = bound(bits, stride, eps=8, step=8 if bits == 2 else 2, momentum=momentum)
    sizes = [(13, 7), (20, 31), (20, 31), (1, 1)]
    forecast = memory.forecast(sizes)
    for i, size in enumerate(sizes):
        memory.put(i, record_of(memory, size)[0])
    assert forecast.images == 4
    assert forecast.bytes == memory.store.nbytes == memory.counters["bytes"]
    assert forecast.per_image == forecast.bytes / 4
    assert forecast.choices[bits, stride, "auto"] == forecast.bytes


def test_coco_takes_what_the_design_says():
    """118,287 images. Original resolution: at COCO's mean of 307,200 pixels an image (640 x 480), 4 bits are 54.5 GB, half of that
    resolution 13.6, ternary 6.8; network resolution, 800 x 1067 of that image, 4 bits at stride 2 are 38 GB."""
    n = 118_287

    def size(canonical, bits, stride):
        memory = PerturbationMemory(bits, stride)
        return memory.forecast([canonical] * n)

    assert size((480, 640), 4, 1).bytes / 1e9 == pytest.approx(54.5, abs=0.05)
    assert size((480, 640), 4, 2).bytes / 1e9 == pytest.approx(13.6, abs=0.05)
    assert size((480, 640), 2, 2).bytes / 1e9 == pytest.approx(6.8, abs=0.05)
    assert size((800, 1067), 4, 2).bytes / 1e9 == pytest.approx(38, abs=0.5)
    assert str(size((480, 640), 4, 1)) == (
        "118287 images x 461 kB = 54.5 GB of host memory (4 bits, stride 1, auto resolution)"
    )
    assert record_bytes((480, 640), bits=4, stride=1, momentum=True) == 3 * 480 * 640 // 2 + 3 * 480 * 640 * 2


def test_no_room_names_the_settings_that_fit():
    memory = bound(8)
    sizes, small = [(480, 640)] * 1000, [(240, 320)] * 1000
    forecast = memory.forecast(sizes, resolution="network", others={"original": small})
    need = 1000 * 3 * 480 * 640
    memory.require_room(forecast, available=need)
    with pytest.raises(MemoryError) as error:
        memory.require_room(forecast, available=need // 4 + 1)
    text = str(error.value)
    assert "922 MB of host memory (8 bits, stride 1, network resolution)" in text
    assert "230 MB may be taken" in text
    # 4 x less: half the resolution, or 4 bits at stride 2 (8 x less); 2 bits would round the step of 2 away, so with step 8.
    proposed = [line.strip() for line in text.splitlines() if "memory=dict(" in line]
    assert "memory=dict(bits=8, stride=2, resolution='network')  # 230 MB" in proposed
    assert "memory=dict(bits=8, stride=1, resolution='original')  # 230 MB" in proposed
    assert "memory=dict(bits=4, stride=2, resolution='network')  # 115 MB" in proposed
    assert "memory=dict(bits=2, stride=1, resolution='network')  # 230 MB, with step_size=8" in proposed
    assert not any("bits=4, stride=1, resolution='network'" in line for line in proposed)
    for line in proposed:
        setting = eval(line.split("memory=")[1].split("#")[0])
        other = PerturbationMemory(**setting)
        other.require_room(
            other.forecast(small if setting["resolution"] == "original" else sizes), available=need // 4 + 1
        )
    # Four ranks of a machine share it.
    with pytest.raises(MemoryError, match="for each of 4 ranks"):
        memory.require_room(forecast, copies=4, available=need)
    # They may share the images out.
    memory.require_room(forecast, copies=4, share=1 / 4, available=need)
    with pytest.raises(MemoryError, match="230 MB of it for each of 4 ranks .* 115 MB may be taken") as error:
        memory.require_room(forecast, copies=4, share=1 / 4, available=need // 2)
    proposed = re.findall(r"bits=(\d), stride=(\d), resolution='network'", str(error.value))
    assert sorted(proposed) == [("2", "1"), ("2", "2"), ("4", "1"), ("4", "2"), ("8", "2")]
    with pytest.raises(MemoryError, match="mode='single'"):
        memory.require_room(forecast, available=100)


def test_max_bytes_is_a_limit_of_its_own():
    memory = bound(max_bytes=100)
    with pytest.raises(MemoryError, match="100 B may be taken"):
        memory.require_room(memory.forecast([(4, 6)] * 3), available=10**12)
    memory.put(1, record_of(memory, (4, 6))[0])
    memory.put(2, record_of(memory, (4, 6))[0])
    memory.put(2, record_of(memory, (4, 6), 1)[0])  # in its own place
    with pytest.raises(MemoryError, match="with one more image it would take 108 B, and max_bytes is 100 B"):
        memory.put(3, record_of(memory, (4, 6))[0])


def test_free_memory_is_that_of_the_machine_or_of_the_group(tmp_path):
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 16 kB\nMemFree: 1 kB\nMemAvailable:       8000 kB\n")
    (proc / "self" / "cgroup").write_text("0::/job/step\n")
    step = groups / "job" / "step"
    step.mkdir(parents=True)
    assert available_bytes(proc, groups) == 8000 * 1024
    (step / "memory.max").write_text("max\n")
    (step / "memory.current").write_text("3000000\n")
    assert available_bytes(proc, groups) == 8000 * 1024
    # The group above limits both; half of what it uses are cached files.
    (groups / "job" / "memory.max").write_text("5000000\n")
    (groups / "job" / "memory.current").write_text("4000000\n")
    (groups / "job" / "memory.stat").write_text("anon 2000000\ninactive_file 2000000\n")
    assert available_bytes(proc, groups) == 3_000_000
    (proc / "self" / "cgroup").write_text("5:cpu:/a\n7:memory:/job\n")
    old = groups / "memory" / "job"
    old.mkdir(parents=True)
    (old / "memory.limit_in_bytes").write_text("1000000")
    (old / "memory.usage_in_bytes").write_text("400000")
    assert available_bytes(proc, groups) == 600_000
    (old / "memory.limit_in_bytes").write_text(str(2**63 - 4096))  # cgroup v1's "no limit"
    assert available_bytes(proc, groups) == 8000 * 1024


def test_this_machine_has_some_memory():
    free = available_bytes()
    assert free is not None
    assert 0 < free < 1 << 50
