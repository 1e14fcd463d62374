"""The house's rules, checked on the source: who may import whom, what stays out, and how long a file is."""

import ast
import graphlib
import re
import sys

import pytest

from tests.support import ROOT

ENGINE = ROOT / "lora_core"

#: The rooms of the engine from the bottom up. Each imports only from itself and from those before it.
ROOMS = (
    "errors",
    "progress",
    "spec",
    "cpu",
    "gpu",
    "maths",
    "bases",
    "methods",
    "layers",
    "model",
    "files",
    "integrations",
    "deploy",
    "cli",
    "",  # the package itself
    "__main__",
)
FORBIDDEN_IN_ENGINE = {"transformers", "datasets", "peft", "experiments", "bench", "tests", "loralib", "accelerate"}
ALLOWED_IN_ENGINE = {"torch", "safetensors", "numpy", "bitsandbytes"}
#: The one file that reads and writes torch's own files; tests/security holds it to reading tensors alone.
PICKLES = "files.pickled"
#: The command line's own: checks that run a model build it with transformers, in one file; bars are drawn in one.
ALSO_ALLOWED = {
    "integrations.pretrained": {"transformers", "huggingface_hub"},
    "integrations.model_class": {"transformers"},
    "integrations.trainer": {"transformers"},
    "progress": {"tqdm"},
    "files.formats.gguf": {"gguf"},
}
MAX_LINES = 300
#: Folders of tests that mirror no room: those of the packages beside the engine, those of the whole, and what is no test.
OTHER_TESTS = {"experiments", "bench", "interop", "security", "project", "servers", "support", "golden"}


def sources(*directories):
    return sorted(path for d in directories if (ROOT / d).is_dir() for path in (ROOT / d).rglob("*.py"))


def module_name(path):
    parts = path.relative_to(ENGINE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path):
    """(absolute module, names) of every import in a file, at any depth; relative ones start with "lora_core"."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, ()) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = path.relative_to(ROOT).parts[: -node.level]
                base = ".".join((*parents, *([node.module] if node.module else [])))
            found.append((base, tuple(alias.name for alias in node.names)))
    return found


def engine_imports(path):
    """Names of the engine's modules that a file imports."""
    names = set()
    for base, members in imports(path):
        if base.split(".")[0] != "lora_core":
            continue
        inner = base.removeprefix("lora_core").lstrip(".")
        submodules = [f"{inner}.{m}".lstrip(".") for m in members]
        hits = [name for name in submodules if name in NAMES]
        names.update(hits or [inner])
    return names


ENGINE_FILES = sources("lora_core")
NAMES = {module_name(path) for path in ENGINE_FILES}
BY_NAME = pytest.mark.parametrize("path", ENGINE_FILES, ids=lambda p: module_name(p) or "__init__")


def room(name):
    return name.partition(".")[0]


@BY_NAME
def test_a_file_imports_only_from_its_room_and_those_below(path):
    name = module_name(path)
    assert room(name) in ROOMS, f"{name} stands in no room of the house"
    above = {other for other in engine_imports(path) if ROOMS.index(room(other)) > ROOMS.index(room(name))}
    assert not above, f"{name} imports {above}, which stand above it"


def test_there_is_no_circle():
    graph = {module_name(path): engine_imports(path) - {module_name(path)} for path in ENGINE_FILES}
    graphlib.TopologicalSorter(graph).prepare()  # raises a CycleError, which names it


@BY_NAME
def test_the_engine_stays_small_in_what_it_needs(path):
    roots = {base.split(".")[0] for base, _ in imports(path)} - {"lora_core", "__future__"}
    roots -= ALSO_ALLOWED.get(module_name(path), set())
    assert not roots & FORBIDDEN_IN_ENGINE
    assert roots <= ALLOWED_IN_ENGINE | set(sys.stdlib_module_names)


def test_only_one_file_touches_bitsandbytes():
    users = {module_name(p) for p in ENGINE_FILES if any(base.split(".")[0] == "bitsandbytes" for base, _ in imports(p))}
    assert users == {"bases.bnb"}


def test_bitsandbytes_is_imported_only_when_asked_for():
    assert "bitsandbytes" not in imported_at_once("bases.bnb")


def test_transformers_is_imported_only_when_a_check_asks_for_it():
    assert not imported_at_once("integrations.pretrained") & {"transformers", "huggingface_hub"}
    users = {module_name(p) for p in ENGINE_FILES if "integrations.pretrained" in engine_imports(p)}
    assert users == {"deploy.basis", "deploy.check", "deploy.verification", "cli.commands"}


def imported_at_once(name):
    """The modules that a file of the engine imports at its top level."""
    tree = ast.parse((ENGINE / f"{name.replace('.', '/')}.py").read_text())
    nodes = [n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))]
    return {alias.name for n in nodes for alias in n.names} | {n.module for n in nodes if isinstance(n, ast.ImportFrom)}


def test_gguf_is_imported_only_when_asked_for():
    assert "gguf" not in imported_at_once("files.formats.gguf")


def files_with(pattern, outside):
    """Paths in the engine, but for one room, of files that the expression is found in."""
    names = (path.relative_to(ENGINE).as_posix() for path in ENGINE_FILES if re.search(pattern, path.read_text()))
    return {name for name in names if not name.startswith(outside)}


def test_few_know_a_base_or_a_method_by_its_name():
    assert len(files_with("nf4|4bit|quant_state|bitsandbytes", outside="bases/")) <= 5
    assert len(files_with("dora|magnitude", outside="methods/")) <= 5


@pytest.mark.parametrize(
    ("pattern", "owners"),
    [
        (r"base_model\.model|base_model\.(?=[\"'])", {"files/keys.py"}),
        (r"lora_[AB]\.(weight|bias)|lora_embedding_|lora_magnitude_vector", {"files/keys.py"}),
        (r"nf4/|/double", set()),
        (r"__metadata__|<Q", {"files/header.py"}),
        (r"overflows \{", {"maths/loss.py"}),
        (r"lora_(down|up|linear_layer|unet|te)|\.lora_[ab]\b|\"lora_[ab]\"|dora_scale", set()),
    ],
)
def test_a_fact_has_one_owner(pattern, owners):
    """Tensor keys, formats of packed weights, headers of safetensors files, what a cast lost, other tools' names."""
    room_of_it = {"nf4": "bases/", "lora_(down": "files/formats/"}
    found = files_with(pattern, outside=next((room for word, room in room_of_it.items() if word in pattern), "methods/"))
    assert found <= owners, found - owners


def test_the_walk_of_a_newcomer_is_an_afternoon_s():
    walk = ("maths/lora.py", "methods/lora.py", "layers/base.py", "layers/linear.py", "model/inject.py")
    assert sum(len((ENGINE / name).read_text().splitlines()) for name in walk) <= 750


@pytest.mark.parametrize("path", sources("lora_core", "experiments"), ids=lambda p: str(p.relative_to(ROOT)))
def test_no_peft_outside_tests_and_bench(path):
    assert not any(base.split(".")[0] == "peft" for base, _ in imports(path))


@pytest.mark.parametrize("path", sources("lora_core", "experiments", "bench"), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_is_short_enough_to_read(path):
    assert len(path.read_text().splitlines()) <= MAX_LINES


@pytest.mark.parametrize("path", sources("lora_core"), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_users_mistake_is_raised_not_asserted_and_nothing_is_pickled(path):
    tree = ast.parse(path.read_text())
    assert not [n.lineno for n in ast.walk(tree) if isinstance(n, ast.Assert)]
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call)]
    used = {ast.unparse(call.func) for call in calls}
    if module_name(path) == PICKLES:
        used -= {"torch.load", "torch.save"}
    assert not used & {"torch.load", "torch.save", "pickle.load", "pickle.loads", "pickle.dump", "eval", "exec"}


def test_tests_stand_in_the_rooms_that_they_test():
    here = ROOT / "tests"
    folders = {path.name for path in here.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders - OTHER_TESTS <= {name for name in ROOMS if (ENGINE / name).is_dir()}
    assert {path.parent for path in here.rglob("test_*.py")} <= {here / name for name in folders - {"support", "golden"}}
    assert all((path.parent / "__init__.py").is_file() for path in here.rglob("*.py"))  # or two of a name would clash


def test_what_tests_share_is_in_support():
    for path in sources("tests"):
        names = [f"{base}.{member}" for base, members in imports(path) for member in (*members, "")]
        assert not [name for name in names if re.search(r"(^|\.)test_", name)], path
        assert all(name.startswith("tests.support.") for name in names if name.startswith("tests.")), path


def test_every_public_name_exists_once_and_has_a_docstring():
    import lora_core

    assert sorted(set(lora_core.__all__)) == sorted(lora_core.__all__)
    for name in lora_core.__all__:
        assert getattr(lora_core, name).__doc__, name


def test_every_error_is_a_lora_error_and_a_builtin():
    from lora_core import errors

    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, Exception)]
    assert len(classes) > 5
    for error in classes:
        assert issubclass(error, errors.LoraError)
        builtins = [c for c in error.__mro__ if c.__module__ == "builtins" and c not in (Exception, BaseException, object)]
        assert builtins or error is errors.LoraError, error
