"""
ThinkingViT written out plainly: every stage complete, for every image, from a state dict and plain functions.

Shares no code with the package, so that agreement means something.
"""

import torch
import torch.nn.functional as F


def thinkingvit_stages(model, pixel_values: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Logits and final tokens of every stage, differentiable in the model's parameters."""
    config, weights = model.config, dict(model.named_parameters())
    prefix = "thinkingvit."
    patches = F.conv2d(
        pixel_values,
        weights[prefix + "embeddings.patch_embeddings.weight"],
        weights[prefix + "embeddings.patch_embeddings.bias"],
        stride=config.patch_size,
    )
    patches = patches.flatten(2).transpose(1, 2)
    class_token = weights[prefix + "embeddings.cls_token"].expand(len(patches), -1, -1)
    embeddings = torch.cat([class_token, patches], 1) + weights[prefix + "embeddings.position_embeddings"]
    head_dim = config.hidden_size // config.num_attention_heads
    x, all_logits, all_tokens = embeddings, [], []

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], weights[name + ".weight"][:d], weights[name + ".bias"][:d], 1e-6)

    def linear(x, name, rows):
        return x @ weights[name + ".weight"][:rows, : x.shape[-1]].T + weights[name + ".bias"][:rows]

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
