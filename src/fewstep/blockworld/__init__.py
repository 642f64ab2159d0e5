"""A procedural, captioned world of solids: "a red cube on top of a blue sphere".

`scenes` draws what is in each picture, `captions` says it, `render` shows it; all three are deterministic in
their arguments. `split_of` and `require_train` keep what is held out away from training.
"""

from __future__ import annotations

from fewstep.blockworld.captions import captions, vocabulary
from fewstep.blockworld.render import render
from fewstep.blockworld.scene import COLOURS, RELATIONS, SHAPES, SIZES, Scenes
from fewstep.blockworld.scenes import scenes
from fewstep.blockworld.split import SPLITS, keys, require_train, split_digest, split_of

__all__ = [
    "COLOURS",
    "RELATIONS",
    "SHAPES",
    "SIZES",
    "SPLITS",
    "Scenes",
    "captions",
    "keys",
    "render",
    "require_train",
    "scenes",
    "split_digest",
    "split_of",
    "vocabulary",
]
