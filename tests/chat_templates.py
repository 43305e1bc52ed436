# ruff: noqa: E501
"""Chat templates in the manner of model families, written for these tests, with the control tokens they use."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Family:
    """A template, its control tokens (the tokenizer learns them as special ones), and what it refuses or takes."""

    template: str
    control: tuple[str, ...]
    system: bool = True
    alternates: bool = False
    swallows: bool = False
    arguments: tuple[dict[str, Any], ...] = field(default=({},))


LLAMA3 = """\
{{- bos_token }}
{%- if not day is defined %}{% if strftime_now is defined %}{% set day = strftime_now("%d %b %Y") %}{% else %}
{%- set day = "26 Jul 2024" %}{% endif %}{% endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Today: " + day + "\\n\\n" + system + "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

QWEN3 = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- "# Tools\\n" }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "<|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(seeking=true, last=messages | length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages | length - 1) - loop.index0 %}
    {%- if ns.seeking and message.role == "user" and not
        (message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.seeking = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content, thought = message.content, '' %}
        {%- if '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last and (loop.last or thought) %}
            {{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""

GEMMA = """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('a system text is not supported') }}{% endif %}\
{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('roles must alternate') }}{% endif %}\
{% if message['role'] == 'assistant' %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}\
{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""

MISTRAL = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system, turns = messages[0]["content"], messages[1:] %}
{%- else %}
    {%- set turns = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in turns %}
    {%- if (message["role"] == "user") != (loop.index0 % 2 == 0) %}
        {{- raise_exception("after the optional system message, user and assistant must alternate") }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system is defined %}
            {{- "[INST] " + system + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- else %}
        {{- " " + message["content"] | trim + eos_token }}
    {%- endif %}
{%- endfor %}
"""

PHI3 = """\
{% for message in messages %}{% if message['role'] == 'system' and message['content'] %}{{ '<|system|>\\n' + \
message['content'] + '<|close|>\\n' }}{% elif message['role'] == 'user' %}{{ '<|asks|>\\n' + message['content'] + \
'<|close|>\\n' }}{% elif message['role'] == 'assistant' %}{{ '<|answers|>\\n' + message['content'] + '<|close|>\\n' }}\
{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|answers|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""

TRIMMING = """
{%- for message in messages -%}
    {{ '\\n' if not loop.first }}{{ message.role | upper | trim }}:
    {%- if message.content is string %} {{ message.content.strip() }}
    {%- else %}{% for part in message.content %}{{ part.text }}{% endfor %}
    {%- endif -%}
    {{ '</s>' }}
{%- endfor %}
{{ '\\nASSISTANT: ' | trim if add_generation_prompt }}
"""

DETACHED = """\
{%- set marker, mode = '@@json', 'plain' %}
{%- for message in messages %}
    {%- if marker in message.content | lower %}{% set mode = 'json' %}{% else %}{% set mode = 'plain' %}{% endif %}
    {{- '[' + message.role + '/' + mode + ']' + message.content }}
{%- endfor %}
{{- '[assistant]' }}
"""

FAMILIES = {
    "llama 3": Family(
        LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), arguments=({"day": "1 May 2026"}, {})
    ),
    "qwen 3": Family(
        QWEN3,
        ("<|im_start|>", "<|im_end|>"),
        arguments=(
            {}, {"enable_thinking": False}, {"enable_thinking": True},
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
        ),
    ),
    "gemma": Family(GEMMA, ("<start_of_turn>", "<end_of_turn>"), system=False, alternates=True),
    "mistral": Family(MISTRAL, ("[INST]", "[/INST]"), alternates=True),
    "phi 3": Family(PHI3, ("<|system|>", "<|asks|>", "<|answers|>", "<|close|>"), swallows=True),
    "trims blanks": Family(TRIMMING, ("</s>",)),
    "looks for what it has put aside": Family(DETACHED, ()),
}  # fmt: skip
