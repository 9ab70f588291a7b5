"""Chat templates against transformers' own rendering of them."""

from __future__ import annotations

import json

import pytest
from headrace_router.text.chat_protocol import Conversation, TemplateSource
from headrace_router.text.chat_template import ChatTemplate
from jinja2 import TemplateError
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
    ours = ChatTemplate(TemplateSource({"default": template}, SPECIAL))
    for conversation in CONVERSATIONS:
        messages = [{"role": role, "content": content} for role, content in conversation]
        (expected,), _ = render_jinja_template(
            [messages], chat_template=template, add_generation_prompt=True, **SPECIAL
        )
        assert ours.render(Conversation([(role, content, "") for role, content in conversation])) == expected


# As Hermes' and Qwen's templates have them, shortened: tools, calls, what tools said, thinking.
TOOLS = """{%- if tools %}{{- 'T' }}{%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}{%- endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}{{- '<tool ' + message.tool_call_id + '>' + message.content + '</tool>' }}
{%- else %}{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.reasoning_content is defined %}{{- '<think>' + message.reasoning_content + '</think>' }}{%- endif %}
{%- if message.content %}{{- message.content }}{%- endif %}
{%- for call in message.tool_calls or [] %}
{{- '<call>' + call.function.name }}{{- call.function.arguments | tojson }}{{- '</call>' }}{%- endfor %}
{{- '<|im_end|>\\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{- '<think></think>' }}{%- endif %}{%- endif %}
{%- if documents %}{{- documents | tojson }}{%- endif %}"""
TOOL = {"type": "function", "function": {"name": "add", "description": 'é"<', "parameters": {"type": "object"}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [None, "é"]}}}
CALLED = [
    {"role": "developer", "content": "Be brief."},
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "Hm."},
    {"role": "tool", "content": "2", "tool_call_id": "c1", "name": "add"},
]
ANSWERED = [*CALLED, {"role": "assistant", "content": "It is 2, "}]


def conversation(messages, **options):
    plain = [
        (message["role"], message["content"] or "", json.dumps({k: v for k, v in message.items() if k != "role"}))
        for message in messages
    ]
    return Conversation(plain, **options)


@pytest.mark.parametrize("variables", [{}, {"enable_thinking": False}, {"documents": [{"title": "a"}], "bos_token": 1}])
@pytest.mark.parametrize("tools", [None, [TOOL, TOOL]])
@pytest.mark.parametrize("is_begun", [True, False])
def test_tools_calls_and_variables_are_rendered_as_transformers_renders_them(variables, tools, is_begun):
    ours = ChatTemplate(TemplateSource({"default": TOOLS}, SPECIAL)).render(
        conversation(
            CALLED,
            tools=[json.dumps(tool) for tool in tools or []],
            variables=json.dumps(variables) if variables else "",
            add_generation_prompt=is_begun,
        )
    )
    (expected,), _ = render_jinja_template(
        [CALLED], tools=tools, chat_template=TOOLS, add_generation_prompt=is_begun, **{**SPECIAL, **variables}
    )
    assert ours == expected


@pytest.mark.parametrize("template", [TOOLS, TOOLS.replace("message.content }}", "message.content | trim }}")])
def test_a_message_is_gone_on_from_as_transformers_does(template):
    options = {"add_generation_prompt": False, "continue_final_message": True}
    ours = ChatTemplate(TemplateSource({"default": template}, SPECIAL)).render(conversation(ANSWERED, **options))
    (expected,), _ = render_jinja_template([ANSWERED], chat_template=template, **options, **SPECIAL)
    assert ours == expected
    assert ours.rstrip().endswith("It is 2,")


@pytest.mark.parametrize(
    ("templates", "options", "problem"),
    [
        ({"default": "{{ messages[0].content[:1] }}"}, {"continue_final_message": True}, "as it is"),
        ({"default": ""}, {"template": "rag"}, "has no template 'rag'; it has default"),
        ({"rag": ""}, {}, "has no template 'default'; it has rag"),
        ({"default": ""}, {"variables": '{"messages": []}'}, "messages is no variable"),
        ({"default": ""}, {"variables": "[]"}, "variables is no JSON object"),
        ({"default": ""}, {"tools": ["{"]}, r"tools\[0\] can't be read as JSON"),
        ({"default": ""}, {"tools": ["[" * 100_000]}, r"tools\[0\] can't be read as JSON"),
    ],
)
def test_what_a_template_can_not_be_told_is_refused_by_name(templates, options, problem):
    with pytest.raises(TemplateError, match=problem):
        ChatTemplate(TemplateSource(templates, SPECIAL)).render(Conversation([("user", "hi", "")], **options))


def test_a_template_is_taken_by_name_and_the_one_for_tools_where_there_are_some():
    ours = ChatTemplate(TemplateSource({"default": "D", "tool_use": "T", "rag": "R"}, SPECIAL))
    hi = [("user", "hi", "")]
    assert ours.render(Conversation(hi)) == "D"
    assert ours.render(Conversation(hi, tools=["{}"])) == "T"
    assert ours.render(Conversation(hi, tools=["{}"], template="default")) == "D"
    assert ours.render(Conversation(hi, template="rag")) == "R"
