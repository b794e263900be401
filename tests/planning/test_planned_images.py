"""What images add to a step: their pixels in every phase, and the vision tower before the language part."""

from __future__ import annotations

from typing import Any

import pytest

from rankwise.planning import Workload
from rankwise.planning.assemble import Found, with_images
from rankwise.planning.parallel import Group
from rankwise.planning.vision import Tower, image_terms, tower_of

EYES = {"hidden_size": 96, "intermediate_size": 256, "patch_size": 14, "image_size": 56}
TOWER = Tower(96, 256, 3 * 14 * 14, 9)


@pytest.mark.parametrize(
    ("eyes", "config", "values", "patches"),
    [
        # SmolVLM joins squares of patches.
        ({}, {"scale_factor": 3}, 3 * 14 * 14, 9),
        # Qwen2.5-VL takes two frames at once.
        ({"spatial_merge_size": 2, "temporal_patch_size": 2}, {}, 6 * 14 * 14, 4),
        # Gemma 3 pools an image to so many tokens.
        ({"image_size": 896}, {"mm_tokens_per_image": 256}, 3 * 14 * 14, 16),
    ],
)
def test_a_tower_is_read_of_a_config(eyes: dict[str, int], config: dict[str, Any], values: int, patches: int) -> None:
    assert tower_of({"vision_config": EYES | eyes, **config}) == Tower(96, 256, values, patches)


@pytest.mark.parametrize("missing", ["hidden_size", "intermediate_size", "patch_size"])
def test_a_tower_of_other_names_is_not_known(missing: str) -> None:
    eyes = {name: size for name, size in EYES.items() if name != missing}
    assert tower_of({"vision_config": eyes, "scale_factor": 3}) is None
    assert tower_of({"vision_config": EYES}) is None
    assert tower_of({}) is None


@pytest.mark.parametrize(("device", "wide"), [("cuda", 2), ("cpu", 3)])
def test_pixels_are_held_in_every_phase_and_the_tower_s_tensors_in_its_own(device: str, wide: int) -> None:
    workload = Workload(batch_size=2, max_length=64, image_tokens=10, device_type=device)  # type: ignore[arg-type]
    patches = 2 * 10 * 9
    pixels, inside = image_terms(TOWER, workload)
    assert pixels == 4 * patches * TOWER.values
    assert inside == 2 * patches * (3 * 96 + wide * 256 + TOWER.values)
    phases = {"forward": {"weights": 5, "activations": 7, "logits": 3, "transient": 1}, "backward": {"weights": 5}}
    found = Found(phases, 0, 0, 0, 0, None, Group(0, 0), Group(0, 0), 0, False, tower=TOWER)
    assert with_images(workload, found) == {
        "forward": phases["forward"] | {"transient": 1 + pixels},
        "backward": {"weights": 5, "transient": pixels},
        "forward of the tower": {
            "weights": 5,
            **dict.fromkeys(("activations", "logits", "gradients"), 0),
            "transient": pixels + inside,
        },
    }
