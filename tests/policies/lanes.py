"""A program as text, lane by lane, for tests that compare with a picture."""

from roundel.policies.program import STATES, Program
from roundel.traces.timeline import KINDS


def task_name(program: Program, task: int) -> str:
    """`0:1F0` for an op; else kind, layer, microbatch or chunk, and the other end of a send."""
    kind = KINDS[program.kind[task]]
    first, stop, microbatch = (
        int(column[task]) for column in (program.first, program.stop, program.microbatch)
    )
    if kind in "FBIWR":
        return f"{first}:{stop}{kind}{microbatch}"
    name = f"{kind} {first}"
    if microbatch >= 0:
        name += f"m{microbatch}"
    if program.part[task] == STATES:
        name += " states"
    elif program.part[task]:
        name += f"+{program.part[task]}"
    if kind == "send":
        name += f">{program.target[task]}"
    return name


def tasks_on(program: Program, name: str) -> list[int]:
    """The tasks of the lane of this name, in order."""
    (number,) = (number for number, lane in enumerate(program.lanes) if lane.name == name)
    return program.tasks_of(number)


def lanes(program: Program) -> dict[str, list[str]]:
    """The names of every lane's tasks, in order; empty lanes left out."""
    rows = {}
    for number, lane in enumerate(program.lanes):
        tasks = program.tasks_of(number)
        if tasks:
            rows[lane.name] = [task_name(program, task) for task in tasks]
    return rows


def dependencies(program: Program) -> set[tuple[str, str]]:
    """(before, after) pairs by name."""
    pairs = zip(program.dep_before.tolist(), program.dep_after.tolist(), strict=True)
    return {(task_name(program, before), task_name(program, after)) for before, after in pairs}
