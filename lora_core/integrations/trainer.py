"""transformers' Trainer, and trl's, on a model with an adapter.

    trainer = Trainer(model, arguments, train_dataset=data)          # the model after `inject`, its base dense or in 4 bits
    trainer.add_callback(AdapterCheckpoint(trainer))                 # checkpoints hold the adapter, and not the base
    trainer.train(resume_from_checkpoint=True)

    DPOTrainer(model, BaseAlone(model), ...)                         # trl: the reference is the same model without its adapter

Imported by whoever has transformers; the rest of the engine does not need it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import StateError
from ..files.adapter import CONFIG_FILE
from ..files.storage import load_adapter, save_adapter
from ..model.adapters import disable_adapters
from ..model.registry import adapter_parameters, find_adapter, registry_of
from ..model.sharding import is_spread
from ..model.wrappers import unwrap


class AdapterCheckpoint(TrainerCallback):
    """Makes a Trainer save and load one adapter where it would save and load the model: in checkpoints, in
    `resume_from_checkpoint`, `load_best_model_at_end`, `save_model` and `push_to_hub`.

    What it writes are PEFT's two files, and the tokenizer if the trainer has one; the optimiser, the schedule and the random
    states beside them in a checkpoint are the Trainer's own. A run that goes on from a checkpoint ends with the same weights,
    bit for bit on a CPU.

    Args:
        trainer: a Trainer, or one of a class made of it, such as trl's.
        adapter_name: which adapter; None: the active one.

    Raises:
        AdapterNameError: the model holds no adapters, or none of that name.
        StateError: several adapters are active and none is named; or it starts from the weights (PiSSA, say), so that its
            file holds another adapter than the one in training.
    """

    def __init__(self, trainer: Trainer, adapter_name: str | None = None) -> None:
        active = registry_of(trainer.model).active
        if adapter_name is None and len(active) != 1:
            raise StateError(f"{len(active)} adapters are active: {', '.join(active)}; give adapter_name, the one to save")
        self.trainer, self.adapter_name = trainer, active[0] if adapter_name is None else adapter_name
        config = find_adapter(trainer.model, self.adapter_name).config
        if config.as_stored() is not config:
            raise StateError(
                f"adapter {self.adapter_name!r} starts from the weights ({config.init_lora_weights!r}), so its file is another "
                "adapter, which can't be trained on; save it with save_adapter at the end, or choose another start"
            )
        # What the Trainer does with a model's files, it does in these three.
        trainer._save, trainer._load_from_checkpoint, trainer._load_best_model = self.save, self.load, self.load_best

    def save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Writes the adapter, and the tokenizer, into a directory; as `Trainer._save`."""
        trainer, directory = self.trainer, Path(output_dir or self.trainer.args.output_dir)
        if trainer.args.should_save or is_spread(unwrap(trainer.model)):  # all processes gather what is spread over them
            save_adapter(trainer.model, directory, self.adapter_name)
        tokenizer = trainer.processing_class or getattr(trainer.data_collator, "tokenizer", None)
        if trainer.args.should_save and tokenizer is not None:
            tokenizer.save_pretrained(directory)

    def load(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Reads the adapter of a checkpoint; as `Trainer._load_from_checkpoint`.

        Raises:
            StateError: the checkpoint holds no adapter.
            LoraError: what `load_adapter` raises: it is of another base, or of other layers.
        """
        directory = Path(resume_from_checkpoint)
        if not (directory / CONFIG_FILE).is_file():
            raise StateError(f"{directory} has no {CONFIG_FILE}: it was written before AdapterCheckpoint was added; start anew")
        load_adapter(self.trainer.model, directory, self.adapter_name)

    def load_best(self) -> None:
        """Reads the adapter of the best checkpoint; as `Trainer._load_best_model`."""
        self.load(self.trainer.state.best_model_checkpoint)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Refuses to train what no checkpoint would hold."""
        own = {id(p) for p in adapter_parameters(self.trainer.model, self.adapter_name)}
        model = unwrap(self.trainer.model)
        if others := [path for path, p in model.named_parameters() if p.requires_grad and id(p) not in own]:
            raise StateError(
                f"{len(others)} tensors are trained that are not of adapter {self.adapter_name!r}, so no checkpoint would hold "
                f"them: {', '.join(others[:3])}; name them in modules_to_save, or freeze them"
            )

    def on_push_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """What is about to be sent to the Hub is the output directory; without peft, the Trainer would copy nothing there."""
        self.save()


class BaseAlone(nn.Module):
    """A model without its adapters, as a module beside it: the reference of trl's DPOTrainer, at no memory of its own.

    It holds nothing: called, it runs `model` with all adapters disabled and without gradients; asked for anything else, it
    answers as `model` does.

    Args:
        model: a model with adapters.

    Raises:
        AdapterNameError: it holds none.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        registry_of(model)
        object.__setattr__(self, "model_with_adapters", model)  # not as a child: its parameters are not this module's

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Around whatever forward trl puts on this module: it asks for the base's parts, one after the other.
        with torch.no_grad(), disable_adapters(self.model_with_adapters):
            return super().__call__(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model_with_adapters(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model_with_adapters, name)
