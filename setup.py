"""The package mapping, and nothing else: the folders stand at the root and are imported as `longreach.*`.

A bare top-level `kernels` would collide with the package of that name that transformers looks for.
"""

from setuptools import find_packages, setup

FOLDERS = ("kernels", "engine", "rl")
PACKAGES = [name for folder in FOLDERS for name in (folder, *(f"{folder}.{sub}" for sub in find_packages(folder)))]

setup(
    packages=[f"longreach.{name}" for name in PACKAGES],
    package_dir={f"longreach.{name}": name.replace(".", "/") for name in PACKAGES},
)
