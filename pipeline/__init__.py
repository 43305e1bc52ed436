"""Offline batch inference for quantized LLMs. See docs/architecture.md."""

__version__ = "0.2.0"
