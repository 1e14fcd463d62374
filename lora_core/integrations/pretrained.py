"""Models and tokenizers of transformers, for the checks that have to run one. It imports transformers, and
the Hub's client, when they are first asked for: merging needs neither.
"""

from __future__ import annotations

import re
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..bases import adopt_layers
from ..errors import FileFormatError, MissingDependencyError
from ..files.checkpoint import TOKENIZER_CONFIG, TOKENIZER_FILES, read_config
from ..files.disk import expanded, is_directory
from ..files.reading import check_directory
from .model_class import LOCAL
from .packages import packaged

WANTED = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", *TOKENIZER_FILES)
TIME_LIMIT = 3.0  # seconds, for the Hub to say that it is there

AUTO_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
}


def find_base(reference: str) -> Path:
    """The directory of a base: `reference` itself, or the Hub's model of that name, from a package, its cache, or fetched now.

    Raises:
        FileFormatError: it is neither, or the Hub can't be reached.
    """
    path = expanded(reference)
    if is_directory(path):
        return path
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", reference):
        raise FileFormatError(f"the base {reference!r} is no directory, and no name of the Hub")
    if directory := packaged(reference):
        return directory
    try:
        from huggingface_hub import constants, snapshot_download
    except ImportError:
        raise MissingDependencyError(
            f"the base {reference!r} is no directory; to look it up on the Hub, pip install 'lora-core[hf]'"
        ) from None
    try:
        return Path(snapshot_download(reference, local_files_only=True))
    except Exception:  # not in the cache; what is raised then differs between versions
        obstacle = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else _obstacle(constants.ENDPOINT)
    if obstacle:
        raise FileFormatError(f"the base {reference!r} is no directory, not in the Hub's cache, and {obstacle}")
    try:
        return Path(snapshot_download(reference, allow_patterns=list(WANTED)))
    except Exception as error:  # the client's and its HTTP library's errors share no base
        raise FileFormatError(f"the base {reference!r} could not be fetched: {error}") from None


def _obstacle(endpoint: str) -> str | None:
    """What stands between this process and the Hub; the client itself would try for up to a minute."""
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=TIME_LIMIT).close()
    except urllib.error.HTTPError:
        return None
    except (OSError, ValueError):
        return "the Hub is out of reach"
    return None


def load_model(directory: Path, task: str | None, dtype: torch.dtype, strict: bool, **settings: Any) -> nn.Module:
    """A model of transformers from a directory, in eval mode.

    Args:
        directory: of the model.
        task: one of LoraConfig's task types, which says the class; None: config.json says it.
        dtype: of its weights.
        strict: whether every weight must be in the files and every tensor of the files in the model.
        settings: others for `from_pretrained`.

    Raises:
        FileFormatError: it can't be loaded, or not exactly.
    """
    library = _transformers()
    named = read_config(directory).get("architectures")
    check_directory(directory, WANTED)
    name = AUTO_CLASSES.get(task or "") or (named[0] if isinstance(named, list) and named else "AutoModel")
    kind = getattr(library, str(name), None)
    if kind is None or not hasattr(kind, "from_pretrained"):
        raise FileFormatError(f"{directory}: its class {name!r} is not known to this version of transformers")
    try:
        model, loading = kind.from_pretrained(
            directory, dtype=dtype, use_safetensors=True, output_loading_info=True, **LOCAL, **settings
        )
    except Exception as error:  # of many kinds
        raise FileFormatError(f"{directory} can't be loaded as {name}: {error}") from None
    problems = {kind: sorted(map(str, keys)) for kind, keys in loading.items() if keys}
    if strict and problems:
        listed = "; ".join(f"{kind.replace('_', ' ')}: {', '.join(keys[:3])}" for kind, keys in problems.items())
        raise FileFormatError(f"{directory} does not load exactly as {name}: {listed}")
    adopt_layers(model)
    return model.eval()


def in_float32(model: nn.Module) -> nn.Module:
    """`model`, computing in float32: two models are then compared by their weights, not by their arithmetic."""
    for module in model.modules():
        if isinstance(getattr(module, "compute_dtype", None), torch.dtype):
            module.compute_dtype = torch.float32  # type: ignore[assignment]  # torch knows tensors and modules there
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.float()
    return model


def tokenize(
    directories: Sequence[Path], texts: Sequence[str], max_length: int | None = None, special: bool = True
) -> dict[str, Tensor]:
    """Texts as a padded batch, by the first tokenizer that one of the directories has; `special`: with its tokens around them.

    Raises:
        FileFormatError: none has one.
    """
    tokenizer = _tokenizer(directories)
    longest = min(max_length or 512, tokenizer.model_max_length)
    settings = {"padding": True, "truncation": True, "max_length": longest, "add_special_tokens": special}
    return dict(tokenizer(list(texts), **settings, return_tensors="pt"))


def ask(directories: Sequence[Path], questions: Sequence[str]) -> dict[str, Tensor]:
    """Questions as a padded batch of prompts, each as the tokenizer's chat template has a user ask it; without a template, as
    they are.

    Raises:
        FileFormatError: none of the directories has a tokenizer, or its template can't write them.
    """
    tokenizer = _tokenizer(directories)
    if not tokenizer.chat_template:
        return tokenize(directories, questions)
    turns = ([{"role": "user", "content": question}] for question in questions)
    try:
        prompts = [tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) for turn in turns]
    except Exception as error:  # whatever a template raises
        raise FileFormatError(f"the chat template of {tokenizer.name_or_path} refuses a question: {error}") from None
    return tokenize(directories, prompts, special=False)


def _tokenizer(directories: Sequence[Path]) -> Any:
    directory = next((d for d in directories if (d / TOKENIZER_CONFIG).is_file()), None)
    if directory is None:
        raise FileFormatError(f"neither of {', '.join(map(str, directories))} has a tokenizer ({TOKENIZER_CONFIG})")
    check_directory(directory, TOKENIZER_FILES)
    try:
        tokenizer = _transformers().AutoTokenizer.from_pretrained(directory, **LOCAL)
    except Exception as error:  # of many kinds
        raise FileFormatError(f"the tokenizer in {directory} can't be loaded: {error}") from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingDependencyError(f"to run a model, pip install 'lora-core[hf]' ({error})") from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers
