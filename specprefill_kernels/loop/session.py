"""Session: a conversation whose next turn starts from what the last one left in both models' caches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from specprefill_kernels.loop.generation import Generation, Step, TokenStream
from specprefill_kernels.loop.held import HeldRun, join
from specprefill_kernels.loop.memory import SpeculatorMemory
from specprefill_kernels.loop.prompts import is_batch
from specprefill_kernels.loop.results import GenerationResult, PromptSelection

if TYPE_CHECKING:
    from specprefill_kernels.loop.pipeline import SpecPrefill
    from specprefill_kernels.loop.prompts import Prompt
    from specprefill_kernels.loop.protection import Protection

Message = dict[str, Any]


class Session:
    """A conversation with a `SpecPrefill`.

    Every prompt is the WHOLE conversation so far, as a server without state gets it. What the caches can spare is found
    by comparing token ids: an edited history, a template that renders earlier turns differently (one that strips
    thinking, say), an answer that is tokenized otherwise, or a completely different prompt are all right; they only
    reuse less.

    The speculator keeps its dense cache: it computes the new tokens and new look-ahead rows, and scores them over ALL
    keys. The base keeps its sparse cache. Each turn's answer is the one of a run from scratch with the same
    `kept_indices`: tokens that come back in the middle change what later ones attend to, so from the first of them on
    the base computes again. The answer's own tokens are cached like others.

    What a turn keeps. The budget, applied to the whole conversation, says what a run from scratch would keep. From the
    first token of that on which is not cached, exactly that is kept; in front of it, what is cached. With nothing to
    bring back that is the cache and the new turn's chunks. So cached tokens are not paid from the budget. It bounds
    what the base computes in one turn, never more than from scratch; nothing that a run from scratch would keep is
    missing; and new chunks get in however full the cache is. `kept_tokens` may be more than the budget: then `overflow`
    is set and `reason` has the numbers. `growth` limits it.

    Bringing back less (`bring_back`) computes less and loses what later questions need. SmolLM2-135M, 8 documents of
    1100 tokens, a fact asked for in each of three turns, 20% kept:

        bring_back                              0          0.5        0.75       1
        turn 2: fact kept, tokens computed      0.38  20   0.88  84   1.00 100   1.00 108    from scratch 1.00 219
        turn 3                                  0.00  22   0.25  63   0.62 100   0.75 140    from scratch 0.75 228

    A base that cannot prefill sparsely runs `model.generate` each turn and reuses nothing; `reason` says so. One whose
    speculator cannot be scored runs dense turns that do reuse the base's cache. With `self_layers` the lower layers
    score in a pass of their own, with a cache of their own, and the base starts again from its first layer with the
    kept tokens, where `SpecPrefill.generate` goes on above the scored layers: the same selection, not the same answer.

    Not thread-safe, and one generation at a time: a new one may start while a stream is not at its end, which then
    raises RuntimeError if it is read on. After any exception, interrupt or abandoned stream the next call is right.
    After changing the models' weights call `reset`.

    Args:
        loop: both models, config and tokenizer.
        system: system prompt of `ask`.
        tools: tool definitions for the chat template, in every call; prompts have to be messages then.
        bring_back: fraction of what a run from scratch would keep of the earlier turns, best chunks first, that must be
            kept even where that means to compute again what comes after it. 0: only what is protected.
        growth: kept tokens are at most this many times those of a run from scratch; where they would be more, more is
            computed again. Up to `min_prompt_tokens` are always allowed. None: no limit.

    Attributes:
        messages: the conversation that `ask` keeps: a list to read, edit or extend between two calls.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> session = Session(sp, system="Answer in one sentence.")  # doctest: +SKIP
        >>> session.ask(document + "What is the code of the blue door?").text  # doctest: +SKIP
        >>> session.ask("And of the red one?").prefilled_tokens  # doctest: +SKIP
    """

    def __init__(
        self,
        loop: SpecPrefill,
        *,
        system: str | None = None,
        tools: Sequence[Any] | None = None,
        bring_back: float = 1.0,
        growth: float | None = 2.0,
    ) -> None:
        if not _is_number(bring_back) or not 0 <= bring_back <= 1:
            raise ValueError(f"bring_back: expected a fraction in [0, 1], got {bring_back!r}")
        if growth is not None and (not _is_number(growth) or not 1 <= growth < math.inf):
            raise ValueError(f"growth: expected None or a number of at least 1, got {growth!r}")
        self.loop = loop
        self._bring_back = bring_back
        self._growth = growth
        self._system = system
        self._tools = tools
        self._memory = SpeculatorMemory()
        self._run: HeldRun | None = None
        self._current: Generation | None = None
        self.messages: list[Message] = []
        self.reset()

    def reset(self) -> None:
        """Forget the conversation and free the caches. A stream that is not at its end cannot be read on."""
        self._memory.clear()
        self._run = self._current = None
        self.messages = [] if self._system is None else [{"role": "system", "content": self._system}]

    @property
    def cached_tokens(self) -> int:
        """Entries in the base's cache."""
        return 0 if self._run is None else int(self._run.entries()[0].shape[0])

    def generate(
        self, prompt: Any, max_new_tokens: int = 128, *, protect: Any = None, do_sample: bool = False, **options: Any
    ) -> GenerationResult:
        """Answer the whole conversation `prompt`: text, messages or ids. Arguments as in `SpecPrefill.generate`.

        `messages` are left alone. `result.prefilled_tokens` is what the base computed before the first token, and
        `result.selection.reused_tokens` what the speculator did not compute again.
        """
        turn = self._turn(prompt, max_new_tokens, protect, do_sample, options)
        for _ in turn.tokens():
            pass
        return turn.result()

    def stream(
        self, prompt: Any, max_new_tokens: int = 128, *, protect: Any = None, do_sample: bool = False, **options: Any
    ) -> TokenStream:
        """`generate`, piece by piece; see `SpecPrefill.stream`."""
        return TokenStream(self._turn(prompt, max_new_tokens, protect, do_sample, options), self.loop.tokenizer)

    def ask(
        self,
        content: Any,
        max_new_tokens: int = 128,
        *,
        role: str = "user",
        protect: Any = None,
        do_sample: bool = False,
        **options: Any,
    ) -> GenerationResult:
        """Add a message, answer, and add the answer to `messages`. After an exception `messages` are as before.

        Args:
            content: the message; what the chat template takes.
            role: "user", or "tool" for a tool's result.
            max_new_tokens, protect, do_sample, options: as in `generate`.
        """
        turn = self._turn_of(content, role, max_new_tokens, protect, do_sample, options)
        for _ in turn.tokens():
            pass
        return turn.result()

    def ask_stream(
        self,
        content: Any,
        max_new_tokens: int = 128,
        *,
        role: str = "user",
        protect: Any = None,
        do_sample: bool = False,
        **options: Any,
    ) -> TokenStream:
        """`ask`, piece by piece. Message and answer join `messages` when the stream has been read to its end."""
        turn = self._turn_of(content, role, max_new_tokens, protect, do_sample, options)
        return TokenStream(turn, self.loop.tokenizer)

    def _turn_of(
        self, content: Any, role: str, max_new_tokens: int, protect: Any, do_sample: bool, options: dict[str, Any]
    ) -> _Turn:
        if self.loop.tokenizer is None:
            raise ValueError("tokenizer: expected one in the loop to ask with, got None")
        message: Message = {"role": role, "content": content}
        return self._turn([*self.messages, message], max_new_tokens, protect, do_sample, options, message)

    def _turn(
        self,
        prompt: Any,
        max_new_tokens: int,
        protect: Any,
        do_sample: bool,
        options: dict[str, Any],
        message: Message | None = None,
    ) -> _Turn:
        if is_batch(prompt):
            raise ValueError("prompt: expected one conversation, got a list of prompts")
        if self._tools is not None:
            given: Mapping[str, Any] = options.pop("template_options", None) or {}
            options["template_options"] = {"tools": self._tools, **given}
        return _Turn(self, prompt, protect, max_new_tokens, do_sample, options, message)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


class _Turn(Generation):
    """One prompt on its way to an answer, from its session's caches."""

    def __init__(
        self,
        session: Session,
        prompt: Any,
        protect: Any,
        max_new_tokens: int,
        do_sample: bool,
        options: dict[str, Any],
        message: Message | None,
    ) -> None:
        super().__init__(session.loop, prompt, protect, max_new_tokens, do_sample, options)
        self._session = session
        self._message = message
        self._reused = 0
        self._continues = False  # the lower layers keep a cache of their own: their forward is what a session spares

    def tokens(self) -> Iterator[int]:
        for token in super().tokens():
            yield token
            if self._session._current is not self:
                raise RuntimeError("this stream's session has started another generation, or was reset")
        self._session._current = None
        if self._message is not None:
            answer = {"role": "assistant", "content": self.result().text}
            self._session.messages.extend([self._message, answer])

    def _select(self, prompt: Prompt, protection: Protection) -> PromptSelection:
        session, owner = self._session, self._owner
        session._current = self
        anew = owner.choose(prompt, protection, self._clock, memory=session._memory)
        if owner.base_problem is not None:
            return anew
        with self._clock.stage("select"):
            if session._run is None:
                session._run = HeldRun(owner.base)
            held = session._run.usable(prompt.input_ids[0])
            joined = join(anew, held, owner.config, bring_back=session._bring_back, growth=session._growth)
        self._reused = joined.reused
        return replace(joined.selection, seconds=dict(self._clock.seconds))

    def _prefill_kept(self, input_ids: Tensor, selection: PromptSelection) -> tuple[Tensor, Step]:
        run = self._session._run
        assert run is not None
        run.go_on(self._reused, input_ids.shape[1])
        new = selection.kept_indices[self._reused :]
        self._prefilled = new.shape[0]
        return run.prefill(input_ids[:, new], new), run.step
