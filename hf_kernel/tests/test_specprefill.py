"""The kernel against the definition, written once more: on the GPU where there is one, else on the CPU."""

import pytest
import specprefill as spk
import torch
from torch.nn.functional import avg_pool1d

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = [name for name, reason in spk.available_backends("score_layers").items() if reason is None]
LAYERS, BATCH, ROWS, Q_HEADS, KV_HEADS, TOKENS, DIM = 2, 2, 4, 6, 2, 150, 64


def layers() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    torch.manual_seed(0)
    queries = [torch.randn(BATCH, ROWS, Q_HEADS, DIM) for _ in range(LAYERS)]
    keys = [torch.randn(BATCH, KV_HEADS, TOKENS, DIM) for _ in range(LAYERS)]
    return queries, keys


def definition(queries: list[torch.Tensor], keys: list[torch.Tensor]) -> torch.Tensor:
    """Attention of each row over the prompt, mean of 13 neighbours, maximum over layers and heads, mean over rows."""
    state = torch.zeros(BATCH, ROWS, TOKENS, dtype=torch.float64)
    for query, key in zip(queries, keys, strict=True):
        shared = key.double().repeat_interleave(Q_HEADS // KV_HEADS, 1)
        weights = torch.einsum("bnhd,bhtd->bhnt", query.double(), shared).mul(DIM**-0.5).softmax(-1)
        pooled = avg_pool1d(weights.flatten(0, 2), 13, 1, 6).view(weights.shape)  # zeros beside the edges count
        state = torch.maximum(state, pooled.amax(1))
    return state.mean(1)


@pytest.mark.kernels_ci
@pytest.mark.parametrize("backend", BACKENDS)
def test_importance(backend: str) -> None:
    queries, keys = layers()
    state = spk.new_state(batch=BATCH, look_ahead=ROWS, max_len=TOKENS, device=DEVICE)
    spk.score_layers_(state, [q.to(DEVICE) for q in queries], [k.to(DEVICE) for k in keys], backend=backend)
    importance = spk.finalize_importance(state, backend=backend)
    torch.testing.assert_close(importance.cpu().double(), definition(queries, keys), rtol=1e-4, atol=1e-7)


@pytest.mark.kernels_ci
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_kept(backend: str) -> None:
    importance = torch.zeros(1, TOKENS, device=DEVICE)
    importance[0, 70] = 1.0
    selection = spk.select_chunks(importance, keep_ratio=0.4, chunk_size=32, backend=backend)
    # 2 of 5 chunks: the one with token 70, and of the equal ones the first.
    assert selection.spans(0) == [(0, 32), (64, 96)]
    packed = spk.gather_tokens(torch.arange(TOKENS, device=DEVICE)[None], selection, backend=backend)
    assert packed.values[:64].tolist() == [*range(32), *range(64, 96)]
    assert packed.position_ids[:64].tolist() == packed.values[:64].tolist()


@pytest.mark.kernels_ci
def test_a_wrong_argument_is_named() -> None:
    with pytest.raises(ValueError, match="chunk_size: expected"):
        spk.select_chunks(torch.zeros(1, TOKENS, device=DEVICE), keep_ratio=0.4, chunk_size=0)
