"""The element-wise parts of a training step: one pass over memory each, no autograd.

Float32 and bfloat16 on a CPU run in the native library. On CUDA, Triton kernels run where Triton is installed.
Everything else runs in plain PyTorch. `rankwise.ops.table` has a row for each function.

Legend: T = rows (all leading dimensions together), N and D = columns, R = rank, V = vocabulary, C = rows with logits;
B, H, L = batch, heads, positions. bfloat16 is computed in float32 and rounded once, unless the formula says otherwise.
Results are deterministic and do not depend on the number of threads. Bad arguments raise QuantizationError RW606.
"""

from __future__ import annotations

from torch import Tensor

from rankwise.constants import IGNORED
from rankwise.ops.checks import check_targets
from rankwise.ops.selection import is_traced
from rankwise.ops.table import call


def low_rank_add_(
    y: Tensor, u: Tensor, B: Tensor, scale: float, g: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """``y <- g * (y + scale * u B^T) + bias`` in place: what LoRA and DoRA add to a frozen product.

    y (T, N), u (T, R) and B (N, R) of one dtype; g (N,) float32; bias (N,). Rows of y and u need not be adjacent.
    """
    return call("low_rank_add_", y, u, B, scale, g, bias)


def scaled_grad(dy: Tensor, y: Tensor | None, g: Tensor) -> tuple[Tensor, Tensor | None]:
    """``dz = dy * g`` and ``dot = sum_T dy * y`` in one pass; dot is None without y.

    dy and y (T, N) of one dtype; g (N,) float32 -> dz as dy, contiguous; dot (N,) float32.
    """
    return call("scaled_grad", dy, y, g)


def rms_norm(x: Tensor, w: Tensor, eps: float, offset: int = 0, cast_first: bool = True) -> tuple[Tensor, Tensor]:
    """``y = (offset + w) * (x rstd)``, ``rstd = 1 / sqrt(mean(x^2) + eps)``.

    With ``cast_first``, ``x rstd`` is rounded to x's dtype before it is multiplied, as transformers' Llama does; Gemma
    is offset 1 without it. x (T, D), w (D,) -> y as x, contiguous; rstd (T,) float32.
    """
    return call("rms_norm", x, w, eps, offset, cast_first)


def rms_norm_backward(
    dy: Tensor, x: Tensor, w: Tensor, rstd: Tensor, offset: int = 0, residual_grad: Tensor | None = None
) -> Tensor:
    """``dx = rstd (h - x rstd^2 mean(h x)) + residual_grad`` with ``h = dy (offset + w)``.

    dy, x and residual_grad (T, D), w (D,), rstd (T,) float32 -> dx as x, contiguous.
    """
    return call("rms_norm_backward", dy, x, w, rstd, offset, residual_grad)


def glu(gate: Tensor, up: Tensor, act: str) -> Tensor:
    """``act(gate) * up`` with act "silu", "gelu_tanh" or "gelu": (T, N) each, rows may be apart -> contiguous."""
    return call("glu", gate, up, act)


def glu_backward(
    dout: Tensor, gate: Tensor, up: Tensor, act: str, *, want_product: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``dgate = dout up act'(gate)``, ``dup = dout act(gate)``, and ``act(gate) up`` again where wanted, else None.

    (T, N) each, rows of the inputs may be apart -> three contiguous tensors.
    """
    return call("glu_backward", dout, gate, up, act, want_product)


def rope(q: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    """``q cos + rotate_half(q) sin``, as transformers' apply_rotary_pos_emb; ``inverse``: its transpose, the gradient.

    q (B, H, L, D), any strides; cos and sin (B or 1, L, D'), D' even and at most D: the other columns stay.
    -> (B, H, L, D), the transpose of a contiguous (B, L, H, D).
    """
    return call("rope", q, cos, sin, inverse)


def rope_(q: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    """`rope` in place: q (B, H, L, D), any strides; cos and sin (B or 1, L, D')."""
    return call("rope_", q, cos, sin, inverse)


def cross_entropy_(
    logits: Tensor,
    targets: Tensor,
    scale: float = 1.0,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    multiplier: float = 1.0,
    want_grad: bool = True,
    *,
    want_entropy: bool = False,
    want_correct: bool = False,
    checked: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(loss, entropy, correct), each summed over the rows whose target is not -100.

    loss = ``-log p_target`` (with smoothing s: ``(1 - s)`` of it plus s times the mean of ``-log p``) of
    ``p = softmax(z)``, ``z = multiplier * logits``, then ``softcap * tanh(z / softcap)``. With ``want_grad``, logits
    become ``scale * dloss/dlogits``, zero in ignored rows; otherwise they stay.

    logits (C, V); targets (C,) int64 -> loss float64 (); entropy ``-sum p log p`` float64 (), or None; correct int64
    (), the rows whose first largest logit is the target, or None. ``checked``: the targets were checked before; on a
    GPU the check would synchronize. Compiled code does not check: on a GPU a bad target then gives a loss of NaN.

    Raises:
        QuantizationError: RW621, a target is neither -100 nor in [0, V).
    """
    if not checked and type(targets) is Tensor and not is_traced():
        check_targets(targets, logits.shape[1], IGNORED)
    return call(
        "cross_entropy_",
        logits,
        targets,
        scale,
        label_smoothing,
        softcap,
        multiplier,
        want_grad,
        want_entropy,
        want_correct,
    )


def row_cross(W: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """``sum_r (W A^T) * B`` per row in float32, the mixed term of ||W + s B A||^2; neither B A nor a float32 W is made.

    W (N, K), A (R, K), B (N, R), each of its own floating dtype, all on one device -> (N,) float32.
    """
    return call("row_cross", W, A, B)


def adapted_gain(W: Tensor, squared: Tensor, A: Tensor, B: Tensor, m: Tensor, scale: float) -> Tensor:
    """``m / ||W + scale B A||`` per row, 1 if that is 0, with ``squared`` = ||W||^2: DoRA's gain, in few kernels on
    a GPU.

    W (N, K), A (R, K), B (N, R), each of its own floating dtype; squared and m (N,) float32 -> (N,) float32.
    """
    return call("adapted_gain", W, squared, A, B, m, scale)


def dropout(x: Tensor, p: float, seed: int) -> Tensor:
    """``x * mask / (1 - p)``; the mask is a hash of (seed, flat index), so that it need not be saved.

    x of any shape, 0 <= p < 1, any integer seed (its low 64 bits count) -> as x, contiguous. The mask depends on the
    number of elements before an element, not on the shape.
    """
    return call("dropout", x, p, seed)


def dropout_add_(dx: Tensor, z: Tensor, p: float, seed: int) -> Tensor:
    """``dx <- dx + z * mask / (1 - p)`` in place, with the mask of `dropout`: dx and z of one shape and dtype."""
    return call("dropout_add_", dx, z, p, seed)
