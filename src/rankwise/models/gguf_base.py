"""A GGUF file as a base in its own bits: weights are views of the mapped file, in the file's blocks.

Matrices of linear layers, embeddings and stacked experts stay packed. Norms, biases and what the file holds in 16 or 32
bits get the model's dtype. So do stacks whose two tensors differ in type (RW613).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from rankwise.compat.torch import own_parameters
from rankwise.errors import ModelError, some_of, warn
from rankwise.models.folder import auto_class
from rankwise.models.gguf_file import ARCHITECTURES, ONLY_ADAPTERS, GgufNames, GgufTensor, Part, read_gguf_header
from rankwise.ops import gguf_blocks
from rankwise.ops.gguf_blocks import GGUF_TYPES
from rankwise.ops.packed_weight import PackedWeight
from rankwise.quantization.experts import StackScales, foreign, put_stack
from rankwise.quantization.linear import Linear4bit, PackedEmbedding, is_conv1d, is_dense_linear
from rankwise.reports.numbers import byte_size

DENSE_TYPES = ("F32", "F16", "BF16")
INSTEAD = "give --base-bits 16, which expands the file"


def load_own_bits(path: Path, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a GGUF file, its matrices packed.

    Raises ModelError: RW316 for a family or a type that is not read so, RW308 for tensors that do not fit the config,
    RW323 for infinite scales. Warns RW613 of experts that are expanded.
    """
    families = [kind for kind in ARCHITECTURES if kind not in ONLY_ADAPTERS]
    if config.model_type not in families:
        raise ModelError(
            "RW316",
            f"{path} holds a {config.model_type}, which is not read in a file's own bits (those of type "
            f"{', '.join(families)} are); {INSTEAD}.",
        )
    file = _File(path)
    with no_init_weights():
        # Its weights are never touched, and so take no memory.
        model: PreTrainedModel = auto_class(config.model_type).from_config(config, dtype=dtype)
    model.tie_weights()
    return _Filling(model, file, GgufNames(config), dtype).filled()


class _File:
    """The tensors of a mapped file. Raises ModelError: RW310 for a damaged one, RW316 for a type that is not read."""

    def __init__(self, path: Path) -> None:
        self.path, header = path, read_gguf_header(path)
        self.tensors, self.start = header.tensors, header.data_start
        self.content = torch.from_numpy(np.memmap(path, np.uint8, "c"))
        for name, tensor in self.tensors.items():
            if (kind := self.kind(tensor)) not in (*GGUF_TYPES, *DENSE_TYPES):
                raise ModelError(
                    "RW316",
                    f"{path} stores {name!r} as {kind}, and bases keep {', '.join(GGUF_TYPES)}; {INSTEAD}, or take a "
                    "file of a different type, such as Q4_K_M.",
                )

    def kind(self, tensor: GgufTensor) -> str:
        return gguf.GGMLQuantizationType(tensor.ggml_type).name

    def rows(self, tensor: GgufTensor) -> Tensor:
        """The stored rows, uint8 (all rows, bytes of a row): a view of the file."""
        stored = self.content[self.start + tensor.begin : self.start + tensor.end]
        return stored.view(-1, len(stored) * tensor.shape[0] // int(np.prod(tensor.shape)))

    def dense(self, tensor: GgufTensor) -> Tensor:
        """The weight in float32, a new tensor in torch's order of dimensions."""
        found = gguf.dequantize(self.rows(tensor).numpy(), gguf.GGMLQuantizationType(tensor.ggml_type))
        return torch.from_numpy(found.astype(np.float32)).reshape(tensor.shape[::-1])


class _Filling:
    def __init__(self, model: PreTrainedModel, file: _File, names: GgufNames, dtype: torch.dtype) -> None:
        self.model, self.file, self.names, self.dtype = model, file, names, dtype
        self.problems: list[str] = []
        self.expanded: list[Tensor] = []

    def filled(self) -> PreTrainedModel:
        model: Any = self.model
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        is_tied = head.weight is embedding.weight
        for path, module in list(model.named_modules()):
            # The weight last, since a layer that stays packed takes the bias over; a stack's scales are no parameter.
            for leaf, parameter in sorted(own_parameters(module).items(), key=lambda item: item[0] == "weight"):
                if parameter is not None and not (is_tied and module is head and leaf == "weight"):
                    self._fill(path, module, leaf, parameter)
        if self.problems:
            raise ModelError(
                "RW308", f"the tensors of {self.file.path} do not fit its header: {some_of(self.problems)}."
            )
        if is_tied:
            self._tie(head, model.get_input_embeddings())
        if self.expanded:
            size = byte_size(sum(W.nbytes for W in self.expanded))
            warn(
                "RW613", f"{len(self.expanded)} expert tensors ({size}) are expanded to {self.dtype}: they stay dense."
            )
        return model.eval()

    def _fill(self, path: str, module: nn.Module, leaf: str, parameter: Tensor) -> None:
        """Give the parameter its tensors of the file; a module whose matrix stays packed is replaced."""
        name = f"{path}.{leaf}"
        parts = self.names.of(name)
        if missing := [part.name for part in parts if part.name not in self.file.tensors]:
            self.problems += [f"{part} is missing" for part in missing]
            return
        tensor = self.file.tensors[parts[0].name]
        found, wanted = tensor.shape[::-1], tuple(parameter.shape[::-1] if is_conv1d(module) else parameter.shape)
        is_matrix = leaf == "weight" and (is_dense_linear(module) or isinstance(module, nn.Embedding))
        if is_matrix and found != wanted:
            self.problems.append(f"{parts[0].name} is {found}, expected {wanted}")
        elif is_matrix and self.file.kind(tensor) in GGUF_TYPES:
            self.model.set_submodule(path, self._packed(module, name, tensor))
        elif parameter.dim() == 3 and self._is_packed_stack(module, leaf, parts):
            self._put_stack(module, leaf, parts)
        else:
            self._set_dense(module, leaf, name, parts)

    def _is_packed_stack(self, module: nn.Module, leaf: str, parts: list[Part]) -> bool:
        tensors = [self.file.tensors[part.name] for part in parts]
        kinds = {self.file.kind(tensor) for tensor in tensors}
        return len(kinds) == 1 and kinds <= GGUF_TYPES.keys() and foreign(module, leaf) is None

    def _put_stack(self, module: nn.Module, leaf: str, parts: list[Part]) -> None:
        """Give a stack its experts of one tensor of the file, or of two, of which each expert's rows follow each other.
        The stack is a view of the file from the first tensor to the last."""
        tensors = [self.file.tensors[part.name] for part in parts]
        kind, shapes = self.file.kind(tensors[0]), [tensor.shape[::-1] for tensor in tensors]
        shape = (shapes[0][0], sum(N for _, N, _ in shapes), shapes[0][2])
        if {(E, K) for E, _, K in shapes} != {(shape[0], shape[2])} or shape != module.get_parameter(leaf).shape:
            self.problems.append(f"{parts[0].name} is {shapes[0]}, expected {tuple(module.get_parameter(leaf).shape)}")
            return
        for part, tensor in zip(parts, tensors):
            self._check_finite(part.name, self.file.rows(tensor), kind)
        begin, row_bytes = min(tensor.begin for tensor in tensors), GGUF_TYPES[kind].row_bytes(shape[2])
        codes, order = self.file.rows(tensors[0]), None
        if len(tensors) > 1:
            codes = self.file.content[self.file.start + begin : self.file.start + max(one.end for one in tensors)]
            places = [
                one.begin - begin + torch.arange(E * N).view(E, N) * row_bytes
                for one, (E, N, _) in zip(tensors, shapes)
            ]
            order = torch.cat(places, dim=1).flatten().int()
        scales = StackScales(
            shape,
            quant_type=kind,
            block_size=GGUF_TYPES[kind].elements,
            double_quant=False,
            dtype=self.dtype,
            device="meta",
        )
        scales.absmax, scales.order = torch.empty(0), order
        put_stack(module, leaf, scales, codes)

    def _check_finite(self, name: str, rows: Tensor, kind: str) -> None:
        if not gguf_blocks.is_finite(rows, kind):
            raise ModelError("RW323", f"{self.file.path} holds NaN or infinity in {name}; get it again.")

    def _packed(self, module: nn.Module, name: str, tensor: GgufTensor) -> nn.Module:
        kind, rows = self.file.kind(tensor), self.file.rows(tensor)
        self._check_finite(name, rows, kind)
        K, N = tensor.shape
        stored = self.names.rows(name, torch.arange(N)[:, None])[:, 0]
        order = None if bool((stored == torch.arange(N)).all()) else stored.argsort().int()
        weight = PackedWeight(
            codes=rows,
            absmax=torch.empty(0),
            shape=(N, K),
            quant_type=kind,
            block_size=GGUF_TYPES[kind].elements,
            order=order,
            dtype=self.dtype,
        )
        if isinstance(module, nn.Embedding):
            return PackedEmbedding(weight, module)
        layer = Linear4bit.of(weight, own_parameters(module)["bias"])
        layer.was_conv1d = is_conv1d(module)
        return layer

    def _set_dense(self, module: nn.Module, leaf: str, name: str, parts: list[Part]) -> None:
        found = [self.file.dense(self.file.tensors[part.name]) for part in parts]
        W = found[0] if len(parts) == 1 else torch.cat(found, dim=1)
        W = W - 1 if self.names.adds_one(name) else W
        if W.dim() == 1 or module.get_parameter(leaf).dim() == 2:
            W = W[self.names.rows(name, torch.arange(len(W))[:, None])[:, 0].argsort()]
        W = W.T.contiguous() if is_conv1d(module) and leaf == "weight" else W
        wanted = module.get_parameter(leaf).shape
        if W.shape != wanted:
            self.problems.append(f"{parts[0].name} is {tuple(W.shape)}, expected {tuple(wanted)}")
            return
        setattr(module, leaf, nn.Parameter(W.to(self.dtype)))
        if W.dim() == 3:
            self.expanded.append(module.get_parameter(leaf))

    def _tie(self, head: nn.Module, embedding: nn.Module) -> None:
        """Let the head have the embedding's weight: packed, or dense."""
        if not isinstance(embedding, PackedEmbedding):
            head.weight = embedding.weight
            return
        layer = Linear4bit.of(embedding.packed_with(embedding.weight), own_parameters(head)["bias"])
        layer.weight = embedding.weight
        self.model.set_output_embeddings(layer)
