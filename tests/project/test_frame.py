"""The frame: what `make` installs is pinned, complete and the same everywhere."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest
import setuptools

import lora_core
from lora_core.__main__ import main
from tests.support import ROOT


@pytest.fixture
def package(monkeypatch):
    """The arguments that setup.py gives to setuptools."""
    given = {}
    monkeypatch.setattr(setuptools, "setup", lambda **kwargs: given.update(kwargs))
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(ROOT / "setup.py"))
    return given


def canonical(requirement):
    return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")


def pins():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("==") for line in lines)


def test_every_requirement_has_an_exact_version(package):
    pinned = {canonical(name) for name in pins()}
    extras = package["extras_require"]
    assert set(extras) == {
        "nf4",
        "hf",
        "gguf",
        "experiments",
        "offline",
        "compare",
        "test",
        "bench",
        "docs",
        "notebook",
        "lm",
        "base",
        "all",
    }
    assert set(extras["all"]) == {r for name, group in extras.items() if name not in ("lm", "base", "notebook") for r in group}
    for requirement in [*package["install_requires"], *(r for group in extras.values() for r in group)]:
        assert canonical(requirement) in pinned, f"{requirement} is not in constraints.txt"


def test_torch_is_pinned_so_that_a_cpu_build_will_do():
    assert pins()["torch"] == "2.13.0"  # no +cpu: a local build satisfies it, and so does the index's
    assert not any("+" in version for version in pins().values())


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """(sdist, wheel): what `python -m build` makes of the checkout, the wheel from the sdist."""
    pytest.importorskip("build", reason="build is not installed, so no package was built")
    place = tmp_path_factory.mktemp("package")
    shutil.copytree(ROOT, place / "source", ignore=shutil.ignore_patterns(".*", "build", "runs", "*.egg-info", "__pycache__"))
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(place), str(place / "source")]
    made = subprocess.run(build, capture_output=True, text=True, timeout=300)
    assert made.returncode == 0, made.stdout[-2000:] + made.stderr[-2000:]
    return next(place.glob("lora_core-*.tar.gz")), next(place.glob("lora_core-*.whl"))


def test_a_package_index_would_take_them(distributions):
    pytest.importorskip("twine", reason="twine is not installed, so the packages were not checked")
    check = [sys.executable, "-m", "twine", "check", "--strict", *map(str, distributions)]
    checked = subprocess.run(check, capture_output=True, text=True, timeout=120)
    assert checked.returncode == 0 and checked.stdout.count("PASSED") == 2, checked.stdout + checked.stderr


def test_the_sdist_is_the_checkout(distributions):
    with tarfile.open(distributions[0]) as archive:
        files = {name.partition("/")[2] for name in archive.getnames()}
    packages = ("lora_core", "experiments", "bench", "tests", "examples")
    sources = {path.relative_to(ROOT).as_posix() for package in packages for path in (ROOT / package).rglob("*.py")}
    assert sources | {"Makefile", "constraints.txt", "README.md", "CHANGELOG.md", "LICENSE", "docs/index.md"} <= files
    assert not [name for name in files if name.endswith(".pyc") or name.startswith(("runs", ".venv", "build/"))]


def test_the_wheel_is_the_engine_alone_and_asks_for_four_packages(distributions):
    with zipfile.ZipFile(distributions[1]) as archive:
        files = {name: archive.read(name).decode("utf-8", "replace") for name in archive.namelist()}
    (info,) = {name.split("/")[0] for name in files if not name.startswith("lora_core/")}
    assert info == f"lora_core-{lora_core.__version__}.dist-info"
    sources = {path for path in (ROOT / "lora_core").rglob("*") if path.suffix in (".py", ".typed", ".pyi")}
    assert {name for name in files if name.startswith("lora_core/")} == {str(path.relative_to(ROOT)) for path in sources}
    metadata = [line for line in files[f"{info}/METADATA"].splitlines() if line.startswith("Requires-Dist")]
    needed = {canonical(line.partition(": ")[2]) for line in metadata if "extra ==" not in line}
    assert needed == {"torch", "numpy", "safetensors", "tqdm"}
    assert "lora-core = lora_core.__main__:main" in files[f"{info}/entry_points.txt"]
    assert any(name.endswith("LICENSE") for name in files)


ALONE = """
import sys
for name in ("transformers", "accelerate", "bitsandbytes", "huggingface_hub", "peft", "pyarrow", "scipy", "sklearn", "pandas"):
    sys.modules[name] = None  # as if it were not installed
import runpy
runpy.run_path("examples/adapt_your_model.py", run_name="__main__")
from torch import nn
import lora_core
try:
    lora_core.quantize_nf4(nn.Sequential(nn.Linear(64, 64)))
except lora_core.LoraError as error:
    assert "pip install 'lora-core[nf4]'" in str(error)
else:
    raise AssertionError("quantised without bitsandbytes")
"""


def test_the_engine_works_with_what_it_requires_alone():
    run = subprocess.run([sys.executable, "-c", ALONE], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert "saved, loaded and merged" in run.stdout and not run.stderr


@pytest.mark.parametrize("example", sorted(path.name for path in (ROOT / "examples").glob("*.py")))
def test_the_examples_run(example, capfd):
    runpy.run_path(str(ROOT / "examples" / example), run_name="__main__")
    assert "kernels" not in capfd.readouterr().err


def test_the_command_says_its_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0 and capsys.readouterr().out == f"lora-core {lora_core.__version__}\n"


def test_continuous_integration_runs_what_make_test_runs():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK) and "make test" in script.read_text()
