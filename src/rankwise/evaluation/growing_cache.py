"""Keys and values that grow in place. transformers' own layer copies all of them for each new token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

ROOM_TOKENS = 64
# Tokens by which the buffers grow at a time.


class GrowingLayer(DynamicLayer):
    """``keys`` and ``values`` (B, heads, L, D) are views of buffers with room behind them."""

    _buffers: tuple[Tensor, Tensor]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.device = key_states.device
        self._buffers = key_states[:, :, :0], value_states[:, :, :0]
        self.keys, self.values = self._buffers
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        start = self.keys.shape[-2]
        end = start + key_states.shape[-2]
        if end > self._buffers[0].shape[-2]:
            self._buffers = _grown(self._buffers[0], start, end), _grown(self._buffers[1], start, end)
        for buffer, new in zip(self._buffers, (key_states, value_states)):
            buffer[:, :, start:end] = new
        self.keys, self.values = (buffer[:, :, :end] for buffer in self._buffers)
        return self.keys, self.values

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._own()

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._own()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx.long())  # type: ignore[arg-type]
        self._own()

    def _own(self) -> None:
        if self.is_initialized:
            assert self.keys is not None
            assert self.values is not None
            self._buffers = self.keys, self.values


def _grown(buffer: Tensor, used: int, needed: int) -> Tensor:
    *shape, _, size = buffer.shape
    larger = buffer.new_empty((*shape, needed + ROOM_TOKENS, size))
    larger[:, :, :used] = buffer[:, :, :used]
    return larger


def growing_cache(model: Any) -> DynamicCache:
    """The model's own kind of cache, with layers of full attention that grow in place."""
    cache = DynamicCache(config=model.config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def repeated(cache: DynamicCache, count: int) -> DynamicCache:
    """A copy of a cache of one row for ``count`` rows."""
    copy = DynamicCache()
    for layer in cache.layers:
        assert isinstance(layer, GrowingLayer)
        assert layer.keys is not None
        assert layer.values is not None
        new = GrowingLayer()
        new.update(*(tensor.expand(count, *tensor.shape[1:]) for tensor in (layer.keys, layer.values)))
        copy.layers.append(new)
    return copy


def shares_prefixes(cache: DynamicCache) -> bool:
    """Whether ``repeated`` can take this cache: full attention in every layer."""
    return bool(cache.layers) and all(isinstance(layer, GrowingLayer) for layer in cache.layers)


def as_tensor(rows: list[list[int]], pad: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Left-padded token ids (B, L) and their mask (B, L)."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask
