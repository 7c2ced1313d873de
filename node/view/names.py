"""A readable name for a peer that nobody named: k7-heron. The same everywhere, since it follows from the id.

Two of a thousand peers may well share one; it is for people, the id is what counts.
"""

from __future__ import annotations

from blake3 import blake3

_BIRDS = [
    "auk",
    "avocet",
    "bittern",
    "booby",
    "bunting",
    "buzzard",
    "canary",
    "cormorant",
    "crane",
    "crow",
    "curlew",
    "dipper",
    "dove",
    "duck",
    "dunlin",
    "eagle",
    "egret",
    "eider",
    "falcon",
    "finch",
    "gannet",
    "godwit",
    "goose",
    "goshawk",
    "grebe",
    "grouse",
    "gull",
    "harrier",
    "hawk",
    "heron",
    "hobby",
    "hoopoe",
    "ibis",
    "jackdaw",
    "jay",
    "kestrel",
    "kite",
    "knot",
    "lapwing",
    "lark",
    "linnet",
    "loon",
    "magpie",
    "martin",
    "merlin",
    "nightjar",
    "oriole",
    "osprey",
    "ouzel",
    "owl",
    "petrel",
    "pipit",
    "plover",
    "puffin",
    "quail",
    "rail",
    "raven",
    "robin",
    "ruff",
    "shrike",
    "siskin",
    "skua",
    "snipe",
    "starling",
    "stork",
    "swan",
    "swift",
    "teal",
    "tern",
    "thrush",
    "tit",
    "turnstone",
    "wagtail",
    "warbler",
    "whimbrel",
    "wren",
]
_LETTERS = "abcdefghjkmnpqrstuvwxyz"  # no i, l, o: they look like digits


def readable(peer: str) -> str:
    """Letter, digit and bird."""
    drawn = int.from_bytes(blake3(b"shoal name" + peer.encode()).digest(8), "little")
    drawn, letter = divmod(drawn, len(_LETTERS))
    drawn, digit = divmod(drawn, 8)
    return f"{_LETTERS[letter]}{digit + 2}-{_BIRDS[drawn % len(_BIRDS)]}"
