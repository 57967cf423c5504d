"""A Machine: devices, host and the links between them."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from .errors import InputError, parse_model, read_json
from .trace import Count

FORMAT = "roundel.machine/1"
HOST = "host"

Rate = Annotated[int, Field(strict=True, gt=0)]


class Host(BaseModel):
    """The host: its memory (0: not limited) and how fast its optimizer is (0: takes no time)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    memory_bytes: Count = 0
    optimizer_params_per_s: Count = 0


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
    duplex: bool = True


class Machine(BaseModel):
    """Devices, host and links as a graph; `switches` names the nodes that only pass data on.

    `hop_ns` not None replaces all links: data takes that constant time between two different
    devices and none between host and device, and transfers never wait for one another.
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
    def _nodes_are_there(self) -> "Machine":
        names = [HOST, *(device.name for device in self.devices), *self.switches]
        if len(set(names)) < len(names):
            raise ValueError("devices and switches: every name must be its own, and not 'host'")
        for number, link in enumerate(self.links):
            for end in ("a", "b"):
                if getattr(link, end) not in names:
                    raise ValueError(
                        f"links.{number}.{end}: there is no device or switch "
                        f"{getattr(link, end)!r}; the nodes are {', '.join(names)}"
                    )
        return self

    @classmethod
    def load(cls, path: str | Path) -> "Machine":
        """Read a machine file. Raises InputError naming the file, the field and the mistake."""
        data = read_json(Path(path), "machine")
        if isinstance(data, dict) and data.get("format") != FORMAT:
            raise InputError(f'{path}: format: must be "{FORMAT}", got {data.get("format")!r}')
        return parse_model(cls, data, str(path))

    def save(self, path: str | Path) -> None:
        """Write the machine as JSON that `load` reads back equal."""
        Path(path).write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")

    def with_hop(self, hop_ns: int) -> "Machine":
        """This machine with all links replaced by a constant time between different devices."""
        return self.model_copy(update={"hop_ns": hop_ns})

    def first_devices(self, count: int) -> "Machine":
        """This machine with only its first `count` devices (the others' links go with them)."""
        if not 1 <= count <= len(self.devices):
            raise InputError(
                f"machine {self.name} has {len(self.devices)} devices, {count} were asked for; "
                f"give a number from 1 to {len(self.devices)} or another machine"
            )
        gone = {device.name for device in self.devices[count:]}
        links = tuple(link for link in self.links if not gone & {link.a, link.b})
        return self.model_copy(update={"devices": self.devices[:count], "links": links})


def ideal_machine(devices: int, hop_ns: int = 0) -> Machine:
    """`devices` devices without memory limits; transfers cost `hop_ns` between devices only."""
    if devices < 1:
        raise InputError(f"devices: must be at least 1, got {devices}")
    names = tuple(Device(name=f"gpu{number}") for number in range(devices))
    return Machine(name="ideal", devices=names, hop_ns=hop_ns)
