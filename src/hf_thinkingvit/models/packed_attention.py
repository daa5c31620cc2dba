"""Attention of images with different numbers of tokens, packed one after another, each image over its own tokens."""

import torch
from torch import nn


def packed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_lengths: list[int],
    key_lengths: list[int],
    scaling: float,
) -> torch.Tensor:
    """
    Args:
        query (`torch.Tensor` of shape `(1, heads, all queries, head_dim)`): the images' queries, one after another.
        key, value (`torch.Tensor` of shape `(1, heads, all keys, head_dim)`): likewise.
        query_lengths, key_lengths (`list[int]`): how many each image has; an image may have no queries.

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
    output = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
    parts = zip(query.split(query_lengths, 2), key.split(key_lengths, 2), value.split(key_lengths, 2))
    start = 0
    for image_query, image_key, image_value in parts:
        stop = start + image_query.shape[2]
        if stop > start:
            output[:, start:stop] = attend(image_query, image_key, image_value, scale=scaling).transpose(1, 2)
        start = stop
    return output
