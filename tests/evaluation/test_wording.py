import math
import random
from decimal import Decimal, localcontext

import pytest

from hf_thinkingvit.evaluation import calibrate_risk
from hf_thinkingvit.evaluation.wording import at_least, at_most
from tests.evaluation.test_calibration import draw


SHARES = [0.05, 0.004, 0.00004, 0.1, 0.01, 1 / 3, 0.5, 0.996, 0.9999999, 1e-7, 5e-324, math.nextafter(1, 0)]
_generator = random.Random(0)
SHARES += [10 ** _generator.uniform(-9, 0) for _ in range(1000)]
SHARES += [1 - 10 ** _generator.uniform(-9, 0) for _ in range(1000)]
SHARES += [_generator.randrange(1, 10**4) / 10**4 for _ in range(1000)]


def read(text: str) -> Decimal:
    assert text.endswith("%")
    return Decimal(text[:-1]).scaleb(-2)


def test_never_rounded_to_the_strong_side():
    for share in SHARES:
        exact = Decimal(repr(share))
        with localcontext() as context:
            context.prec = 1100
            risk, certainty = read(at_most(share)), read(at_least(share))
            assert exact <= risk < 1 and 0 < certainty <= 1 - exact, share
            # And close: within 1 % of the share or of its distance to 1.
            margin = min(exact, 1 - exact) / 100
            assert risk - exact <= margin and 1 - exact - certainty <= margin, share


@pytest.mark.parametrize(
    "share, risk, certainty",
    [(0.05, "5%", "95%"), (0.004, "0.4%", "99.6%"), (0.00004, "0.004%", "99.996%"), (0.1, "10%", "90%")],
)
def test_reads_as_it_was_asked_for(share, risk, certainty):
    assert (at_most(share), at_least(share)) == (risk, certainty)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, float("nan")])
def test_refuses_what_is_no_share(share):
    with pytest.raises(ValueError, match="above 0 and below 1"):
        at_most(share)


def test_statements_use_it():
    found = calibrate_risk(draw(2000, 0), epsilon=0.02, delta=0.004)
    assert (
        found.statement.startswith("With probability at least 99.6% over") and "at most 2% of images" in found.statement
    )
    with pytest.raises(ValueError, match=r"risk of at most 0\.004% with probability 99\.6%"):
        calibrate_risk(draw(2000, 0), epsilon=0.00004, delta=0.004)
