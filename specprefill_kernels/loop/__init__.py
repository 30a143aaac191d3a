"""The reference loop: speculative prefill on Transformers models, from a prompt to a streamed answer."""

try:
    import transformers  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    raise ModuleNotFoundError(
        "specprefill_kernels.loop needs Transformers: pip install 'specprefill-kernels[loop]'", name="transformers"
    ) from None

from specprefill_kernels.loop.costs import CostModel
from specprefill_kernels.loop.generation import TokenStream
from specprefill_kernels.loop.pipeline import SpecPrefill
from specprefill_kernels.loop.protection import Characters
from specprefill_kernels.loop.results import GenerationResult, PromptSelection
from specprefill_kernels.loop.selection_cache import SelectionCache
from specprefill_kernels.loop.session import Session

__all__ = [
    "Characters",
    "CostModel",
    "GenerationResult",
    "PromptSelection",
    "SelectionCache",
    "Session",
    "SpecPrefill",
    "TokenStream",
]
