"""Stories made by rule: our own text, as much of it as a run wants, the same for the same seed.

`write_story` draws a small world (hero, friend, place, thing) and keeps to it for the whole
story, so a model must carry who and what along; it cannot know them by heart. The hero's name
stands eight times or more in a story and is always preceded by a space.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from random import Random

from headrace_demo import hero_names, story_words
from headrace_demo.story_plots import BARE_OPENING, OPENING, PLOTS

_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_SLOT = re.compile(r"\{(\w+)\}")
_ARTICLE = re.compile(r"\b([Aa]) (?=[aeiouAEIOU])")
_SENTENCE = re.compile(r"(^|\n|[.!?] )([a-z])")
_PRONOUNS = {"he": ("he", "him", "his"), "she": ("she", "her", "her")}
_BARE_SHARE = 0.03
_REQUESTS = (
    (6, "[Tell me|Write|Please tell me|I want] a story about a {kind} [named|called] {n}."),
    (2, "[Tell me|Write|Please tell me] a story about a {adj} {kind} [named|called] {n}."),
    (2, "[Tell me|Write|Please tell me] a story about {n} the {kind}."),
    (2, "[Tell me|Write] a story about a {kind} named {n} who {theme}."),
    (1, "[Tell me|Write] a bedtime story about a {kind} named {n}."),
    (2, "[Tell me|Write] a story about a {kind} named {n} and a {friend}."),
    (1, "[Tell me|Write] a story about {n} and a {friend}."),
    (1, "Can you tell me a story about a {kind} named {n}?"),
    (1, "[Tell me|Write] a story about {n}."),
    (1, "[Tell me|Write] a story about a {kind} who {theme}."),
    (1, "[Tell me|Write] a story about a {kind}."),
    (1, "[Tell me a story.|Tell me a bedtime story.|Do you know a story?]"),
)


@dataclass(frozen=True, slots=True)
class Story:
    """One story, and a request that it would answer."""

    hero: str
    plot: str
    request: str
    text: str


def _expand(rng: Random, wording: str, world: dict[str, str]) -> str:
    while choice := _CHOICE.search(wording):
        taken = rng.choice(choice.group(1).split("|"))
        wording = wording[: choice.start()] + taken + wording[choice.end() :]
    return _SLOT.sub(lambda slot: world[slot.group(1)], wording)


def _tidy(text: str) -> str:
    text = _ARTICLE.sub(r"\1n ", text)
    return _SENTENCE.sub(lambda start: start.group(1) + start.group(2).upper(), text)


def _hero(rng: Random, name: str) -> dict[str, str]:
    kind = rng.choice(list(story_words.ANIMALS))
    animal = story_words.ANIMALS[kind]
    pronoun = story_words.CHILDREN.get(kind, rng.choice(("he", "she")))
    he, him, his = _PRONOUNS[pronoun]
    adjective, friend_adjective = rng.sample(story_words.TRAITS, 2)
    others = [k for k in story_words.ANIMALS if k != kind and k not in story_words.CHILDREN]
    skills = sorted({other.skill for other in story_words.ANIMALS.values()} - {animal.skill})
    return {
        "n": name,
        "kind": kind,
        "he": he,
        "him": him,
        "his": his,
        "adj": adjective,
        "home": animal.home,
        "food": animal.food,
        "skill": animal.skill,
        "skill2": rng.choice(skills),
        "elder": rng.choice(story_words.ELDERS),
        "friend": rng.choice(others),
        "fadj": friend_adjective,
    }


def _surroundings(rng: Random) -> dict[str, str]:
    place = rng.choice(list(story_words.PLACES))
    there, sights = story_words.PLACES[place]
    thing = rng.choice(list(story_words.THINGS))
    use, like = story_words.THINGS[thing]
    color, thing_color = rng.sample(story_words.COLORS, 2)
    spot, spot2, spot3 = rng.sample(story_words.SPOTS, 3)
    sight, sight2 = rng.sample(sights, 2)
    return {
        "place": place,
        "at": there,
        "sight": sight,
        "sight2": sight2,
        "thing": thing,
        "t": f"{thing_color} {thing}",
        "use": use,
        "like": like,
        "color": color,
        "spot": spot,
        "spot2": spot2,
        "spot3": spot3,
        "meal": rng.choice(story_words.MEALS),
        "fruit": rng.choice(story_words.FRUITS),
        "weather": rng.choice(story_words.WEATHER),
        "sad": rng.choice(story_words.SAD),
        "glad": rng.choice(story_words.GLAD),
        "crash": rng.choice(story_words.CRASHES),
        "pop": rng.choice(story_words.POPS),
    }


def _request(rng: Random, world: dict[str, str]) -> str:
    weights = [weight for weight, _ in _REQUESTS]
    wording = rng.choices([wording for _, wording in _REQUESTS], weights)[0]
    return _tidy(_expand(rng, wording, world))


def write_story(rng: Random, *, name: str | None = None) -> Story:
    """Write one story.

    Args:
        rng: moved on by the call; the same state gives the same story.
        name: of the hero; None draws one that may stand in training text.
    """
    name = name or hero_names.training_name(rng)
    world = _hero(rng, name) | _surroundings(rng)
    key = rng.choice(list(PLOTS))
    plot = PLOTS[key]
    world["theme"] = _expand(rng, plot.theme, world)
    opening = BARE_OPENING if rng.random() < _BARE_SHARE else OPENING
    paragraphs = [list(beats) for beats in plot.paragraphs]
    paragraphs[0].insert(0, opening)
    told = (" ".join(_expand(rng, rng.choice(beat), world) for beat in beats) for beats in paragraphs)
    text = _tidy("\n\n".join(told))
    return Story(name, key, _request(rng, world), text)
