"""Tokenizers of the common families, trained here on a few lines: byte-level, Metaspace, Llama 2's, Unigram, slow."""

from __future__ import annotations

import json
from functools import cache

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

CORPUS = [
    "the quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "A naïve café owner says: 12345 apples, 67 pears; nothing more, nothing less!",
    "日本語の本 は 東京 に あります 。 щи да щи",
    'def f(x): return {"key": [x, None]} if x==[1] else x=[1]',
] * 30
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPECIAL = ["<unk>", "<s>", "</s>"]


def _fast(tokenizer: Tokenizer, **names: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", **names)


def _around(tokenizer: Tokenizer, pattern: str, *first: processors.PostProcessor) -> None:
    ids = [(name, tokenizer.token_to_id(name)) for name in ("<s>", "</s>")]
    around = processors.TemplateProcessing(single=pattern, special_tokens=ids)
    tokenizer.post_processor = processors.Sequence([*first, around]) if first else around


def _byte_level(size: int, *, trim: bool = False, prefix: bool = False, around: str | None = None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    level = [processors.ByteLevel(trim_offsets=trim)] if trim else []
    if around:
        _around(tokenizer, around, *level)
    elif level:
        tokenizer.post_processor = level[0]
    return tokenizer


def _metaspace(kind: str, size: int, normalizer: normalizers.Normalizer | None = None) -> Tokenizer:
    if kind == "bpe":
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=SPECIAL + BYTES, show_progress=False)
    else:
        tokenizer = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(
            vocab_size=size, special_tokens=SPECIAL + BYTES, unk_token="<unk>", show_progress=False
        )
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _with_byte_fallback(tokenizer: Tokenizer) -> Tokenizer:
    rules = json.loads(tokenizer.to_str())
    rules["model"]["byte_fallback"] = True
    return Tokenizer.from_str(json.dumps(rules))


def _llama2() -> Tokenizer:
    """No pre-tokenizer: the normalizer puts a space in front and writes spaces as a visible character."""
    tokenizer = _metaspace("bpe", 560)
    tokenizer.pre_tokenizer = None
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    _around(tokenizer, "<s> $A")
    return tokenizer


class CharTokenizer(PreTrainedTokenizer):
    """A slow tokenizer, which knows no offsets: bytes of a text, or its characters in lower case."""

    def __init__(self, lossy: bool = False, **options: object) -> None:
        self._lossy = lossy
        self._vocab = {"<s>": 0, "</s>": 1, "<unk>": 2, **{f"{byte:02x}": byte + 3 for byte in range(256)}}
        self._names = {index: name for name, index in self._vocab.items()}
        super().__init__(bos_token="<s>", eos_token="</s>", unk_token="<unk>", **options)

    @property
    def vocab_size(self) -> int:
        return len(self._vocab)

    def get_vocab(self) -> dict[str, int]:
        return dict(self._vocab)

    def _tokenize(self, text: str, **_: object) -> list[str]:
        return [f"{byte:02x}" for byte in (text.lower() if self._lossy else text).encode()]

    def _convert_token_to_id(self, token: str) -> int:
        return self._vocab.get(token, 2)

    def _convert_id_to_token(self, index: int) -> str:
        return self._names[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        names = ("<s>", "</s>", "<unk>")
        return b"".join(t.encode() if t in names else bytes.fromhex(t) for t in tokens).decode(errors="replace")

    def build_inputs_with_special_tokens(self, ids: list[int], other: list[int] | None = None) -> list[int]:
        return [0, *ids]


# Two that change the text: this one also knows no character that it was not trained on.
_NFKC = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
_BERT = normalizers.Sequence([normalizers.NFD(), normalizers.Lowercase(), normalizers.StripAccents()])

ZOO = {
    "qwen": lambda: _fast(_byte_level(500)),
    "gpt2": lambda: _fast(_byte_level(420, trim=True)),
    "roberta": lambda: _fast(_byte_level(380, trim=True, prefix=True, around="<s> $A </s>")),
    "llama3": lambda: _fast(_byte_level(600, around="<s> $A")),
    "llama2": lambda: _fast(_llama2(), unk_token="<unk>"),
    "metaspace": lambda: _fast(_metaspace("bpe", 500), unk_token="<unk>"),
    "unigram": lambda: _fast(_with_byte_fallback(_metaspace("unigram", 420)), unk_token="<unk>"),
    "nfkc": lambda: _fast(_metaspace("unigram", 400, _NFKC), unk_token="<unk>"),
    "accents": lambda: _fast(_metaspace("bpe", 450, _BERT), unk_token="<unk>"),
    "slow": CharTokenizer,
}


@cache
def zoo(name: str) -> PreTrainedTokenizerFast:
    return ZOO[name]()
