"""``ikd-fast`` and ``python -m ikd_fast``: the command line, or the extra that it needs."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; exit 1 with the line to write where typer or rich is missing."""
    try:
        from .cli import main as run
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        sys.exit(f'ikd-fast needs {error.name}, which is not installed. Write: pip install "ikd_fast[cli]"')
    run()


if __name__ == "__main__":
    main()
