"""Roundel: simulate every pipeline schedule on your hardware, pick the best, train with it."""

from typing import Any

from .analysis.metrics import Metrics
from .api import Comparison, Simulation, compare, make_work, simulate
from .policies.catalog import POLICIES, make_policy
from .policies.gpipe import GPipe
from .policies.interleaved_1f1b import Interleaved1F1B
from .policies.layer_to_layer import LayerToLayer
from .policies.looped_bfs import LoopedBFS
from .policies.one_f_one_b import OneFOneB
from .policies.op import Op
from .policies.plan import Plan
from .policies.policy import Policy
from .policies.round_robin import RoundRobin
from .policies.work import Work
from .policies.zb_h1 import ZBH1
from .policies.zb_h2 import ZBH2
from .policies.zb_v import ZBV
from .traces.errors import InputError
from .traces.library import load_machine, load_trace, machine_names, trace_names
from .traces.machine import Device, Host, Link, Machine, ideal_machine
from .traces.timeline import Timeline
from .traces.trace import LayerCost, Trace

__version__ = "0.1.0"

_EXECUTOR = {
    "Layers": "layers",
    "NotANumber": "trainer",
    "StepResult": "step_result",
    "Trainer": "trainer",
    "load_weights": "weight_file",
}


def __getattr__(name: str) -> Any:
    """The executor's names; torch is imported when one of them is first asked for."""
    if name not in _EXECUTOR:
        raise AttributeError(f"module 'roundel' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".executor.{_EXECUTOR[name]}", __name__), name)


__all__ = [
    "POLICIES",
    "ZBH1",
    "ZBH2",
    "ZBV",
    "Comparison",
    "Device",
    "GPipe",
    "Host",
    "InputError",
    "Interleaved1F1B",
    "LayerCost",
    "LayerToLayer",
    "Layers",
    "Link",
    "LoopedBFS",
    "Machine",
    "Metrics",
    "NotANumber",
    "OneFOneB",
    "Op",
    "Plan",
    "Policy",
    "RoundRobin",
    "Simulation",
    "StepResult",
    "Timeline",
    "Trace",
    "Trainer",
    "Work",
    "compare",
    "ideal_machine",
    "load_machine",
    "load_trace",
    "load_weights",
    "machine_names",
    "make_policy",
    "make_work",
    "simulate",
    "trace_names",
]
