"""A matplotlib figure without a window, and its file. Colours that a colour-blind reader tells apart (Okabe and Ito)."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ikd_fast.files import write_bytes

FOUND, WRONG, MISSED, TRUTH = "#00E5A0", "#FF5A36", "#FFE100", "#FFFFFF"


def figure(width: float, height: float) -> Figure:
    """A figure of ``width`` x ``height`` inches."""
    fig = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(fig)
    return fig


def save(fig: Figure, path: Path, dpi: int = 110) -> Path:
    """Write ``fig`` whole: a PNG, or a JPEG where the name says ``.jpg``."""
    buffer = io.BytesIO()
    if path.suffix.lower() in (".jpg", ".jpeg"):
        fig.savefig(buffer, format="jpeg", dpi=dpi, pil_kwargs={"quality": 65, "optimize": True})
    else:
        fig.savefig(buffer, format="png", dpi=dpi)
    write_bytes(path, buffer.getvalue())
    return path


def draw_boxes(ax: Axes, boxes: Iterable[Any], colour: str, style: str = "-", width: float = 1.2) -> None:
    """Outline xyxy pixel boxes."""
    for x1, y1, x2, y2 in boxes:
        ax.add_patch(
            Rectangle((x1 - 0.5, y1 - 0.5), x2 - x1, y2 - y1, fill=False, ec=colour, ls=style, lw=width)
        )


def show(ax: Axes, image: Any, title: str = "") -> None:
    """An ``[H,W,3]`` uint8 image without axes."""
    ax.imshow(image, interpolation="nearest")
    ax.set_title(title, fontsize=9)
    ax.set_xticks([])
    ax.set_yticks([])
