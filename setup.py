"""Packages of a wheel. What is in pyproject.toml is not here.

`train`, `assets` and `orchestration` go below `openlm_pipeline/programs`, so that no other program imports them by
these names, which others have too. A checkout has them at its root.
"""

from setuptools import find_packages, setup

PROGRAMS = ("train", "assets", "orchestration")
INSIDE = "openlm_pipeline.programs"

packages, folders, data = find_packages(include=["openlm_pipeline*"]), {}, {}
for top in PROGRAMS:
    packages += [f"{INSIDE}.{name}" for name in (top, *(f"{top}.{sub}" for sub in find_packages(top)))]
    folders[f"{INSIDE}.{top}"] = top
    data[f"{INSIDE}.{top}"] = ["*.yaml"]

setup(packages=packages, package_dir=folders, package_data=data)
