"""A Trace: what each layer of a model costs, layer by layer, and who measured it."""

from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from .json_files import read_model, write_model

FORMAT: Final = "roundel.trace/1"

MAX_COUNT = 2**53
"""The largest number in a file: exact in every JSON reader, and a thousand of them fit an int64."""

LEAST_OF_BACKWARD = 0.9
"""Backward's parts, measured apart, may not sum to it; but they cannot be much shorter."""

Count = Annotated[int, Field(strict=True, ge=0, le=MAX_COUNT)]


class LayerCost(BaseModel):
    """The cost of one layer for one microbatch: integer nanoseconds and bytes.

    `backward_ns` is the whole backward; `backward_input_ns` and `backward_weight_ns` are its
    parts where they are known (both or neither). `forward_only_ns` is a forward that leaves nothing
    for backward, because a recompute will; None for it or `recompute_ns` means: as long as forward.
    `recompute_last_ns` is a recompute behind which nothing reads the layer's output, for its
    backward comes next: what only makes that may be left out. None: as long as another.
    `output_bytes` is the boundary tensor that the layer hands on; the gradient that comes back
    has the same size. `saved_bytes` is what forward leaves allocated for backward beyond the
    layer's own input and output. `workspace_bytes` is needed only while the layer runs,
    `update_workspace_bytes` only while a device updates it.
    `grad_bytes`, `optimizer_bytes` and `trainable_params` are 0 for a frozen layer;
    `trainable_params` None means `grad_bytes / 2`, 16-bit gradients. `tied_to` is the number of an
    earlier layer that owns some of the parameters which this one trains: their gradients belong
    to its update.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    forward_ns: Count
    backward_ns: Count
    recompute_ns: Count | None = None
    recompute_last_ns: Count | None = None
    forward_only_ns: Count | None = None
    backward_input_ns: Count | None = None
    backward_weight_ns: Count | None = None
    param_bytes: Count = 0
    grad_bytes: Count = 0
    optimizer_bytes: Count = 0
    output_bytes: Count = 0
    saved_bytes: Count = 0
    workspace_bytes: Count = 0
    update_workspace_bytes: Count = 0
    trainable_params: Count | None = None
    tied_to: Count | None = None

    @model_validator(mode="after")
    def _split_is_whole(self) -> "LayerCost":
        if (self.backward_input_ns is None) != (self.backward_weight_ns is None):
            raise ValueError("backward_input_ns and backward_weight_ns: give both or neither")
        parts = (self.backward_input_ns or 0) + (self.backward_weight_ns or 0)
        if self.backward_input_ns is not None and parts < LEAST_OF_BACKWARD * self.backward_ns:
            raise ValueError(
                f"backward_input_ns and backward_weight_ns: together they take {parts} ns, "
                f"much less than backward_ns, {self.backward_ns}; measure both parts in full"
            )
        return self

    @property
    def params_to_update(self) -> int:
        """Parameters that the optimizer updates."""
        return self.grad_bytes // 2 if self.trainable_params is None else self.trainable_params


class Trace(BaseModel):
    """Per-layer costs of one model on one device, first layer to last, the loss head being last.

    Each field, summed over the layers, is at most `MAX_COUNT`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["roundel.trace/1"] = FORMAT
    name: str
    device: str
    provenance: str
    microbatch_tokens: Count
    layers: tuple[LayerCost, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _sums_fit(self) -> "Trace":
        for field in LayerCost.model_fields:
            if field not in ("name", "tied_to") and self._total(field) > MAX_COUNT:
                raise ValueError(f"layers: {field} sums to more than {MAX_COUNT}")
        return self

    @model_validator(mode="after")
    def _ties_go_back(self) -> "Trace":
        for number, layer in enumerate(self.layers):
            if layer.tied_to is not None and layer.tied_to >= number:
                raise ValueError(
                    f"layers.{number}.tied_to: must be the number of an earlier layer, counted "
                    f"from 0, got {layer.tied_to}"
                )
        return self

    def _total(self, field: str) -> int:
        return sum(getattr(layer, field) or 0 for layer in self.layers)

    @classmethod
    def load(cls, path: str | Path) -> "Trace":
        """Read a trace file. Raises InputError naming the file, the field and the mistake."""
        return read_model(cls, path, "trace")

    def save(self, path: str | Path) -> None:
        """Write the trace as JSON that `load` reads back equal."""
        write_model(self, path)
