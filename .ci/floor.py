"""Prints the lowest version of each direct dependency in pyproject.toml, as constraints for pip."""

import re
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
lists = [project["dependencies"], *project["optional-dependencies"].values()]
floors = {line.replace(">=", "==") for lines in lists for line in lines if ">=" in line}
print("\n".join(sorted(re.sub(r"\[.*\]", "", floor) for floor in floors)))  # constraints have no extras
