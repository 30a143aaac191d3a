"""SpecPrefill: the whole path, from a prompt to an answer whose first token comes early."""

import logging
from collections.abc import Mapping
from typing import Any

from specprefill_kernels.config import SpecPrefillConfig
from specprefill_kernels.loop.clock import StageClock
from specprefill_kernels.loop.costs import CostModel, identity_of
from specprefill_kernels.loop.generation import Generation, TokenStream
from specprefill_kernels.loop.memory import SpeculatorMemory
from specprefill_kernels.loop.prompts import Prompt, TokenBridge, is_batch, read_prompt, same_tokens
from specprefill_kernels.loop.protection import Characters, Protection, find_protection
from specprefill_kernels.loop.results import PromptSelection
from specprefill_kernels.loop.selecting import Selector
from specprefill_kernels.loop.selection_cache import SelectionCache, identity
from specprefill_kernels.loop.speculator import Speculator
from specprefill_kernels.loop.support import (
    base_problem,
    continuing_problem,
    layer_range_of,
    num_layers,
    speculator_problem,
)

logger = logging.getLogger("specprefill_kernels")


class SpecPrefill:
    """Speculative prefill for two Transformers models, or for one.

    The speculator reads the whole prompt and says which chunks matter; the base prefills those alone, at their original
    positions, and decodes from position T on. `keep_ratio=1.0`, a short prompt, or a model that cannot do this runs an
    ordinary dense prefill, and the result says why.

    Whatever the budget, the chunk of the last prompt token is kept: the first answer token is read off that token.

    A list of prompts runs one after the other. Prompts of unequal length would need left padding in one batch; padding
    turns the `is_causal` attention kernels off and makes every prompt wait for the longest, while a prefill of
    thousands of tokens fills the machine by itself. So each prompt has its own first token as early as alone, and a
    list gives exactly what its prompts give singly.

    Args:
        base: a Transformers causal language model.
        speculator: a smaller one; the base itself is allowed. None with `self_layers`.
        config: see `SpecPrefillConfig`; None: its preset "default".
        tokenizer: the base's; needed for prompts of text or messages, and for text in results.
        speculator_tokenizer: the speculator's, if it has other tokens than the base.
        self_layers: (first, last), both included, of the base's own layers to score: no second model and no second
            pass. Layers 0 to `last` read the whole prompt, the last `look_ahead` prompt rows are the queries, and the
            layers above go on with the kept tokens alone (see `ContinuingRun`). An int n means (0, n - 1).
        costs: measured costs of both ways (`CostModel.measure`); a prompt for which speculative prefill would take
            longer than a full one then runs dense, and `reason` gives both predicted times. None: no such check.
        selection_cache: a prompt whose selection it holds runs no speculator; see `SelectionCache`. With `self_layers`
            there is none to spare in `generate` and `stream`, which do not ask it.

    Raises:
        ValueError: an argument is wrong, or does not go with another.

    Example:
        >>> from specprefill_kernels.loop import SpecPrefill
        >>> sp = SpecPrefill(base, speculator, SpecPrefillConfig(keep_ratio=0.1), tokenizer=tokenizer)  # doctest: +SKIP
        >>> result = sp.generate(prompt, max_new_tokens=64)  # doctest: +SKIP
        >>> result.text, result.mode, result.ttft  # doctest: +SKIP
    """

    def __init__(
        self,
        base: Any,
        speculator: Any = None,
        config: SpecPrefillConfig | None = None,
        *,
        tokenizer: Any = None,
        speculator_tokenizer: Any = None,
        self_layers: int | tuple[int, int] | None = None,
        costs: CostModel | None = None,
        selection_cache: SelectionCache | None = None,
    ) -> None:
        config = SpecPrefillConfig.preset("default") if config is None else config
        if not isinstance(config, SpecPrefillConfig):
            raise TypeError(f"config: expected a SpecPrefillConfig, got {type(config).__name__}")
        if base.config.is_encoder_decoder:
            raise ValueError(f"base: expected a decoder-only model, got {type(base).__name__}")
        if (speculator is None) == (self_layers is None):
            got = "neither" if speculator is None else "both"
            raise ValueError(f"speculator: expected a model or self_layers=(first, last), got {got}")
        bridge = None
        if speculator_tokenizer is not None:
            if tokenizer is None or speculator is None:
                missing = "tokenizer" if tokenizer is None else "speculator"
                raise ValueError(f"{missing}: expected one beside speculator_tokenizer, got None")
            if not same_tokens(tokenizer, speculator_tokenizer):
                bridge = TokenBridge(tokenizer, speculator_tokenizer)
        layer_range = None
        if self_layers is not None:
            layer_range = layer_range_of(self_layers, num_layers(base))
            if config.speculator_attention != "dense":
                raise ValueError(
                    'speculator_attention: expected "dense" with self_layers, whose layers answer from what they read, '
                    f"got {config.speculator_attention!r}"
                )
            # The lower layers alone decode nothing.
            config = config.replace(queries="observation_window")
        scorer = base if speculator is None else speculator
        self.base_problem = base_problem(base)
        problem = _problem(base, scorer, layer_range is not None)
        if problem is not None:
            logger.warning("every prompt will run dense: %s", problem)
        self.base = base
        self.config = config
        self.tokenizer = tokenizer
        self.continuing_layers = layer_range
        self._devices = (base.device, scorer.device)
        if costs is not None:
            costs.check(identity_of(base, speculator, config, layer_range))
        self.selector = Selector(
            None if problem is not None else Speculator(scorer, config, layer_range),
            bridge,
            config,
            problem,
            base.device,
            costs,
        )
        self.selection_cache = selection_cache
        self._translates = bridge is not None
        tokenizers = (tokenizer, speculator_tokenizer) if self._translates else ()
        self._identity = identity(scorer, config, layer_range, problem, costs, *tokenizers)

    def select(
        self,
        prompt: Any,
        protect: Any = None,
        *,
        template_options: Mapping[str, Any] | None = None,
        per_layer: bool = False,
    ) -> Any:
        """Which tokens the base would read, without running it.

        Args:
            prompt: text, token ids (a list or a tensor), chat messages (a list of dicts), or a list of those.
            protect: what must survive, beside a chat template's parts (`config.protect`): (start, end) token spans, end
                exclusive; passages of the prompt's text, in all their occurrences; or `Characters` of its text or of a
                message. For a list of prompts, one such list (or None) per prompt.
            template_options: for chat messages alone, what the chat template takes: {"tools": [...]}.
            per_layer: also give each scored layer's own importance, `layer_importance`; a `SelectionCache` has none and
                is not asked.

        Returns:
            A `PromptSelection`, or a list of them for a list of prompts.
        """
        if is_batch(prompt):
            spans = _protect_each(protect, len(prompt))
            options: dict[str, Any] = {"template_options": template_options, "per_layer": per_layer}
            return [self.select(one, keep, **options) for one, keep in zip(prompt, spans)]
        clock = StageClock(*self._devices)
        read, protection = self.read(prompt, protect, template_options, clock)
        if per_layer:
            return self.selector.select(read, protection, clock, per_layer=True)
        return self.choose(read, protection, clock)

    def generate(
        self, prompt: Any, max_new_tokens: int = 128, *, protect: Any = None, do_sample: bool = False, **options: Any
    ) -> Any:
        """Answer one prompt, or each of a list.

        Args:
            prompt, protect: as in `select`; so is the keyword `template_options`.
            max_new_tokens: at most this many tokens; EOS and the model's other stopping criteria end earlier.
            do_sample: greedy when False.
            options: whatever `model.generate` takes to choose tokens: temperature, top_p, repetition_penalty,
                eos_token_id, stop_strings, logits_processor, ... Beams are not supported.

        Returns:
            A `GenerationResult`, or a list of them for a list of prompts.
        """
        if is_batch(prompt):
            spans = _protect_each(protect, len(prompt))
            return [
                self.generate(one, max_new_tokens, protect=keep, do_sample=do_sample, **options)
                for one, keep in zip(prompt, spans)
            ]
        run = Generation(self, prompt, protect, max_new_tokens, do_sample, options)
        for _ in run.tokens():
            pass
        return run.result()

    def stream(
        self, prompt: Any, max_new_tokens: int = 128, *, protect: Any = None, do_sample: bool = False, **options: Any
    ) -> TokenStream:
        """Answer one prompt piece by piece: an iterator of text, or of token ids when there is no tokenizer.

        Nothing runs before the first `next`. A piece is yielded as soon as its characters are complete, so the first
        one normally comes with the first token, before any decode step. `.result` has the `GenerationResult` at the
        end.
        """
        if is_batch(prompt):
            raise ValueError("prompt: expected one prompt to stream, got a list of prompts")
        return TokenStream(Generation(self, prompt, protect, max_new_tokens, do_sample, options), self.tokenizer)

    def choose(
        self, prompt: Prompt, protection: Protection, clock: StageClock, *, memory: SpeculatorMemory | None = None
    ) -> PromptSelection:
        """Which tokens the base reads of a prompt that `read` gave: known already, or the selector's answer."""
        if self.selection_cache is None:
            return self.selector.select(prompt, protection, clock, memory=memory)
        return self.selection_cache.choose(
            self._identity,
            prompt,
            protection,
            clock,
            self.base.device,
            lambda: self.selector.select(prompt, protection, clock, memory=memory),
            by_text=self._translates,
        )

    def read(
        self, prompt: Any, protect: Any, template_options: Mapping[str, Any] | None, clock: StageClock
    ) -> tuple[Prompt, Protection]:
        """The prompt in the base's tokens, and what of it must survive."""
        with clock.stage("tokenize"):
            read = read_prompt(prompt, self.tokenizer, template_options)
            return read, find_protection(read, protect, self.tokenizer, self.config)


def _problem(base: Any, scorer: Any, continues: bool) -> str | None:
    problem = continuing_problem(base) if continues else base_problem(base)
    if problem is not None:
        return f"unsupported base ({type(base).__name__}): {problem}"
    problem = speculator_problem(scorer)
    return None if problem is None else f"unsupported speculator ({type(scorer).__name__}): {problem}"


def _protect_each(protect: Any, count: int) -> list[Any]:
    """One prompt's spans each. A flat list of spans would be ambiguous, so it is refused."""
    if protect is None:
        return [None] * count
    spans = list(protect)
    if len(spans) != count or any(one is not None and not _are_spans(one) for one in spans):
        raise ValueError(
            f"protect: expected a list of spans (or None) for each of the {count} prompts, got {protect!r}"
        )
    return spans


def _are_spans(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(item, (str, list, tuple, Characters)) for item in value)
