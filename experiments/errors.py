"""What a user of the experiments can get wrong. A message is one line: what was found, what to do."""

from lora_core.errors import LoraError


class ExperimentError(LoraError, ValueError):
    """The data, the base model or a setting can't be used as asked."""
