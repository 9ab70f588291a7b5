"""The words of the stories: who, where, with what, and in what weather."""

from __future__ import annotations

from typing import NamedTuple


def words(text: str) -> tuple[str, ...]:
    """Split a line of words."""
    return tuple(text.split())


class Animal(NamedTuple):
    """What is true of every hero of one kind."""

    home: str
    food: str
    skill: str


class Place(NamedTuple):
    """A place to go to, and two things to see there."""

    there: str
    sights: tuple[str, str]


class Thing(NamedTuple):
    """A thing to own: what one does with it, and what it is like."""

    use: str
    like: str


ANIMALS = {
    "rabbit": Animal("a burrow under the old oak", "carrots", "hop"),
    "fox": Animal("a den on the hill", "berries", "run"),
    "mouse": Animal("a hole behind the mill", "cheese", "dance"),
    "bear": Animal("a cave in the hills", "honey", "climb"),
    "squirrel": Animal("a nest in the tall pine", "nuts", "jump"),
    "duck": Animal("a nest by the pond", "corn", "swim"),
    "frog": Animal("the reeds by the pond", "plums", "leap"),
    "owl": Animal("a hollow tree", "seeds", "fly"),
    "hedgehog": Animal("a pile of dry leaves", "apples", "roll"),
    "turtle": Animal("a hollow under the river bank", "green leaves", "swim"),
    "kitten": Animal("a basket in the barn", "milk", "climb"),
    "puppy": Animal("a kennel by the farm gate", "bones", "dig"),
    "lamb": Animal("a warm stable", "fresh grass", "skip"),
    "goat": Animal("a shed behind the farm", "turnips", "climb"),
    "beaver": Animal("a lodge on the river", "pears", "build"),
    "badger": Animal("a cosy den in the wood", "roots", "dig"),
    "crow": Animal("a nest in the church tower", "corn", "fly"),
    "sparrow": Animal("a nest under the roof", "crumbs", "sing"),
    "otter": Animal("a den by the stream", "fish", "swim"),
    "mole": Animal("a tunnel under the meadow", "roots", "dig"),
    "pony": Animal("a stable on the farm", "oats", "run"),
    "piglet": Animal("a sty full of straw", "turnips", "roll"),
    "penguin": Animal("a little house of ice", "fish", "slide"),
    "elephant": Animal("a grove by the wide river", "leaves", "splash"),
    "monkey": Animal("the top of a fig tree", "bananas", "swing"),
    "deer": Animal("a quiet glade in the forest", "grass", "run"),
    "dragon": Animal("a cave on the mountain", "cherries", "fly"),
    "robot": Animal("a workshop in the village", "oil", "dance"),
    "cat": Animal("a house with a blue door", "milk", "jump"),
    "dog": Animal("a farmhouse on the hill", "bones", "swim"),
    "girl": Animal("a small cottage by the river", "pancakes", "sing"),
    "boy": Animal("a tall house in the village", "apples", "climb"),
}
CHILDREN = {"girl": "she", "boy": "he"}
PLACES = {
    "forest": Place("in the forest", ("tall trees", "soft green moss")),
    "meadow": Place("in the meadow", ("yellow flowers", "busy bees")),
    "garden": Place("in the garden", ("rows of beans", "red tomatoes")),
    "park": Place("in the park", ("a stone fountain", "two tall swings")),
    "beach": Place("on the beach", ("white shells", "little waves")),
    "hill": Place("on the hill", ("an old windmill", "white sheep")),
    "river": Place("by the river", ("smooth stones", "a wooden bridge")),
    "pond": Place("by the pond", ("round lily pads", "a blue dragonfly")),
    "market": Place("at the market", ("piles of oranges", "bright cloth")),
    "orchard": Place("in the orchard", ("apple trees", "a long ladder")),
}
THINGS = {
    "kite": Thing("fly it in the wind", "danced in the air"),
    "ball": Thing("bounce it all day", "bounced as high as the fence"),
    "boat": Thing("sail it on the pond", "floated like a leaf"),
    "hat": Thing("wear it every day", "had a feather on one side"),
    "scarf": Thing("wear it in the snow", "was warm and soft"),
    "drum": Thing("play it after lunch", "went boom, boom, boom"),
    "bell": Thing("ring it in the morning", "had a sweet, clear sound"),
    "lantern": Thing("carry it after dark", "gave a warm yellow light"),
    "basket": Thing("fill it with apples", "was made of willow"),
    "button": Thing("keep it in a small box", "shone like a star"),
    "book": Thing("read it before bed", "was full of pictures of the sea"),
    "whistle": Thing("blow it on the hill", "made a sound like a bird"),
    "cup": Thing("drink from it every morning", "had a flower painted on it"),
    "blanket": Thing("sleep under it every night", "smelled of summer"),
    "key": Thing("wear it on a string", "was heavy and cold"),
    "toy train": Thing("push it along the floor", "had six little wheels"),
    "umbrella": Thing("open it in the rain", "was as round as a mushroom"),
    "shell": Thing("listen to the sea in it", "was smooth on the inside"),
    "marble": Thing("roll it down the path", "had a swirl of colour inside"),
    "ribbon": Thing("tie it in a bow", "fluttered in the breeze"),
}
SPOTS = (
    "under a bush",
    "behind a big rock",
    "inside a hollow log",
    "at the foot of a tree",
    "under the bridge",
    "beside the well",
    "in the tall grass",
    "behind the shed",
    "under a pile of leaves",
    "near the old wall",
)
COLORS = words("red blue green yellow purple orange white golden silver brown pink black")
MEALS = (
    "apple pie",
    "warm soup",
    "bread and honey",
    "pancakes",
    "carrot cake",
    "hot porridge",
    "ginger cookies",
    "plum cake",
)
TRAITS = words("kind brave clever curious shy gentle cheerful quiet careful playful friendly sleepy small young")
ELDERS = ("mother", "father", "grandmother", "grandfather", "aunt", "uncle")
SAD = ("sad", "worried", "a little scared", "very sad", "lonely")
GLAD = ("happy", "glad", "proud", "full of joy", "very happy")
WEATHER = (
    "The sun was shining",
    "The wind blew through the trees",
    "Grey clouds filled the sky",
    "The air was warm and sweet",
    "There was frost on the grass",
    "Soft rain fell on the leaves",
)
CRASHES = ("Crash", "Boom", "Rumble")
POPS = ("Pop", "Snap", "Whoosh")
FRUITS = ("red apples", "yellow pears", "sweet plums", "ripe cherries", "golden flowers")
