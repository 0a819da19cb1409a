"""Where the packages lie; everything else about the project stands in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["fusekern", "fusekern.*"]), "fusekern.kernels"],
    package_dir={"fusekern.kernels": "kernels"},
    package_data={"fusekern.recipes": ["*.yaml", "*/*.yaml"]},
)
