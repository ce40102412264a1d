"""Attack every image of a training set, and write what comes of it: file by file, by any number of processes, whenever."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ikd_fast.analysis.strength.measures import pixel_change, pyramid_change
from ikd_fast.attack import AttackBatch, OnlineDIFGSM
from ikd_fast.attack.memory.forecast import human
from ikd_fast.attack.memory.shards.run_lock import RunLock
from ikd_fast.attack.offline.adversarial_set import IDS, IMAGES, file_name, listed
from ikd_fast.attack.offline.formats import Format
from ikd_fast.attack.offline.manifest import SetManifest
from ikd_fast.files import write_bytes
from ikd_fast.mmdet.errors import InputError
from ikd_fast.mmdet.samples import to_targets

from mmengine.dataset import pseudo_collate

from .images import Image, TrainingImages, file_size
from .strength import PARTS, Strength, merged

LOCK = ".lock"
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Processes:
    """Which of how many processes this is, and the name they have in common."""

    rank: int = 0
    count: int = 1
    run: str = ""

    @classmethod
    def of_environment(cls) -> Processes:
        """As torchrun says."""
        env = os.environ
        count = int(env.get("WORLD_SIZE", 1))
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in env]
        if count > 1 and missing:
            raise InputError(
                f"WORLD_SIZE is {count}, and {', '.join(missing)} not set: start several processes by torchrun, or unset WORLD_SIZE",
                usage=True,
            )
        if count == 1:
            return cls(run=f"process {os.getpid()}")
        run = f"{env.get('TORCHELASTIC_RUN_ID')} {env['MASTER_ADDR']}:{env['MASTER_PORT']}"
        if env["MASTER_ADDR"] in LOOPBACK:
            run += f" {socket.gethostname()}"  # torchrun's own address, the same on every machine
        return cls(int(env["RANK"]), count, run)


def _collated(rows: list[Any]) -> Any:
    """A batch, or the first image's error: raised in a worker it would come as a page of text."""
    wrong = [row for row in rows if isinstance(row, InputError)]
    return wrong[0] if wrong else pseudo_collate(rows)


class Generator:
    """Makes the files of an :class:`~ikd_fast.attack.offline.AdversarialSet` that are not there yet.

    Images are attacked in fixed groups of ``batch``, so that a file's bytes depend neither on the number of processes nor on what was
    there before. A file is written under another name and renamed: it is there whole, or not at all. Group g belongs to process
    g mod count.

    Args:
        images: what is to be attacked.
        subject: victim, preprocessor, units and order of channels of the teacher (:class:`~ikd_fast.mmdet.strength.DetectorSubject`).
        attack: that makes an adversarial image in one call: mode ``iterative`` or ``single``.
        out: the folder.
        limit: only the first so many images; None: all. The rest may be made later.
        processes: default: as torchrun says.

    Raises:
        InputError: the folder has a set made with other settings; the differences are named.
        RuntimeError: another run is at work in it.
    """

    def __init__(
        self,
        images: TrainingImages,
        subject: Any,
        attack: OnlineDIFGSM,
        fmt: Format,
        out: Path,
        *,
        batch: int = 4,
        workers: int = 0,
        limit: int | None = None,
        processes: Processes | None = None,
    ) -> None:
        self.images, self.subject, self.attack, self.format, self.out = images, subject, attack, fmt, out
        self.batch, self.workers = batch, workers
        self.limit = min(limit or len(images), len(images))
        self.processes = processes or Processes.of_environment()
        self.manifest = SetManifest(
            format=fmt,
            attack={**attack_settings(attack), **subject_settings(subject), "batch": batch},
            teacher=subject.teacher.fingerprint()[:16],
            data=images.fingerprint,
            size=images.size,
            channels="rgb" if subject.rgb else "bgr",
            images=len(images),
        )

    def run(self, advance: Callable[[int], None] = lambda _: None) -> dict[str, Any] | None:
        """Make what is missing of this process's share.

        Args:
            advance: called with the number of images that were made, or were there.

        Returns:
            ``made`` by this process and ``there`` before of its share, ``images`` that are made and ``of_images``, ``bytes``, and the
            ``summary`` of their strength, from the process that finishes last; None from the others.
        """
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise InputError(
                f"--out {self.out}: expected a folder, or a place for one; a file is in the way"
            ) from None
        lock = RunLock(self.out / LOCK, self.processes.run, "set of adversarial images")
        try:
            if lock.first:
                self._prepare()
                lock.opened()
            there = {key for key, _ in listed(self.out, self.format.suffix)}
            if self.processes.rank and all(self._key(place) in there for place in range(self.limit)):
                return None  # nothing to do for anybody, which the first process says
            mine = self.groups()
            done = sum(p < self.limit and self._key(p) in there for group in mine for p in group)
            advance(done)
            made = 0
            strength = Strength(self.out, self.processes)
            for count in self._make(mine, there, strength):
                made += count
                advance(count)
            strength.close()
            # Lines are brought together when nobody writes any.
            if not lock.last() and (made or done < self.share or self._lines_left()):
                return None
            return self._finish(made, done)
        finally:
            lock.release()

    def _lines_left(self) -> bool:
        return (self.out / PARTS).is_dir()

    def _prepare(self) -> None:
        there = SetManifest.read(self.out)
        if there is None:
            self.manifest.write(self.out)
        elif differ := there.differences(self.manifest):
            raise InputError(
                f"{self.out} has adversarial images that were made otherwise ({'; '.join(differ)}). Write another --out, or delete it"
            )
        for left in (self.out / IMAGES).glob(".*"):
            left.unlink()  # of a process that was killed while it wrote

    def groups(self) -> list[list[int]]:
        """Places of the images of this process, as they are attacked together: of the last group, some are beyond ``limit``."""
        places = range(len(self.images))
        groups = [list(places[k : k + self.batch]) for k in range(0, self.limit, self.batch)]
        return groups[self.processes.rank :: self.processes.count]

    @property
    def share(self) -> int:
        """How many images this process is to make, or to find made."""
        return sum(place < self.limit for group in self.groups() for place in group)

    def _key(self, place: int) -> int:
        return self.images.images[place].key & IDS

    def _wanted(self, group: list[int], there: set[int]) -> list[bool]:
        return [place < self.limit and self._key(place) not in there for place in group]

    def _make(self, groups: list[list[int]], there: set[int], strength: Strength) -> Iterator[int]:
        todo = [group for group in groups if any(self._wanted(group, there))]
        loader: DataLoader = DataLoader(
            self.images,  # type: ignore[arg-type]
            batch_sampler=todo,
            num_workers=min(self.workers, len(todo)),
            collate_fn=_collated,
        )
        first = True
        with ThreadPoolExecutor(max_workers=max(1, min(self.batch, os.cpu_count() or 1))) as pool:
            for group, data in zip(todo, loader, strict=True):
                if isinstance(data, InputError):
                    raise data
                images = [self.images.images[p] for p in group]
                wanted = self._wanted(group, there)
                written = 0
                for row, (path, content) in self._attacked(images, data, wanted, pool):
                    # Strength first: a row without its file is made again, a file without its row never.
                    strength.add(row)
                    write_bytes(path, content)
                    written += len(content)
                if first:
                    self._require_room(written / sum(wanted), len(there))
                    first = False
                yield sum(wanted)

    def _attacked(
        self, images: list[Image], data: Mapping[str, Any], wanted: list[bool], pool: ThreadPoolExecutor
    ) -> Iterator[tuple[dict[str, Any], tuple[Path, bytes]]]:
        """Strength and file of each image that is wanted."""
        subject, units, fmt = self.subject, self.subject.units, self.format
        loaded = [x.permute(1, 2, 0).contiguous().numpy() for x in data["inputs"]]
        batch = subject.preprocessor({**data, "inputs": list(data["inputs"])}, False)
        x, samples = batch["inputs"], batch["data_samples"]
        targets = to_targets(samples)
        sizes = [target["size"] for target in targets]
        out = self.attack(
            subject.victim,
            x,
            targets,
            image_ids=[image.key for image in images],
            epoch=0,
            sizes=sizes,
            units=units,
        )
        # Files are BGR, packed perturbations in the teacher's order.
        turned = subject.rgb and fmt.kind != "packed"
        pixels = units.to_pixels(out.images)
        frames = [pixels[i, :, :h, :w].float().cpu() for i, (h, w) in enumerate(sizes)]
        chosen = [i for i, want in enumerate(wanted) if want]

        def encode(i: int) -> tuple[bytes, np.ndarray]:
            clean = loaded[i] if turned or not subject.rgb else np.ascontiguousarray(loaded[i][..., ::-1])
            moved = frames[i].flip(0) if turned else frames[i]
            original = file_size(samples[i].metainfo)
            content = fmt.encode(images[i].key & IDS, clean, moved, original, self.attack.eps)
            return content, fmt.decode(images[i].key & IDS, content, clean, self.attack.eps)

        for i, (content, read) in zip(chosen, pool.map(encode, chosen), strict=True):
            back = torch.from_numpy(np.ascontiguousarray(read.transpose(2, 0, 1)))
            moved = x[i : i + 1].clone()
            h, w = sizes[i]
            moved[0, :, :h, :w] = units.from_pixels((back.flip(0) if turned else back).to(x.device), x.dtype)
            name = file_name(images[i].key, images[i].name, fmt.suffix)
            row = self._strength(images[i], x[i : i + 1], moved, targets[i])
            yield {"file": name, **row}, (self.out / IMAGES / name, content)

    @torch.no_grad()
    def _strength(self, image: Image, clean: Tensor, moved: Tensor, target: dict[str, Any]) -> dict[str, Any]:
        """Of one image, as it is read back."""
        maps, losses = [], []
        for x in (clean, moved):
            batch = AttackBatch(x, [target], [target["size"]], 0, lambda: clean, [image.key], 0, 0)
            found, loss = self.subject.victim.maps_and_loss(batch)
            maps.append(found)
            losses.append(float(loss.sum()))
        linf, mean, outside = pixel_change(
            clean, moved, [target["size"]], self.subject.units, self.attack.eps
        )[0].tolist()
        return {
            "image": image.name,
            "class_loss": round(losses[0], 6),
            "adversarial_class_loss": round(losses[1], 6),
            "feature_change": round(float(pyramid_change(*maps)[0, :, 0].mean()), 6),
            "linf": round(linf, 3),
            "mean_abs": round(mean, 4),
            "outside": round(outside, 6),
        }

    def _require_room(self, mean: float, there: int) -> None:
        """Raise where the files that are missing will not fit, by the size of the first ones."""
        free, need = shutil.disk_usage(self.out).free, mean * (self.limit - there)
        if need > free:
            raise InputError(
                f"{self.out}: {self.limit - there} files of about {human(mean)} are missing, {human(need)}; {human(free)} are free. "
                "Write --packed (about half of a PNG, a seventh with --stride 2), --jpeg or --save-scale; or another --out"
            )

    def _finish(self, made: int, there: int) -> dict[str, Any] | None:
        files = dict(listed(self.out, self.format.suffix))
        if any(self._key(place) not in files for place in range(self.limit)):
            return None  # of processes that have not begun yet, or have failed and say so themselves
        summary = merged(self.out, {path.name for path in files.values()})
        complete = all(self._key(place) in files for place in range(len(self.images)))
        if complete and summary["measured"] == len(files):
            replace(self.manifest, summary=summary).write(self.out)
        return {
            "out": str(self.out), "images": len(files), "of_images": len(self.images),
            "bytes": sum(path.stat().st_size for path in files.values()), "made": made, "there": there, "summary": summary,
        }  # fmt: skip


def subject_settings(subject: Any) -> dict[str, Any]:
    """What decides on the loss that is climbed, beside the teacher's weights."""
    text = json.dumps(subject.model, sort_keys=True, default=str)
    return {
        "include_rpn": subject.victim.loss.include_rpn,
        "model": hashlib.blake2b(text.encode(), digest_size=8).hexdigest(),
    }


def attack_settings(attack: OnlineDIFGSM) -> dict[str, Any]:
    """What decides on a perturbation."""
    names = (
        "mode", "eps", "step_size", "steps", "momentum", "diversity_prob", "diversity_rate", "diversity_per_batch", "random_start", "seed",
    )  # fmt: skip
    return {name: getattr(attack, name) for name in names} | {"objective": attack.objective_name}
