"""The frame: what `make` installs is pinned, complete and the same everywhere."""

import os
import re
import runpy

import pytest
import setuptools

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
    assert set(extras) == {"offline", "test", "compare", "bench"}
    for requirement in [*package["install_requires"], *(r for group in extras.values() for r in group)]:
        assert canonical(requirement) in pinned, f"{requirement} is not in constraints.txt"


def test_torch_is_pinned_so_that_a_cpu_build_will_do():
    assert pins()["torch"] == "2.13.0"  # no +cpu: a local build satisfies it, and so does the index's
    assert not any("+" in version for version in pins().values())


def test_the_packages_are_those_of_the_project(package):
    assert package["name"] == "lora-core"
    assert {name.split(".")[0] for name in package["packages"]} <= {"lora_core", "experiments", "bench"}
    assert {"lora_core", "lora_core.layers", "experiments"} <= set(package["packages"])


def test_the_engine_is_installed_without_the_tools_of_its_tests(package):
    assert not {"peft", "loralib", "pytest"} & {canonical(r) for r in package["install_requires"]}


def test_continuous_integration_runs_what_make_test_runs():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK) and "make test" in script.read_text()
