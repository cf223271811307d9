"""What FSDP2 holds on a rank beside its shares: whole weights while they are used, whole gradients until they are reduced.

As `sharding` cuts a model: each decoder layer is a unit, in the dtype it computes in; embeddings and head are one unit in
the dtype they are stored in, gathered from the first forward to the end of the backward. By torch's FSDP2:

    gathering      a flat buffer and the weights that are copied out of it; in a forward the buffer lies until the next
                   unit's has arrived
    in a backward  the layer's weights, the flat buffer of the one before it, already under way, and the flat gradients
                   of the one behind it, which lie until this one's are reduced
    at the end     gradients of the embeddings and the head, their flat copy and the share that comes of it; the weights
                   have gone before

Vectors are whole on every rank and too small to count. `tests/engine/test_planner_ranks.py` holds it to a trace.
"""

from __future__ import annotations

from dataclasses import dataclass

from .planner_layer import WIDE
from .planner_setting import Setting
from .planner_shape import ModelShape


@dataclass(frozen=True)
class Gathered:
    """Bytes; all 0 where weights aren't sharded. `root` is the unit of embeddings and head."""

    root: float = 0.0
    layer: float = 0.0
    layer_sum: float = 0.0
    """Flat gradients of a layer."""
    at_end: float = 0.0
    """Whole gradients of the root, their flat copy, and a rank's share of the sum."""
    whole: float = 0.0
    """All weights at once, as a generator has them."""

    @property
    def at_start(self) -> float:
        return 2 * (self.root + self.layer)

    @property
    def in_layers(self) -> float:
        return self.root + 2 * self.layer + self.layer_sum

    @property
    def in_forward(self) -> float:
        """Without gradients: nothing waits to be reduced."""
        return self.root + 2 * self.layer


def gathered_bytes(shape: ModelShape, setting: Setting) -> Gathered:
    if not setting.sharded:
        return Gathered()
    edges = shape.head_parameters * (1 if shape.tied else 2)
    root, layer = setting.stored * edges, setting.computed * shape.layer_matrices
    reduced = setting.stored if setting.lora is None else WIDE  # adapters are fp32
    if setting.lora is None:
        trained, at_edges = shape.layer_matrices, edges
    else:
        head = shape.adapter_parameters(setting.lora) - shape.layers * adapters(shape, setting)
        trained, at_edges = adapters(shape, setting), 0
        layer += WIDE * trained
        root += WIDE * head
    return Gathered(
        root=root,
        layer=layer,
        layer_sum=reduced * trained,
        at_end=reduced * at_edges * (2 + 1 / setting.shards),
        whole=root + shape.layers * layer,
    )


def adapters(shape: ModelShape, setting: Setting) -> int:
    """Parameters of one layer's adapters."""
    assert setting.lora is not None
    sizes = shape.linears
    return sum(setting.lora.rank * sum(sizes[name]) for name in setting.lora.targets if name in sizes)
