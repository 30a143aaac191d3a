"""The composite by its definition: the three ops one after the other."""

from specprefill_kernels.ops.finalize.reference import finalize_importance
from specprefill_kernels.ops.gather.reference import gather_tokens
from specprefill_kernels.ops.select.reference import select_chunks
from specprefill_kernels.ops.select_tokens.compose import compose

select_tokens = compose(finalize_importance, select_chunks, gather_tokens)
