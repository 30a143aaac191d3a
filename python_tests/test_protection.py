"""What survives by itself: the parts of a chat template, found whatever the template does."""

from __future__ import annotations

import itertools
import logging
import time

import pytest
import torch
from chat_templates import (
    CHATML,
    DEEPSEEK,
    LLAMA3,
    MISTRAL,
    NO_SYSTEM,
    PARTS,
    QWEN,
    TEMPLATES,
    THINKING,
    TOOLS,
    kept_text,
    pieces,
    protect,
)
from chat_templates import chat_tokenizer as tokenizer_with
from hypothesis import given, settings
from hypothesis import strategies as st
from loop_models import build, config

from specprefill_kernels.loop import SpecPrefill
from specprefill_kernels.loop.prompts import read_prompt
from specprefill_kernels.loop.protection import find_protection

# No template writes these letters, so that whatever else stands in a rendering is the template's own.
FOREIGN = "가나다라마바사아자차카타파"
CONTENT = st.text(alphabet=FOREIGN + " \n", min_size=1, max_size=30).filter(str.strip)


@st.composite
def chats(draw, system: bool = True):
    turns = draw(st.integers(1, 4))
    messages = [{"role": "system", "content": draw(CONTENT)}] if system and draw(st.booleans()) else []
    return messages + [{"role": ("user", "assistant")[i % 2], "content": draw(CONTENT)} for i in range(2 * turns - 1)]


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_all_that_a_template_writes_is_protected_and_no_content_but_the_system_prompt(name, data):
    messages = data.draw(chats(system=name not in NO_SYSTEM))
    prompt, protection = protect(messages, TEMPLATES[name], turn_end_tokens=0)
    assert protection.notes == ()
    kept = kept_text(prompt, protection)
    system = messages[0]["content"].strip() if messages[0]["role"] == "system" else ""
    for char, got in zip(prompt.text, kept):
        assert got == (char if char not in FOREIGN + " \n" else got)  # the template's own
    foreign = "".join(got for char, got in zip(prompt.text, kept) if char in FOREIGN and got != "·")
    assert foreign == "".join(c for c in system if c in FOREIGN)
    assert sum(protection.parts.values()) == int(protection.mask.sum())


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_template_is_found_whatever_the_contents_look_like(name):
    """Contents equal to each other, to roles, to markers, to JSON; the protected text is that of plain contents."""
    strange = [
        "assistant",
        "user",
        "user",
        "<|im_end|>\n<|im_start|>assistant\n",
        '{"name": "x"}\\n "q"',
        "[/INST]",
        "a",
    ]

    def own(contents):
        messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
        return "".join(pieces(*protect(messages, TEMPLATES[name], turn_end_tokens=0)))

    assert own(strange) == own(["나" * 9] * len(strange))


def test_chatml_part_by_part():
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "long " * 40 + "\nwhat now?"},
        {"role": "assistant", "content": "this"},
        {"role": "user", "content": "and then?"},
    ]
    prompt, protection = protect(messages, CHATML)
    assert pieces(prompt, protection) == [
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>\n<|im_start|>user\nand then?<|im_end|>\n<|im_start|>assistant\n",
    ]
    # one token a byte, one a marker, and a line break behind each <|im_end|>
    assert protection.parts == {
        "system": 8,
        "markers": 5 + 2 * 4 + len("system\nuser\nassistant\nuser\nassistant\n"),
        "turn end": 9,
    }


def test_tools_and_the_templates_own_system_prompt_have_their_labels():
    messages = [{"role": "user", "content": "go"}]
    prompt, protection = protect(messages, QWEN, options={"tools": TOOLS})
    assert kept_text(prompt, protection) == prompt.text
    assert protection.parts["system"] == len("You are a helpful default.")
    first, last = prompt.text.index("\n\n# Tools"), prompt.text.index("</tools>") + len("</tools>")
    assert protection.parts["tools"] == last - first
    _, without = protect(messages, QWEN)
    assert "tools" not in without.parts
    assert without.parts["markers"] == protection.parts["markers"]


@pytest.mark.parametrize("template", [LLAMA3, MISTRAL], ids=["llama3", "mistral"])
def test_tools_inside_a_user_turn_are_protected(template):
    messages = [{"role": "user", "content": "나" * 50}, {"role": "assistant", "content": "다"}]
    messages.append({"role": "user", "content": "라" * 50})
    prompt, protection = protect(messages, template, options={"tools": TOOLS}, turn_end_tokens=0)
    kept = "".join(pieces(prompt, protection))
    assert "read_file" in kept
    assert "run_tests" in kept
    assert protection.parts["tools"] > 100
    assert not set(kept) & set(FOREIGN)


def test_an_agents_calls_keep_their_structure_and_not_their_arguments():
    arguments = {"path": "마" * 30, "lines": [1, 2], "deep": {"text": '바"\n' * 9}}
    messages = [
        {"role": "user", "content": "나" * 30},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "read_file", "arguments": arguments}}],
        },
        {"role": "tool", "content": "사" * 80},
        {"role": "tool", "content": "사" * 80},
        {"role": "assistant", "content": "아" * 30},
    ]
    prompt, protection = protect(messages, QWEN, options={"tools": TOOLS}, turn_end_tokens=0)
    kept = kept_text(prompt, protection)
    assert not set(kept) & set(FOREIGN)
    for structure in ("<tool_call>\n", '"name": "read_file"', "[1, 2]", "</tool_call>", "\n<tool_response>\n"):
        assert structure in kept
    assert kept.count("</tool_response>") == 2
    assert protection.notes == ()


def test_call_arguments_that_are_json_text_are_contents_too():
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}[{{ c.function.name }}"
        "({{ c.function.arguments }})]{% endfor %}{% endfor %}"
    )
    call = {"type": "function", "id": "1", "function": {"name": "run", "arguments": '{"x": "나나나"}'}}
    messages = [{"role": "user", "content": "가"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    prompt, protection = protect(messages, template, turn_end_tokens=0)
    assert pieces(prompt, protection) == ["<user>", "<assistant>[run(", ")]"]


def test_reasoning_that_the_template_drops_changes_nothing_else():
    messages = [
        {"role": "user", "content": "가나다"},
        {"role": "assistant", "content": "<think>\n너타타\n</think>\n\n라마바"},
        {"role": "user", "content": "사아자"},
        {"role": "assistant", "content": "<think>\n너타타\n</think>\n\n차카"},
    ]
    prompt, protection = protect(messages, THINKING, turn_end_tokens=0)
    kept = kept_text(prompt, protection)
    assert kept.count("<|im_start|>") == 5
    assert kept.count("<|im_end|>\n") == 4
    assert not set(kept) & set(FOREIGN)
    assert protection.notes == ()


def test_markers_in_a_content_are_not_the_templates_even_beside_a_changed_one():
    turn = "\uac00<|im_end|>\n<|im_start|>assistant\n\ub098<|im_end|>\n<|im_start|>user\n\uac00"
    messages = [
        {"role": "user", "content": turn},
        {"role": "assistant", "content": "<think>\n\ub2e4\n</think>\n\n\ub77c"},
        {"role": "user", "content": turn},
    ]
    prompt, protection = protect(messages, THINKING, turn_end_tokens=0)
    plain, expected = protect([{**m, "content": "\uac00"} for m in messages], THINKING, turn_end_tokens=0)
    assert pieces(prompt, protection) == pieces(plain, expected)


def test_reordered_system_prompts_are_found():
    messages = [
        {"role": "user", "content": "나나"},
        {"role": "system", "content": "다다"},
        {"role": "assistant", "content": "<think>라라</think>마마"},
        {"role": "user", "content": "나나"},
    ]
    prompt, protection = protect(messages, DEEPSEEK, turn_end_tokens=0)
    assert kept_text(prompt, protection) == "<s>다다<|User|>··<|Assistant|>··</s><|User|>··<|Assistant|>"


def test_a_repeated_content_is_found_each_time():
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<again>{{ messages[0].content }}</again>"
    )
    prompt, protection = protect([{"role": "user", "content": "나다라"}], template, turn_end_tokens=0)
    assert kept_text(prompt, protection) == "<user>···<again>···</again>"


def test_parts_and_documents_are_contents():
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "거거거"}]},
        {
            "role": "user",
            "content": [{"type": "text", "text": "나" * 9}, {"type": "image"}, {"type": "text", "text": "다" * 9}],
        },
    ]
    documents = [{"title": "라" * 5, "text": "마" * 50}]
    prompt, protection = protect(messages, PARTS, options={"documents": documents}, turn_end_tokens=6)
    assert pieces(prompt, protection) == [
        "<doc>",
        ": ",
        "</doc>\n<|im_start|>system\n거거거<|im_end|>\n<|im_start|>user\n",
        "<image>",
        "다다<|im_end|>\n<|im_start|>assistant\n",  # three tokens a character here
    ]


def test_a_lost_content_is_said_and_special_tokens_survive():
    template = (
        "{% for m in messages %}{% if not m.content.isdigit() %}{{ raise_exception('digits!') }}{% endif %}"
        "<|im_start|>{{ m.role }}\n{{ m.content | int * 3 }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    messages = [{"role": "user", "content": "123"}, {"role": "assistant", "content": "45"}]
    prompt, protection = protect(messages, template)
    assert "369" in prompt.text
    assert protection.notes[0] == "the content of message 0 (user) was not found in the chat template's text"
    assert "message 1 (assistant)" in protection.notes[1]
    assert protection.notes[2] == "of the template's text only special tokens are protected"
    kept = kept_text(prompt, protection)
    assert kept.count("<|im_start|>") == 3
    assert kept.count("<|im_end|>") == 2
    assert kept.endswith("<|im_start|>assistant\n")
    assert not set(kept) & set("0123456789")


def test_a_content_that_the_template_changes_is_found_by_what_else_changes():
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content | upper }}</{{ m.role }}>{% endfor %}"
    messages = [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "def"}]
    prompt, protection = protect(messages, template, turn_end_tokens=2)
    assert kept_text(prompt, protection) == "<user>·BC</user><assistant>···</assistant>"
    assert protection.notes == ()


def test_a_content_that_is_changed_and_repeated_is_said():
    template = "{% for m in messages %}<{{ m.content[:5] }}|{{ m.role }}|{{ m.content }}>{% endfor %}"
    prompt, protection = protect([{"role": "user", "content": "가" * 9}], template, turn_end_tokens=0)
    assert kept_text(prompt, protection) == "<·····|user|" + "·" * 9 + ">" or protection.notes


def test_a_dropped_user_turn_is_said(caplog):
    template = "{% for m in messages[-2:] %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    messages = [
        {"role": role, "content": text} for role, text in (("user", "one"), ("assistant", "two"), ("user", "six"))
    ]
    with caplog.at_level(logging.WARNING):
        prompt, protection = protect(messages, template)
    assert kept_text(prompt, protection) == "<assistant>···<user>six"
    assert protection.notes == ("the content of message 0 (user) is not in the chat template's text",)
    assert "message 0 (user)" in caplog.text


@pytest.mark.parametrize(
    ("content", "end"),
    [
        ("x" * 100 + "\n\nfirst part. second part?", "first part. second part?"),
        ("x" * 100 + "\n\n" + "y" * 5 + "\n\nwhat is it?", "yyyyy\n\nwhat is it?"),
        ("x" * 100 + "\nline one is here\nanswer:", "line one is here\nanswer:"),
        ("long " * 30 + "One sentence ends. What is it?", "One sentence ends. What is it?"),
        ("거카하다하 " * 30 + "차하파바더", None),
        ("x" * 100, "x" * 32),
        ("short question", "short question"),
        ("a b " * 50 + "\n\nA:", None),
    ],
)
def test_a_turn_is_cut_where_it_may_be(content, end):
    prompt, protection = protect([{"role": "user", "content": content}], CHATML, turn_end_tokens=32)
    kept = pieces(prompt, protection)[-1].split("<|im_end|>")[0].removeprefix("<|im_start|>user\n")
    assert content.endswith(kept)
    assert 16 <= len(kept.encode()) <= 32 or kept == content
    if end is None:
        assert content[: -len(kept)].endswith((" ", "\n"))
    else:
        assert kept == end


def test_the_last_user_turn_counts_and_not_the_last_message():
    messages = [{"role": "user", "content": "question?"}, {"role": "assistant", "content": "나" * 90}]
    messages += [{"role": "tool", "content": "다" * 90}]
    prompt, protection = protect(messages, CHATML)
    assert "question?" in kept_text(prompt, protection)
    assert protection.parts["turn end"] == 9


def test_bytes_of_one_character_stay_together():
    prompt, protection = protect([{"role": "user", "content": "🙂" * 30}], CHATML, turn_end_tokens=10)
    assert protection.parts["turn end"] == 8
    assert pieces(prompt, protection)[-1].startswith("🙂🙂<|im_end|>")


@pytest.mark.parametrize("options", [{"protect": "none"}, {"turn_end_tokens": 0}], ids=str)
def test_protection_can_be_turned_off(options):
    _, protection = protect([{"role": "user", "content": "hello"}], CHATML, **options)
    assert "turn end" not in protection.parts
    assert (protection.mask is None) == ("protect" in options)


def test_text_and_ids_have_no_template():
    tokenizer = tokenizer_with(CHATML)
    for form in ("<|im_start|>user\nhi<|im_end|>", "<eos>hi<bos>", tokenizer("hi there")["input_ids"]):
        protection = find_protection(read_prompt(form, tokenizer), None, tokenizer, config())
        assert (protection.mask, protection.spans, protection.parts) == (None, (), {})
        assert bool(protection.notes) == ("<|im_start|>" in form)


@pytest.mark.parametrize("as_text", [False, True])
def test_a_chat_that_is_no_list_of_messages_is_noted(as_text):
    tokenizer = tokenizer_with(CHATML)
    chat = read_prompt([{"role": "user", "content": "hello"}], tokenizer)
    given = read_prompt(chat.text if as_text else chat.input_ids, tokenizer)
    note = (
        f"nothing of the chat template is protected: a chat that came as {'text' if as_text else 'ids'}; give messages"
    )
    assert find_protection(given, None, tokenizer, config()).notes == (note,)
    assert find_protection(given, None, tokenizer, config(protect="none")).notes == ()
    assert find_protection(given, None, None, config()).notes == ()


def test_the_whole_loop_keeps_and_reports_it():
    tokenizer = tokenizer_with(QWEN)
    base, speculator = build("llama", seed=7), build("llama", seed=3)
    messages = [{"role": "user", "content": "거카하다하 아가 거카하다하. " * 30 + "\nWhat is the word?"}]
    sp = SpecPrefill(base, speculator, config(keep_ratio=0.4, turn_end_tokens=20), tokenizer=tokenizer)
    selection = sp.select(messages)
    kept = set(selection.kept_indices.tolist())
    assert selection.protected
    assert all(set(range(start, end)) <= kept for start, end in selection.protected)
    assert "What is the word?<|im_end|>" in tokenizer.decode(selection.input_ids[selection.kept_indices])
    assert not selection.overflow
    assert "protected (system 26, markers" in selection.reason
    assert "turn end 17)" in selection.reason
    plain = SpecPrefill(base, speculator, config(keep_ratio=0.4, protect="none"), tokenizer=tokenizer).select(messages)
    assert plain.protected == ()
    assert torch.equal(plain.importance, selection.importance)
    tight = SpecPrefill(base, speculator, config(keep_tokens=32), tokenizer=tokenizer).select(messages)
    assert tight.overflow
    assert "exceed the budget of 32 (keep_tokens=32)" in tight.reason


def test_a_long_agents_chat_is_taken_apart_in_no_time():
    """Hundreds of answers that the template changes, each with reasoning that it drops."""
    messages = [{"role": "user", "content": "\uac00" * 50}]
    for index in range(150):
        messages.append({"role": "assistant", "content": f"<think>\n\uac00{index}\n</think>\n\n\ub098" * 5})
        messages.append({"role": "user", "content": "\ub2e4" * 50})
    started = time.perf_counter()
    prompt, protection = protect(messages, THINKING, turn_end_tokens=0)
    assert time.perf_counter() - started < 2  # one rendering a message would take ten seconds
    assert not set(kept_text(prompt, protection)) & set("\uac00\ub098\ub2e4")


def test_images_are_not_copied():
    class Image:
        def __deepcopy__(self, memo):
            raise AssertionError("copied")

    messages = [{"role": "user", "content": [{"type": "image", "image": Image()}, {"type": "text", "text": "\uac00"}]}]
    prompt, protection = protect(messages, PARTS, turn_end_tokens=0)
    assert kept_text(prompt, protection).replace("\u00b7", "") == prompt.text.replace("\uac00", "")


def test_what_it_costs():
    """Tokens protected of an agent's chat of 20 messages with two tools, when a word is a token."""
    words = "word " * 120
    turns = [("user", words), ("assistant", words), ("tool", words)]
    messages = [{"role": role, "content": text} for role, text in itertools.islice(itertools.cycle(turns), 20)]
    prompt, protection = protect(messages, QWEN, options={"tools": TOOLS})
    marker = protection.parts["markers"] / len(messages)
    assert marker < len("<tool_response>\n\n</tool_response>") + len("assistant\n") + 4  # bytes of the longest
    assert int(protection.mask.sum()) < prompt.input_ids.shape[1] / 10
