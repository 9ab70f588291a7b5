"""Chat templates against transformers' own rendering of them."""

from __future__ import annotations

import json

import pytest
from headrace_router.text.chat_protocol import TemplateSource
from headrace_router.text.chat_template import ChatTemplate
from transformers.utils.chat_template_utils import render_jinja_template

SPECIAL = {"bos_token": "<bos>", "eos_token": "<eos>"}
ODD = 'é "quoted" <b>&amp;</b>\n\t\\ 👩'
CONVERSATIONS = [
    [("user", "hi")],
    [("system", ODD), ("user", ODD), ("assistant", "  spaces  "), ("user", "")],
    [("user", "a"), ("assistant", "<think>x</think>b"), ("user", "{{ bos_token }}{% if %}")],
]
TEMPLATES = {
    "v2": """{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}
{{ bos_token }}{% for message in messages %}
    {% if message['role'] == 'user' %}
{{ 'User: ' + message['content'] + '\\n\\n' }}{% elif message['role'] == 'assistant' %}
{{ 'Assistant: ' + message['content'] + eos_token }}{% elif message['role'] == 'system' %}
{{ message['content'] + '\\n\\n' }}{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}
""",
    "r1": """{% set ns = namespace(is_first=true, system_prompt='') %}
{%- for message in messages %}{%- if message['role'] == 'system' %}
{%- set ns.system_prompt = ns.system_prompt + message['content'] %}{%- endif %}{%- endfor %}
{{- bos_token }}{{ ns.system_prompt }}
{%- for message in messages %}
{%- if message['role'] == 'user' %}{{ '<U>' + message['content'] }}{%- endif %}
{%- if message['role'] == 'assistant' and message['content'] is not none %}
{% set content = message['content'] %}
{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}
{{- '<A>' + content + eos_token }}{%- endif %}{%- endfor -%}
{% if add_generation_prompt %}<A>{% endif %}""",
    "mixtral": """{%- set loop_messages = messages %}{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) and tools is not none %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
    {{- '[INST] ' + message['content'] | trim + ' [/INST]' if message.role == 'user' else message.content + eos_token }}
{%- endfor %}""",
    "generation": """{% for message in messages %}
{% generation %}
{{ message.role }}: {% for c in message.content %}{% if c == 'p' %}{% break %}{% endif %}{{ c }}{{ loop.index }}
{% endfor %}
{% endgeneration %}
{% endfor %}
""",
    "generation has a scope of its own": """{% set x = 1 %}{% for message in messages %}{% set x = 2 %}
{%- generation %}{% set x = 3 %}{{ x }}{{ loop.index }}{{ message.role }}{% endgeneration %}{{ x }}
{%- endfor %}{{ x }}""",
    "generation, nested and trimmed": """a {%- generation -%} b {%- generation %} c {% endgeneration -%} d
{%- endgeneration -%} e""",
    "json": "{{ messages | tojson }}",
    "json with everything": (
        "{{ messages | tojson(ensure_ascii=true, indent=2, separators=(' ,', ' : '), sort_keys=true) }}"
        "{{ messages[0] | tojson(true, 1, none, true) }}{{ messages | tojson(indent='--') }}"
    ),
    "whitespace": "  {% if true %}\n  x\n  {% endif %}\n{#- c -#}\n y {{- 1 -}} z\n",
    "documents and tools": "{{ documents is none }}{{ tools is none }}{{ nothing is defined }}{{ nothing }}",
}


@pytest.fixture(params=[*TEMPLATES, "demo"])
def template(request, model_dir):
    if request.param == "demo":
        return json.loads((model_dir / "tokenizer_config.json").read_text())["chat_template"]
    return TEMPLATES[request.param]


def test_a_conversation_is_rendered_as_transformers_renders_it(template):
    ours = ChatTemplate(TemplateSource(template, SPECIAL))
    for conversation in CONVERSATIONS:
        messages = [{"role": role, "content": content} for role, content in conversation]
        (expected,), _ = render_jinja_template(
            [messages], chat_template=template, add_generation_prompt=True, **SPECIAL
        )
        assert ours.render(conversation) == expected
