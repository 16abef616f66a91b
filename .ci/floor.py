"""Prints the lowest version of each direct dependency in pyproject.toml, as constraints for pip."""

import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
lists = [project["dependencies"], *project["optional-dependencies"].values()]
print("\n".join(sorted({line.replace(">=", "==") for lines in lists for line in lines if ">=" in line})))
