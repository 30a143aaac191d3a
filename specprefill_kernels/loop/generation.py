"""One prompt on its way to an answer, token by token, and the stream of text that it makes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from specprefill_kernels.loop.clock import StageClock
from specprefill_kernels.loop.continuing import ContinuingRun
from specprefill_kernels.loop.decoding import DecodePlan, PieceDecoder, decode, plan_decoding
from specprefill_kernels.loop.plain import generate_plainly
from specprefill_kernels.loop.prefill import BaseRun
from specprefill_kernels.loop.results import GenerationResult, PromptSelection
from specprefill_kernels.loop.scoring import Captured
from specprefill_kernels.loop.support import num_layers

if TYPE_CHECKING:
    from specprefill_kernels.loop.capture import LayerCapture
    from specprefill_kernels.loop.pipeline import SpecPrefill
    from specprefill_kernels.loop.prompts import Prompt
    from specprefill_kernels.loop.protection import Protection

Step = Callable[[Tensor], Tensor]

# Cache slots reserved for the answer. A longer one makes the cache grow; a generous limit must not cost gigabytes.
_ROOM = 1024


class Generation:
    """One prompt on its way to an answer."""

    def __init__(
        self,
        owner: SpecPrefill,
        prompt: Any,
        protect: Any,
        max_new_tokens: int,
        do_sample: bool,
        options: dict[str, Any],
    ) -> None:
        if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected an int of at least 1, got {max_new_tokens!r}")
        self._owner = owner
        self._prompt = prompt
        self._protect = protect
        self._max_new_tokens = max_new_tokens
        self._do_sample = do_sample
        self._template_options = options.pop("template_options", None)
        self._options = options
        self._clock = StageClock(*owner._devices)
        self._generated: list[int] = []
        self._selection: PromptSelection | None = None
        self._prefilled = 0
        self._continues = owner.continuing_layers is not None
        self._begun: tuple[Prompt, Protection] | None = None

    def begin(self) -> PromptSelection | None:
        """Read the prompt and select, which `tokens` does otherwise. Once.

        Returns:
            None where the selection will be made in the middle of the base's forward.
        """
        prompt, protection = self._begun = self._read()
        if self._continues:
            self._selection = self._owner.selector.dense_selection(prompt, protection, self._clock)
        else:
            self._selection = self._select(prompt, protection)
        return self._selection

    def tokens(self) -> Iterator[int]:
        """Run, token by token. The caller's own time between two tokens is not counted."""
        clock = self._clock
        if self._begun is None:
            self.begin()
        tokens = self._prefill()
        with clock.stage("base_prefill"):
            token = next(tokens)
        while True:
            self._generated.append(token)
            yield token
            with clock.stage("decode"):
                following = next(tokens, None)
            if following is None:
                return
            token = following

    def _read(self) -> tuple[Prompt, Protection]:
        return self._owner.read(self._prompt, self._protect, self._template_options, self._clock)

    def _prefill(self) -> Iterator[int]:
        """Prefill what was selected, and hand out the tokens that follow."""
        owner, selection = self._owner, self._selection
        assert self._begun is not None
        prompt, protection = self._begun
        input_ids = prompt.input_ids.to(owner.base.device)
        if selection is None:
            return self._prefill_continuing(prompt, protection, input_ids)
        with self._clock.stage("base_prefill"):
            if owner.base_problem is not None:
                return generate_plainly(owner.base, input_ids, **self._decode_options())
            plan = self._plan(input_ids)
            logits, step = self._prefill_kept(input_ids, selection)
            return decode(plan, input_ids, logits, step)

    def _prefill_continuing(self, prompt: Prompt, protection: Protection, input_ids: Tensor) -> Iterator[int]:
        """Selection in the middle of the base's one forward: the stages' names are those of a second model's."""
        owner, clock, config = self._owner, self._clock, self._owner.config
        assert owner.continuing_layers is not None
        run = ContinuingRun(
            owner.base,
            owner.continuing_layers,
            rows=config.look_ahead,
            room=min(self._max_new_tokens, _ROOM),
            prefill_chunk=config.prefill_chunk,
        )
        captured = partial(
            Captured,
            seq_len=input_ids.shape[1],
            num_layers=num_layers(owner.base),
            prompt_rows=config.look_ahead,
            look_ahead=1,
        )

        def choose(layers: dict[int, LayerCapture]) -> Tensor:
            self._selection = selection = owner.selector.select_captured(prompt, protection, captured(layers), clock)
            clock.switch("base_prefill")
            return selection.kept_indices

        with clock.stage("speculator_prefill"):
            plan = self._plan(input_ids)
            logits = run.prefill(input_ids, choose)
        return decode(plan, input_ids, logits, run.step)

    def _select(self, prompt: Prompt, protection: Protection) -> PromptSelection:
        return self._owner.choose(prompt, protection, self._clock)

    def _prefill_kept(self, input_ids: Tensor, selection: PromptSelection) -> tuple[Tensor, Step]:
        """The base reads what was kept: logits [1, V] of the last prompt token, and what feeds a decoded one."""
        sparse, kept = selection.mode == "sparse", selection.kept_indices
        run = BaseRun(self._owner.base, input_ids.shape[1], sparse=sparse, room=min(self._max_new_tokens, _ROOM))
        self._prefilled = selection.kept_tokens
        return run.prefill(input_ids[:, kept] if sparse else input_ids, kept), run.step

    def _plan(self, input_ids: Tensor) -> DecodePlan:
        return plan_decoding(self._owner.base, input_ids, **self._decode_options())

    def _decode_options(self) -> dict[str, Any]:
        return {
            "max_new_tokens": self._max_new_tokens,
            "do_sample": self._do_sample,
            "tokenizer": self._owner.tokenizer,
            **self._options,
        }

    def result(self) -> GenerationResult:
        selection = self._selection
        if selection is None:
            raise RuntimeError("the generation has not run yet")
        tokenizer, seconds = self._owner.tokenizer, dict(self._clock.seconds)
        text = "" if tokenizer is None else tokenizer.decode(self._generated, skip_special_tokens=True)
        return GenerationResult(
            text=text,
            tokens=tuple(self._generated),
            prompt_tokens=selection.prompt_tokens,
            kept_tokens=selection.kept_tokens,
            mode=selection.mode,
            reason=selection.reason,
            spans=selection.spans,
            seconds=seconds,
            ttft=sum(value for stage, value in seconds.items() if stage != "decode"),
            backend=selection.backend,
            selection=selection,
            prefilled_tokens=self._prefilled or selection.kept_tokens,
        )


class TokenStream(Iterator[Any]):
    """Pieces of one answer as they come; see `SpecPrefill.stream`."""

    def __init__(self, generation: Generation, tokenizer: Any) -> None:
        self._generation = generation
        self._pieces = self._run(tokenizer)
        self._finished = False

    def _run(self, tokenizer: Any) -> Iterator[Any]:
        if tokenizer is None:
            yield from self._generation.tokens()
        else:
            pieces = PieceDecoder(tokenizer)
            for token in self._generation.tokens():
                piece = pieces.push(token)
                if piece:
                    yield piece
            rest = pieces.flush()
            if rest:
                yield rest
        self._finished = True

    def __iter__(self) -> TokenStream:
        return self

    def __next__(self) -> Any:
        return next(self._pieces)

    @property
    def result(self) -> GenerationResult:
        """The whole answer. Raises RuntimeError while pieces are still to come."""
        if not self._finished:
            raise RuntimeError("result: expected the stream to be read to its end first")
        return self._generation.result()
