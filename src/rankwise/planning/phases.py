"""The memory that each phase of a step adds to what all phases hold, by the closed form. Imports no torch.

    forward     saved by all layers + logits
    backward    saved by all layers + what the last layer's gradients take (with checkpointing the input of each
                layer is saved, and one layer is made again)
    its end     all gradients + one layer, or + the embedding's gradient
    optimizer   all gradients + the optimizer's copies

The letters are those of `planning.step_facts`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from rankwise.planning import backward, head, saved
from rankwise.planning.step_facts import StepFacts

Terms = dict[str, int]


@dataclasses.dataclass(frozen=True)
class Moments:
    """The bytes held at each moment of one training step.

    ``gradients``: all gradients. ``copies``: the optimizer's copies of them. ``unpacked``: the largest 4-bit weight
    that is dequantized for its product.
    """

    step: StepFacts
    gradients: int
    copies: int
    unpacked: int

    def phases(self) -> Iterator[tuple[str, Terms]]:
        """(phase, its terms); a phase's first word is its name in ``MemoryEstimate``."""
        step = self.step
        logits = head.loss_bytes(step)
        yield "forward", {"activations": self.saved + self.outside, "logits": logits, "transient": self.cast}
        if step.shape.experts and not self.again and not step.is_full:
            yield "forward through experts", self.through_experts()
        at_head = {"activations": self.saved + self.outside, "transient": head.first_gradient_bytes(step)}
        yield "backward at the head", at_head
        yield "backward", self.last_layer()
        yield "backward at the first layer", self.first_layer()
        if step.scores:
            yield from self.through_scores()
        yield "backward at the embedding", {"gradients": self.gradients, "transient": 2 * self.tied_gradient}
        yield "optimizer", {"gradients": self.gradients, "transient": self.copies}

    @property
    def again(self) -> bool:
        """Whether checkpointing computes each layer again."""
        return self.step.workload.gradient_checkpointing

    @property
    def offloads(self) -> bool:
        return self.step.workload.activation_offloading

    @property
    def layer(self) -> int:
        return saved.layer_bytes(self.step)

    @property
    def unsaved(self) -> int:
        """The bytes that the first layer does not save. Checkpointing leaves nothing out, nor do trained biases, for
        which every layer needs gradients."""
        biases_train = self.step.adaptation is not None and bool(self.step.adaptation.biases)
        return 0 if self.again or biases_train else saved.unsaved_bytes(self.step)

    @property
    def saved(self) -> int:
        """The bytes that all layers save on the device."""
        if self.offloads:
            return 0
        each = self.step.stream_bytes if self.again else self.layer
        return self.step.shape.layers * each - self.unsaved

    @property
    def outside(self) -> int:
        return saved.outside_layers_bytes(self.step)

    @property
    def cast(self) -> int:
        """Autocast's copies of all layers' weights, which live until the forward pass ends. Layers that are not
        computed again save theirs.
        """
        return round(self.step.shape.layers * saved.cast_weights_bytes(self.step)) if self.again else 0

    @property
    def made_again(self) -> int:
        """The tensors of one layer that is computed again, beyond its checkpoint."""
        return self.layer - saved.kept_twice_bytes(self.step) if self.again else 0

    @property
    def outside_then(self) -> int:
        """The part of ``outside`` held in the backward pass: with checkpointing, a layer's input and the mask."""
        return self.step.stream_bytes + saved.masks_bytes(self.step) if self.again else 0

    @property
    def held(self) -> int:
        """Gradients inside one layer's backward pass, and a dense copy of a 4-bit weight."""
        from_host = self.offloads and not self.again
        own = backward.offloaded_backward_bytes if from_host else backward.backward_bytes
        return own(self.step) + self.unpacked + self.brought_back

    @property
    def brought_back(self) -> int:
        """Offloaded tensors that were fetched for one operation and stay until the next one has fetched its own."""
        if not self.offloads:
            return 0
        return 2 * self.step.stream_bytes if self.again else backward.brought_back_bytes(self.step)

    @property
    def last_gradient(self) -> int:
        """The gradient of the embedding, which comes last."""
        return head.embedding_gradient_bytes(self.step)

    @property
    def tied_gradient(self) -> int:
        return self.last_gradient if self.step.shape.tied else 0

    def last_layer(self) -> Terms:
        """The backward pass of the last layer, while the saved tensors of all layers are held."""
        return {
            "activations": self.saved + self.made_again + self.outside_then,
            "gradients": head.gradient_bytes(self.step),
            "transient": self.held,
        }

    def first_layer(self) -> Terms:
        """The backward pass of the first layer: its own tensors, and the gradients of all the others."""
        own = self.made_again if self.offloads else self.layer - self.unsaved
        return {
            "activations": own + (self.step.stream_bytes if self.again else 0),
            "gradients": self.gradients - self.last_gradient + self.tied_gradient,
            "transient": self.held,
        }

    def through_scores(self) -> Iterator[tuple[str, Terms]]:
        """The backward pass of attention that keeps its scores, in the last layer and in the first."""
        if self.offloads and not self.again:
            transient = backward.offloaded_scores_bytes(self.step) + self.tied_gradient + self.brought_back
            terms = {"gradients": self.gradients - self.last_gradient, "transient": transient}
            yield "backward through scores", terms
            return
        scores, gone = backward.scores_backward_bytes(self.step)
        last = self.saved + self.made_again + self.outside_then - gone
        yield "backward through scores", {"activations": last, "transient": scores + self.last_gradient}
        yield (
            "backward through the first layer's scores",
            {
                "activations": self.layer + self.outside_then - gone,
                "gradients": self.gradients - self.last_gradient,
                "transient": scores + self.tied_gradient,
            },
        )

    def through_experts(self) -> Terms:
        inside, unsaved = backward.experts_forward_bytes(self.step)
        return {"activations": self.saved + self.outside - unsaved, "transient": inside}
