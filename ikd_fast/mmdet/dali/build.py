"""A ``DALIDetLoader`` from mmengine's dict of a loader."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mmengine.config import Config

TYPE = "DALIDetLoader"
_OURS = ("device", "device_id", "threads", "prefetch", "on_error", "channel_order", "resizer")


def is_dali(loader: Any) -> bool:
    """Whether a loader's config asks for DALI.

    Raises:
        ValueError: it nearly does.
    """
    # mmengine takes a dict, a ConfigDict, a Config, which is no Mapping, or a loader that is built already.
    kind = loader.get("type") if isinstance(loader, (Mapping, Config)) else None
    if isinstance(kind, str) and kind != TYPE and kind.lower() == TYPE.lower():
        raise ValueError(f"a loader's type is {kind!r}: did you mean {TYPE!r}?")
    return kind == TYPE


def build_dali_loader(build: Callable[..., Any], loader: Mapping[str, Any], **kwargs: Any) -> Any:
    """Data set, sampler and workers as ``build`` (mmengine's) makes them of the rest of the dict, the pixels through DALI.

    Raises:
        ValueError: ``output`` other than ``"mmdet"``, or a ``collate_fn``.
    """
    from ikd_fast.dali import DALIDetLoader

    from .source import noting_unusable_boxes

    cfg = dict(loader)
    cfg.pop("type")
    if cfg.pop("output", "mmdet") != "mmdet":
        raise ValueError(
            f"train_dataloader: {TYPE}(output={loader['output']!r}) is for loops of your own; expected 'mmdet'"
        )
    if "collate_fn" in cfg:
        raise ValueError(f"train_dataloader: {TYPE} makes its batches itself; leave collate_fn out")
    ours = {name: cfg.pop(name) for name in _OURS if name in cfg}
    cfg.setdefault("num_workers", 0)
    with noting_unusable_boxes():
        plain = build(cfg, **kwargs)
    workers = {}
    if plain.num_workers:
        workers = dict(
            persistent_workers=plain.persistent_workers,
            prefetch_factor=plain.prefetch_factor,
            multiprocessing_context=plain.multiprocessing_context,
            worker_init_fn=plain.worker_init_fn,
            timeout=plain.timeout,
        )
    return DALIDetLoader(
        plain.dataset, batch_sampler=plain.batch_sampler, num_workers=plain.num_workers, **workers, **ours
    )
