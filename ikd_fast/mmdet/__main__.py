"""``python -m ikd_fast.mmdet SCRIPT ARGS...``: run an mmdet script where mmcv has no compiled operators."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from .compat import activate
from .compat.distributed import leaving_together
from .compat.environment import package_folder

USAGE = """usage: python -m ikd_fast.mmdet SCRIPT [ARGS...]

Run an mmdet script with ikd_fast.mmdet.compat active: with mmcv-lite the compiled mmcv operators (nms, soft-nms, focal
loss, RoIAlign, deformable convolution) are served by torchvision or plain PyTorch, and mmengine checkpoints load on
torch >= 2.6.

SCRIPT  a path, or a script of the installed mmdet: tools/train.py, tools/test.py, ...
ARGS    passed to the script unchanged

examples:
  python -m ikd_fast.mmdet tools/test.py CONFIG.py epoch_24.pth
  torchrun --nproc_per_node 8 -m ikd_fast.mmdet tools/train.py CONFIG.py --launcher pytorch
"""


def candidates(script: str) -> list[Path]:
    """Where ``script`` may lie, in the order tried: as given, then inside the installed mmdet."""
    places = [Path(script).expanduser()]
    folder = package_folder("mmdet")
    if folder is not None and not places[0].is_absolute():
        # .mim in a wheel; beside the package in a source checkout.
        places += [folder / ".mim" / script, folder.parent / script]
    return places


def main() -> None:
    arguments = sys.argv[1:]
    if arguments and arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return
    if not arguments or arguments[0].startswith("-"):
        print(
            f"error: expected a script first, got {arguments[0] if arguments else 'nothing'}\n",
            file=sys.stderr,
        )
        print(USAGE, end="", file=sys.stderr)
        sys.exit(2)
    places = candidates(arguments[0])
    script = next((path for path in places if path.is_file()), None)
    if script is None:
        tried = "\n  ".join(str(path) for path in places)
        print(f"error: script {arguments[0]!r} not found; looked at\n  {tried}", file=sys.stderr)
        sys.exit(2)
    activate()
    # As `python SCRIPT ARGS...` would set them.
    sys.argv = [str(script), *arguments[1:]]
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = str(script.resolve().parent)
    with leaving_together():
        runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
