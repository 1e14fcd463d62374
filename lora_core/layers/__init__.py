"""The injected layers: for each kind of base layer, a subclass of it that carries adapters."""

from .base import LoraLayer
from .linear import LoraConv1D, LoraLinear, lora_class

__all__ = ["LoraConv1D", "LoraLayer", "LoraLinear", "lora_class"]
