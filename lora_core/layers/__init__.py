"""The injected layers: for each kind of base layer, a subclass of it that carries adapters."""

from .base import LoraLayer
from .conv import LoraConv
from .embedding import LoraEmbedding
from .kinds import lora_class, why_not
from .linear import LoraConv1D, LoraLinear

__all__ = ["LoraConv", "LoraConv1D", "LoraEmbedding", "LoraLayer", "LoraLinear", "lora_class", "why_not"]
