"""Print the lowest declared versions: for pip's `--constraint` those of all packages but torch, with `--torch` torch's.

python .ci/lowest.py EXTRA ...
"""

import re
import sys
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text("utf-8"))["project"]
extras = [each for extra in sys.argv[1:] if extra != "--torch" for each in project["optional-dependencies"][extra]]
lowest = {}
for requirement in [*project["dependencies"], *extras]:
    match = re.fullmatch(r"([\w.-]+)(?:\[\w+\])?>=([\w.]+)(?:,<[\w.]+)?", requirement)
    assert match is not None, f"{requirement} has no lowest version"
    lowest[match[1]] = match[2]
torch = lowest.pop("torch")  # old versions have no build for CPUs alone in the usual index
print(torch if "--torch" in sys.argv else "\n".join(f"{name}=={version}" for name, version in lowest.items()))
