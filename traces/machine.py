"""A Machine: devices, host and the links between them."""

from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from .errors import InputError
from .json_files import read_model, write_model
from .trace import MAX_COUNT, Count

FORMAT: Final = "roundel.machine/1"
HOST = "host"

Rate = Annotated[int, Field(strict=True, gt=0, le=MAX_COUNT)]


class Host(BaseModel):
    """The host: its memory (0: not limited) and how fast it updates (0: takes no time).

    `sum_params_per_s`: gradients of so many parameters it adds to others a second (0: no time).
    `task_ns`: what it takes to launch an op on a device, whose ops follow no closer than that.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    memory_bytes: Count = 0
    optimizer_params_per_s: Count = 0
    sum_params_per_s: Count = 0
    task_ns: Count = 0


class Device(BaseModel):
    """One GPU: its memory (0: not limited) and its optimizer's speed (0: takes no time)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    memory_bytes: Count = 0
    optimizer_params_per_s: Count = 0


class Link(BaseModel):
    """A link between two nodes. `duplex`: both directions have the whole bandwidth at once."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    a: str
    b: str
    bytes_per_s: Rate
    latency_ns: Count = 0
    duplex: Annotated[bool, Field(strict=True)] = True


class Machine(BaseModel):
    """Devices, host and links as a graph; `switches` names the nodes that only pass data on.

    `hop_ns` not None replaces all links: data takes that constant time between two different
    devices and none between host and device. A lane still moves one thing at a time.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["roundel.machine/1"] = FORMAT
    name: str
    host: Host = Host()
    devices: tuple[Device, ...] = Field(min_length=1)
    switches: tuple[str, ...] = ()
    links: tuple[Link, ...] = ()
    hop_ns: Count | None = None

    @model_validator(mode="after")
    def _graph_is_sound(self) -> "Machine":
        nodes = self._nodes()
        seen: dict[frozenset[str], int] = {}
        for number, link in enumerate(self.links):
            _check_ends(number, link, nodes)
            other = seen.setdefault(frozenset((link.a, link.b)), number)
            if other != number:
                raise ValueError(
                    f"links.{number}: {link.a!r} and {link.b!r} are linked by links.{other} "
                    f"already; make one link of the two"
                )
        return self

    def _nodes(self) -> list[str]:
        fields = [(f"devices.{n}.name", device.name) for n, device in enumerate(self.devices)]
        fields += [(f"switches.{n}", name) for n, name in enumerate(self.switches)]
        nodes = [HOST]
        for field, name in fields:
            if name in nodes:
                raise ValueError(f"{field}: there is a node {name!r} already; give another name")
            nodes.append(name)
        return nodes

    @classmethod
    def load(cls, path: str | Path) -> "Machine":
        """Read a machine file. Raises InputError naming the file, the field and the mistake."""
        return read_model(cls, path, "machine")

    def save(self, path: str | Path) -> None:
        """Write the machine as JSON that `load` reads back equal."""
        write_model(self, path)

    def with_hop(self, hop_ns: int) -> "Machine":
        """This machine with all links replaced by a constant time between different devices.

        Raises InputError if `hop_ns` is negative.
        """
        _check_hop(hop_ns)
        return self.model_copy(update={"hop_ns": hop_ns})

    def first_devices(self, count: int) -> "Machine":
        """This machine with only its first `count` devices (the others' links go with them).

        Raises InputError if there are not that many.
        """
        if not 1 <= count <= len(self.devices):
            raise InputError(
                f"machine {self.name} has {len(self.devices)} devices, {count} were asked for; "
                f"give a number from 1 to {len(self.devices)} or another machine"
            )
        gone = {device.name for device in self.devices[count:]}
        links = tuple(link for link in self.links if not gone & {link.a, link.b})
        return self.model_copy(update={"devices": self.devices[:count], "links": links})

    def with_memory(self, device_bytes: int, host_bytes: int = 0) -> "Machine":
        """This machine with so much memory on each device and on the host; 0 changes nothing."""
        changed: dict[str, object] = {}
        if device_bytes:
            memory = {"memory_bytes": device_bytes}
            changed["devices"] = tuple(each.model_copy(update=memory) for each in self.devices)
        if host_bytes:
            changed["host"] = self.host.model_copy(update={"memory_bytes": host_bytes})
        return self.model_copy(update=changed)


def ideal_machine(devices: int, hop_ns: int = 0) -> Machine:
    """`devices` devices without memory limits; transfers cost `hop_ns` between devices only.

    Raises InputError if there is no device or `hop_ns` is negative.
    """
    if devices < 1:
        raise InputError(f"devices: must be at least 1, got {devices}")
    _check_hop(hop_ns)
    names = tuple(Device(name=f"gpu{number}") for number in range(devices))
    return Machine(name="ideal", devices=names, hop_ns=hop_ns)


def _check_ends(number: int, link: Link, nodes: list[str]) -> None:
    for field, end in (("a", link.a), ("b", link.b)):
        if end not in nodes:
            raise ValueError(
                f"links.{number}.{field}: there is no device or switch {end!r}; "
                f"the nodes are {', '.join(map(repr, nodes))}"
            )
    if link.a == link.b:
        raise ValueError(f"links.{number}.b: leads from {link.a!r} to itself; name another node")


def _check_hop(hop_ns: int) -> None:
    if not 0 <= hop_ns <= MAX_COUNT:
        raise InputError(f"hop_ns: must be from 0 to {MAX_COUNT}, got {hop_ns}")
