"""What people have published: every LoRA configuration that PEFT reads is read, and every call that it takes is taken.

    python -m tests.support.wild DIRECTORY        # with configs/*.json and calls.json; prints the counts

The files are not part of the project.
"""

import json
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import peft

from lora_core import LoraConfig, LoraError
from lora_core.files.config import config_from_json
from lora_core.spec.peft_fields import NOT_HERE


def as_peft_reads(path):
    """PEFT's configuration of a file; None if it reads none."""
    with tempfile.TemporaryDirectory() as directory:
        shutil.copy(path, Path(directory, "adapter_config.json"))
        try:
            return peft.PeftConfig.from_pretrained(directory)
        except Exception:  # whatever it is
            return None


def peft_takes(call):
    try:
        return bool(peft.LoraConfig(**call))
    except Exception:
        return False


def files(directory):
    """{file: (PEFT's configuration or None, ours or the error)}."""
    found = {}
    for path in sorted(Path(directory, "configs").glob("*.json")):
        try:
            ours = config_from_json(path)
        except LoraError as error:
            ours = error
        found[path.name] = as_peft_reads(path), ours
    return found


def calls(directory):
    """[(fields, whether PEFT takes them, our configuration or the error)]."""
    found = []
    for call in json.loads(Path(directory, "calls.json").read_text()):
        try:
            ours = LoraConfig(**call)
        except LoraError as error:
            ours = error
        found.append((call, peft_takes(call), ours))
    return found


def refused_by_name(call, error):
    """Whether a call asks for what is on the list of what is refused, and the error names that."""
    return any(call.get(name) and f"{name}=" in str(error) for name in NOT_HERE)


def main(directory):
    warnings.simplefilter("ignore")
    read = files(directory).values()
    lora = [ours for theirs, ours in read if isinstance(theirs, peft.LoraConfig)]
    ok = sum(isinstance(config, LoraConfig) for config in lora)
    taken = calls(directory)
    errors = [(call, by_peft, ours) for call, by_peft, ours in taken if isinstance(ours, LoraError)]
    named = sum(refused_by_name(call, error) for call, _, error in errors)
    print(f"{len(read)} files: PEFT reads {len(lora)} as LoRA, of which {ok} are read here")
    print(f"{len(taken)} calls: {len(taken) - len(errors)} construct; {named} ask for what is refused by name; ", end="")
    print(f"{sum(not by_peft for _, by_peft, _ in errors)} raise in PEFT too")


if __name__ == "__main__":
    main(sys.argv[1])
