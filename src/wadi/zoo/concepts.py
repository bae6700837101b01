"""The concepts, styles and backgrounds of the embedded teacher. Plain data, no imports.

Every concept is the name of one icon that all three sets contain, written as words ("red-apple" is "red apple"). Each
candidate is one thing with a name. Some candidates are left out because they look too much like another one at 64 x 64 pixels,
or are too thin. The autoencoder learns from all candidates.
"""

from __future__ import annotations

STYLES: dict[str, str] = {"noto": "noto", "twemoji": "twemoji", "fluent": "fluent-emoji-flat"}
"""Style word of a caption -> name of the icon set on npm (``@iconify-json/NAME``)."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "white": (250, 250, 250),
    "black": (24, 24, 28),
    "grey": (150, 152, 158),
    "red": (214, 60, 62),
    "orange": (244, 150, 56),
    "yellow": (250, 216, 90),
    "green": (84, 176, 98),
    "blue": (66, 126, 216),
    "purple": (142, 86, 190),
    "pink": (246, 168, 196),
}
"""Background colour word -> sRGB, jittered a little each time it is used."""

_ANIMALS = """
ant bat bear bee butterfly camel cat-face chicken cow-face crab crocodile dolphin duck elephant fish flamingo fox frog
giraffe hedgehog horse-face koala lady-beetle lion lobster monkey-face mouse-face octopus owl panda parrot penguin
pig-face rabbit-face rooster scorpion shark snail snake spider spouting-whale squid swan tiger-face tropical-fish
turtle unicorn zebra
"""
_PLANTS_AND_FOOD = """
red-apple avocado banana broccoli cactus carrot cheese-wedge cherries coconut cookie doughnut ear-of-corn eggplant
french-fries four-leaf-clover grapes hamburger hot-dog ice-cream lemon maple-leaf mushroom palm-tree peach pear
pineapple pizza pretzel rose strawberry sunflower sushi taco tangerine tomato tulip watermelon birthday-cake
beer-mug hot-beverage wine-glass
"""
_THINGS = """
airplane alien-monster ambulance anchor automobile balloon basketball bell bicycle bomb books bus camera castle crown
delivery-truck drum fire fire-engine ghost guitar hammer helicopter high-heeled-shoe house jack-o-lantern key light-bulb
locomotive magnet pencil pile-of-poo racing-car rainbow ringed-planet robot rocket running-shoe sailboat saxophone
scissors skull snowman soccer-ball sun telephone tent top-hat tractor trophy trumpet umbrella volcano watch wrapped-gift
"""
_TOO_ALIKE = """
ambulance ant bat bear bicycle books camel castle chicken coconut crocodile delivery-truck giraffe hammer helicopter
horse-face hot-dog lobster locomotive mouse-face peach saxophone zebra
pencil racing-car running-shoe scissors scorpion shark squid sushi swan tangerine tent tractor tropical-fish trumpet tulip
"""
_ICON_OF = {"bee": "honeybee"}


def _named(names: list[str]) -> dict[str, str]:
    return {name.replace("-", " "): _ICON_OF.get(name, name) for name in names}


_ALL = (_ANIMALS + _PLANTS_AND_FOOD + _THINGS).split()
CANDIDATES: dict[str, str] = _named(_ALL)
CONCEPTS: dict[str, str] = _named([name for name in _ALL if name not in _TOO_ALIKE.split()])
"""Concept as a caption names it -> name of its icon, in the order of the classifier's outputs."""
