"""What of a call of Transformers' `generate` the loop can do, and one of its prompts on its way through the loop.

Every reason for which a call runs dense stands here, in words that go to the log and to the result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation import utils

from specprefill_kernels.loop import GenerationResult, SpecPrefill
from specprefill_kernels.loop.decoding import DecodePlan, Prepared
from specprefill_kernels.loop.generation import Generation
from specprefill_kernels.loop.prompts import Prompt
from specprefill_kernels.loop.protection import Protection
from specprefill_kernels.loop.recognizing import recognize

_generation: Any = utils  # where `generate` has its own names from moves between versions

_WHOLE_CACHE = "the loop decodes with a cache of its own, of the kept tokens"
_SYNCED = "all processes have to take the same number of steps"

# Arguments of a call with which it runs dense, and why.
_ARGUMENTS: Mapping[str, str] = {
    "assistant_model": _WHOLE_CACHE,
    "cache_implementation": _WHOLE_CACHE,  # asked for here: "paged" would run the model before anything is prepared
    "cache_position": "the loop counts positions itself",
    "custom_generate": "a decoding loop of the call's own",
    "inputs_embeds": "the speculator reads ids",
    "negative_prompt_ids": "guidance runs the model on a prompt of its own",
    "past_key_values": _WHOLE_CACHE,
    "position_ids": "the loop counts positions itself",
    "synced_gpus": _SYNCED,
    "token_healing": "it changes the prompt",
}
# Fields of a generation config with which a call runs dense, and why.
_OPTIONS: Mapping[str, str] = {
    "cache_implementation": _WHOLE_CACHE,
    "guidance_scale": "guidance runs the model on a prompt of its own",
    "output_attentions": "there is no attention to the tokens that are left out",
    "output_hidden_states": "there are no hidden states of the tokens that are left out",
    "prefill_chunk_size": "the base reads what is kept in one forward",
    "token_healing": "it changes the prompt",
}
# Of a batch, whose rows run one after the other.
_BATCH_ARGUMENTS = ("logits_processor", "prefix_allowed_tokens_fn", "stopping_criteria")
_BATCH_OPTIONS: Mapping[str, str] = {
    "max_time": "the rows run one after the other",
    "output_logits": "the rows end at steps of their own",
    "output_scores": "the rows end at steps of their own",
}
# What every forward gets from `generate`, and what the loop makes itself.
_OWN_INPUTS = {"attention_mask", "cache_position", "logits_to_keep", "past_key_values", "position_ids", "use_cache"}
_MODES = ("greedy_search", "sample")


def call_problem(model: Any, arguments: Mapping[str, Any]) -> str | None:
    """Why a call of this model with these arguments cannot be sparse, or None. Nothing has run."""
    for name, why in _ARGUMENTS.items():
        value = arguments.get(name, getattr(arguments.get("generation_config"), name, None))
        if value is not None and value is not False:
            return f"{name}: {why}"
    if arguments.get("synced_gpus") is None and _syncs_by_itself(model):
        return f"synced_gpus, which generate turns on for this model: {_SYNCED}"
    return None


def _syncs_by_itself(model: Any) -> bool:
    """Whether `generate` waits for other processes, unless it is told not to: parameters are spread over them."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    spread: bool = _generation.is_deepspeed_zero3_enabled() or _generation.is_fsdp_managed_module(model)
    return spread and torch.distributed.get_world_size() > 1


def plan_problem(arguments: Mapping[str, Any], prepared: Prepared, *, streamed: bool) -> str | None:
    """Why a call that `generate` has prepared so cannot be sparse, or None."""
    config = prepared.config
    mode = str(getattr(config.get_generation_mode(), "value", config.get_generation_mode()))
    if mode not in _MODES:
        return f"{mode.replace('_', ' ')}: the loop decodes greedily or samples"
    if (config.num_return_sequences or 1) != 1:
        return "num_return_sequences: the loop gives one answer to each prompt"
    if config.use_cache is False:
        return f"use_cache=False: {_WHOLE_CACHE}"
    for name, why in _OPTIONS.items():
        value = getattr(config, name, None)
        if value is not None and value is not False and not (name == "guidance_scale" and value == 1):
            return f"{name}: {why}"
    for name in sorted(prepared.model_inputs.keys() - _OWN_INPUTS):
        # A multimodal model has an empty place for what was encoded, even where that is nothing.
        if prepared.model_inputs[name] is not None and prepared.model_inputs[name] != {}:
            return f"{name}: an input of the model's that the loop does not give it"
    positions = prepared.model_inputs.get("position_ids")
    if positions is not None and positions.ndim != 2:
        return "position_ids of several axes: the loop gives every token one position"
    return _padding_problem(prepared) or _batch_problem(arguments, prepared, streamed)


def _padding_problem(prepared: Prepared) -> str | None:
    mask = prepared.model_inputs.get("attention_mask")
    if mask is None:
        return None
    if mask.shape != prepared.input_ids.shape:
        return "attention_mask: one of another shape than the ids"
    left = mask.bool().int().diff(dim=-1)
    if bool((left < 0).any()) or not bool(mask[:, -1].all()):
        return "attention_mask: padding that is not all on the left"
    return None


def _batch_problem(arguments: Mapping[str, Any], prepared: Prepared, streamed: bool) -> str | None:
    if prepared.input_ids.shape[0] == 1:
        return None
    if streamed:
        return "streamer: a batch, which is not streamed"
    for name in _BATCH_ARGUMENTS:
        if arguments.get(name):
            return f"{name} of the call's own for a batch: it may count rows, which run one after the other"
    for name, why in _BATCH_OPTIONS.items():
        value = getattr(prepared.config, name, None)
        if value is not None and value is not False:
            return f"{name} for a batch: {why}"
    if padding_id(prepared.config) is None:
        return "a batch without pad_token_id: its answers may have unequal lengths"
    return None


def padding_id(config: Any) -> int | None:
    """What stands behind an answer that is shorter than its neighbours: as in `generate`, EOS where there is no pad."""
    if config.pad_token_id is not None:
        return int(config.pad_token_id)
    eos = config.eos_token_id
    if isinstance(eos, (list, tuple)):
        eos = eos[0] if eos else None
    return None if eos is None else int(eos)


def row_arguments(arguments: Mapping[str, Any], prepared: Prepared, index: int) -> dict[str, Any]:
    """The call for one row of the batch alone, its padding included, so that lengths count as in the batch."""
    # A generate of the class's own may know them by one of the two names only.
    name = "inputs" if arguments.get("input_ids") is None else "input_ids"
    row = dict(arguments)
    row[name] = prepared.input_ids[index : index + 1]
    mask = prepared.model_inputs.get("attention_mask")
    # Without a mask, generate would take pad ids inside the prompt for padding.
    row["attention_mask"] = torch.ones_like(row[name]) if mask is None else mask[index : index + 1]
    return row


class Row(Generation):
    """One prompt of a call.

    Args:
        loop: both models.
        prepared: the call for this prompt alone, padding on its left included.
        messages: the chat that its ids were made of, if given; else they are asked themselves (`recognize`).
        template_options, protect: as in `SpecPrefill.select`.

    Attributes:
        scores, logits: [1, V] of each step, after and before the processors, where the call wants them.

    Raises:
        ValueError: in `begin`, if `messages` do not give the ids.
    """

    def __init__(
        self,
        loop: SpecPrefill,
        prepared: Prepared,
        messages: Sequence[Mapping[str, Any]] | None,
        template_options: Mapping[str, Any] | None,
        protect: Any,
    ) -> None:
        ids, mask, config = prepared.input_ids, prepared.model_inputs.get("attention_mask"), prepared.config
        start = 0 if mask is None else int(mask[0].bool().int().argmax())
        self._padded, self._padding, self._ids = ids, ids[:, :start], ids[:, start:]
        self._prepared = prepared
        self.scores: list[Tensor] = []
        self.logits: list[Tensor] = []
        prompt = self._ids if messages is None else messages
        room = max(1, config.max_length - ids.shape[1])
        super().__init__(loop, prompt, protect, room, bool(config.do_sample), {"template_options": template_options})

    def run(self, streamer: Any = None) -> GenerationResult:
        """Prefill and decode, after `begin`; `streamer` gets prompt and tokens as `generate` gives them."""
        if streamer is not None:
            streamer.put(self._padded.cpu())
        for token in self.tokens():
            if streamer is not None:
                streamer.put(torch.tensor([token]))
        if streamer is not None:
            streamer.end()
        return self.result()

    def _read(self) -> tuple[Prompt, Protection]:
        owner = self._owner
        if self._prompt is self._ids and owner.config.protect == "template":
            with self._clock.stage("tokenize"):
                self._prompt = recognize(self._ids, owner.tokenizer) or self._ids
        prompt, protection = super()._read()
        own = self._ids[0].to("cpu", torch.int64)
        if not torch.equal(prompt.input_ids[0], own):
            length = min(len(own), prompt.input_ids.shape[1])
            differ = (prompt.input_ids[0, :length] != own[:length]).nonzero()[:, 0].tolist()
            raise ValueError(
                f"messages: expected the chat that input_ids were made of ({len(own)} tokens), got one that gives "
                f"{prompt.input_ids.shape[1]} tokens, others from token {differ[0] if differ else length} on; "
                "template_options say what else the chat template was given"
            )
        return prompt, protection

    def _plan(self, input_ids: Tensor) -> DecodePlan:
        return DecodePlan(self._process, self._finished, bool(self._prepared.config.do_sample))

    def _process(self, input_ids: Tensor, logits: Tensor) -> Tensor:
        config = self._prepared.config
        if config.return_dict_in_generate and config.output_logits:
            self.logits.append(logits.clone())  # processors may write into them
        processor: Any = self._prepared.logits_processor
        scores: Tensor = processor(self._with_padding(input_ids), logits)
        if config.return_dict_in_generate and config.output_scores:
            self.scores.append(scores)
        return scores

    def _finished(self, input_ids: Tensor, _: Any) -> Tensor:
        scores = tuple(self.scores) if self.scores else None
        return self._prepared.stopping_criteria(self._with_padding(input_ids), scores)

    def _with_padding(self, input_ids: Tensor) -> Tensor:
        """What processors and criteria would see in the batch."""
        if self._padding.shape[1] == 0:
            return input_ids
        return torch.cat([self._padding.to(input_ids.device), input_ids], dim=-1)
