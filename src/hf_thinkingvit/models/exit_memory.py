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


def q_exit(answer: Answer, memory: Memory, top_k: int) -> Scored:
    """The probability of having halted by now, by the learned halting scores (Q-exit, arXiv 2204.03276)."""
    score = answer["halting_score"].float()
    goes_on = (1 - score) * memory["goes_on"] if "goes_on" in memory else 1 - score
    return 1 - goes_on, {"goes_on": goes_on}


def pondernet(answer: Answer, memory: Memory, top_k: int) -> Scored:
    """
    PonderNet's sampled halting (arXiv 2107.05407): F + 1 - u, with F the probability of having halted by now, and u one
    uniform number in [0, 1) for each image and all of its stages. Greater than 1 iff F > u, so that at τ = 1 an image
    halts at each stage with the probability that its halting scores give; a greater τ halts later, and none at τ = 2.

    u is `"noise"` of the memory that the first stage starts with, which `ExitRule.first_memory` draws.
    """
    if "noise" not in memory:
        raise ValueError(
            "`exit_criterion` = 'pondernet' compares with a number that is drawn for each image: let the first stage "
            "start with the state that `first_state` makes."
        )
    probability, remembered = q_exit(answer, memory, top_k)
    return probability + (1 - memory["noise"]), {**remembered, "noise": memory["noise"]}


__all__ = ["act", "confident_twice", "patience", "pondernet", "q_exit", "similarity"]
