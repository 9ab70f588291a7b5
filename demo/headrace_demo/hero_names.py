"""Names for heroes: a space of invented names far too large to learn by heart.

A story model keeps its hero only if it copies the name out of its context. That ability forms
when nothing else helps, so nearly every hero gets a name put together from syllables. One name in
ten is held out by a hash of its letters: it never stands in training text, and the gate in
`evaluate.py` uses no other.
"""

from __future__ import annotations

import hashlib
from random import Random

from headrace_demo.story_words import words

_ONSETS = words("B Br Ch D Dr F Fl Fr G Gr H J K Kl L M N P Pl Qu R S Sh Sk Sn St T Th Tr V W Wh Y Z")
_INNER = words("b br d dl g gg h j k l ll m mb mp n nd nn p pp r rr rv s ss t tt v w x z zz")
_VOWELS = words("a a e e i i o o u ai ee oo")
_ENDS = words("a o i y n l r m x s t k bo by ck dle el en ix in kin la lo ly na nut ra sy va vim wen")
_ORDINARY = words(
    "Adam Alice Anna Bella Ben Billy Carl Clara Daisy David Ella Emma Finn Flora George Grace Hanna Henry Hugo "
    "Ivy Jack Josie Kate Leo Lily Lucy Luke Maya Max Mia Molly Nina Noah Nora Olive Oscar Penny Peter Ravi Rosa "
    "Ruby Sam Sara Tess Theo Tim Tom Vera Wendy Will Zack Zoe Pip Dot Bramble Clover Fern Hazel Moss Pepper Poppy "
    "Rusty Sunny Tilly Twig Whisker Biscuit Cocoa Ginger Maple Misty Patch Pumpkin Socks Toby Velvet"
)
_RUDE = words("anu ass cock cun dick fuc fuk hell kak kok nig pee pis poo rap sex shi slu tit wan")
_ORDINARY_SHARE = 0.08
_LONG_SHARE = 0.6


def is_held_out(name: str) -> bool:
    """Tell whether `name` is kept out of training; true of about one name in ten."""
    return hashlib.sha256(name.lower().encode()).digest()[0] < 26


def _spell(rng: Random) -> str:
    name = rng.choice(_ONSETS) + rng.choice(_VOWELS)
    if rng.random() < _LONG_SHARE:
        name += rng.choice(_INNER) + rng.choice(_VOWELS)
    end = rng.choice(_ENDS)
    return name.rstrip("aeiou") + end if end[0] in "aeiouy" else name + end


def _invent(rng: Random) -> str:
    while True:
        name = _spell(rng)
        if not any(part in name.lower() for part in _RUDE):
            return name


def training_name(rng: Random) -> str:
    """Draw a name that may stand in training text."""
    while True:
        name = rng.choice(_ORDINARY) if rng.random() < _ORDINARY_SHARE else _invent(rng)
        if not is_held_out(name):
            return name


def held_out_name(rng: Random) -> str:
    """Draw an invented name that no training text holds."""
    while True:
        name = _invent(rng)
        if is_held_out(name):
            return name
