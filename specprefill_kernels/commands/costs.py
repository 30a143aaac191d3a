"""Measured costs in a file: loaded where they fit what runs, measured and saved where not."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specprefill_kernels.config import SpecPrefillConfig
    from specprefill_kernels.loop.costs import CostModel
    from specprefill_kernels.models.progress import Progress


def load_or_measure(
    file: Path, base: Any, speculator: Any, config: SpecPrefillConfig, progress: Progress, **options: Any
) -> CostModel:
    """Costs of this pair and configuration on this machine; says which of the two happened.

    Args:
        options: the other arguments of `CostModel.measure`: tokenizers and `self_layers`.

    Raises:
        ValueError: the file holds something else than costs; it is left as it is.
    """
    from specprefill_kernels.loop.costs import CostModel, identity_of
    from specprefill_kernels.loop.support import layer_range_of, num_layers

    layers = options.get("self_layers")
    if layers is not None:
        layers = layer_range_of(layers, num_layers(base))
        config = config.replace(queries="observation_window")  # the lower layers alone decode nothing
    reason = "there was no such file"
    if file.exists():
        costs = CostModel.load(file)
        try:
            costs.check(identity_of(base, speculator, config, layers), str(file))
        except ValueError as other:
            reason = f"it was of something else: {other}"
        else:
            progress.note(f"Costs from {file}: measured up to {costs.measured_tokens} tokens.")
            return costs
    costs = CostModel.measure(base, speculator, config, progress=progress, **options)
    costs.save(file)
    progress.note(f"Costs measured up to {costs.measured_tokens} tokens and saved to {file} ({reason}).")
    return costs
