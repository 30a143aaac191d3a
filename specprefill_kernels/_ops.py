"""The torch namespace that the ops are registered in.

Laid out as a Hugging Face kernel (hf_kernel/lay_out.py), the package has another `_ops` with these two names, which
kernel-builder writes: with a namespace of its own for every build, so that several can be loaded side by side.
"""

import torch

ops = torch.ops.specprefill


def add_op_namespace_prefix(name: str) -> str:
    """The op's full name: "specprefill::score_layers_" of "score_layers_"."""
    return f"specprefill::{name}"
