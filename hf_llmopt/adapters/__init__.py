"""LoRA adapters, a different one for each request of a pass."""

from .lora import LoraLayers, check

__all__ = ["LoraLayers", "check"]
