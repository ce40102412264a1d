"""``ikd-fast init STUDENT TEACHER CKPT``."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout

from ikd_fast.mmdet.compat import activate
from ikd_fast.mmdet.errors import InputError


def run(student: str, teacher: str, checkpoint: str) -> None:
    """Print the config; what was chosen and what is wrong goes to stderr.

    Raises:
        InputError: the config would not train as it is; it is printed all the same, to be edited.
    """
    activate()
    # What mmdet prints while it builds is not part of the config.
    with redirect_stdout(sys.stderr):
        from ikd_fast.mmdet.init import draft

        found = draft(student, teacher, checkpoint)
    print(found.text, end="")
    for note in found.notes:
        print(f"note: {note}", file=sys.stderr)
    if found.problems:
        listed = "\n".join(f"  - {problem}" for problem in found.problems)
        raise InputError(f"the config does not train as it was printed:\n{listed}")
