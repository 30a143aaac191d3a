"""The reference loop: speculative prefill on Transformers models, from a prompt to a streamed answer."""

from specprefill_kernels.loop.pipeline import SpecPrefill, TokenStream
from specprefill_kernels.loop.results import GenerationResult, PromptSelection

__all__ = ["GenerationResult", "PromptSelection", "SpecPrefill", "TokenStream"]
