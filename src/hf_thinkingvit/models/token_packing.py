"""
Images with different numbers of tokens, packed one after another without padding: which image each token belongs to,
and attention of each image over its own tokens.
"""

import inspect
from collections.abc import Callable
from functools import cache
from itertools import accumulate

import torch
from torch import nn


class PackedTokens:
    """
    Image and position of each packed token of a batch. Rebuilt only when tokens leave.

    Args:
        position (`torch.LongTensor` of shape `(tokens,)`): index of each token in the flattened `(batch, num_tokens)`.
        batch_size, num_tokens (`int`): sizes of the batch before any token left.
        num_prefix (`int`): number of prefix tokens (class, distillation), which are the first of each image.

    Attributes:
        image (`torch.LongTensor` of shape `(tokens,)`): index of the image of each token.
        prefix (`torch.LongTensor`): indices of the prefix tokens among the packed tokens.
        prefix_slot (`torch.LongTensor`): index of each prefix token in the flattened `(batch, num_prefix)`.
        lengths, prefix_lengths (`tuple[int]`): tokens and prefix tokens per image, without images that have none left.
    """

    def __init__(self, position: torch.Tensor, batch_size: int, num_tokens: int, num_prefix: int):
        self.position = position
        self.batch_size, self.num_tokens, self.num_prefix = batch_size, num_tokens, num_prefix
        self.image = position // num_tokens
        token = position - self.image * num_tokens
        self.prefix = (token < num_prefix).nonzero().squeeze(1)
        prefix_image = self.image[self.prefix]
        self.prefix_slot = prefix_image * num_prefix + token[self.prefix]
        counts = [torch.bincount(owner, minlength=batch_size) for owner in (self.image, prefix_image)]
        lengths = torch.stack(counts, dim=1).tolist()  # one copy to the host for both
        self.lengths, self.prefix_lengths = zip(*([pair for pair in lengths if pair[0]] or [(0, 0)]))

    @classmethod
    def whole(cls, batch_size: int, num_tokens: int, num_prefix: int, device: torch.device) -> "PackedTokens":
        return cls(torch.arange(batch_size * num_tokens, device=device), batch_size, num_tokens, num_prefix)

    def select(self, rows: torch.Tensor) -> "PackedTokens":
        return PackedTokens(self.position[rows], self.batch_size, self.num_tokens, self.num_prefix)


@cache
def variable_length_kernel() -> Callable | None:
    """`torch.nn.attention.varlen.varlen_attn`; `None` if this version of torch lacks it or its argument `scale`."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if "scale" in inspect.signature(varlen_attn).parameters else None


def runs_variable_length_kernel(query: torch.Tensor) -> bool:
    """Whether `varlen_attn` exists and supports `query`: half precision on NVIDIA GPUs from Ampere on."""
    return (
        query.is_cuda
        and torch.version.hip is None
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= 256
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
        and variable_length_kernel() is not None
    )


def _offsets(lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Where each image begins among the packed tokens, and where the last one ends: int32 `(images + 1,)`."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def packed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_lengths: tuple[int, ...],
    key_lengths: tuple[int, ...],
    scaling: float,
) -> torch.Tensor:
    """
    Attention of each image over its own tokens.

    Args:
        query (`torch.Tensor` of shape `(1, heads, all queries, head_dim)`): the images' queries, one after another.
        key, value (`torch.Tensor` of shape `(1, heads, all keys, head_dim)`): likewise.
        query_lengths, key_lengths (`tuple[int]`): number of queries and keys per image; an image may have no queries.

    Returns:
        `torch.Tensor` of shape `(1, all queries, heads, head_dim)`.
    """
    attend = nn.functional.scaled_dot_product_attention
    if len(set(query_lengths)) == len(set(key_lengths)) == 1:  # a plain batch
        query, key, value = (
            packed.squeeze(0).unflatten(1, (len(lengths), lengths[0])).transpose(0, 1)
            for packed, lengths in ((query, query_lengths), (key, key_lengths), (value, key_lengths))
        )
        return attend(query, key, value, scale=scaling).transpose(1, 2).flatten(0, 1).unsqueeze(0)
    if query.shape[2] and runs_variable_length_kernel(query):
        query, key, value = (packed.squeeze(0).transpose(0, 1) for packed in (query, key, value))
        query_offsets, key_offsets = (_offsets(lengths, query.device) for lengths in (query_lengths, key_lengths))
        longest = max(query_lengths), max(key_lengths)
        attend = variable_length_kernel()
        return attend(query, key, value, query_offsets, key_offsets, *longest, scale=scaling).unsqueeze(0)
    output = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
    parts = zip(query.split(query_lengths, 2), key.split(key_lengths, 2), value.split(key_lengths, 2))
    start = 0
    for image_query, image_key, image_value in parts:
        stop = start + image_query.shape[2]
        if stop > start:
            output[:, start:stop] = attend(image_query, image_key, image_value, scale=scaling).transpose(1, 2)
        start = stop
    return output
