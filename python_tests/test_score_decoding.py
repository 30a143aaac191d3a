"""Every bit pattern of the narrow types is read as the number it stands for, subnormal ones too."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from grid import on_backends
from scoring import BF16, E4M3, E5M2, FP16, FP32, assert_close

import specprefill_kernels as spk

pytestmark = on_backends("score_layer")


def finite_codes(dtype: torch.dtype) -> torch.Tensor:
    """All finite, non-zero values of a type."""
    if dtype in (E4M3, E5M2):
        codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(dtype)
    else:
        codes = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    values = codes.float()
    return codes[values.isfinite() & (values != 0)]


def by_magnitude(dtype: torch.dtype) -> list[tuple[torch.Tensor, float]]:
    """Codes of one binary exponent each, and a scale that brings them to exponents an exp tells apart."""
    codes = finite_codes(dtype)
    exponents = torch.frexp(codes.double().abs()).exponent
    wanted = exponents.unique().tolist()
    if dtype == BF16:  # the others' scales would leave fp32
        wanted = [exponent for exponent in wanted if -120 <= exponent <= 120][::12]
    return [(codes[exponents == exponent], 2.0 ** (1 - exponent)) for exponent in wanted]


@pytest.mark.parametrize("dtype", [FP16, BF16, E4M3, E5M2], ids=str)
def test_key_codes(backend, dtype):
    """One dimension, query 1, lse 0: the score of a key is exp(key * scale)."""
    for codes, scale in by_magnitude(dtype):
        count = len(codes)
        state = spk.new_state(1, 1, count, device=backend.device)
        query, lse = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1)
        key = codes.view(1, 1, count, 1).to(backend.device)
        options = {"lse": lse.to(backend.device), "scale": scale, "pool_kernel_size": 1, "backend": backend.name}
        spk.score_layer_(state, query.to(backend.device), key, **options)
        assert_close(state[0, 0].cpu().numpy(), np.exp(codes.double().numpy() * scale))


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_query_codes(backend, dtype):
    """The same for queries: a prompt of one token in each sequence, its key 1."""
    for codes, scale in by_magnitude(dtype)[::3]:
        codes = codes[::7]
        codes = torch.cat([codes, codes[:1].expand(-len(codes) % 16)]).view(-1, 16, 1, 1)
        batch = len(codes)
        state = spk.new_state(batch, 16, 1, device=backend.device)
        key, lse = torch.ones(batch, 1, 1, 1, dtype=FP32), torch.zeros(batch, 16, 1)
        options = {"lse": lse.to(backend.device), "scale": scale, "pool_kernel_size": 1, "backend": backend.name}
        spk.score_layer_(state, codes.to(backend.device), key.to(backend.device), **options)
        assert_close(state[..., 0].cpu().numpy(), np.exp(codes[..., 0, 0].double().numpy() * scale))
