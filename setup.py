"""Package layout: ``kernels/`` and ``configs/`` live at the top level and are imported below ``ikd_fast``.

Everything else is declared in ``pyproject.toml``; the folder mapping needs code because namespace packages
below the mapped folders have to be listed by name.
"""

from setuptools import find_namespace_packages, setup

PACKAGE_DIR = {"ikd_fast.kernels": "kernels", "ikd_fast.configs": "configs"}


def packages() -> list[str]:
    found = find_namespace_packages(include=["ikd_fast", "ikd_fast.*"])
    for name, folder in PACKAGE_DIR.items():
        found += [name, *(f"{name}.{sub}" for sub in find_namespace_packages(folder))]
    return sorted(set(found))


setup(packages=packages(), package_dir=PACKAGE_DIR)
