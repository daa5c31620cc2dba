"""
Scores of how certain an answer is: functions from logits to one number per image.

Every score is computed in float32, whatever the dtype of the logits. NaN logits give a NaN score.
"""

import torch


CACHED_NUMBERS = 2**17  # of an image, that a pass of `mean_pixel_entropy` works on
LOWEST_LOGIT = -1e30  # in place of -inf: its exponential is 0 as well, and 0 times it is not NaN


def _entropy(probabilities: torch.Tensor) -> torch.Tensor:
    # clamp: rounding can push a certain answer's entropy below 0, and then τ = 0 would let it exit. NaN stays NaN.
    # The same numbers as `torch.special.entr`, which torch 2.11 cannot export to ONNX inside a conditional.
    return (-torch.xlogy(probabilities, probabilities)).sum(dim=-1).clamp(min=0.0)


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """
    Shannon entropy of the softmax over all classes, in nats: the formula in the ThinkingViT paper (arXiv 2507.10800).

    Args:
        logits (`torch.Tensor` of shape `(..., num_classes)`, any floating dtype).

    Returns:
        `torch.Tensor` of shape `(...)`, float32, between 0 and ln(num_classes).
    """
    return _entropy(logits.float().softmax(dim=-1))


def topk_entropy(logits: torch.Tensor, top_k: int = 10) -> torch.Tensor:
    """
    Entropy of the `top_k` largest probabilities, renormalised to sum to 1, in nats: what the official code computes,
    and the scale of the published thresholds.

    Args:
        logits (`torch.Tensor` of shape `(..., num_classes)`, any floating dtype).
        top_k (`int`): how many classes to keep; all of them where there are fewer.

    Returns:
        `torch.Tensor` of shape `(...)`, float32, between 0 and ln(top_k).
    """
    # In this order, so that equal logits give the official entropies to the last bit: τ may lie on one of them.
    largest = logits.float().softmax(dim=-1).topk(min(top_k, logits.shape[-1]), dim=-1).values
    return _entropy(largest / largest.sum(dim=-1, keepdim=True))


def max_probability(logits: torch.Tensor) -> torch.Tensor:
    """Largest softmax probability per image: shape `(...)`, float32, between 0 and 1."""
    return logits.float().softmax(dim=-1).amax(dim=-1)


def margin(logits: torch.Tensor) -> torch.Tensor:
    """Largest minus second largest softmax probability: shape `(...)`, float32, between 0 and 1 (1 for one class)."""
    if logits.shape[-1] < 2:
        return max_probability(logits)
    largest = logits.float().softmax(dim=-1).topk(2, dim=-1).values
    return largest[..., 0] - largest[..., 1]


def mean_binary_entropy(logits: torch.Tensor) -> torch.Tensor:
    """
    Entropy of each label's own yes or no (the sigmoid of its logit), averaged over the labels, in nats: for multi-label
    classification, where the labels of an image do not exclude one another.

    Args:
        logits (`torch.Tensor` of shape `(..., num_labels)`, any floating dtype).

    Returns:
        `torch.Tensor` of shape `(...)`, float32, between 0 and ln(2).
    """
    # H(sigmoid(z)) is even in z, and with |z| both terms are positive, so that nothing cancels.
    magnitude = logits.float().abs()
    entropies = torch.nn.functional.softplus(-magnitude) + magnitude * torch.sigmoid(-magnitude)
    return entropies.mean(dim=-1)


def _softmax_entropy(logits: torch.Tensor) -> torch.Tensor:
    """As `entropy`, over dimension 1, without a logarithm for each class: of maps with many places and classes."""
    logits = (logits - logits.amax(dim=1, keepdim=True)).clamp(min=LOWEST_LOGIT)
    exponentials = logits.exp()
    total = exponentials.sum(dim=1)
    return (total.log() - (exponentials * logits).sum(dim=1) / total).clamp(min=0.0)


def mean_grid_entropy(logits: torch.Tensor) -> torch.Tensor:
    """
    Entropy of the softmax over all classes, in nats, averaged over the places of a grid.

    Args:
        logits (`torch.Tensor` of shape `(images, num_classes, rows, columns)`, any floating dtype).

    Returns:
        `torch.Tensor` of shape `(images,)`, float32, between 0 and ln(num_classes).

    Raises:
        ValueError: for logits without a grid.
    """
    if logits.dim() != 4:
        raise ValueError(
            "`mean_grid_entropy` judges logits of the shape (images, num_classes, rows, columns), one answer for each "
            f"patch, got {tuple(logits.shape)}: choose another `exit_criterion`, with its `threshold`."
        )
    return _softmax_entropy(logits.float()).mean(dim=(1, 2))


def mean_pixel_entropy(logits: torch.Tensor, patch_size: tuple[int, int]) -> torch.Tensor:
    """
    The same averaged over pixels, of logits that are resized bilinearly (`align_corners=False`) from patches to pixels:
    what the official segmentation code computes. It carries no gradient.

    The resized map is never held whole. Pixel row `y` lies in patch row `y // height`, at the same distance from the
    row's centre as every `height`-th row, so one pass of the inner loop computes these of several patch rows: on a CPU
    few enough to stay in the cache, where it is about three times as fast.

    Args:
        logits (`torch.Tensor` of shape `(images, num_classes, rows, columns)`, any floating dtype).
        patch_size (`tuple[int, int]`): (height, width) of a patch, in pixels.

    Returns:
        `torch.Tensor` of shape `(images,)`, float32, between 0 and ln(num_classes).
    """
    (height, width), (rows, columns) = patch_size, logits.shape[2:]
    logits = logits.detach().float()
    # Here and not for each pixel: weights of 0 in the resize would make NaN of -inf, and there are few patches.
    no_class = logits.amax(dim=1, keepdim=True) == -torch.inf
    logits = logits.clamp(min=LOWEST_LOGIT).masked_fill(no_class, torch.nan)
    logits = torch.cat([logits[:, :, :1], logits, logits[:, :, -1:]], dim=2)  # beyond the border, the row at the border
    block = rows
    if logits.device.type == "cpu" and not torch.compiler.is_compiling():  # programs would repeat every pass
        block = max(CACHED_NUMBERS // (logits.shape[1] * columns * width), 1)
    sums = []
    for start in range(0, rows, block):
        stop = min(start + block, rows)
        size = (stop - start + 2, columns * width)
        wide = torch.nn.functional.interpolate(
            logits[:, :, start : stop + 2], size=size, mode="bilinear", align_corners=False
        )
        above, middle, below = wide[:, :, :-2], wide[:, :, 1:-1], wide[:, :, 2:]
        for row in range(height):
            distance = (row + 0.5) / height - 0.5  # from the centre of the patch, in patches
            resized = torch.lerp(middle, above if distance < 0 else below, abs(distance))
            sums.append(_entropy_in_place(resized).sum(dim=(1, 2)))
    return torch.stack(sums).sum(dim=0) / (height * width * rows * columns)


def _entropy_in_place(logits: torch.Tensor) -> torch.Tensor:
    """As `_softmax_entropy`, without a gradient; overwrites `logits`."""
    logits.sub_(logits.amax(dim=1, keepdim=True))
    exponentials = logits.exp()
    total = exponentials.sum(dim=1)
    return (total.log() - logits.mul_(exponentials).sum(dim=1) / total).clamp(min=0.0)


__all__ = [
    "entropy",
    "margin",
    "max_probability",
    "mean_binary_entropy",
    "mean_grid_entropy",
    "mean_pixel_entropy",
    "topk_entropy",
]
