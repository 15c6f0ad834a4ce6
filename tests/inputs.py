"""Tensors and models that several tests use."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import transformers

from hf_flashprefill.support.families import tiny_model

__all__ = ["UGLY_CASES", "Case", "exact_dense", "tiny_gemma3", "tiny_model"]


@dataclass(frozen=True)
class Case:
    """Shapes of one operator call; ``ranges`` are valid (first, end) buffer positions per row."""

    batch: int
    heads: int
    key_heads: int
    query_len: int
    kv_len: int
    head_dim: int
    ranges: tuple[tuple[int, int], ...] | None = None
    query_offset: int | None = None
    dtype: torch.dtype = torch.float32
    strided: bool = False

    def __str__(self) -> str:
        parts = [f"b{self.batch}", f"h{self.heads}/{self.key_heads}", f"q{self.query_len}/{self.kv_len}", f"d{self.head_dim}"]
        parts += ["ranges"] if self.ranges else []
        parts += [f"at{self.query_offset}"] if self.query_offset is not None else []
        parts += ["strided"] if self.strided else []
        return "-".join([*parts, str(self.dtype).removeprefix("torch.")])

    @property
    def offset(self) -> int:
        return self.kv_len - self.query_len if self.query_offset is None else self.query_offset

    def tensors(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Query, key, value and valid ranges. Keys of a neighbourhood share a direction, so that block means differ and
        thresholds decide something; whatever is not valid is NaN, so that whoever reads it is found out."""
        query = self._random(self.heads, self.query_len, device)
        key = self._random(self.key_heads, self.kv_len, device)
        directions = 2 * torch.randn(self.batch, self.key_heads, self.kv_len // 64 + 1, self.head_dim, device=device)
        key += directions.repeat_interleave(64, 2)[:, :, : self.kv_len].to(self.dtype)
        value = self._random(self.key_heads, self.kv_len, device)
        ranges = None
        if self.ranges is not None:
            ranges = torch.tensor(self.ranges, device=device)
            for row, (first, end) in enumerate(self.ranges):
                for tensor in (key, value):
                    tensor[row, :, :first] = float("nan")
                    tensor[row, :, end:] = float("nan")
                position = self.offset + torch.arange(self.query_len, device=device)
                query[row, :, (position < first) | (position >= end)] = float("nan")
        return query, key, value, ranges

    def _random(self, heads: int, tokens: int, device: torch.device) -> torch.Tensor:
        if not self.strided:
            return torch.randn(self.batch, heads, tokens, self.head_dim, device=device).to(self.dtype)
        # As projections leave it: tokens outermost, and a row longer than the heads need.
        wide = torch.full((self.batch, tokens, heads, self.head_dim + 8), float("nan"), device=device, dtype=self.dtype)
        wide[..., : self.head_dim] = torch.randn(self.batch, tokens, heads, self.head_dim, device=device)
        return wide[..., : self.head_dim].transpose(1, 2)


UGLY_CASES = [
    Case(1, 2, 2, 1, 1, 64),
    Case(1, 4, 1, 63, 63, 64),
    Case(1, 2, 1, 127, 127, 80),
    Case(2, 4, 2, 129, 129, 64),
    Case(1, 7, 1, 300, 300, 64, strided=True),
    Case(1, 2, 1, 200, 700, 96),
    Case(1, 2, 2, 130, 400, 64, query_offset=37),
    Case(1, 2, 1, 257, 257, 128),
    Case(1, 1, 1, 140, 300, 256),
    Case(3, 2, 1, 400, 400, 64, ranges=((150, 400), (0, 260), (0, 400))),
    Case(3, 2, 2, 200, 600, 64, ranges=((100, 600), (0, 450), (590, 600)), strided=True),
    Case(2, 2, 1, 129, 129, 64, ranges=((5, 5), (0, 129))),
]


def tiny_gemma3(vocab_size: int = 200, **text: object) -> transformers.PreTrainedModel:
    """A model of text and images, with random weights; ``text`` are settings of its part for text."""
    settings = tiny_model("gemma3", vocab_size=vocab_size).config.to_dict() | text
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
    config = transformers.Gemma3Config(
        text_config=settings, vision_config=vision | {"patch_size": 14}, mm_tokens_per_image=4, image_token_index=vocab_size - 1
    )
    return transformers.Gemma3ForConditionalGeneration._from_config(config).eval()


def exact_dense(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    offset: int,
    ranges: torch.Tensor | None,
    scale: float,
    sliding_window: int | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention in float64 with a dense mask; zeros for queries that are padding."""
    batch, heads, query_len, _ = query.shape
    group = heads // key.shape[1]
    key_position = torch.arange(key.shape[2], device=query.device)
    query_position = offset + torch.arange(query_len, device=query.device)
    output = torch.zeros(query.shape, dtype=torch.float64, device=query.device)
    for row in range(batch):
        first, end = (0, key.shape[2]) if ranges is None else ranges[row].tolist()
        used = (query_position >= first) & (query_position < end)
        distance = query_position[used, None] - key_position[first:end]
        seen = (distance >= 0) & (distance < (sliding_window or key.shape[2]))
        for head in range(heads):
            keys, values = (tensor[row, head // group, first:end].double() for tensor in (key, value))
            logits = (query[row, head, used].double() @ keys.T * scale).masked_fill(~seen, float("-inf"))
            sink = torch.full((1, 1), float("-inf")) if sinks is None else sinks[head].double().reshape(1, 1)
            weights = torch.cat([logits, sink.to(logits).expand(len(logits), 1)], 1).softmax(-1)[:, :-1]
            output[row, head, used] = weights @ values
    return output


def with_one_huge_block(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, block_size: int, size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Query [B, Hq, S, D], key and value [B, Hkv, S, D] and the number of the only block whose keys the queries have logits of
    2^size to 2^(size + 2) with; with others these are below 2^(size / 2 + 6)."""
    tokens, head_dim = query.shape[2:]
    huge = tokens // block_size // 2
    rows = slice(huge * block_size, (huge + 1) * block_size)
    factors = 1 + torch.rand(tokens, 1, device=query.device)
    direction = torch.nn.functional.normalize(torch.randn(head_dim, device=query.device), dim=0)
    direction *= head_dim**0.25 * 2 ** (size / 2)
    query = (factors * direction).to(query.dtype).expand_as(query).contiguous()
    key = key.clone()
    key[:, :, rows] = (factors[rows] * direction).to(key.dtype)
    return query, key, value, huge
