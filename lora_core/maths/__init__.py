"""LoRA on plain tensors: no modules, no names, no state."""
