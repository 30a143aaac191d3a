"""Chat templates with the structure of published ones, each written anew as small as that structure allows."""

from __future__ import annotations

from loop_models import byte_tokenizer, config
from transformers import PreTrainedTokenizerFast

from specprefill_kernels.loop.prompts import read_prompt
from specprefill_kernels.loop.protection import find_protection

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# SmolLM2: ChatML with a default system prompt, which is there where a chat has none.
SMOLLM2 = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful default.<|im_end|>\n{% endif %}"
    + CHATML
)

# Qwen2.5: a default system prompt, tools in the system block, tool calls and results with tags of their own.
QWEN = """{%- if messages[0].role == 'system' %}{% set system = messages[0].content %}
{%- else %}{% set system = 'You are a helpful default.' %}{% endif %}
{{- '<|im_start|>system\\n' + system }}
{%- if tools %}{{- '\\n\\n# Tools\\n\\nYou may call these:\\n<tools>' }}
{%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{% endfor %}{{- '\\n</tools>' }}{% endif %}
{{- '<|im_end|>\\n' }}
{%- for m in messages %}
{%- if m.role == 'system' and loop.first %}
{%- elif m.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{% endif %}
{{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{% endif %}
{%- else %}
{{- '<|im_start|>' + m.role }}{% if m.content %}{{- '\\n' + m.content }}{% endif %}
{%- for call in m.tool_calls or [] %}
{{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson }}{{- '}\\n</tool_call>' }}{% endfor %}
{{- '<|im_end|>\\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""

# Qwen3: reasoning is dropped from all but the last answers.
THINKING = """{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}{% set content = m.content %}{% set thought = '' %}
{%- if m.role == 'assistant' and '</think>' in content %}
{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}
{{- '<|im_start|>' + m.role + '\\n' }}
{%- if thought and loop.index0 > ns.last %}{{- '<think>\\n' + thought + '\\n</think>\\n\\n' }}{% endif %}
{{- content + '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""

# Llama 3: contents are stripped, tools are written into the first user turn, headers around roles.
LLAMA3 = """{{- '<|begin|>' }}{% set first = namespace(done=false) %}
{{- '<|head|>system<|end_head|>\\n\\nCutting Knowledge Date: December 2023\\n\\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content | trim }}{% set messages = messages[1:] %}{% endif %}
{{- '<|eot|>' }}
{%- for m in messages %}
{{- '<|head|>' + m.role + '<|end_head|>\\n\\n' }}
{%- if tools and m.role == 'user' and not first.done %}{% set first.done = true %}
{{- 'Given the following functions, answer with a call.\\n\\n' }}
{%- for tool in tools %}{{- tool | tojson(indent=4) + '\\n\\n' }}{% endfor %}{% endif %}
{{- m.content | trim + '<|eot|>' }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|head|>assistant<|end_head|>\\n\\n' }}{% endif %}"""

# Llama 2: the system prompt is written inside the first user turn.
LLAMA2 = """{%- if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set turns = messages[1:] %}
{%- else %}{% set system = none %}{% set turns = messages %}{% endif %}
{%- for m in turns %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{%- if loop.first and system %}{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + m.content %}
{%- else %}{% set content = m.content %}{% endif %}
{%- if m.role == 'user' %}{{- '<s>[INST] ' + content.strip() + ' [/INST]' }}
{%- else %}{{- ' ' + content.strip() + ' </s>' }}{% endif %}{% endfor %}"""

# Mistral: tools stand before the last user turn, and the system prompt inside it.
MISTRAL = """{%- if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set turns = messages[1:] %}
{%- else %}{% set turns = messages %}{% endif %}
{{- '<s>' }}
{%- for m in turns %}
{%- if m.role == 'user' %}
{%- if loop.last and tools %}{{- '[TOOLS]' + tools | tojson + '[/TOOLS]' }}{% endif %}
{%- if loop.last and system is defined %}{{- '[INST]' + system + '\\n\\n' + m.content + '[/INST]' }}
{%- else %}{{- '[INST]' + m.content + '[/INST]' }}{% endif %}
{%- else %}{{- ' ' + m.content | trim + '</s>' }}{% endif %}{% endfor %}"""

# Gemma: no system role, the assistant is called model, contents are stripped.
GEMMA = """{{- '<s>' }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}
{%- for m in messages %}
{{- '<|turn|>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}
{{- m.content | trim + '<|end_turn|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|turn|>model\\n' }}{% endif %}"""

# DeepSeek: all system prompts come first, wherever they stood; reasoning is cut off answers.
DEEPSEEK = """{%- set ns = namespace(system='') %}
{%- for m in messages %}{% if m.role == 'system' %}{% set ns.system = ns.system + m.content %}{% endif %}{% endfor %}
{{- '<s>' + ns.system }}
{%- for m in messages %}
{%- if m.role == 'user' %}{{- '<|User|>' + m.content }}{% endif %}
{%- if m.role == 'assistant' %}{% set content = m.content %}
{%- if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}
{{- '<|Assistant|>' + content + '</s>' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{- '<|Assistant|>' }}{% endif %}"""

PHI = """{%- for m in messages %}{{- '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{% endif %}"""

# Contents of several parts, and documents that the template itself writes.
PARTS = """{%- for d in documents or [] %}{{- '<doc>' + d.title + ': ' + d.text + '</doc>\\n' }}{% endfor %}
{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.content is string %}{{- m.content }}
{%- else %}{% for part in m.content %}
{%- if part.type == 'text' %}{{- part.text }}{% else %}{{- '<image>' }}{% endif %}{% endfor %}{% endif %}
{{- '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""

TEMPLATES = {
    "chatml": CHATML,
    "smollm2": SMOLLM2,
    "qwen": QWEN,
    "thinking": THINKING,
    "llama3": LLAMA3,
    "llama2": LLAMA2,
    "mistral": MISTRAL,
    "gemma": GEMMA,
    "deepseek": DEEPSEEK,
    "phi": PHI,
    "parts": PARTS,
}
NO_SYSTEM = ("gemma",)
TOOLS = [
    {"type": "function", "function": {"name": name, "description": f"does {name}", "parameters": {"type": "object"}}}
    for name in ("read_file", "run_tests")
]


def chat_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """One token a byte, and a single token for each of ChatML's markers."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def protect(messages, template, spans=(), *, options=None, **changes):
    tokenizer = chat_tokenizer(template)
    prompt = read_prompt(messages, tokenizer, options)
    return prompt, find_protection(prompt, spans, tokenizer, config(**changes))


def kept_text(prompt, protection, blank="·"):
    """The rendered text with everything that is not protected blanked out."""
    _, spans = prompt.text, prompt.encoded.spans
    chars = [blank] * len(prompt.text)
    for (start, end), kept in zip(spans.tolist(), protection.mask.tolist()):
        if kept:
            chars[start:end] = prompt.text[start:end]
    return "".join(chars)


def pieces(prompt, protection):
    return [piece for piece in kept_text(prompt, protection, "\0").split("\0") if piece]
