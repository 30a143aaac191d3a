"""Any pair of tokenizers: importance planted on a word arrives on that word's tokens and nowhere else."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loop_models import build, byte_tokenizer, config
from tokenizer_zoo import ZOO, CharTokenizer, zoo
from tokenizers import AddedToken, Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

from specprefill_kernels.loop import SpecPrefill
from specprefill_kernels.loop.offsets import NoSpans, complete, encode, pieces
from specprefill_kernels.loop.prompts import TokenBridge, read_prompt, same_tokens
from specprefill_kernels.loop.speculator import Speculator

NAMES = list(ZOO)
PAIRS = [pair for pair in itertools.product(NAMES, NAMES) if pair[0] != pair[1]]
# Tokenizers that change the text: some characters share a token, and some have none of their own.
TEXT = (
    st.lists(
        st.sampled_from(
            [*"ab .,;=", "\n", "\r\n", "\t", "\0", "\x1b", *"éßñ", "e\u0301", *"語本の", "\ufb01", "\u2460"]
        )
        | st.sampled_from(["🙂", "🧑\u200d🚀", "<s>", "</s>", "<|im_start|>", "\u00ad", "\u3000"]),
        min_size=1,
        max_size=40,
    )
    .map("".join)
    .filter(str.strip)
)


def crossing(base, speculator, text):
    return TokenBridge(zoo(base), zoo(speculator)).cross(read_prompt(text, zoo(base)))


def words_of_tokens(name, words, text):
    """Which word each token belongs to, found by counting the tokens of prefixes: no offsets are asked for.

    A separator's tokens count for the word behind it, and -1 is what stands around the text.
    """
    tokenizer = zoo(name)
    # what a post-processor puts around the text counts from the front; an EOS behind it is not counted
    front = tokenizer(text)["input_ids"].index(tokenizer(text, add_special_tokens=False)["input_ids"][0])
    owner, seen, position = [-1] * front, 0, 0
    for index, word in enumerate(words):
        position = text.index(word, position) + len(word)
        count = len(tokenizer(text[:position], add_special_tokens=False)["input_ids"])
        owner += [index] * (count - seen)
        seen = count
    rest = len(tokenizer(text)["input_ids"]) - len(owner)
    return owner + [-1] * rest


def blank(name, token):
    text = zoo(name).convert_ids_to_tokens(token)
    return text.strip("\u2581\u0120\u010a ") in ("", "<0x0A>", "20", "0a", "<unk>")  # an unknown one may be a space


@pytest.mark.parametrize(("base", "speculator"), PAIRS, ids=["-".join(pair) for pair in PAIRS])
def test_a_planted_word_arrives_on_its_own_tokens(base, speculator):
    text = "the quick 東京 fox\nщи e\u0301t 🙂 12345 naïve \ufb01n  É x=[1] the fox"
    words = text.split()
    cross = crossing(base, speculator, text)
    base_ids = read_prompt(text, zoo(base)).input_ids[0].tolist()
    base_words, spec_words = words_of_tokens(base, words, text), words_of_tokens(speculator, words, text)
    assert len(base_words) == len(base_ids) == len(cross.base_spans)
    spec_ids = cross.input_ids[0].tolist()
    for target in range(len(words)):
        importance = torch.tensor(
            [float(word == target and not blank(speculator, i)) for word, i in zip(spec_words, spec_ids)]
        )
        if not importance.any():
            continue
        got = cross.back(importance).tolist()
        for token, word, value in zip(base_ids, base_words, got):
            if word >= 0 and word != target:
                assert value == 0, (words[target], zoo(base).convert_ids_to_tokens(token))
            elif word == target and not blank(base, token):
                assert value == 1, (words[target], zoo(base).convert_ids_to_tokens(token))


@pytest.mark.parametrize("base", NAMES)
@settings(max_examples=25, deadline=None)
@given(text=TEXT, data=st.data())
def test_every_base_token_gets_an_importance(base, text, data):
    speculator = data.draw(st.sampled_from(NAMES))
    if base == "slow":  # its special tokens swallow nothing, but decoding puts spaces around some
        text = text.replace("<s>", "").replace("</s>", "") or "x"
    if speculator == "slow":
        text = text.replace("<s>", "").replace("</s>", "") or "x"
    if not text.strip():
        text += "x"
    cross = crossing(base, speculator, text)
    torch.manual_seed(len(text))
    importance = torch.rand(cross.input_ids.shape[1]) + 0.1
    got = cross.back(importance)
    assert got.shape == (read_prompt(text, zoo(base)).input_ids.shape[1],)
    assert bool((got > 0).all())
    # Nothing that has characters is lost on the way.
    real = cross.speculator_spans[:, 0] < cross.speculator_spans[:, 1]
    assert float(got.max()) >= float(importance[real].max())


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40, deadline=None)
@given(text=TEXT)
def test_every_character_belongs_to_a_token(name, text):
    if name == "slow":
        text = text.replace("<s>", "").replace("</s>", "") or "x"
    encoded = encode(zoo(name), text, special=True)
    assert encoded.ids == zoo(name)(text)["input_ids"]
    covered = torch.zeros(len(text), dtype=torch.bool)
    for start, end in encoded.spans.tolist():
        assert 0 <= start <= end <= len(text)
        covered[start:end] = True
    assert bool(covered.all())
    ends = encoded.spans[:, 1]
    assert torch.equal(ends, ends.cummax(0).values)  # no EOS at character 0
    assert all(int(end - start) == 0 for start, end in encoded.spans[encoded.added])


def test_lost_characters_go_where_they_belong():
    text = "ab  cd\u0301 e"
    spans = torch.tensor([[0, 0], [0, 2], [4, 6], [8, 9], [0, 0]])
    added = torch.tensor([True, False, False, False, True])
    # spaces to the word behind them, the accent to the letter before it, EOS to the end
    assert complete(spans, added, text).tolist() == [[0, 0], [0, 2], [2, 7], [7, 9], [9, 9]]
    assert complete(torch.tensor([[2, 3]]), torch.tensor([False]), "  x  ").tolist() == [[0, 5]]
    assert complete(torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, dtype=torch.bool), "").tolist() == []


def test_a_character_that_a_later_token_has_is_not_lost():
    """RoBERTa's tokenizer puts an empty prefix token between a special token and the word behind it."""
    spans = torch.tensor([[0, 3], [4, 4], [3, 4]])
    assert torch.equal(complete(spans, torch.zeros(3, dtype=torch.bool), "<s>x"), spans)


def test_an_added_bos_and_eos_are_points_at_their_ends():
    encoded = encode(zoo("roberta"), "the fox", special=True)
    assert encoded.added.tolist() == [True] + [False] * (len(encoded.ids) - 2) + [True]
    assert encoded.spans[0].tolist() == [0, 0]
    assert encoded.spans[-1].tolist() == [7, 7]
    assert encoded.spans[1:-1].tolist()[0][0] == 0
    assert encoded.spans[1:-1].tolist()[-1][1] == 7


def test_the_speculator_gets_its_bos_and_no_eos():
    for text in ("the fox", "<s>the fox"):
        ids = crossing("qwen", "roberta", text).input_ids[0].tolist()
        assert ids.count(zoo("roberta").bos_token_id) == 1
        assert zoo("roberta").eos_token_id not in ids


def test_the_spans_of_a_slow_tokenizer_are_those_of_its_pieces():
    text = "naïve 🙂 東"
    encoded = encode(CharTokenizer(), text, special=True)
    assert encoded.added.tolist() == [True] + [False] * len(text.encode())
    expected = [(index, index + 1) for index, char in enumerate(text) for _ in char.encode()]
    assert encoded.spans.tolist() == [[0, 0], *map(list, expected)]


def test_a_tokenizer_that_changes_the_text_and_has_no_offsets_is_an_error():
    with pytest.raises(NoSpans, match=r"^tokenizer: expected a fast tokenizer.* CharTokenizer does not"):
        encode(CharTokenizer(lossy=True), "Upper", special=True)
    sp = SpecPrefill(
        build("llama"),
        build("llama"),
        config(),
        tokenizer=byte_tokenizer(),
        speculator_tokenizer=CharTokenizer(lossy=True),
    )
    assert sp.select("lower " * 20).mode == "sparse"
    with pytest.raises(ValueError, match=r"^speculator_tokenizer: expected a fast tokenizer"):
        sp.select("Upper " * 20)


@settings(max_examples=60, deadline=None)
@given(ids=st.lists(st.integers(3, 300), min_size=1, max_size=30))
def test_any_ids_have_a_text_and_spans_in_it(ids):
    """Even bytes that are no character: they stand for the replacement character that decoding gives."""
    for tokenizer in (zoo("qwen"), CharTokenizer()):
        mine = [i % len(tokenizer) for i in ids]
        text, spans = pieces(tokenizer, mine)
        assert spans.shape == (len(mine), 2)
        assert int(spans[-1, 1]) == len(text)
        assert bool((spans[1:, 0] >= spans[:-1, 0]).all())


def retold(tokenizer, change):
    """The same fast tokenizer with its description changed."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    change(rules)
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(rules)))


def merged(order):
    vocab = {name: index for index, name in enumerate(["a", "b", "c", "ab", "bc"])}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab=vocab, merges=order)))


def test_equal_vocabularies_are_not_enough():
    first, second = merged([("a", "b"), ("b", "c")]), merged([("b", "c"), ("a", "b")])
    assert first.get_vocab() == second.get_vocab()
    assert first("abc")["input_ids"] != second("abc")["input_ids"]
    assert not same_tokens(first, second)
    assert same_tokens(first, merged([("a", "b"), ("b", "c")]))


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r.update(normalizer=json.loads(described(normalizers.Lowercase()))["normalizer"]),
        lambda r: r["pre_tokenizer"].update(add_prefix_space=True),
        lambda r: r["added_tokens"][0].update(lstrip=True),
        lambda r: r["added_tokens"].pop(),
        lambda r: r["model"]["merges"].reverse(),
    ],
    ids=["normalizer", "pre_tokenizer", "lstrip", "added token", "merges"],
)
def test_other_rules_are_other_tokens(change):
    assert not same_tokens(zoo("qwen"), retold(zoo("qwen"), change))


def described(normalizer):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizer
    return tokenizer.to_str()


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r["added_tokens"][0].update(special=False),
        lambda r: r.update(truncation=None, padding=None),
        lambda r: r.update(decoder=None),
        lambda r: r.update(post_processor={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True,
                                           "use_regex": True}),
    ],
    ids=["special", "padding", "decoder", "trimmed offsets"],
)  # fmt: skip
def test_what_changes_no_id_is_the_same(change):
    assert same_tokens(zoo("qwen"), retold(zoo("qwen"), change))


def test_another_bos_is_another_tokenizer():
    """The same vocabulary and merges; a speculator without its BOS would be another model."""
    assert not same_tokens(byte_tokenizer(), byte_tokenizer(bos=True))
    assert not same_tokens(byte_tokenizer(bos=True), zoo("qwen"))
    assert same_tokens(byte_tokenizer(bos=True), byte_tokenizer(bos=True))
    assert same_tokens(CharTokenizer(), CharTokenizer())
    assert not same_tokens(CharTokenizer(), byte_tokenizer())


MESSAGES = [
    {"role": "system", "content": "Be brief; </s> and <s> are only text here."},
    {"role": "user", "content": "The naïve café 東京 🙂 e\u0301\r\nsells 12345 pears. " * 5 + "How many?"},
]
LOOP_PAIRS = [
    ("llama3", "unigram"),
    ("llama2", "qwen"),
    ("unigram", "roberta"),
    ("gpt2", "nfkc"),
    ("metaspace", "slow"),
]


@pytest.mark.parametrize(("base", "speculator"), LOOP_PAIRS, ids=["-".join(pair) for pair in LOOP_PAIRS])
@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
def test_a_pair_runs_through_the_one_front(base, speculator, chat):
    first, second = zoo(base), zoo(speculator)
    first.chat_template = (
        "{% for m in messages %}<s>{{ m.role }}: {{ m.content | trim }}</s>\n{% endfor %}<s>assistant:"
    )
    messages = MESSAGES
    if speculator == "slow":
        messages = [{"role": "user", "content": "12345 pears and a fox. " * 9}]
        first.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant]"
    prompt = messages if chat else messages[-1]["content"]
    loop = SpecPrefill(
        build("llama", seed=7, vocab_size=len(first)),
        build("qwen2", seed=3, vocab_size=len(second)),
        config(keep_ratio=0.5, turn_end_tokens=8),
        tokenizer=first,
        speculator_tokenizer=second,
    )
    result = loop.generate(prompt, 3)
    selection = result.selection
    assert result.mode == "sparse"
    assert bool((selection.importance > 0).all())
    assert bool(selection.protected) == chat
    # The same by hand: the speculator alone, on the text that it was given.
    text = read_prompt(prompt, first).text
    own = encode(second, text, special=not text.startswith("<s>"))
    keep = len(own.ids) - int(own.added[-1])
    ids = torch.tensor([own.ids[:keep]])
    importance = Speculator(build("qwen2", seed=3, vocab_size=len(second)), loop.config).score(ids).importance
    spans = read_prompt(prompt, first).encoded.spans.tolist()
    for (start, end), value in zip(spans, selection.importance.tolist()):
        over = [float(v) for v, (s, e) in zip(importance, own.spans[:keep].tolist()) if s < end and e > start]
        assert start == end or value == max(over)


def test_per_layer_importance_crosses_too():
    loop = SpecPrefill(
        build("llama", seed=7, vocab_size=len(zoo("qwen"))),
        build("llama", seed=3, vocab_size=len(zoo("llama2"))),
        config(),
        tokenizer=zoo("qwen"),
        speculator_tokenizer=zoo("llama2"),
    )
    from specprefill_kernels.loop.clock import StageClock

    read, protection = loop.read("the quick brown fox sleeps. " * 9, None, None, StageClock())
    selection = loop.selector.select(read, protection, StageClock(), per_layer=True)
    assert selection.layer_importance.shape == (len(selection.scored_layers), selection.prompt_tokens)
    assert bool((selection.layer_importance > 0).all())


def test_a_tokenizer_of_another_model_is_named():
    loop = SpecPrefill(
        build("llama", vocab_size=len(zoo("qwen"))),
        build("llama", vocab_size=20),
        config(),
        tokenizer=zoo("qwen"),
        speculator_tokenizer=zoo("unigram"),
    )
    with pytest.raises(ValueError, match=r"holds id \d+, got one of 20; speculator_tokenizer is not its own"):
        loop.select("the quick brown fox sleeps. " * 9)


def test_half_a_surrogate_pair_is_named():
    with pytest.raises(ValueError, match=r"^prompt: .* half a surrogate pair at character 3"):
        read_prompt("abc\ud83d", zoo("qwen"))


def test_a_speculator_that_sees_nothing_is_named():
    empty = merged([])
    bridge = TokenBridge(zoo("qwen"), empty)
    with pytest.raises(ValueError, match=r"^speculator_tokenizer: expected at least one token"):
        bridge.cross(read_prompt("xyz", zoo("qwen")))


def test_added_tokens_that_swallow_spaces_keep_them():
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken("<call>", lstrip=True, rstrip=True)])
    encoded = encode(tokenizer, "a  <call>  b", special=True)
    covered = [c for start, end in encoded.spans.tolist() for c in range(start, end)]
    assert sorted(set(covered)) == list(range(12))
