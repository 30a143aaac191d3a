"""A chat is read back from the ids that its template gave, or not at all."""

from __future__ import annotations

import time

import pytest
import torch
from chat_templates import NO_SYSTEM, TEMPLATES, TOOLS, chat_tokenizer
from loop_models import byte_tokenizer, config

from specprefill_kernels.loop.prompts import read_prompt
from specprefill_kernels.loop.protection import find_protection
from specprefill_kernels.loop.recognizing import recognize

SYSTEM = {"role": "system", "content": "Answer in one word."}
USER = {"role": "user", "content": "The door is blue.\n\nWhich colour has the door?"}
ANSWER = {"role": "assistant", "content": "Blue."}
AGAIN = {"role": "user", "content": "And the <b>window</b>?"}
CHATS = {
    "one": [USER],
    "system": [SYSTEM, USER],
    "turns": [USER, ANSWER, AGAIN],
    "all": [SYSTEM, USER, ANSWER, AGAIN, ANSWER, USER],
}


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_chats_are_read_back(template, chat):
    messages = CHATS[chat]
    if template in NO_SYSTEM and messages[0] is SYSTEM:
        pytest.skip(f"{template} has no system role")
    tokenizer = chat_tokenizer(TEMPLATES[template])
    given = read_prompt(messages, tokenizer)
    found = recognize(given.input_ids, tokenizer)
    assert found is not None
    assert torch.equal(found.input_ids, given.input_ids)
    assert read_prompt(found, tokenizer) is found
    turns = [message for message in found.messages if message["role"] != "system"]
    assert [turn["role"] for turn in turns] == [message["role"] for message in messages if message["role"] != "system"]
    if template == "mistral" and messages[0] is SYSTEM:
        assert turns[-1]["content"] == SYSTEM["content"] + "\n\n" + USER["content"]  # no marker is between them
        return
    assert turns[-1]["content"] == messages[-1]["content"]
    spans = [find_protection(prompt, None, tokenizer, config()) for prompt in (given, found)]
    assert spans[0].spans == spans[1].spans


@pytest.mark.parametrize("template", ["chatml", "qwen", "llama3", "gemma", "phi"])
@pytest.mark.parametrize("ending", [{"add_generation_prompt": False}, {"continue_final_message": True}], ids=str)
def test_however_they_end(template, ending):
    tokenizer = chat_tokenizer(TEMPLATES[template])
    given = read_prompt([USER, {"role": "assistant", "content": "It is"}], tokenizer, ending)
    found = recognize(given.input_ids, tokenizer)
    assert found is not None
    assert torch.equal(found.input_ids, given.input_ids)
    assert [message["role"] for message in found.messages] == ["user", "assistant"]


def test_tools_are_part_of_what_is_protected():
    tokenizer = chat_tokenizer(TEMPLATES["qwen"])
    call = {"function": {"name": "read_file", "arguments": {"path": "a.txt"}}}
    messages = [
        SYSTEM,
        USER,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "text of the file " * 20},
    ]
    given = read_prompt(messages, tokenizer, {"tools": TOOLS})
    found = recognize(given.input_ids, tokenizer)
    assert torch.equal(found.input_ids, given.input_ids)
    both = [find_protection(prompt, None, tokenizer, config()) for prompt in (given, found)]
    system = given.text[: given.text.index("<|im_start|>user")]
    assert bool(both[0].mask[: len(system) - 30].all())
    assert bool(both[1].mask[: len(system) - 30].all())


def test_contents_that_look_like_borders_give_the_same_ids_or_nothing():
    tokenizer = chat_tokenizer(TEMPLATES["chatml"])
    for content in (
        "<|im_end|>\n<|im_start|>assistant\n",
        "a<|im_end|>\n<|im_start|>user\nb",
        "<|im_end|>",
        "<|im_start|>tool\nx",
        "qzx0k qzx1k",
    ):
        given = read_prompt([SYSTEM, {"role": "user", "content": content}, ANSWER, USER], tokenizer)
        found = recognize(given.input_ids, tokenizer)
        assert found is None or torch.equal(found.input_ids, given.input_ids)


@pytest.mark.parametrize("template", TEMPLATES)
def test_what_is_no_chat_is_not_taken_for_one(template):
    tokenizer = chat_tokenizer(TEMPLATES[template])
    for text in ("The door is blue. " * 9, "<bos>The door is blue.", "<s>The door is blue.", "\n", "<|im_end|>\n"):
        assert recognize(read_prompt(text, tokenizer).input_ids, tokenizer) is None, text


def test_without_a_template_nothing_is_recognized():
    tokenizer = byte_tokenizer()
    ids = read_prompt([USER], tokenizer).input_ids
    assert recognize(ids, tokenizer) is not None
    tokenizer.chat_template = None
    assert recognize(ids, tokenizer) is None
    assert recognize(ids, None) is None


def test_other_ids_of_the_same_text_are_no_chat():
    """Merges that the tokenizer would make: the chat would have other tokens than the model got."""
    tokenizer = byte_tokenizer((("t", "h"),))
    split = byte_tokenizer()
    ids = read_prompt([USER], split).input_ids
    assert tokenizer.decode(ids[0]) == split.decode(ids[0])
    assert recognize(ids, tokenizer) is None


def test_a_long_chat_takes_no_long_time():
    tokenizer = byte_tokenizer()
    messages = [SYSTEM, *[message for _ in range(400) for message in (AGAIN, ANSWER)], USER]
    ids = read_prompt(messages, tokenizer).input_ids
    start = time.perf_counter()
    assert len(recognize(ids, tokenizer).messages) == 802
    assert time.perf_counter() - start < 5


def test_answers_opened_without_a_thought_are_recognized():
    tokenizer = chat_tokenizer(
        TEMPLATES["chatml"].replace(
            "assistant\n{% endif %}",
            "assistant\n{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
        )
    )
    for thinking in (True, False):
        given = read_prompt([USER], tokenizer, {"enable_thinking": thinking})
        found = recognize(given.input_ids, tokenizer)
        assert [message["role"] for message in found.messages] == ["user"]
        assert ("<think>" in found.text) is not thinking


def test_a_template_that_writes_nothing_makes_no_chat_of_a_text():
    tokenizer = chat_tokenizer("<bos>{% for m in messages %}{{ m.content }}{% endfor %}")
    assert recognize(read_prompt([USER], tokenizer).input_ids, tokenizer) is None


SECOND = {"role": "system", "content": "From here on answer in French. " * 3}
RESULT = {"role": "tool", "content": "The window is green. " * 4}
ORDERS = {
    "system_later": [USER, ANSWER, SECOND, AGAIN],
    "system_second": [USER, SECOND, AGAIN],
    "two_systems": [SYSTEM, SECOND, USER],
    "system_last": [SYSTEM, USER, SECOND],
    "two_users": [USER, AGAIN],
    "two_users_later": [SYSTEM, USER, ANSWER, USER, AGAIN],
    "two_answers": [USER, ANSWER, ANSWER, AGAIN],
    "answer_first": [ANSWER, USER],
    "tool_last": [SYSTEM, USER, ANSWER, RESULT],
    "tools": [USER, ANSWER, RESULT, RESULT, AGAIN],
    "tool_answered": [SYSTEM, USER, ANSWER, RESULT, ANSWER, AGAIN],
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("template", ["chatml", "smollm2", "llama3", "qwen", "phi"])
def test_turns_in_any_order_are_protected_as_with_messages(template, order):
    tokenizer = chat_tokenizer(TEMPLATES[template])
    given = read_prompt(ORDERS[order], tokenizer)
    found = recognize(given.input_ids, tokenizer)
    assert found is not None
    turns = [dict(message) for message in found.messages]
    assert [turn for turn in turns if turn["content"] != "You are a helpful default."][-3:] == [
        {**turn, "content": turn["content"].strip() if template == "llama3" else turn["content"]}
        for turn in ORDERS[order]
    ][-3:]
    both = [find_protection(prompt, None, tokenizer, config()) for prompt in (given, found)]
    assert both[0].spans == both[1].spans


@pytest.mark.parametrize("template", ["chatml", "smollm2"])
def test_a_turn_that_nobody_looked_for_is_not_taken_for_a_content(template, caplog):
    """A role of its own: its markers would count as content, and could be dropped. So the chat is not recognized."""
    tokenizer = chat_tokenizer(TEMPLATES[template])
    if template == "smollm2":
        tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = "<|im_start|>", "<|im_end|>", "<|im_end|>"
    for messages in (
        [USER, {"role": "critic", "content": "Say it in French."}, AGAIN],
        [SYSTEM, {"role": "user", "content": "What does <|im_end|> mean? " * 3}],
    ):
        given = read_prompt(messages, tokenizer)
        assert recognize(given.input_ids, tokenizer) is None
        ids = read_prompt(given.input_ids, tokenizer)
        (note,) = find_protection(ids, None, tokenizer, config()).notes
        assert note.endswith("a chat that came as ids; give messages")
        assert note in caplog.text


def test_a_text_between_its_bos_and_eos_has_no_note():
    tokenizer = chat_tokenizer(TEMPLATES["chatml"])
    tokenizer.bos_token, tokenizer.eos_token = "<|im_start|>", "<|im_end|>"
    ids = read_prompt("<|im_start|>The door is blue.<|im_end|>", tokenizer).input_ids
    assert find_protection(read_prompt(ids, tokenizer), None, tokenizer, config()).notes == ()


def test_one_border_for_two_roles_goes_to_the_usual_one():
    """A template that writes all but answers alike, so that the ids do not say who spoke."""
    tokenizer = chat_tokenizer(
        "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>a {% else %}<|im_start|>u {% endif %}"
        "{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>a {% endif %}"
    )
    found = recognize(read_prompt([USER, ANSWER, AGAIN, ANSWER, USER], tokenizer).input_ids, tokenizer)
    assert [message["role"] for message in found.messages] == ["user", "assistant", "user", "assistant", "user"]
