"""
Plain reference implementations of ThinkingViT and ThinkingSwin: every stage for every image, with functions of torch.

They share no code with the package, so that equal results are evidence.
"""

from functools import partial

import torch
import torch.nn.functional as F


def patch_embeddings(model, pixel_values: torch.Tensor) -> torch.Tensor:
    """Images to `(images, rows, columns, width)`."""
    layer = model.base_model.embeddings.patch_embeddings
    return F.conv2d(pixel_values, layer.weight, layer.bias, stride=model.config.patch_size).permute(0, 2, 3, 1)


def leading_norm(weights: dict[str, torch.Tensor], x: torch.Tensor, name: str, eps: float) -> torch.Tensor:
    """LayerNorm with the leading entries of its weights, as many as `x` has channels."""
    d = x.shape[-1]
    return F.layer_norm(x, (d,), weights[name + ".weight"][:d], weights[name + ".bias"][:d], eps)


def leading_linear(weights: dict[str, torch.Tensor], x: torch.Tensor, name: str, rows: int) -> torch.Tensor:
    """A linear layer with the leading `rows` and columns of its weight."""
    return x @ weights[name + ".weight"][:rows, : x.shape[-1]].T + weights[name + ".bias"][:rows]


def thinkingvit_stages(model, pixel_values: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Logits and final tokens of every stage, differentiable in the model's parameters."""
    config, weights = model.config, dict(model.named_parameters())
    prefix = "thinkingvit."
    patches = patch_embeddings(model, pixel_values).flatten(1, 2)
    class_token = weights[prefix + "embeddings.cls_token"].expand(len(patches), -1, -1)
    embeddings = torch.cat([class_token, patches], 1) + weights[prefix + "embeddings.position_embeddings"]
    head_dim = config.hidden_size // config.num_attention_heads
    norm, linear = partial(leading_norm, weights, eps=1e-6), partial(leading_linear, weights)
    x, all_logits, all_tokens = embeddings, [], []
    for index, heads in enumerate(config.thinking_stages):
        d = heads * head_dim
        x = x[..., :d]
        for layer in range(config.num_hidden_layers):
            name = f"{prefix}layers.{layer}."
            h = norm(x, name + "layernorm_before")
            q, k, v = (linear(h, f"{name}attention.{p}_proj", d).unflatten(-1, (heads, head_dim)) for p in "qkv")
            scores = torch.einsum("bqhc,bkhc->bhqk", q, k) / head_dim**0.5
            attended = torch.einsum("bhqk,bkhc->bqhc", scores.softmax(-1), v).flatten(2)
            x = x + linear(attended, name + "attention.o_proj", d)
            h = F.gelu(linear(norm(x, name + "layernorm_after"), name + "mlp.fc1", 4 * d))
            x = x + linear(h, name + "mlp.fc2", d)
        tokens = norm(x, prefix + "layernorm")
        all_tokens.append(tokens)
        all_logits.append(linear(tokens[:, 0], "classifier", config.num_labels))
        if index < len(config.thinking_stages) - 1:
            recycler = f"{prefix}recyclers.{index}."
            x = embeddings + weights[recycler + "alpha"] * linear(tokens, recycler + "projection", config.hidden_size)
    return all_logits, all_tokens


def thinking_swin_stages(model, pixel_values: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """
    The same for a ThinkingSwin with `qkv_slicing="leading_rows"`: logits and final tokens `(images, rows, columns,
    width)` of every round. Images and grids must need no padding.
    """
    config, weights = model.config, dict(model.named_parameters())
    prefix = "thinking_swin."
    norm, linear = partial(leading_norm, weights, eps=1e-5), partial(leading_linear, weights)

    def attend(x, name, heads, shift):
        """Attention of one window after another; the mask separates the regions that a shift brings into one window."""
        images, rows, columns, d = x.shape
        size = config.window_size
        if min(rows, columns) <= size:
            size, shift = min(rows, columns), 0
        x = x.roll((-shift, -shift), (1, 2))
        table = weights[name + "relative_position_bias_table"]
        span = 2 * config.window_size - 1
        places = [(i, j) for i in range(size) for j in range(size)]
        center = config.window_size - 1
        offsets = [[(a - c + center) * span + b - d_ + center for c, d_ in places] for a, b in places]
        bias = table[torch.tensor(offsets)][..., :heads].permute(2, 0, 1)
        output = torch.zeros_like(x)
        for top in range(0, rows, size):
            for left in range(0, columns, size):
                window = x[:, top : top + size, left : left + size].reshape(images, size * size, d)
                weight, shift_bias = weights[name + "qkv.weight"][: 3 * d, :d], weights[name + "qkv.bias"][: 3 * d]
                q, k, v = (window @ weight.T + shift_bias).split(d, dim=-1)
                q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
                scores = q @ k.transpose(2, 3) / (d // heads) ** 0.5 + bias
                if shift:
                    region = [((top + i) >= rows - shift, (left + j) >= columns - shift) for i, j in places]
                    apart = torch.tensor([[one != other for other in region] for one in region])
                    scores = scores - 100.0 * apart
                attended = (scores.softmax(-1) @ v).transpose(1, 2).reshape(images, size, size, d)
                output = output.index_put(
                    (
                        torch.arange(images)[:, None, None],
                        torch.arange(top, top + size)[None, :, None],
                        torch.arange(left, left + size)[None, None, :],
                    ),
                    attended,
                )
        return linear(output.roll((shift, shift), (1, 2)), name + "o_proj", d)

    embeddings = norm(patch_embeddings(model, pixel_values), prefix + "embeddings.norm")
    x, all_logits, all_tokens = embeddings, [], []
    for index, head_round in enumerate(config.head_rounds):
        for layer, heads in enumerate(head_round):
            full = config.embed_dim * 2**layer
            d = full * heads // config.num_heads[layer]
            name = f"{prefix}layers.{layer}."
            if layer:
                corners = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
                x = norm(torch.cat(corners, -1), name + "downsample.norm")
                x = x @ weights[name + "downsample.reduction.weight"][:d, : x.shape[-1]].T
            x = x[..., :d]
            for block in range(config.depths[layer]):
                part = f"{name}blocks.{block}."
                shift = config.window_size // 2 if block % 2 else 0
                x = x + attend(norm(x, part + "layernorm_before"), part + "attention.", heads, shift)
                h = F.gelu(linear(norm(x, part + "layernorm_after"), part + "mlp.fc1", int(config.mlp_ratio * d)))
                x = x + linear(h, part + "mlp.fc2", d)
        tokens = norm(x, prefix + "layernorm")
        all_tokens.append(tokens)
        all_logits.append(linear(tokens.mean((1, 2)), "classifier", config.num_labels))
        if index < len(config.head_rounds) - 1:
            recycler = f"{prefix}recyclers.{index}."
            kernel = weights[recycler + "upsample"].permute(2, 0, 1)[:, None]
            up = F.conv_transpose2d(
                tokens.permute(0, 3, 1, 2), kernel, stride=kernel.shape[-1], groups=kernel.shape[0]
            ).permute(0, 2, 3, 1)
            projected = up @ weights[recycler + "weight"].T + weights[recycler + "bias"]
            x = embeddings[..., : projected.shape[-1]] + weights[recycler + "alpha"] * projected
    return all_logits, all_tokens
