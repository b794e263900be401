"""Stacked experts in 4 bits: bitsandbytes' format, the eager computation, and every way into and out of a model."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.moe import use_experts_implementation

import rankwise as rw
from marks import at_some_level
from precision import assert_as_exact
from rankwise.errors import QuantizationError, RankwiseWarning
from rankwise.quantization import Fp4Config, Nf4Config, adopt_bitsandbytes_config, dequantize, quantize
from rankwise.quantization.experts import StackScales, four_bit_stacks
from tables import thinned
from tiny_models import tiny_moe

IDS = torch.tensor([[1, 5, 9, 14, 33, 60, 96, 2], [7, 3, 3, 50, 41, 8, 22, 90]])
FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss")
CONFIGS = [Nf4Config(), Nf4Config(double_quant=True), Fp4Config(block_size=32, double_quant=True)]


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def eager(model: nn.Module) -> nn.Module:
    """A copy with every 4-bit weight dense, computed by transformers' own loop over experts."""
    dense = copy.deepcopy(model)
    dequantize(dense)
    dense.set_experts_implementation("eager")
    return dense


def load_stored(folder: Path, **settings) -> nn.Module:
    config = AutoConfig.from_pretrained(folder)
    assert adopt_bitsandbytes_config(config) is not None
    return AutoModelForCausalLM.from_pretrained(folder, config=config, **settings)


def quantized(family: str, config=None, dtype: torch.dtype = torch.float32, **settings) -> nn.Module:
    model = tiny_moe(family, **settings).to(dtype)
    quantize(model, config or Nf4Config())
    return model


def given_to(experts: nn.Module) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows, two experts for each, and their weights: a whole model may send a rounded token elsewhere."""
    index = torch.stack([torch.randperm(experts.num_experts)[:2] for _ in range(40)])
    return torch.randn(40, 32), index, torch.rand(40, 2)


@pytest.fixture
def parametrize():
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: nothing to compare with")
    return pytest.importorskip("bitsandbytes.nn.parametrize")


def by_bitsandbytes(parametrize, model: nn.Module, config) -> nn.Module:
    for module in list(model.modules()):
        for leaf in ("gate_up_proj", "down_proj"):
            if isinstance(getattr(module, leaf, None), nn.Parameter):
                parametrize.replace_parameter_4bit(
                    module,
                    leaf,
                    compress_statistics=config.double_quant,
                    quant_type=config.quant_type,
                    blocksize=config.block_size,
                )
    return model


@thinned(
    {
        "config": [*CONFIGS, Fp4Config(block_size=128)],
        "dtype": [torch.float32, torch.bfloat16],
        "family": ["mixtral", "gpt_oss"],
    }
)
def test_the_state_equals_that_of_bitsandbytes(parametrize, family, dtype, config, tmp_path):
    theirs = by_bitsandbytes(parametrize, tiny_moe(family).to(dtype), config).state_dict()
    mine = quantized(family, config, dtype)
    mine.save_pretrained(tmp_path)
    # On disk Mixtral's blocks have another name.
    stored = {
        name.replace("block_sparse_moe", "mlp"): t for name, t in load_file(tmp_path / "model.safetensors").items()
    }
    names = [name for name in theirs if ".experts." in name]
    assert names == [name for name in theirs if "experts." in name and name in stored]
    assert sum("quant_state" in name for name in names) == 4
    for name in names:
        assert theirs[name].dtype == stored[name].dtype, name
        assert torch.equal(theirs[name], stored[name]), name


@thinned({"config": CONFIGS, "family": ["mixtral", "qwen3_moe", "gpt_oss"]})
def test_a_file_that_bitsandbytes_wrote_is_read(parametrize, family, config, tmp_path):
    # It dequantizes wrongly on a CPU where the last dimension is not a multiple of the block.
    sizes = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64}
    peer = by_bitsandbytes(parametrize, tiny_moe(family, **sizes), config)
    save_file(peer.state_dict(), tmp_path / "model.safetensors", {"format": "pt"})
    peer.config.quantization_config = config
    peer.config.architectures = [type(peer).__name__]
    peer.config.save_pretrained(tmp_path)
    mine = load_stored(tmp_path)
    stacks = dict(four_bit_stacks(mine))
    assert len(stacks) == 4
    for name, stack in stacks.items():
        path, _, leaf = name.rpartition(".")
        assert torch.equal(stack.dequantize(), getattr(peer.get_submodule(path), leaf))
    torch.testing.assert_close(logits(mine), logits(peer), rtol=1e-5, atol=1e-6)


@thinned({"family": FAMILIES, "config": CONFIGS})
def test_it_computes_what_eager_does_on_the_dequantized_weights(family, config):
    model = quantized(family, config)
    expected = eager(model)
    assert any(isinstance(module, StackScales) for module in model.modules())
    assert not any(isinstance(module, StackScales) for module in expected.modules())
    torch.testing.assert_close(logits(model), logits(expected), rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        assert not torch.allclose(logits(tiny_moe(family)), logits(model), atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_so_are_the_gradients_of_hidden_states_and_of_the_router(family):
    model = quantized(family, CONFIGS[1])
    grads = []
    for each in (model, eager(model)):
        embedding = each.get_input_embeddings().weight
        routers = [p for name, p in each.named_parameters() if name.endswith(("mlp.gate.weight", "router.weight"))]
        assert len(routers) == 2
        loss = each(input_ids=IDS, labels=IDS).loss
        grads.append(torch.autograd.grad(loss, [embedding, *(p.requires_grad_() for p in routers)]))
    for ours, theirs in zip(*grads, strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@at_some_level
@pytest.mark.parametrize("family", FAMILIES)
def test_in_bfloat16_the_error_is_no_larger_than_eager_s(family):
    exact = quantized(family)
    dequantize(exact, torch.bfloat16)
    half = quantized(family, dtype=torch.bfloat16)
    dense = eager(half)
    experts = next(module for module in half.modules() if hasattr(module, "has_gate"))
    theirs = next(module for module in dense.modules() if hasattr(module, "has_gate"))
    x, index, weights = given_to(experts)
    x = x.bfloat16()
    wanted = copy.deepcopy(theirs).float()(x.float(), index, weights)
    assert_as_exact([experts(x, index, weights)], [theirs(x, index, weights)], [wanted])


def test_autocast_and_a_compute_dtype_are_heeded():
    model, in_half = quantized("gpt_oss"), quantized("gpt_oss", Nf4Config(compute_dtype=torch.bfloat16))
    ours, half, theirs = (each.model.layers[0].mlp.experts for each in (model, in_half, eager(model)))
    x, index, weights = given_to(ours)
    exact = ours(x, index, weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, plain = ours(x, index, weights), theirs(x, index, weights)
    in_bfloat16 = half(x, index, weights)
    assert in_bfloat16.dtype is torch.float32
    assert not torch.equal(in_bfloat16, exact)
    assert_as_exact([found, in_bfloat16], [plain] * 2, [exact] * 2, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("shape", "double"), [((3, 24, 32), True), ((2, 128, 128), True), ((3, 160, 128), True), ((3, 24, 32), False)]
)
def test_an_expert_s_slice_has_the_weights_of_the_whole(shape, double):
    """Of blocks of 256 scales that lie across two experts too."""
    holder = _experts(shape)
    quantize(nn.Sequential(holder, nn.Linear(64, 64)), Nf4Config(double_quant=double))
    ((_, stack),) = list(four_bit_stacks(holder))[:1]
    whole = stack.dequantize()
    for index in range(shape[0]):
        part = rw.ops.dequantize_weight(stack.scales.of_expert(index, stack.codes[index]), torch.float32)
        assert torch.equal(part, whole[index])
        x = torch.randn(5, shape[2])
        torch.testing.assert_close(stack.product(x, index, transposed=False), x @ whole[index].T)
        x = torch.randn(5, shape[1])
        torch.testing.assert_close(stack.product(x, index, transposed=True), x @ whole[index])


def _experts(shape: tuple[int, int, int]) -> nn.Module:
    E, N, K = shape

    @use_experts_implementation(has_gate=False, has_bias=True, has_post_expert_norm=True)
    class Experts(nn.Module):
        """Without a gate, with biases and a norm behind."""

        def __init__(self, config):
            super().__init__()
            self.num_experts, self.act_fn = E, nn.ReLU()
            self.up_proj, self.down_proj = nn.Parameter(torch.randn(E, N, K)), nn.Parameter(torch.randn(E, K, N))
            self.up_proj_bias, self.down_proj_bias = nn.Parameter(torch.randn(E, N)), nn.Parameter(torch.randn(E, K))
            self.post_expert_norm = nn.LayerNorm(K)

        def forward(self, hidden_states, top_k_index, top_k_weights):
            out = torch.zeros_like(hidden_states)
            for t, (experts, weights) in enumerate(zip(top_k_index.tolist(), top_k_weights, strict=True)):
                for e, p in zip(experts, weights, strict=True):
                    inner = self.act_fn(F.linear(hidden_states[t], self.up_proj[e], self.up_proj_bias[e]))
                    out[t] += p * self.post_expert_norm(F.linear(inner, self.down_proj[e], self.down_proj_bias[e]))
            return out

    config = AutoConfig.for_model("llama")
    config._experts_implementation = "eager"
    return nn.ModuleDict({"experts": Experts(config)})


def test_experts_without_a_gate_and_with_a_norm_behind():
    model = _experts((4, 48, 32))
    x, weights = torch.randn(10, 32), torch.rand(10, 2)
    index = torch.stack([torch.randperm(4)[:2] for _ in range(10)])
    quantize(model, Nf4Config())
    dense = copy.deepcopy(model)
    dequantize(dense)
    torch.testing.assert_close(model["experts"](x, index, weights), dense["experts"](x, index, weights))


def test_nothing_dense_and_no_codes_are_kept_for_backward():
    model = quantized("gpt_oss", CONFIGS[1])
    experts = model.model.layers[0].mlp.experts
    held = {id(tensor.untyped_storage()) for tensor in model.state_dict(keep_vars=True).values()}
    kept: list[torch.Tensor] = []
    x = torch.randn(4, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        experts(x, torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0]]), torch.rand(4, 2))
    assert kept
    assert all(tensor.dtype is not torch.uint8 and tensor.numel() <= 8 * 96 for tensor in kept)
    assert not held & {id(tensor.untyped_storage()) for tensor in kept}


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_checkpointing_changes_no_gradient(family, fast):
    def grads(checkpointing):
        model = quantized(family)
        rw.add_adapter(model, rw.LoraConfig(r=2, init_lora_weights=False))
        if checkpointing:
            model.gradient_checkpointing_enable()
        if fast:
            rw.optimize_for_training(model)
        model.train()
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        return {name: parameter.grad for name, parameter in rw.adapter_parameters(model).items()}

    plain, again = grads(False), grads(True)
    assert all(grad is not None and grad.abs().max() > 0 for grad in plain.values())
    # Few rows take other kernels without a graph than with one. Rounding the embeddings otherwise, in their last bit,
    # moves gradients by as much.
    atol = 2e-5 * max(grad.abs().max().item() for grad in plain.values())
    for name, grad in plain.items():
        torch.testing.assert_close(again[name], grad, rtol=1e-4, atol=atol)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_generates_what_the_dense_one_does(family):
    model = quantized(family)
    settings = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(IDS, **settings), eager(model).generate(IDS, **settings))


@thinned({"family": FAMILIES, "dtype": [torch.float32, torch.bfloat16], "config": CONFIGS})
def test_loading_equals_quantizing_afterwards_and_reloading_both(family, dtype, config, tmp_path):
    tiny_moe(family).to(dtype).save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    assert len(list((tmp_path / "dense").glob("*.safetensors"))) > 1
    streamed, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", dtype=dtype, quantization_config=config, output_loading_info=True
    )
    assert not any(info.values())
    afterwards = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=dtype)
    quantize(afterwards, config)
    afterwards.save_pretrained(tmp_path / "one")
    streamed.save_pretrained(tmp_path / "other", max_shard_size="10KB")
    reloaded = [load_stored(tmp_path / folder, output_loading_info=True) for folder in ("one", "other")]
    assert not any(any(info.values()) for _, info in reloaded)
    wanted = afterwards.state_dict()
    for model in (streamed, *(model for model, _ in reloaded)):
        state = model.state_dict()
        assert state.keys() == wanted.keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in wanted.items())
        assert torch.equal(logits(model), logits(afterwards))
        assert not any(tensor.is_meta for tensor in state.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_dequantized_it_is_saved_as_the_family_s_checkpoints_are(family, tmp_path):
    model = quantized(family)
    expected = logits(eager(model))
    model.save_pretrained(tmp_path / "quantized")
    tiny_moe(family).save_pretrained(tmp_path / "dense")
    again = load_stored(tmp_path / "quantized", dtype=torch.float32).dequantize()
    again.save_pretrained(tmp_path / "again")
    assert (
        load_file(tmp_path / "again" / "model.safetensors").keys()
        == load_file(tmp_path / "dense" / "model.safetensors").keys()
    )
    assert again.config._experts_implementation != "rankwise_4bit"
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    torch.testing.assert_close(logits(plain), expected, rtol=1e-5, atol=1e-6)


def test_an_expert_of_no_whole_blocks_stays_dense_and_it_is_said(tmp_path):
    # gate_up has 42 x 32 weights, 21 blocks; down 672, ten and a half.
    model = tiny_moe("mixtral", intermediate_size=21)
    model.save_pretrained(tmp_path / "dense")
    with pytest.warns(RankwiseWarning, match=r"RW613: 2 expert tensors .*down_proj.* 672 weights .*blocks of 64"):
        report = quantize(model, Nf4Config())
    assert {name.rpartition(".")[2] for name in report.stacks} == {"gate_up_proj"}
    assert {name.rpartition(".")[2] for name in report.experts} == {"down_proj"}
    torch.testing.assert_close(logits(model), logits(eager(model)), rtol=1e-5, atol=1e-6)
    with pytest.warns(RankwiseWarning, match="RW613"):
        streamed = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=Nf4Config())
    assert torch.equal(logits(streamed), logits(model))
    model.save_pretrained(tmp_path / "stored")
    with pytest.warns(RankwiseWarning, match="RW613"):
        again = load_stored(tmp_path / "stored")
    assert torch.equal(logits(again), logits(model))


def test_experts_outside_of_the_interface_stay_dense_and_it_is_said():
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    sizes = {"hidden_size": 32, "intermediate_size": 64, "intermediate_size_mlp": 64, "num_hidden_layers": 1}
    config = Llama4TextConfig(vocab_size=97, num_attention_heads=4, num_key_value_heads=2, head_dim=8, **sizes)
    model = Llama4ForCausalLM(config).eval()
    with pytest.warns(RankwiseWarning, match=r"RW613.*Llama4TextExperts does not use"):
        report = quantize(model, Nf4Config())
    assert len(report.experts) == 2
    assert not report.stacks
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("excluded", ["experts", "down_proj", r"model\.layers\.0\.mlp\.experts"])
def test_what_is_excluded_stays_dense_in_silence(excluded, recwarn):
    model = quantized("qwen3_moe", Nf4Config(modules_to_not_convert=[excluded]))
    found = {name for name, _ in four_bit_stacks(model)}
    every = {f"model.layers.{i}.mlp.experts.{leaf}" for i in (0, 1) for leaf in ("gate_up_proj", "down_proj")}
    kept = {"experts": 0, "down_proj": 2}.get(excluded, 2)
    assert found < every
    assert len(found) == kept
    assert not [warning for warning in recwarn if "RW61" in str(warning.message)]
    torch.testing.assert_close(logits(model), logits(eager(model)), rtol=1e-5, atol=1e-6)


def test_only_what_is_4_bit_leaves_transformers_implementation():
    model = quantized("qwen3_moe", Nf4Config(modules_to_not_convert=[r"model\.layers\.0\.mlp\.experts"]))
    model.set_experts_implementation("batched_mm")
    first, second = (model.model.layers[i].mlp.experts.config._experts_implementation for i in (0, 1))
    assert (first, second) == ("batched_mm", "rankwise_4bit")


def test_a_cast_and_a_move_change_no_code_and_no_scale():
    model = quantized("mixtral", CONFIGS[1])
    before = {name: stack.dequantize() for name, stack in four_bit_stacks(model)}
    model.to(torch.bfloat16)
    for name, stack in four_bit_stacks(copy.deepcopy(model)):
        assert stack.scales.dtype is torch.bfloat16
        assert stack.scales.offset.dtype is torch.float32
        assert torch.equal(stack.dequantize(), before[name].bfloat16())
    assert logits(model).dtype is torch.bfloat16


def _damaged(folder: Path, change) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_broken_expert_is_named(tmp_path):
    tiny_moe("qwen3_moe").save_pretrained(tmp_path)
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    _damaged(tmp_path, lambda tensors: tensors[name].fill_(float("nan")))
    with pytest.raises(QuantizationError, match=r"RW603.*layers\.1\.mlp\.experts\.gate_up_proj"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=Nf4Config())
    model = tiny_moe("qwen3_moe")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[2, 1, 0] = float("inf")
    with pytest.raises(QuantizationError, match=r"RW603.*layers\.1\.mlp\.experts\.down_proj"):
        quantize(model, Nf4Config())
    assert not list(four_bit_stacks(model))


def test_missing_and_damaged_experts_are_named(tmp_path):
    tiny_moe("qwen3_moe").save_pretrained(tmp_path / "dense")
    names = [f"model.layers.1.mlp.experts.{index}.down_proj.weight" for index in range(8)]
    _damaged(tmp_path / "dense", lambda tensors: [tensors.pop(name) for name in names])
    with pytest.raises(QuantizationError, match=r"RW612.*layers\.1\.mlp\.experts\.down_proj"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=Nf4Config())
    stack = "model.layers.0.mlp.experts.gate_up_proj"
    for number, (change, fault) in enumerate(
        [
            (lambda tensors: tensors.pop(f"{stack}.absmax"), "absmax: missing"),
            (lambda tensors: tensors.pop(stack), "codes: missing"),
            (lambda tensors: tensors.update({stack: tensors[stack][:-1].clone()}), "codes: 6,143 bytes"),
        ]
    ):
        quantized("qwen3_moe").save_pretrained(tmp_path / str(number))
        _damaged(tmp_path / str(number), change)
        with pytest.raises(QuantizationError, match=rf"RW611.*{stack}.*{fault}"):
            load_stored(tmp_path / str(number))
