"""What images add to a step: their pixels, and the forward pass of the frozen vision tower, which saves nothing for a
backward pass. Imports no torch.

n patches, h width of the tower, f of its MLP, s bytes per element.
"""

from __future__ import annotations

import dataclasses

from rankwise.foreign import Fields
from rankwise.planning.workload import Workload

ELEMENT = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclasses.dataclass(frozen=True)
class Tower:
    """The sizes of the vision tower. One image token of the language model stands for ``patches`` patches."""

    hidden: int
    mlp: int
    # Number of pixel values of a patch.
    values: int
    patches: int


def tower_of(config: Fields) -> Tower | None:
    """The tower that a config.json describes, with all its fields; None where their names are unknown."""
    eyes = config.get("vision_config") or {}
    h, f, patch, image = map(_size, map(eyes.get, ("hidden_size", "intermediate_size", "patch_size", "image_size")))
    merged, tokens = map(
        _size, (config.get("scale_factor") or eyes.get("spatial_merge_size"), config.get("mm_tokens_per_image"))
    )
    patches = merged**2
    if not merged and patch and tokens:
        patches = (image // patch) ** 2 // tokens
    if not (h and f and patch and patches):
        return None
    return Tower(h, f, 3 * eyes.get("temporal_patch_size", 1) * patch**2, patches)


def _size(value: object) -> int:
    return value if isinstance(value, int) and value > 0 else 0


def image_terms(tower: Tower, workload: Workload) -> tuple[int, int]:
    """Bytes of the micro-batch's pixels, which live through the whole step, and of the tower's forward pass.

    Pixels are float32; the pass includes their copy in the model's dtype. An MLP of the tower holds the stream, a
    normed copy and two tensors of width f; on a CPU a third one, as measured:  n s (3 h + 2 f + values) in all.
    """
    tokens = min(workload.image_tokens, workload.max_length)
    n, s = workload.batch_size * tokens * tower.patches, ELEMENT[workload.dtype]
    wide = 3 if workload.device_type == "cpu" else 2
    return 4 * n * tower.values, n * s * (3 * tower.hidden + wide * tower.mlp + tower.values)
