"""Calls in the forms of published models: each read the same wherever it is cut, and shown where tokens are special."""

import json

import pytest
from headrace_router.face.openai.call_forms import FORMS, form_of
from headrace_router.face.openai.calls_in_sections import DEEPSEEK, KIMI, MOST_HEAD
from headrace_router.face.openai.said import Plain, Said, Thinking, joined
from headrace_router.testing import byte_ids, scripted_worker, write_tokenizer

from tests.unit.http_parts import once, run_http

PATH = "/v1/chat/completions"
ARGUMENTS = {"a": {"b": ["}", "\\"]}, "c": "é👋 {", "d": "<|tool_call_end|>"}
JSON = json.dumps(ARGUMENTS, ensure_ascii=False)
BEGIN, END = DEEPSEEK.begin, DEEPSEEK.end
CALL, CALL_END, SEP = DEEPSEEK.tokens
V3 = f"{CALL}function{SEP}add\n```json\n{JSON}\n```{CALL_END}"
V31 = f"{CALL}add{SEP}{JSON}{CALL_END}"


def kimi(index, name="add", arguments=JSON):
    return f"<|tool_call_begin|>functions.{name}:{index}<|tool_call_argument_begin|>{arguments}<|tool_call_end|>"


def glm(name="see", **values):
    pairs = "".join(f"<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n" for key, value in values.items())
    return f"<tool_call>{name}\n{pairs}</tool_call>"


TEMPLATES = {
    "deepseek": f"{{{{ '{BEGIN}' }}}} {CALL} {SEP}",
    "kimi": "<|tool_calls_section_begin|> <|tool_call_argument_begin|>",
    "mistral": "[AVAILABLE_TOOLS] [TOOL_CALLS] arguments",
    "glm": "<tool_call> <arg_key> <arg_value>",
    "hermes": '<tool_call>{"name": , "arguments": }</tool_call>',
}
SECTION = (KIMI.begin, KIMI.end)
CASES = {
    "DeepSeek-V3": ("deepseek", f"Hm.\n{BEGIN}{V3}\n{V3}{END}", "Hm.", [("add", ARGUMENTS)] * 2),
    "DeepSeek-V3.1": ("deepseek", f"{BEGIN}{V31}{V31}{END}\nSo.", "So.", [("add", ARGUMENTS)] * 2),
    "DeepSeek, nonsense between": (
        "deepseek",
        f"{BEGIN}{V31} x {CALL}y{CALL_END}{END}",
        f"{CALL_END} x {CALL}y{CALL_END}",
        [("add", ARGUMENTS)],
    ),
    "DeepSeek, never closed": ("deepseek", f"{BEGIN}{V31}", "", [("add", ARGUMENTS)]),
    "DeepSeek, half a head": ("deepseek", f"a{BEGIN}{CALL}ad", f"a{CALL}ad", []),
    "DeepSeek, half a mark": ("deepseek", f"a{BEGIN[:7]}", f"a{BEGIN[:7]}", []),
    "Kimi": (
        "kimi",
        f"Hi {SECTION[0]}{kimi(0)}{kimi(1, 'x_y', '{}')}{SECTION[1]}",
        "Hi ",
        [("add", ARGUMENTS), ("x_y", {})],
    ),
    "Kimi, two sections": (
        "kimi",
        f"{SECTION[0]}{kimi(0)}{SECTION[1]}\nthen{SECTION[0]}{kimi(1)}{SECTION[1]}",
        "then",
        [("add", ARGUMENTS)] * 2,
    ),
    "Kimi, no call": ("kimi", f"{SECTION[0]}no{SECTION[1]}", "no", []),
    "Mistral, a list": (
        "mistral",
        f'[TOOL_CALLS] [{{"name": "add", "arguments": {JSON}, "id": "abc"}}, ' + '{"name": "b", "arguments": {}}]',
        "",
        [("add", ARGUMENTS), ("b", {})],
    ),
    "Mistral, one by one": (
        "mistral",
        f"So[TOOL_CALLS]add[ARGS]{JSON}[TOOL_CALLS]b{{}}",
        "So",
        [("add", ARGUMENTS), ("b", {})],
    ),
    "Mistral, no call": ("mistral", "[TOOL_CALLS] [no", "[TOOL_CALLS] [no", []),
    "GLM": (
        "glm",
        f"Hm.\n{glm(t='7', u='é {', n='7', o='[1, {}]', p='x y')}\n{glm('f')}",
        "Hm.",
        [("see", {"t": "7", "u": "é {", "n": 7, "o": [1, {}], "p": "x y"}), ("f", {})],
    ),
    "GLM-4.7, on one line": (
        "glm",
        "<tool_call>see<arg_key>t</arg_key><arg_value>x</arg_value></tool_call>",
        "",
        [("see", {"t": "x"})],
    ),
    "GLM, no call": ("glm", "<tool_call>a b</tool_call>c", "<tool_call>a b</tool_call>c", []),
    "GLM, half a name": ("glm", "<tool_call>se", "<tool_call>se", []),
    "Hermes": ("hermes", f'<tool_call>{{"name": "add", "arguments": {JSON}}}</tool_call>', "", [("add", ARGUMENTS)]),
}
TEXTS = {"see": frozenset("tu")}


def reader_of(template):
    form = form_of(TEMPLATES[template].__contains__)
    assert form is not None
    return form.make(TEXTS)


def read(template, pieces):
    reader, said = reader_of(template), Said()
    for piece in pieces:
        said += reader.push(piece)
    said += reader.finish()
    calls = [(each["function"]["name"], each["function"]["arguments"]) for each in joined(said.calls)]
    assert reader.num_calls == len(calls)
    return said.content, calls


@pytest.mark.parametrize("case", CASES)
def test_each_form_says_the_same_cut_at_every_place(case):
    template, text, content, expected = CASES[case]
    whole = read(template, [text])
    assert (whole[0], [(name, json.loads(arguments)) for name, arguments in whole[1]]) == (content, expected)
    assert read(template, text) == whole  # character by character
    for at in range(1, len(text)):
        assert read(template, [text[:at], text[at:]]) == whole, at
        assert read(template, [text[:at], text[at : at + 3], text[at + 3 :]]) == whole, at


def test_names_come_first_and_arguments_in_pieces():
    reader = reader_of("kimi")
    said = reader.push(SECTION[0] + '<|tool_call_begin|>functions.add:3<|tool_call_argument_begin|>{"a"')
    assert (said.calls[0]["id"], said.calls[0]["function"]["name"]) == ("functions.add:3", "add")
    assert said.calls[1]["function"]["arguments"] == '{"a"'
    assert reader.push(": 1").calls == [{"index": 0, "function": {"arguments": ": 1"}}]
    reader = reader_of("glm")
    assert reader.push("<tool_call>see\n<arg_key>n").calls[0]["function"]["name"] == "see"
    assert reader.push("</arg_key><arg_value>1</arg_value>").calls == [
        {"index": 0, "function": {"arguments": '{"n": 1'}}
    ]


def test_a_call_that_is_cut_off_keeps_what_came_of_its_arguments():
    assert read("deepseek", [f'{BEGIN}{CALL}add{SEP}{{"a": [1, "x']) == ("", [("add", '{"a": [1, "x')])
    assert read("glm", ["<tool_call>see\n<arg_key>n</arg_key><arg_value>1</arg_value><arg_key>o"]) == (
        "",
        [("see", '{"n": 1')],
    )


def test_what_never_becomes_a_head_is_not_held_for_ever():
    reader = reader_of("deepseek")
    said = reader.push(BEGIN + "x" * 5 * MOST_HEAD)
    assert len(said.content) > 3 * MOST_HEAD
    assert read("deepseek", [BEGIN + "x" * 5 * MOST_HEAD]) == read("deepseek", BEGIN + "x" * 5 * MOST_HEAD)
    assert read("glm", ["<tool_call>" + "x" * 999]) == ("<tool_call>" + "x" * 999, [])


def test_forms_are_told_by_the_marks_of_templates():
    assert len({form_of(text.__contains__) for text in TEMPLATES.values()}) == len(FORMS) == len(TEMPLATES)
    for other in (
        "",
        "<tool_call>",
        "<tool_call>\n<function=x>\n<parameter=y> </tool_call> arguments",
        "<\uff5cDSML\uff5cinvoke>",
    ):
        assert form_of(other.__contains__) is None


def test_thoughts_may_come_before_calls():
    reader = Thinking(reader_of("kimi"), has_begun=True)
    said = reader.push(f"Hm.</think>{SECTION[0]}{kimi(0)}{SECTION[1]}") + reader.finish()
    assert (said.reasoning, said.content, len(joined(said.calls))) == ("Hm.", "", 1)
    assert isinstance(Plain().push("x"), Said)


@pytest.mark.parametrize("is_streamed", [False, True])
def test_marks_that_are_special_tokens_are_read_and_not_shown(tmp_path, is_streamed):
    """As Kimi's and Mistral's are: without tools they have no text, as ever."""
    model = write_tokenizer(tmp_path / "tiny")
    vocabulary = json.loads((model / "tokenizer.json").read_text())
    last = vocabulary["added_tokens"][-1]
    ids = {mark: last["id"] + 1 + index for index, mark in enumerate((*SECTION, *KIMI.tokens))}
    vocabulary["added_tokens"] += [{**last, "content": mark, "id": token} for mark, token in ids.items()]
    (model / "tokenizer.json").write_text(json.dumps(vocabulary))
    config = json.loads((model / "tokenizer_config.json").read_text())
    template = TEMPLATES["kimi"] + "{% for m in messages %}{{ m.content }}{% endfor %}"
    (model / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    begin, call_end, argument = KIMI.tokens
    answer = [*byte_ids("Hé"), ids[SECTION[0]], ids[begin], *byte_ids("functions.add:0"), ids[argument]]
    answer += [*byte_ids('{"a": "é"}'), ids[call_end], ids[SECTION[1]], 299]

    def next_token(tokens, num_prompt):
        return answer[len(tokens) - num_prompt]

    async def test(router, address):
        body = {"messages": [{"role": "user", "content": "u"}], "stream": is_streamed}
        tools = [{"type": "function", "function": {"name": "add"}}]
        found = await once(address, "POST", PATH, {**body, "tools": tools})
        if is_streamed:
            deltas = [each["delta"] for event in found.events[:-1] for each in event["choices"]]
            content = "".join(each.get("content") or "" for each in deltas)
            calls = joined([call for each in deltas for call in each.get("tool_calls", ())])
        else:
            message = found.json["choices"][0]["message"]
            content, calls = message["content"], message["tool_calls"]
        assert content == "Hé"
        assert [(each["id"], each["function"]["arguments"]) for each in calls] == [("functions.add:0", '{"a": "é"}')]
        plain = await once(address, "POST", PATH, {**body, "stream": False})
        assert plain.json["choices"][0]["message"]["content"] == 'Héfunctions.add:0{"a": "é"}'

    options = {"eos_token_ids": (299,), "next_token": next_token, "vocab_size": 300}
    run_http(tmp_path, [scripted_worker(role, **options) for role in ("prefill", "decode")], test)
