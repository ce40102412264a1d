"""Bodies of the commands; :mod:`ikd_fast.cli` lists them and imports each when it is called."""
