"""How fast the simulator is, beside a bare SimPy loop over the same ops in the same run.

    python benchmarks/simulator.py            all sizes, about two minutes
    python benchmarks/simulator.py --quick    without the largest

Each size runs in a process of its own, so that its peak memory is its own. Times count from the
policy object to the finished timeline: plan, checks, lowering, simulation, memory over time.
"""

import argparse
import os
import platform
import resource
import subprocess
import sys
import time
from importlib.metadata import version

import simpy

import roundel
from roundel.policies.lowering import lower_policy
from roundel.policies.plan import Plan
from roundel.policies.policy import Policy
from roundel.policies.work import Work
from roundel.sim.engine import simulate_program
from roundel.traces.machine import Device, Link, Machine, ideal_machine
from roundel.traces.trace import LayerCost, Trace

# (name, devices, microbatches, layers, policy); compute ops are counted from the plan.
SIZES = {
    "8 x 16, 12 chunks": (8, 16, 96, roundel.LoopedBFS(chunks=12)),
    "8 x 16, 96 stages, round-robin": (8, 16, 96, roundel.RoundRobin((2,) * 48, (1,) * 96)),
    "8 x 64, 12 chunks": (8, 64, 96, roundel.LoopedBFS(chunks=12)),
    "64 x 256, 4 chunks": (64, 256, 256, roundel.LoopedBFS(chunks=4)),
    "64 x 256, 4 chunks, interleaved": (64, 256, 256, roundel.Interleaved1F1B(chunks=4)),
    "256 x 1024, 4 chunks": (256, 1024, 1024, roundel.LoopedBFS(chunks=4)),
}
LINKS = ("constant hop", "own links", "shared links")


def make_work(devices: int, microbatches: int, layers: int, links: str) -> Work:
    """Layers with every cost, on a machine whose transfers cost what `links` says."""
    layer = LayerCost(
        name="layer",
        forward_ns=10_000_000,
        backward_ns=20_000_000,
        param_bytes=100_000_000,
        grad_bytes=100_000_000,
        optimizer_bytes=600_000_000,
        output_bytes=10_000_000,
        saved_bytes=100_000_000,
        workspace_bytes=10_000_000,
    )
    trace = Trace(
        name="even", device="any", provenance="made", microbatch_tokens=1, layers=(layer,) * layers
    )
    return Work(trace, make_machine(devices, links), microbatches)


def make_machine(devices: int, links: str) -> Machine:
    """A ring in which every link has one user, or a switch where several send to one receiver."""
    if links == "constant hop":
        return ideal_machine(devices, 1_000_000)
    rate = 50_000_000_000
    names = [f"gpu{number}" for number in range(devices)]
    pairs = [("host", name) for name in names]
    if links == "own links":
        pairs += [(name, names[(number + 1) % devices]) for number, name in enumerate(names)]
    else:
        pairs = [("switch", name) for name in ("host", *names)]
    return Machine(
        name=links,
        devices=tuple(Device(name=name, memory_bytes=80 * 2**30) for name in names),
        switches=("switch",),
        links=tuple(Link(a=a, b=b, bytes_per_s=rate) for a, b in pairs),
    )


def bare_simpy(plan: Plan, layers: int) -> float:
    """Seconds for a SimPy process a device that waits for each op's input and takes its time.

    No transfers, no memory, no lowering: the least that SimPy can do for these ops.
    """
    env = simpy.Environment()
    done = {
        (kind, op.first if kind == "B" else op.stop, op.microbatch): env.event()
        for ops in plan.devices
        for op in ops
        for kind in op.kind
    }

    def lane(ops: tuple[roundel.Op, ...]):  # type: ignore[no-untyped-def]
        for kind, first, stop, microbatch in ops:
            need = (kind, stop if kind == "B" else first, microbatch)
            if kind != "R" and need in done and need[1] not in (0, layers):
                yield done[need]
            yield env.timeout(10)
            done[kind, first if kind == "B" else stop, microbatch].succeed()

    start = time.perf_counter()
    for ops in plan.devices:
        env.process(lane(ops))
    env.run()
    return time.perf_counter() - start


def measure(name: str, links: str) -> None:
    """Run one size and print its row."""
    devices, microbatches, layers, policy = SIZES[name]
    work = make_work(devices, microbatches, layers, links)
    start = time.perf_counter()
    timeline = simulate(policy, work)
    seconds = time.perf_counter() - start
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    ops = int(timeline.is_compute.sum() - (timeline.microbatch[timeline.is_compute] < 0).sum())
    bare = bare_simpy(policy.plan(work, 0), layers)
    print(
        f"{name:32} {links:13} {ops:9,} {len(timeline):9,} {seconds:8.3f} "
        f"{ops / seconds:10,.0f} {seconds / ops * 1e6:6.2f} {peak_gb:6.2f} "
        f"{ops / bare:10,.0f} {bare / seconds:6.2f}",
        flush=True,
    )


def simulate(policy: Policy, work: Work):  # type: ignore[no-untyped-def]
    """From the policy to the timeline."""
    return simulate_program(lower_policy(policy, work), "benchmark")


def main() -> None:
    """Print the hardware, the versions, the command, and a row per size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="leave out the largest size")
    parser.add_argument("--one", nargs=2, metavar=("SIZE", "LINKS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        measure(*arguments.one)
        return
    packages = ", ".join(f"{name} {version(name)}" for name in ("roundel", "simpy", "numpy"))
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(f"{packages}\ncommand: python {' '.join(sys.argv)}\n")
    print(
        f"{'devices x microbatches':32} {'links':13} {'ops':>9} {'tasks':>9} {'seconds':>8} "
        f"{'ops/s':>10} {'us/op':>6} {'GB':>6} {'bare SimPy':>10} {'ratio':>6}"
    )
    for name in SIZES:
        if arguments.quick and name.startswith("256"):
            continue
        for links in LINKS:
            subprocess.run([sys.executable, __file__, "--one", name, links], check=True)


if __name__ == "__main__":
    main()
