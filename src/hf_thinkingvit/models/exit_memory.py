"""
Scores of exit criteria that carry a memory from one stage to the next, or read more than logits. Each is a function
`(answer, memory, top_k) -> (scores, memory)` as in [`ExitCriterion`]; their tensors have one row per image.
"""

import torch

from .exit_scores import max_probability
from .staged_run import Answer, Memory


Scored = tuple[torch.Tensor, Memory]


def similarity(answer: Answer, memory: Memory, top_k: int) -> Scored:
    """Mean squared difference from the logits of the stage before; infinite at the first, where nothing exits."""
    logits = answer["logits"].float()
    if not memory:
        return torch.full_like(logits[:, 0], torch.inf), {"logits": logits}
    return (logits - memory["logits"]).square().mean(dim=1), {"logits": logits}


def patience(answer: Answer, memory: Memory, top_k: int) -> Scored:
    """How many stages in a row, this one included, have given the same prediction (PABEE, arXiv 2006.04152)."""
    logits = answer["logits"]
    prediction = logits.argmax(dim=1)
    count = torch.ones_like(prediction)
    if memory:
        count = torch.where(prediction == memory["prediction"], memory["count"] + 1, count)
    # A broken answer has no prediction, and must pass no τ.
    score = torch.where(logits.isfinite().all(dim=1), count.float(), torch.nan)
    return score, {"prediction": prediction, "count": count}


def confident_twice(answer: Answer, memory: Memory, top_k: int) -> Scored:
    """The smaller of the largest probabilities of this stage and of the one before; 0 at the first."""
    probability = max_probability(answer["logits"])
    before = memory["probability"] if memory else torch.zeros_like(probability)
    return torch.minimum(probability, before), {"probability": probability}


def act(answer: Answer, memory: Memory, top_k: int) -> Scored:
    """The sum of the halting scores so far, at most 1 (ACT, arXiv 1603.08983)."""
    total = answer["halting_score"].float()
    if memory:
        total = total + memory["total"]
    total = total.clamp(max=1.0)
    return total, {"total": total}


def pondernet(answer: Answer, memory: Memory, top_k: int) -> Scored:
    """
    PonderNet's sampled halting (arXiv 2107.05407): F + 1 - u, with F the probability of having halted by now, and u one
    uniform number in [0, 1) for each image and all of its stages. Greater than 1 iff F > u, so that at τ = 1 an image
    halts at each stage with the probability that its halting scores give; a greater τ halts later, and none at τ = 2.

    u is `"noise"` of the memory that the first stage starts with, where the caller gave one, else of the answer.
    """
    score = answer["halting_score"].float()
    noise = memory["noise"] if "noise" in memory else answer["halting_noise"]
    goes_on = (1 - score) * memory["goes_on"] if "goes_on" in memory else 1 - score
    return (1 - goes_on) + (1 - noise), {"noise": noise, "goes_on": goes_on}


def image_noise(pixel_values: torch.Tensor, seed: int) -> torch.Tensor:
    """
    A number in [0, 1) for each image, uniform over images, which depends on its pixels and the seed alone. So an image
    gets the same one in every batch, engine, sweep and exported program, and no generator has to travel with it.

    Args:
        pixel_values (`torch.Tensor` of shape `(images, channels, height, width)`): in the dtype of the model.
        seed (`int`): another one gives other numbers, from 0 to 2³¹ - 2.

    Returns:
        `torch.Tensor` of shape `(images,)`, float32.
    """
    # Integers, because their sums do not depend on the order in which they are added. No product overflows int64.
    prime = 2**31 - 1
    levels = pixel_values.flatten(1).float().nan_to_num().clamp(-128, 128).mul(4096).round().long()
    places = torch.arange(levels.shape[1], device=levels.device)
    weights = ((places + 1) * 48271 + seed % prime) % prime * 16807 % prime % 1000003 + 1
    mixed = (levels * weights).sum(dim=1) % prime
    for multiplier in (48271, 69621):
        mixed = (mixed * multiplier + 12345 + seed) % prime
    # 24 bits, which float32 holds exactly: rounding must not give 1.
    return (mixed * 2**24 // prime).float() / 2**24


__all__ = ["act", "confident_twice", "image_noise", "patience", "pondernet", "similarity"]
