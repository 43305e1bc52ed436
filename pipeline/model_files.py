"""The files that a configuration names of a model: its checkpoint, its adapter, and whose tokenizer counts."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.models.adapter import Adapter, open_adapter
from pipeline.models.checkpoint import Checkpoint, open_checkpoint
from pipeline.settings import ModelSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """Everything but the weights, which nobody has read yet."""

    checkpoint: Checkpoint
    adapter: Adapter | None
    tokenizer: Checkpoint

    @property
    def tokenizer_is_adapters(self) -> bool:
        """Whether the adapter brings the tokenizer."""
        return self.adapter is not None and self.tokenizer.folder == self.adapter.folder

    def notes(self, model_path: str) -> list[str]:
        """What is worth knowing of the adapter, a sentence each."""
        if self.adapter is None:
            return []
        elsewhere = self.adapter.trained_elsewhere(model_path)
        brings = f"the tokenizer, its chat template and its end token are those that model.adapter={self.adapter.name} "
        return [
            *([] if elsewhere is None else [elsewhere]),
            *([f"{brings}brings; model.tokenizer names another"] if self.tokenizer_is_adapters else []),
        ]


def open_model_files(settings: ModelSettings) -> ModelFiles:
    """Open what the settings name; the tokenizer is the one asked for, else the adapter's own, else the model's."""
    checkpoint = open_checkpoint(settings.path, settings.revision)
    adapter = None if settings.adapter is None else open_adapter(settings.adapter, settings.adapter_revision)
    own = None if adapter is None else adapter.tokenizer
    tokenizer = checkpoint if own is None else own
    if settings.tokenizer is not None:
        tokenizer = open_checkpoint(settings.tokenizer)
    return ModelFiles(checkpoint=checkpoint, adapter=adapter, tokenizer=tokenizer)
