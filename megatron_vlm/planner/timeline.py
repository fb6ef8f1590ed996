"""Timeline of the pipeline's stages and micro-batches: megatron-core's schedules as arithmetic. Pure.

Each stage works through a fixed order of forward and backward passes (`stage_order`), and a pass starts when the stage
is free and what it needs has come from its neighbour (`simulate`). Three orders, as megatron-core picks them: without a
pipeline forward and backward take turns; with one, 1F1B (Narayanan et al., PipeDream-Flush, 2021): a stage runs ahead
by as many forwards as stages follow it, then the two take turns; with several model chunks per stage the interleaved
order (Narayanan et al., Megatron-LM, SC 2021), in rounds of as many micro-batches as there are stages. So what the
pipeline's bubble costs, and how many micro-batches' activations a stage holds, is known before anything runs.

Hazard: this is a second copy of an order that megatron-core keeps inside its loops; a test compares it with the calls
that its schedules make.

Letters: P stages, V chunks per stage; chunk c of stage p is virtual stage c*P + p, and data goes through them in order.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Pass:
    """One micro-batch through one model chunk, forward or backward."""

    forward: bool
    chunk: int
    micro_batch: int


@dataclass(frozen=True)
class TimedPass:
    """A pass of a stage with its times, in the unit of the costs."""

    stage: int
    run: Pass
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """All passes of one run of the pipeline."""

    num_stages: int
    passes: tuple[TimedPass, ...]  # by stage, in the order in which it runs them

    @property
    def length(self) -> float:
        """Time from the first pass's start to the last one's end."""
        return max((timed.end for timed in self.passes), default=0.0)

    @property
    def bubble(self) -> float:
        """The share of the stages' time in which they wait, 0 to 1."""
        busy = sum(timed.end - timed.start for timed in self.passes)
        return 1.0 - busy / (self.num_stages * self.length) if self.length else 0.0


def stage_order(num_micro_batches: int, num_stages: int, stage: int, num_chunks: int = 1) -> list[Pass]:
    """The passes of one stage in megatron-core's order. Several chunks need a multiple of P micro-batches."""
    interleaved = num_chunks > 1
    assert not interleaved or num_micro_batches % num_stages == 0, "validated with the recipe"
    group = num_stages if interleaved else num_micro_batches
    turns = [
        (chunk, first + i)
        for first in range(0, num_micro_batches, group)
        for chunk in range(num_chunks)
        for i in range(group)
    ]
    forward = [Pass(True, chunk, micro_batch) for chunk, micro_batch in turns]
    backward = [Pass(False, num_chunks - 1 - chunk, micro_batch) for chunk, micro_batch in turns]
    following = num_stages - 1 - stage
    ahead = min(2 * following + (num_chunks - 1) * num_stages if interleaved else following, len(turns))
    steady = [one for pair in zip(forward[ahead:], backward, strict=False) for one in pair]
    return [*forward[:ahead], *steady, *backward[len(turns) - ahead :]]


def simulate(
    num_micro_batches: int, num_stages: int, forward_costs: Sequence[float], backward_costs: Sequence[float]
) -> Timeline:
    """One run of the pipeline; messages between stages take no time.

    Args:
        num_micro_batches: of the run.
        num_stages: P.
        forward_costs, backward_costs: of one micro-batch, per virtual stage [P * V].
    """
    num_virtual = len(forward_costs)
    assert num_virtual == len(backward_costs) and num_virtual % num_stages == 0, f"{num_virtual} costs"
    num_chunks = num_virtual // num_stages
    orders = [stage_order(num_micro_batches, num_stages, stage, num_chunks) for stage in range(num_stages)]
    timed: list[list[TimedPass]] = [[] for _ in orders]
    ends: dict[tuple[bool, int, int], float] = {}  # (forward, virtual stage, micro-batch) -> end
    while any(len(done) < len(order) for done, order in zip(timed, orders, strict=True)):
        moved = False
        for stage, (done, order) in enumerate(zip(timed, orders, strict=True)):
            while len(done) < len(order):
                run = order[len(done)]
                virtual = run.chunk * num_stages + stage
                needs = _needs(run, virtual, num_virtual)
                if needs is not None and needs not in ends:
                    break
                start = max(done[-1].end if done else 0.0, ends[needs] if needs is not None else 0.0)
                end = start + (forward_costs if run.forward else backward_costs)[virtual]
                ends[run.forward, virtual, run.micro_batch] = end
                done.append(TimedPass(stage, run, start, end))
                moved = True
        assert moved, "the orders wait for each other"
    return Timeline(num_stages, tuple(one for done in timed for one in done))


def peak_outstanding(order: Sequence[Pass]) -> int:
    """Forwards whose backward has not come yet, at most: as many chunks' activations a stage holds."""
    most = held = 0
    for run in order:
        held += 1 if run.forward else -1
        most = max(most, held)
    return most


def _needs(run: Pass, virtual: int, num_virtual: int) -> tuple[bool, int, int] | None:
    """The pass on another chunk that must have ended; None where there is none."""
    if run.forward:
        return (True, virtual - 1, run.micro_batch) if virtual else None
    if virtual == num_virtual - 1:
        return True, virtual, run.micro_batch
    return False, virtual + 1, run.micro_batch
