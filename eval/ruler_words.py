"""English words for RULER's keys and lists. The published tasks take them from a package of word lists; these are fewer."""

from __future__ import annotations

import functools

ADJECTIVES = """
able aged amber ample ancient angry basic bitter blank blunt bold brave brief bright brisk broad bronze bumpy busy calm candid
careful cheap chief chilly civil clean clear clever cloudy coarse cold common cool coral crisp crowded curious curly damp
daring dark deep dense dim distant double dusty eager early easy elder elegant empty exact faint fair famous fancy fast fatal
fierce final firm flat fluffy foggy formal frail free fresh frozen full fuzzy gentle giant glad golden good grand grave greasy
great green grim handy happy harsh heavy hidden high hollow honest huge humble icy idle inner jolly keen kind large late lazy
lean light little lively lonely long loud lucky
"""
NOUNS = """
acorn actor album anchor ankle apple apron arch arrow attic badge baker banjo barn basin basket beach beam bell bench berry
bike bird blade blanket board boat bottle bowl branch bread brick bridge broom brush bucket bus butter button cabin cable
camel camera candle canoe canyon card carpet castle cave cedar chair chalk chest chimney circle clock cloud coach coast coffee
collar comet copper corner cotton cradle crane crow crown cup curtain desk diamond dish door dragon drawer dress drum eagle
engine farm feather fence field fig flag flute forest fork fountain fox garden gate glass glove goat grape hammer harbor hat
hill honey horse hotel island jacket jar judge kettle key king kite ladder lake lamp leaf lemon letter lion lock map marble
market meadow melon mirror moon mountain mouse museum nail needle nest ocean olive onion orange oven owl paddle palace paper
parrot path peach pencil piano pillow pilot planet plate pocket pond potato rabbit radio river road robot rocket roof rope
rose sail salad school shadow ship
"""


@functools.cache
def word_pairs() -> list[str]:
    """All adjective-noun pairs, sorted."""
    return sorted(f"{adjective}-{noun}" for adjective in ADJECTIVES.split() for noun in NOUNS.split())
