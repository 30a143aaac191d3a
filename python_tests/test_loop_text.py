"""Text in and out: streaming without cut characters, and a speculator that has another tokenizer."""

from __future__ import annotations

import time

import pytest
import torch
from loop_models import build, byte_tokenizer
from transformers import GenerationConfig

from specprefill_kernels import SpecPrefillConfig
from specprefill_kernels.loop import GenerationResult, Session, SpecPrefill
from specprefill_kernels.loop.decoding import PieceDecoder
from specprefill_kernels.loop.prompts import TokenBridge, read_prompt, same_tokens
from specprefill_kernels.loop.protection import find_protection
from specprefill_kernels.loop.speculator import Speculator

MERGES = (("t", "h"), ("th", "e"), ("\u0120", "the"), ("o", "w"), ("q", "u"), ("\u0120", "qu"))
TEXT = "the quick brown fox jumps over the lazy dog. how now, brown cow? naïve café — 東京 🙂. " * 3


def config(**changes):
    return SpecPrefillConfig(**{"keep_ratio": 0.4, "chunk_size": 16, "min_prompt_tokens": 0, **changes})


def pipeline(**changes):
    tokenizer = byte_tokenizer()
    return SpecPrefill(build("llama", seed=7), build("llama", seed=3), config(**changes), tokenizer=tokenizer)


def ascii_answers(base):
    """Answers in printable one-byte characters: each token is a piece."""
    base.lm_head.weight.data[:4] = 0
    base.lm_head.weight.data[98:] = 0


@pytest.mark.parametrize("text", ["plain words here", "naïve café", "東京は大きい", "a🙂b🙂🙃", "\n\n x \t", "é"])
def test_pieces_join_to_the_text_and_never_cut_a_character(text):
    tokenizer = byte_tokenizer(MERGES)
    decoder = PieceDecoder(tokenizer)
    pieces = [decoder.push(token) for token in tokenizer(text)["input_ids"]]
    assert "".join(pieces) + decoder.flush() == text
    assert all("\ufffd" not in piece for piece in pieces)
    complete = [piece for piece in pieces if piece]
    assert len(complete) >= len(tokenizer(text)["input_ids"]) - sum(len(c.encode()) - 1 for c in text)


def test_bytes_that_never_become_a_character_come_at_the_end():
    tokenizer = byte_tokenizer()
    tokens = tokenizer("a🙂")["input_ids"][:3]
    decoder = PieceDecoder(tokenizer)
    assert [decoder.push(token) for token in tokens] == ["a", "", ""]
    assert "\ufffd" in decoder.flush()


@pytest.mark.parametrize("seed", range(4))
def test_streaming_equals_generate(seed):
    sp = pipeline()
    torch.manual_seed(seed)
    sp.base.lm_head.weight.data.normal_(0, 0.3)
    result = sp.generate(TEXT, 20)
    stream = sp.stream(TEXT, 20)
    pieces = list(stream)
    assert "".join(pieces) == stream.result.text == result.text
    assert stream.result.tokens == result.tokens
    assert stream.result.mode == "sparse"


def test_the_first_piece_comes_before_any_decode_step():
    sp = pipeline()
    ascii_answers(sp.base)
    forwards = []
    sp.base.register_forward_pre_hook(lambda *_: forwards.append(1))
    stream = sp.stream(TEXT, 8)
    assert forwards == []
    first = next(stream)
    assert first
    assert len(forwards) == 1
    with pytest.raises(RuntimeError, match="result: "):
        _ = stream.result
    rest = list(stream)
    assert len(forwards) == 8
    assert isinstance(stream.result, GenerationResult)
    assert first + "".join(rest) == stream.result.text


def test_between_two_pieces_the_model_is_as_it_was():
    """Whoever holds an unfinished stream must not find the model hooked."""
    sp = SpecPrefill(build("gemma2", seed=7), build("gemma2", seed=3), config(), tokenizer=byte_tokenizer())
    ascii_answers(sp.base)
    stream = sp.stream(TEXT, 4)
    before = sp.base.config._attn_implementation
    states = [sp.base.config._attn_implementation for _ in stream]
    assert len(states) > 1
    assert set(states) == {before}


def test_the_readers_own_time_is_not_counted():
    sp = pipeline()
    stream = sp.stream(TEXT, 3)
    next(stream)
    time.sleep(0.5)
    for _ in stream:
        time.sleep(0.2)
    assert sum(stream.result.seconds.values()) < 0.5


def test_without_a_tokenizer_the_stream_yields_ids():
    sp = SpecPrefill(build("llama", seed=7), build("llama", seed=3), config())
    ids = list(range(10, 160))
    stream = sp.stream(ids, 5)
    assert tuple(stream) == stream.result.tokens == sp.generate(ids, 5).tokens
    assert stream.result.text == ""


@pytest.mark.parametrize("given", [TEXT, [5, 6, 7], torch.tensor([5, 6, 7])])
def test_template_options_without_messages_are_refused(given):
    """No template renders such a prompt: tools would be missing without a word."""
    sp = pipeline()
    with pytest.raises(ValueError, match=r"^template_options: .* got tools$"):
        sp.select(given, template_options={"tools": [{"name": "f"}]})
    with pytest.raises(ValueError, match=r"^template_options: .* got tools$"):
        Session(sp, tools=[{"name": "f"}]).generate(given, 1)
    assert sp.select(given, template_options={}).prompt_tokens


def test_the_last_message_may_go_on():
    messages = [{"role": "user", "content": TEXT}, {"role": "assistant", "content": "Sure, the"}]
    tokenizer = byte_tokenizer()
    prompt = read_prompt(messages, tokenizer, {"continue_final_message": True})
    assert prompt.text.endswith("<|im_start|>assistant\nSure, the")
    assert find_protection(prompt, None, tokenizer, config(turn_end_tokens=8)).notes == ()


def test_negative_ids_are_refused():
    with pytest.raises(ValueError, match=r"^prompt: expected token ids of at least 0, got -1"):
        pipeline().generate([5, -1, 6], 1)


def test_a_list_is_not_streamed():
    with pytest.raises(ValueError, match=r"^prompt: expected one prompt"):
        pipeline().stream([TEXT, TEXT])


def test_stop_strings_end_the_answer():
    sp = pipeline()
    ascii_answers(sp.base)
    free = sp.generate(TEXT, 12)
    assert len(free.text) == 12
    stop = free.text[3:5]
    stopped = sp.generate(TEXT, 12, stop_strings=[stop])
    assert len(stopped.tokens) < len(free.tokens)
    assert free.tokens[: len(stopped.tokens)] == stopped.tokens
    assert stop in stopped.text


def test_stop_strings_of_a_generation_config_end_it_too():
    """The model's own and a call's; `generate` gives a function that decodes for it no tokenizer."""
    sp = pipeline()
    ascii_answers(sp.base)
    stop = sp.generate(TEXT, 12).text[3:5]
    expected = sp.generate(TEXT, 12, stop_strings=[stop]).tokens
    given = GenerationConfig(stop_strings=[stop])
    assert sp.generate(TEXT, 12, generation_config=given).tokens == expected
    assert given.stop_strings == [stop]
    sp.base.generation_config.stop_strings = [stop]
    assert sp.generate(TEXT, 12).tokens == expected
    assert len(sp.generate(TEXT, 12, stop_strings=["no such thing"]).tokens) == 12


def spoken(tokenizer_of_speculator, **changes):
    return SpecPrefill(
        build("llama", seed=7),
        build("llama", seed=3),
        config(**changes),
        tokenizer=byte_tokenizer(),
        speculator_tokenizer=tokenizer_of_speculator,
    )


def test_an_equal_tokenizer_is_recognized():
    assert same_tokens(byte_tokenizer(), byte_tokenizer())
    assert not same_tokens(byte_tokenizer(), byte_tokenizer(MERGES))
    alike = spoken(byte_tokenizer()).select(TEXT)
    alone = pipeline().select(TEXT)
    assert torch.equal(alike.importance, alone.importance)


@pytest.mark.parametrize("bos", [False, True])
def test_importance_crosses_by_characters(bos):
    """Every base byte takes the importance of the speculator token that covers its character."""
    other = byte_tokenizer(MERGES, bos=bos)
    sp = spoken(other)
    selection = sp.select(TEXT)
    base = byte_tokenizer()
    spec_ids = other(TEXT)["input_ids"]
    assert len(spec_ids) < selection.prompt_tokens
    assert (spec_ids[0] == other.bos_token_id) == bos
    importance = Speculator(build("llama", seed=3), config()).score(torch.tensor([spec_ids])).importance
    spec_spans = other(TEXT, return_offsets_mapping=True)["offset_mapping"]
    base_spans = base(TEXT, return_offsets_mapping=True)["offset_mapping"]
    for index, (start, end) in enumerate(base_spans):
        over = [float(importance[i]) for i, (s, e) in enumerate(spec_spans) if s < end and e > start]
        assert float(selection.importance[index]) == max(over)
    assert sp.generate(TEXT, 3).mode == "sparse"


def test_chat_markers_have_importance_too():
    """Both models read the text that the base's template gives; a marker is plain text to a stranger."""
    stranger = byte_tokenizer(MERGES)
    stranger.chat_template = "{{ raise_exception('not mine to render') }}"
    messages = [{"role": "system", "content": "be brief. " * 5}, {"role": "user", "content": TEXT}]
    selection = spoken(stranger).select(messages)
    markers = selection.input_ids == byte_tokenizer().convert_tokens_to_ids("<|im_start|>")
    assert int(markers.sum()) == 3
    assert (selection.importance[markers] > 0).all()


def test_ids_cross_by_the_text_that_they_stand_for():
    sp, ids = spoken(byte_tokenizer(MERGES)), byte_tokenizer()(TEXT)["input_ids"]
    assert sp.select(ids).spans == sp.select(TEXT).spans
    base = SpecPrefill(
        build("llama", seed=7),
        build("llama", seed=3),
        config(),
        tokenizer=byte_tokenizer(MERGES),
        speculator_tokenizer=byte_tokenizer(),
    )
    # Bytes where the base's own tokenizer would have merged: each has its own characters all the same.
    ascii_text = TEXT.encode("ascii", "ignore").decode()
    selection = base.select(byte_tokenizer()(ascii_text)["input_ids"])
    assert selection.prompt_tokens == len(ascii_text)
    assert torch.equal(selection.importance, pipeline().select(ascii_text).importance)


def test_bos_is_given_once():
    base, other = byte_tokenizer(), byte_tokenizer(MERGES, bos=True)
    bridge = TokenBridge(base, other)
    for text in ("hello there", "<bos>hello there"):
        ids = bridge.cross(read_prompt(text, base)).input_ids
        assert ids[0].tolist().count(other.bos_token_id) == 1


def test_what_is_no_tokenizer_is_refused():
    class Slow:
        is_fast = False

        def __len__(self):
            return 3

        def get_vocab(self):
            return {}

    with pytest.raises(
        ValueError, match=r"^speculator_tokenizer: expected a tokenizer that encodes and decodes, got Slow"
    ):
        spoken(Slow())
    with pytest.raises(ValueError, match=r"^tokenizer: expected one beside"):
        SpecPrefill(build("llama"), build("llama"), config(), speculator_tokenizer=Slow())
