"""Second moments of inputs: what is summed, and what few tokens may claim."""

import pytest
import torch

from auto_round.core.scheme import TensorSpec
from auto_round.sources.moments import Moments
from auto_round.stacks.stack import Stack
from auto_round.steps.gptq import rounded_in_order, turns_of


def moments(x, *, whole=True):
    found = Moments(x.shape[1], whole=whole, like=x)
    for part in x.split(7):
        found.add(part)
    return found


def test_sums_are_those_of_all_parts_and_keep_their_diagonal():
    x = torch.randn(50, 12, generator=torch.Generator().manual_seed(0))
    shrunk = moments(x).shrunk()
    torch.testing.assert_close(shrunk.diagonal(), x.square().sum(0))
    torch.testing.assert_close(shrunk, (x.t() @ x) * (50 / 86) + (36 / 86) * torch.diag(x.square().sum(0)))
    torch.testing.assert_close(moments(x, whole=False).shrunk(), x.square().sum(0))


def test_looking_twice_shrinks_once_and_ends_the_sum():
    found = moments(torch.ones(5, 3))
    assert found.shrunk() is found.shrunk() and found.shrunk()[0, 1] == pytest.approx(5 * 5 / 14)
    with pytest.raises(AssertionError):
        found.add(torch.ones(1, 3))


def test_nothing_seen_leaves_zeros():
    assert not Moments(4, whole=True, like=torch.ones(1)).shrunk().any()


@pytest.mark.parametrize("tokens", [16, 64, 4096])
def test_rounding_by_few_tokens_is_good_for_other_tokens_too(tokens):
    generator = torch.Generator().manual_seed(1)
    mixing = torch.eye(64) + 0.15 * torch.randn(64, 64, generator=generator)
    seen, other = (torch.randn(n, 64, generator=generator) @ mixing for n in (tokens, 4096))
    w = torch.randn(48, 64, generator=generator)

    def error(gram):
        """On the other tokens, as a share of plain rounding's."""
        stack = Stack({"layer": w}, gram, TensorSpec(bits=3, group=32), {})
        plain = (other @ (stack.fake - w).t()).square().sum()
        stack.offer(rounded_in_order(stack, turns_of(gram)))
        return ((other @ (stack.fake - w).t()).square().sum() / plain).item()

    shrunk, raw = error(moments(seen).shrunk()), error(seen.t() @ seen)
    assert shrunk < 1  # never at the cost of what was not seen
    assert shrunk < raw if tokens <= 64 else shrunk < raw * 1.05
