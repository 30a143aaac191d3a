"""Does this installation work? smoke.py compiled|pure FOLDER_IT_MUST_BE_IMPORTED_FROM"""

import sys
from pathlib import Path

import torch

import specprefill_kernels as spk

expected, folder = sys.argv[1], Path(sys.argv[2])
generator = torch.Generator().manual_seed(0)
query = torch.randn(2, 4, 6, 64, generator=generator)
key = torch.randn(2, 3, 200, 64, generator=generator)


def select(backend: str) -> spk.TokenSelection:
    state = spk.new_state(batch=2, look_ahead=4, max_len=200)
    spk.score_layer_(state, query, key, backend=backend)
    return spk.select_tokens(state, torch.arange(400).view(2, 200), keep_ratio=0.3, backend=backend)


if folder.resolve() not in Path(spk.__file__).resolve().parents:
    sys.exit(f"expected a package from {folder}, got {spk.__file__}")
print(spk.show_config())
reason = spk.available_backends("score_layer")["cpu"]
reference = select("reference")
if expected == "compiled":
    if reason is not None:
        sys.exit(f"the cpu backend is missing: {reason}")
    found = select("cpu")
    torch.testing.assert_close(found.importance, reference.importance)
    torch.testing.assert_close(found.packed.values, reference.packed.values)
elif not reason or "SPECPREFILL_BUILD=none" not in reason:
    sys.exit(f"expected no cpu backend, because of SPECPREFILL_BUILD=none; the reason given is: {reason}")
print(f"works: {expected}, kept {reference.selection.num_kept.tolist()} of 200")
