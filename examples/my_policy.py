"""A policy of one's own: GPipe that keeps at most `most` microbatches in flight.

    roundel simulate qwen3-1.7b-rtx4090 --policy examples/my_policy.py:Waves \
        --devices 4 --microbatches 16 --set most=8
"""

from dataclasses import dataclass

from roundel import Op, Plan, Work


@dataclass(frozen=True)
class Waves:
    """Waves of forwards, each followed by its backwards."""

    most: int = 4

    def plan(self, work: Work, step: int) -> Plan:
        """Layers in even stages; `most` forwards, then as many backwards, and so on."""
        bounds = [work.layers * number // work.devices for number in range(work.devices + 1)]
        return Plan(
            tuple(
                tuple(
                    Op(kind, bounds[device], bounds[device + 1], microbatch)
                    for start in range(0, work.microbatches, self.most)
                    for kind in "FB"
                    for microbatch in range(start, min(start + self.most, work.microbatches))
                )
                for device in range(work.devices)
            )
        )
