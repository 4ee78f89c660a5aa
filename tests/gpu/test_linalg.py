"""The linear algebra on a GPU: true float32 whatever TF32 is set to, no wait, capturable, as accurate as on a CPU."""

import numpy as np
import pytest
import torch

from hf_condlr import fold_model
from hf_condlr.linalg import (
    clamp_singular_values,
    clip_core_by_products,
    condition_number,
    full_precision,
    orthonormality_error,
    project_horizontal,
    retract_cholesky,
)
from hf_condlr.linalg.newton_schulz import CERTIFICATE_TOLERANCE
from tests.linalg import cases
from tests.manifold.nets import make_model


def moved_cores(count, r, bound, device):
    """Conditioned cores after a step of a hundredth of their size, and before it."""
    rng = np.random.default_rng(0)
    start = np.stack([cases.with_singular_values(rng.uniform(1, bound, r), seed) for seed in range(count)])
    moved = start + 0.01 * rng.standard_normal((count, r, r)) / np.sqrt(r)
    return tuple(torch.from_numpy(x).float().to(device) for x in (moved, start))


@pytest.mark.parametrize("center", cases.CENTERS)
def test_clip_by_products_is_that_by_eigh(device, no_waiting, center):
    S, start = moved_cores(4, 48, 1.2, device)
    bound = torch.full((4,), 1.1, dtype=torch.float64, device=device)
    with no_waiting, full_precision():
        clipped, followed = clip_core_by_products(S, bound, center, start)
    assert followed.all()
    assert (condition_number(clipped) <= 1.1 * (1 + CERTIFICATE_TOLERANCE + 1e-6)).all()
    expected = clamp_singular_values(S, 0.1, center=center)
    assert ((clipped - S).norm(dim=(1, 2)) <= 1.1 * (expected - S).norm(dim=(1, 2)) + 1e-4).all()


@pytest.fixture(params=["attribute", "function", "new"])
def tf32(request):
    """TF32 allowed in each of torch's ways."""
    matmul = torch.backends.cuda.matmul
    if request.param == "attribute":
        matmul.allow_tf32 = True
    elif request.param == "function":
        torch.set_float32_matmul_precision("high")
    else:
        matmul.fp32_precision = "tf32"
    yield
    matmul.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")


def test_retraction_ignores_tf32_and_does_not_wait(device, no_waiting, tf32):
    torch.manual_seed(0)
    U = torch.linalg.qr(torch.randn(3, 200, 40)).Q.to(device)
    G = torch.randn(3, 200, 40, device=device)
    with no_waiting, full_precision():
        X = U - 0.01 * project_horizontal(U, G)
        retracted, trusted = retract_cholesky(X)
    assert trusted.all()
    assert (orthonormality_error(retracted) <= 1e-5 * 40**0.5).all()


@pytest.mark.gpu
def test_the_linear_algebra_of_a_step_is_captured_in_a_cuda_graph(cuda):
    """What a step computes on the device, replayed on other values: equal to the same functions called one by one."""
    S, start = moved_cores(4, 48, 1.1, cuda)
    bound = torch.full((4,), 1.1, dtype=torch.float64, device=cuda)
    U = torch.linalg.qr(torch.randn(3, 200, 40, device=cuda)).Q
    G = torch.randn(3, 200, 40, device=cuda)

    def step():
        with full_precision():
            retracted, _ = retract_cholesky(U - 0.01 * project_horizontal(U, G))
            return retracted, clip_core_by_products(S, bound, "nearest", start)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    G.copy_(torch.randn_like(G))
    S.mul_(3.0)
    graph.replay()
    for found, expected in zip(captured, step(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folded_model_answers_like_its_factors(cuda, dtype):
    model = make_model().to(cuda, dtype).eval()
    x = torch.randn(16, 2, 5, 5, device=cuda, dtype=dtype)
    with torch.inference_mode():
        expected = model(x)
        compiled = torch.compile(fold_model(model))
        found = compiled(x)
    torch.testing.assert_close(found, expected, rtol=0.05 if dtype == torch.bfloat16 else 1e-3, atol=0.05)
