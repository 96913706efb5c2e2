"""The pieces of a batch, dealt to several processes: the gradient is that of one process."""

from __future__ import annotations

import random

import pytest

from grath_utils.config import DPOConfig
from grath_utils.dpo.global_batch import deal, piece_size
from grath_utils.errors import ConfigError


def test_a_batch_that_cannot_be_divided_is_refused() -> None:
    with pytest.raises(ConfigError, match="dpo.batch_size=6 cannot be divided among 4 processes"):
        piece_size(DPOConfig(batch_size=6, micro_batch_size=2), 4)
    with pytest.raises(ConfigError, match="dpo.loss=aot looks at all pairs"):
        piece_size(DPOConfig(batch_size=8, micro_batch_size=8, loss="aot"), 2)
    assert piece_size(DPOConfig(batch_size=8, micro_batch_size=4, loss="aot"), 2) == 4


def test_pieces_are_as_large_as_they_can_be() -> None:
    config = DPOConfig(batch_size=16, micro_batch_size=4)
    assert [piece_size(config, processes) for processes in (1, 2, 4, 8)] == [4, 4, 4, 2]


@pytest.mark.parametrize("count", [1, 3, 16, 17, 23, 40])
@pytest.mark.parametrize("config", [(16, 4), (12, 4), (4, 4), (8, 1), (6, 6)])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_gradient_is_that_of_one_process(
    count: int, config: tuple[int, int], world: int
) -> None:
    batch, micro = config
    dpo = DPOConfig(batch_size=batch, micro_batch_size=micro)
    if batch % world:
        return  # refused
    accumulation, left = divmod(batch, piece_size(dpo, world) * world)
    assert not left
    order = random.Random(count).sample(range(count), count)
    loss = [random.Random(i).random() for i in range(count)]
    hands = deal(order, dpo, world)
    assert len({len(hand) for hand in hands}) == 1, "every process takes equally many turns"

    def mean(indices) -> float:
        return sum(loss[i] for i in indices) / len(indices)

    steps = range(0, count, batch)
    for number, start in enumerate(steps):
        step = order[start : start + batch]
        cut = [step[i : i + micro] for i in range(0, len(step), micro)]
        expected = sum(map(mean, cut)) / len(cut)
        turn = slice(number * accumulation, (number + 1) * accumulation)
        own = [hand[turn] for hand in hands]
        # What the trainer makes of it: a mean over turns, then over processes.
        found = [sum(p.scale * mean(p.indices) for p in hand) / len(hand) for hand in own]
        assert sum(found) / world == pytest.approx(expected, rel=1e-12)
        seen = [i for hand in own for p in hand if p.share for i in p.indices]
        assert sorted(seen) == sorted(step), "each pair once, none twice"
        assert sum(p.share for hand in own for p in hand) == pytest.approx(len(cut))
        if len(step) == batch:
            assert {p.scale for hand in own for p in hand} == {1.0}
