"""Tests of the hypothesis that a risk is at least ε, for failures and for losses between 0 and 1."""

import math

import numpy as np


def binomial_p_value(failures: int, images: int, epsilon: float) -> float:
    """
    P(Binomial(images, epsilon) ≤ failures): the probability of at most this many failures if the risk is ε. A valid
    p-value of "the risk is at least ε", since a greater risk makes few failures less likely.
    """
    if not 0 < epsilon < 1 or failures >= images:
        return 1.0
    counts = np.arange(failures + 1)
    log_choose = math.lgamma(images + 1) - np.array([math.lgamma(k + 1) + math.lgamma(images - k + 1) for k in counts])
    logs = log_choose + counts * math.log(epsilon) + (images - counts) * math.log1p(-epsilon)
    return min(float(np.exp(logs).sum()), 1.0)


def hoeffding_bentkus_p_value(risk: float, images: int, epsilon: float) -> float:
    """
    A valid p-value of "the mean loss is at least ε", for independent losses between 0 and 1 whose mean over the images
    is `risk`: the smaller of Hoeffding's bound and Bentkus's (arXiv 2110.01052, proposition 1).
    """
    if not 0 < epsilon < 1 or risk >= epsilon:
        return 1.0
    divergence = (1 - risk) * math.log((1 - risk) / (1 - epsilon)) + (risk and risk * math.log(risk / epsilon))
    # Rounded up after a hair is taken off, so that rounding of the mean makes no further failure of a whole number.
    failures = math.ceil(risk * images - 1e-9)
    return min(math.exp(-images * divergence), math.e * binomial_p_value(failures, images, epsilon), 1.0)


def least_images(epsilon: float, delta: float) -> int:
    """The least number of images that allows a promise: enough to pass the test if none of them fails."""
    return math.ceil(math.log(delta) / math.log1p(-epsilon))
