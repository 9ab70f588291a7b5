"""The stories of the demo model: the same for the same seed, and true to their hero."""

from __future__ import annotations

from random import Random

import pytest
from headrace_demo import hero_names
from headrace_demo.story_grammar import write_story
from headrace_demo.story_plots import parse_plots

_NUM_STORIES = 400


def _stories():
    rng = Random(17)
    return [write_story(rng) for _ in range(_NUM_STORIES)]


def test_equal_seeds_tell_equal_stories():
    assert _stories() == _stories()


def test_every_plot_is_told():
    assert len({story.plot for story in _stories()}) == 10


def test_a_story_keeps_saying_its_hero():
    assert min(story.text.count(story.hero) for story in _stories()) >= 5


def test_no_slot_or_choice_is_left_open():
    for story in _stories():
        assert not set(story.text + story.request) & set("{}[]|@")


def test_a_name_inside_a_story_follows_a_space():
    rng = Random(3)
    for _ in range(_NUM_STORIES):
        story = write_story(rng, name="Zorvimbo")
        inside = story.text[1:]
        assert inside.count("Zorvimbo") - inside.count(" Zorvimbo") == 0


def test_held_out_names_never_stand_in_training_text():
    for story in _stories():
        assert not hero_names.is_held_out(story.hero)
    rng = Random(5)
    held_out = {hero_names.held_out_name(rng) for _ in range(_NUM_STORIES)}
    assert not held_out & {story.hero for story in _stories()}


def test_an_unknown_shared_beat_is_refused():
    with pytest.raises(KeyError):
        parse_plots("# lost: loses a thing\n\n@nowhere")
