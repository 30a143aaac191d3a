"""The composite on the compiled CPU kernels: the three ops one after the other, as a launch costs nothing there."""

from specprefill_kernels import _native
from specprefill_kernels.ops.finalize.cpu import finalize_importance
from specprefill_kernels.ops.gather.cpu import gather_tokens
from specprefill_kernels.ops.select.cpu import select_chunks
from specprefill_kernels.ops.select_tokens.compose import compose

unavailable = _native.unavailable
select_tokens = compose(finalize_importance, select_chunks, gather_tokens)
