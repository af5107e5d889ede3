"""Classifiers on the text model, with the names that transformers gives them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .config import TextConfig
from .text import Head, gradients, initialize


class SequenceClassifier(Head):
    """One label a sequence, read at its last real token. The head is `score`, without a bias, as in transformers."""

    def __init__(
        self,
        config: TextConfig,
        num_labels: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(config, device, dtype)
        self.score = nn.Linear(config.hidden_size, num_labels, bias=False, device=device, dtype=dtype)
        initialize(self.score, config.initializer_range)

    def forward(
        self, input_ids: Tensor | None = None, *, attention_mask: Tensor | None = None, **inputs: Any
    ) -> Tensor:
        """Logits [B, num_labels]; arguments as of `TextModel.forward`. Without attention_mask the config's pad_token_id,
        if it has one, marks the padding. cu_seqlens gives a row for each document, [N, num_labels]. Raises
        ValueError for a sequence without tokens.
        """
        pad, cu_seqlens = self.config.pad_token_id, inputs.get("cu_seqlens")
        if attention_mask is None and cu_seqlens is None and pad is not None and input_ids is not None:
            attention_mask = input_ids != pad
        hidden, _ = self.model(input_ids, attention_mask=attention_mask, **inputs)
        rows = torch.arange(len(hidden), device=hidden.device)
        if cu_seqlens is not None:
            empty = cu_seqlens.diff() == 0
            rows, last = torch.zeros_like(cu_seqlens[1:]), cu_seqlens[1:] - 1
        elif attention_mask is not None:
            real = attention_mask != 0
            empty, last = ~real.any(1), (torch.arange(real.shape[1], device=real.device) * real).argmax(1)
        else:
            empty, last = torch.zeros_like(rows), torch.full_like(rows, hidden.shape[1] - 1)
        if empty.any() or hidden.shape[1] == 0:
            raise ValueError(
                "SequenceClassifier: expected a token at least in each sequence, got an empty one"
            )
        with gradients(inputs.get("cache")):
            return self.score(hidden[rows.to(hidden.device), last.to(hidden.device)])


class TokenClassifier(Head):
    """One label a token. The head is `score`, with a bias, as in transformers."""

    def __init__(
        self,
        config: TextConfig,
        num_labels: int,
        *,
        dropout: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(config, device, dtype)
        self.dropout = nn.Dropout(dropout)
        self.score = nn.Linear(config.hidden_size, num_labels, device=device, dtype=dtype)
        initialize(self.score, config.initializer_range)

    def forward(self, input_ids: Tensor | None = None, **inputs: Any) -> Tensor:
        """Logits [B, T, num_labels]; arguments as of `TextModel.forward`."""
        hidden, _ = self.model(input_ids, **inputs)
        with gradients(inputs.get("cache")):
            return self.score(self.dropout(hidden))


class QuestionAnswering(Head):
    """Where an answer starts and ends. The head is `qa_outputs`, with a bias, as in transformers."""

    def __init__(
        self,
        config: TextConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(config, device, dtype)
        self.qa_outputs = nn.Linear(config.hidden_size, 2, device=device, dtype=dtype)
        initialize(self.qa_outputs, config.initializer_range)

    def forward(self, input_ids: Tensor | None = None, **inputs: Any) -> tuple[Tensor, Tensor]:
        """(start logits, end logits), each [B, T]; arguments as of `TextModel.forward`."""
        hidden, _ = self.model(input_ids, **inputs)
        with gradients(inputs.get("cache")):
            start, end = self.qa_outputs(hidden).unbind(-1)
            return start, end
