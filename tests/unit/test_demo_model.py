"""The demo model: its training code, its checkpoint names, and the checkpoint that ships."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest
import torch
from headrace_demo.export import from_checkpoint, model_config, to_checkpoint, write_checkpoint
from headrace_demo.network import Network, Shape
from headrace_demo.story_grammar import write_story
from headrace_demo.stream import repeat_share, story_document
from headrace_demo.tokenizer import BOS, EOS
from headrace_demo.train import Plan, Trainer
from safetensors import safe_open
from tokenizers import Tokenizer

_SHIPPED = Path(__file__).parents[2] / "demo" / "model"
_SMALL = Shape(
    hidden_size=32,
    intermediate_size=48,
    moe_intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
)


@pytest.fixture
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(_SHIPPED / "tokenizer.json"))


def test_a_few_steps_lower_the_loss(tokenizer, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    plan = Plan(folder=tmp_path, steps=30, num_processes=1, num_rows=4, num_tokens=48)
    trainer = Trainer(plan, tokenizer, _SMALL)
    before = trainer.validate()
    for _ in range(30):
        trainer.step(0.4)
    assert trainer.validate() < before - 0.5
    torch.set_num_threads(threads)


def test_equal_seeds_train_equal_weights(tokenizer, tmp_path):
    plan = Plan(folder=tmp_path, steps=3, num_processes=1, num_rows=2, num_tokens=32)
    trainers = [Trainer(plan, tokenizer, _SMALL) for _ in range(2)]
    for trainer in trainers:
        for _ in range(3):
            trainer.step(0.9)
    first, second = (trainer.network.state_dict() for trainer in trainers)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_repetitions_fade_out():
    shares = [repeat_share(progress / 20) for progress in range(21)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == 0.5
    assert shares[-1] == 0


def test_a_name_weighs_more_where_it_comes_back(tokenizer):
    story = write_story(Random(1), name="Zorvim")
    ids, weights = story_document(tokenizer, story, as_chat=False)
    assert len(ids) == len(weights)
    assert (ids[0], ids[-1]) == (BOS, EOS)
    num_pieces = len(tokenizer.encode(" Zorvim", add_special_tokens=False).ids)
    assert weights.count(0.2) == num_pieces
    assert weights.count(2.0) == num_pieces * (story.text.count("Zorvim") - 1)


def test_a_checkpoint_comes_back_as_it_went(tmp_path):
    network = Network(_SMALL).eval()
    for experts in network.expert_layers():
        experts.bias.normal_()
    write_checkpoint(network, tmp_path)
    back = from_checkpoint(tmp_path)
    for name, weight in network.state_dict().items():
        expected = weight if name.endswith("bias") else weight.bfloat16().float()
        torch.testing.assert_close(back.state_dict()[name], expected, rtol=0, atol=0)


def test_the_checkpoint_has_the_names_that_transformers_wants():
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    named = to_checkpoint(Network(_SMALL))
    with torch.device("meta"):
        model = DeepseekV3ForCausalLM(DeepseekV3Config(**model_config(_SMALL)))
    wanted = {name for name in model.state_dict() if ".mlp.experts." not in name}
    ours = {name for name in named if ".mlp.experts." not in name and ".layers.2." not in name}
    assert ours == wanted
    for index in range(_SMALL.n_routed_experts):
        assert named[f"model.layers.1.mlp.experts.{index}.gate_proj.weight"].shape == (16, 32)
        assert named[f"model.layers.2.mlp.experts.{index}.down_proj.weight"].shape == (32, 16)
    assert named["model.layers.2.eh_proj.weight"].shape == (32, 64)
    assert named["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32


def test_the_shipped_config_is_the_one_the_code_writes():
    config = json.loads((_SHIPPED / "config.json").read_text(encoding="utf-8"))
    assert config == model_config(Shape())


def test_the_shipped_weights_are_complete():
    expected = to_checkpoint(Network(Shape()))
    with safe_open(_SHIPPED / "model.safetensors", "pt") as shipped:
        assert set(shipped.keys()) == set(expected)
        for name, tensor in expected.items():
            assert list(shipped.get_slice(name).get_shape()) == list(tensor.shape)


def test_the_shipped_tokenizer_gives_text_back(tokenizer):
    rng = Random(8)
    for _ in range(50):
        text = write_story(rng).text
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=True) == text
    assert tokenizer.get_vocab_size() == Shape().vocab_size


def test_the_shipped_model_knows_how_to_end_a_name(tokenizer):
    network = from_checkpoint(_SHIPPED)
    text = "Once upon a time, a little fox named Zorvim lived in a den on the hill. Zor"
    whole = tokenizer.encode(" Zorvim", add_special_tokens=False).ids
    head = tokenizer.encode(text[: -len(" Zor")]).ids
    with torch.no_grad():
        for length in range(1, len(whole)):
            hidden = network(torch.tensor([[*head, *whole[:length]]]))
            assert network.lm_head(hidden)[0, -1].argmax().item() == whole[length]
