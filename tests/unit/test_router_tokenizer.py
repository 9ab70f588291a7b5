"""Text to token ids: what the model's files say about the tokens around a text."""

import json
import os

import pytest
from headrace_core.errors import CheckpointError
from headrace_router.testing import BOS, EOS, byte_ids, write_tokenizer
from headrace_router.text.tokenizer import Tokenizer
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

HELLO = byte_ids("Hello world")
SPECIAL = [("<bos>", BOS), ("<eos>", EOS)]
POST_PROCESSORS = {
    "none": processors.ByteLevel(trim_offsets=False),  # DeepSeek's
    "begin": processors.TemplateProcessing(single="<bos> $A", special_tokens=SPECIAL),
    "both": processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=SPECIAL),
    "begin, as Llama 3 has it": processors.Sequence(
        [processors.ByteLevel(), processors.TemplateProcessing(single="<bos> $A", special_tokens=SPECIAL)]
    ),
    "both, as BERT has it": processors.BertProcessing(("<eos>", EOS), ("<bos>", BOS)),
}
BOS_OBJECT = {"__type": "AddedToken", "content": "<bos>", "lstrip": False, "normalized": True}
CASES = {
    "begin added as the config says": ("none", {"add_bos_token": True}, "Hello world", [BOS, *HELLO]),
    "bos_token as an object": ("none", {"add_bos_token": True, "bos_token": BOS_OBJECT}, "Hello world", [BOS, *HELLO]),
    "end added": ("none", {"add_eos_token": True}, "Hello world", [*HELLO, EOS]),
    "both added": ("none", {"add_bos_token": True, "add_eos_token": True}, "Hello world", [BOS, *HELLO, EOS]),
    "nothing said": ("none", {}, "Hello world", HELLO),
    "said with null": ("begin", {"add_bos_token": None}, "Hello world", [BOS, *HELLO]),
    "the post-processor's word": ("both", {}, "Hello world", [BOS, *HELLO, EOS]),
    "said twice": ("begin", {"add_bos_token": True}, "Hello world", [BOS, *HELLO]),
    "said twice by a sequence": (
        "begin, as Llama 3 has it", {"add_bos_token": True, "add_eos_token": False}, "Hello world", [BOS, *HELLO],
    ),
    "said twice by BERT's": (
        "both, as BERT has it", {"add_bos_token": True, "add_eos_token": True}, "Hello world", [BOS, *HELLO, EOS],
    ),
    "the config says no begin": ("both", {"add_bos_token": False}, "Hello world", [*HELLO, EOS]),
    "the config says no end": ("both", {"add_eos_token": False}, "Hello world", [BOS, *HELLO]),
    "false where nothing is added": ("none", {"add_bos_token": False}, "Hello world", HELLO),
    "false without a bos_token": ("none", {"add_bos_token": False, "bos_token": None}, "Hello world", HELLO),
    "the text begins with it": ("none", {"add_bos_token": True}, "<bos>Hello world", [BOS, *HELLO]),
    "the text begins with it, and the post-processor adds it": ("begin", {}, "<bos>Hello world", [BOS, *HELLO]),
    "the text begins with two": ("begin", {}, "<bos><bos>", [BOS, BOS]),
    "the text is nothing else": ("none", {"add_bos_token": True}, "<bos>", [BOS]),
    "the text ends with it": ("none", {"add_eos_token": True}, "Hello world<eos>", [*HELLO, EOS]),
    "the text has it inside": ("none", {"add_bos_token": True}, "a<bos>b", [BOS, *byte_ids("a"), BOS, *byte_ids("b")]),
}  # fmt: skip


def model(folder, post_processor, **config):
    """A byte-level tokenizer with one of `POST_PROCESSORS`; `config` goes into tokenizer_config.json."""
    write_tokenizer(folder)
    fast = FastTokenizer.from_file(str(folder / "tokenizer.json"))
    fast.post_processor = POST_PROCESSORS[post_processor]
    fast.save(str(folder / "tokenizer.json"))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


def text_ids(tokenizer, text):
    return tokenizer.encode(text, with_special=True, max_tokens=10_000)


@pytest.mark.parametrize("case", CASES)
def test_a_text_prompt_has_the_tokens_around_it_that_the_files_name(tmp_path, case):
    post_processor, config, text, expected = CASES[case]
    assert text_ids(Tokenizer(model(tmp_path, post_processor, **config)), text) == expected


@pytest.mark.parametrize("post_processor", POST_PROCESSORS)
@pytest.mark.parametrize("text", ["Hello world", " ", "é\n", "a<eos>b"])
def test_without_a_word_in_the_config_a_text_is_encoded_as_tokenizer_json_has_it(tmp_path, post_processor, text):
    folder = model(tmp_path, post_processor)
    expected = FastTokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    assert text_ids(Tokenizer(folder), text) == expected


@pytest.mark.parametrize("post_processor", POST_PROCESSORS)
def test_a_text_of_a_template_has_the_special_tokens_in_it_only(tmp_path, post_processor):
    tokenizer = Tokenizer(model(tmp_path, post_processor, add_bos_token=True, add_eos_token=True))
    assert tokenizer.encode("<bos>hi", with_special=False, max_tokens=99) == [BOS, *byte_ids("hi")]
    assert tokenizer.encode("hi", with_special=False, max_tokens=99) == byte_ids("hi")


def test_a_tokenizer_in_another_format_alone_is_refused_by_name(tmp_path):
    (tmp_path / "tokenizer.model").write_text("x")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing.* tokenizer\.model can't be read") as caught:
        Tokenizer(tmp_path)
    assert caught.value.reason == "NO_TOKENIZER"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"add_bos_token": True, "bos_token": None}, "add_bos_token is true, but bos_token is missing"),
        ({"add_eos_token": True, "eos_token": None}, "add_eos_token is true, but eos_token is missing"),
        ({"add_bos_token": True, "bos_token": "<s>"}, "bos_token, '<s>', is no token of tokenizer.json"),
        ({"add_bos_token": "yes"}, "add_bos_token is 'yes'; it must be true, false or null"),
        ({"add_eos_token": 1}, "add_eos_token is 1; it must be true, false or null"),
        ({"bos_token": 3}, "bos_token is 3; it must be text"),
        ({"eos_token": {"id": 3}}, "eos_token is {'id': 3}; it must be text"),
        ({"bos_token": "\ud800", "add_bos_token": True}, "bos_token is '.ud800'; it must be text"),
        ({"extra_special_tokens": {"image_token": 5}}, "image_token is 5; it must be text"),
        ({"pad_token": ["<pad>"]}, r"pad_token is \['<pad>'\]; it must be text"),
    ],
)
def test_a_config_that_can_not_be_followed_is_refused_by_name(tmp_path, config, words):
    with pytest.raises(CheckpointError, match=words) as caught:
        Tokenizer(model(tmp_path, "none", **config))
    assert caught.value.reason == "BAD_TOKENIZER"


def write_json(folder, name, values):
    (folder / name).write_text(json.dumps(values))
    return folder


MAPS = {
    "alone": ({"bos_token": None}, {"bos_token": "<bos>"}),
    "against the config": ({"bos_token": "<eos>"}, {"bos_token": "<bos>"}),
    "as an object": ({}, {"bos_token": {"content": "<bos>", "lstrip": False, "normalized": False}}),
    "with null": ({}, {"bos_token": None}),
    "beside added_tokens_decoder": ({"bos_token": None, "added_tokens_decoder": {}}, {"bos_token": "<bos>"}),
    "tokens of the model's own": ({"extra_special_tokens": {"image_token": "<eos>"}}, {"video_token": "<bos>"}),
    "a field of the model's own": ({"image_token": "<eos>", "add_image_token": True}, {}),
}


@pytest.mark.parametrize("case", MAPS)
def test_special_tokens_are_those_that_transformers_gives_a_template(tmp_path, case):
    config, special = MAPS[case]
    write_json(model(tmp_path, "none", **{"eos_token": "<eos>", **config}), "special_tokens_map.json", special)
    expected = PreTrainedTokenizerFast.from_pretrained(tmp_path).special_tokens_map
    assert Tokenizer(tmp_path).config.special_tokens == expected


def test_the_begin_token_of_special_tokens_map_is_added_to_a_text(tmp_path):
    folder = model(tmp_path, "none", bos_token=None, add_bos_token=True)
    write_json(folder, "special_tokens_map.json", {"bos_token": "<bos>"})
    assert text_ids(Tokenizer(folder), "Hello world") == [BOS, *HELLO]


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
def test_a_file_that_can_not_be_read_is_not_taken_for_one_left_out(tmp_path, name):
    folder = model(tmp_path, "none")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("nowhere")
    with pytest.raises(CheckpointError, match=f"{name} can't be read: No such file") as caught:
        Tokenizer(folder)
    assert caught.value.reason == "UNREADABLE_FILE"


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
def test_a_pipe_in_a_file_s_place_is_refused_by_name(tmp_path, name):
    folder = model(tmp_path, "none")
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(CheckpointError, match=f"{name} is no regular file") as caught:
        Tokenizer(folder)
    assert caught.value.reason == "BAD_TOKENIZER"


def test_a_link_to_a_template_that_is_gone_is_a_template_that_can_not_be_read(tmp_path):
    folder = model(tmp_path, "none", chat_template="of the config")
    (folder / "chat_template.jinja").symlink_to("nowhere")
    config = Tokenizer(folder).config
    assert config.templates == {}
    assert "chat_template.jinja can't be read" in config.template_problem


@pytest.mark.parametrize(
    ("template", "expected", "problem"),
    [
        ("A", {"default": "A"}, ""),
        ({"default": "A", "tool_use": "B"}, {"default": "A", "tool_use": "B"}, ""),
        ([{"name": "default", "template": "A"}], {"default": "A"}, ""),
        ("\ud800", {}, "neither text nor a list"),
        ({"default": 5}, {}, "neither text nor a list"),
    ],
)
def test_templates_are_read_by_name(tmp_path, template, expected, problem):
    config = Tokenizer(model(tmp_path, "none", chat_template=template)).config
    assert config.templates == expected
    assert problem in config.template_problem


def test_templates_in_files_count_before_the_configs(tmp_path):
    folder = model(tmp_path, "none", chat_template="of the config")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/rag.jinja").write_text("R")
    assert Tokenizer(folder).config.templates == {"rag": "R"}
    (folder / "chat_template.jinja").write_text("D")
    assert Tokenizer(folder).config.templates == {"default": "D", "rag": "R"}
