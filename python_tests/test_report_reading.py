"""From a selection of the loop to what the page and the picture show, with tiny models and from the command line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("typer")
from loop_models import build, byte_tokenizer, config, pipeline
from test_cli import invoke, tiny  # noqa: F401  (a fixture)
from test_report import Page, facts

from specprefill_kernels.demo.reading import LABELS, budget_text, read, tokens_of
from specprefill_kernels.report import page

FACT = "The key is under the mat."
TEXT = "A short line of the document. " * 8 + FACT + " Another line follows here." * 6
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": TEXT}]


@pytest.fixture(scope="module")
def loop():
    return pipeline(
        base=build("llama", seed=7), tokenizer=byte_tokenizer((("t", "h"),)), protect="template", turn_end_tokens=8
    )


def reading_of(loop, prompt=MESSAGES, **options: object):
    selection = loop.select(prompt, options.pop("protect", None), per_layer=options.pop("per_layer", True))
    names = {"title": "T", "base": "B", "speculator": "S", **options}
    return selection, read(selection, prompt, loop.tokenizer, loop.config, **names)


def test_a_reading_is_the_selection_in_plain_numbers(loop) -> None:
    selection, reading = reading_of(loop, passages=[FACT, "not in it"])
    kept = set(selection.kept_indices.tolist())
    assert selection.mode == reading.mode == "sparse"
    assert (reading.prompt_tokens, reading.kept_tokens) == (selection.prompt_tokens, len(kept))
    assert {piece.position for piece in reading.pieces if piece.kept} == kept
    assert [piece.importance for piece in reading.pieces] == selection.importance.tolist()
    assert reading.kept_spans == list(selection.spans)
    assert reading.layers.numbers == selection.scored_layers == (0, 1, 2, 3)
    assert torch.equal(torch.tensor(reading.layers.values), selection.layer_importance)
    text = "".join(piece.text for piece in reading.pieces)
    [(start, end)] = reading.evidence
    assert "".join(piece.text for piece in reading.pieces[start:end]) == FACT
    assert text == loop.tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)


def test_protected_parts_have_the_names_that_readers_know(loop) -> None:
    selection, reading = reading_of(loop, protect=[FACT])
    counts = reading.protected_counts
    assert set(counts) == {LABELS[label] for label in ("system", "markers", "turn end", "user")}
    words = {}
    for part in reading.protected:
        words[part.label] = words.get(part.label, "") + "".join(
            piece.text for piece in reading.pieces[part.start : part.end]
        )
    assert words["system prompt"] == "Be brief."
    assert words["asked for"] == FACT
    assert words["end of the question"] == TEXT[-len(words["end of the question"]) :]
    assert words["role markers"].startswith("<|im_start|>system\n<|im_end|>\n<|im_start|>user\n")
    # Together they are what the selection protects, each token once.
    tokens = [token for part in reading.protected for token in range(part.start, part.end)]
    assert sorted(tokens) == [token for start, end in selection.protected for token in range(start, end)]
    assert all(reading.pieces[token].kept for token in tokens)
    assert {int(v["data-p"]) for _, _, v in Page(page.render(reading)).tokens if "data-l" in v} == set(tokens)


def test_a_dense_selection_has_a_reading_without_layers(loop) -> None:
    selection, reading = reading_of(loop, prompt="too short")
    assert selection.mode == "dense"
    assert selection.importance is None
    assert reading.layers is None
    assert all(piece.kept for piece in reading.pieces)
    assert "Nothing is skipped" in page.render(reading)


@pytest.mark.parametrize("options", [{"add_generation_prompt": False}, {"continue_final_message": True}], ids=str)
def test_template_options_mean_what_they_mean_to_the_loop(loop, options) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "It lies under"}]
    selection = loop.select(messages, template_options=options)
    reading = read(
        selection, messages, loop.tokenizer, loop.config, title="", base="", speculator="", template_options=options
    )
    text = "".join(piece.text for piece in reading.pieces)
    assert text == loop.tokenizer.decode(selection.input_ids)
    assert text.endswith("It lies under") == ("continue_final_message" in options)


def test_another_prompts_selection_is_refused(loop) -> None:
    selection = loop.select(MESSAGES)
    names = {"title": "", "base": "", "speculator": ""}
    with pytest.raises(ValueError, match=rf"prompt: expected the {selection.prompt_tokens} tokens of the selection"):
        read(selection, "other", loop.tokenizer, loop.config, **names)
    with pytest.raises(ValueError, match="tokenizer: expected one for a prompt of text or messages, got None"):
        read(selection, MESSAGES, None, loop.config, **names)


def test_the_budget_is_told_in_words() -> None:
    assert budget_text(config(keep_ratio=0.25)) == "keep ratio 0.25"
    assert budget_text(config(keep_ratio=None, keep_tokens=4096)) == "at most 4,096 tokens"
    assert budget_text(config(keep_ratio=None, keep_mass=0.9)) == "90% of the importance"


def test_tokens_of_a_passage_are_those_that_touch_it() -> None:
    offsets = [(0, 2), (2, 4), (4, 4), (4, 6)]
    assert tokens_of("abcdef", "bcd", offsets) == (0, 2)
    assert tokens_of("abcdef", "ef", offsets) == (3, 4)
    assert tokens_of("abcdef", "x", offsets) is None
    assert tokens_of("abcdef", None, offsets) is None
    assert tokens_of("abcdef", "ef", offsets[:2]) is None


# ------------------------------------------------------------------------------------------------------ command line


def test_select_saves_a_page_and_a_picture(tiny, tmp_path: Path) -> None:  # noqa: F811
    pytest.importorskip("matplotlib")
    out = {name: tmp_path / name for name in ("page.html", "picture.png", "kept.json")}
    result = invoke(
        "select", "--base", tiny["base"], "--speculator", tiny["speculator"], "--prompt-file", tiny["doc.txt"],
        "--question", "Where is <it>?", "--keep-ratio", 0.3, "--set", "protect=template",
        "--page", out["page.html"], "--picture", out["picture.png"], "--output", out["kept.json"],
    )  # fmt: skip
    said = result.stdout.replace("\n", "")
    assert all(str(file) in said for file in out.values())
    text = out["page.html"].read_text(encoding="utf-8")
    assert "Where is &lt;it&gt;?" in text
    assert "doc.txt" in text
    assert facts(text)["layers"]["numbers"] == [0, 1]  # the speculator's
    assert {"role markers", "end of the question"} <= set(facts(text)["labels"])
    assert out["picture.png"].read_bytes().startswith(b"\x89PNG")
    assert out["kept.json"].exists()


def test_select_asks_for_matplotlib_before_any_model_is_loaded(tiny, tmp_path: Path, monkeypatch) -> None:  # noqa: F811
    from specprefill_kernels.report import picture

    def missing() -> None:
        raise ImportError(f"a picture needs matplotlib: {picture.INSTALL}")

    monkeypatch.setattr(picture, "require", missing)
    result = invoke("select", "--base", "/no/model", "--prompt-file", tiny["doc.txt"], "--picture", tmp_path / "x.png",
                    code=1)  # fmt: skip
    assert "specprefill-kernels[plot]" in result.stderr.replace("\n", "")


def test_selections_of_one_prompt_have_the_same_page_with_and_without_layers_but_for_them(loop) -> None:
    _, one = reading_of(loop)
    _, other = reading_of(loop, per_layer=False)
    assert other.layers is None
    assert replace(one, layers=None, seconds={}) == replace(other, seconds={})
