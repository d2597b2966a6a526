"""Ways to damage a model: each function changes some files and says what it did. All that is random comes from the generator it is given."""

from __future__ import annotations

import random

from fuzz import damaged_documents, damaged_files, damaged_headers, damaged_tensors  # noqa: F401  # each registers its ways
from fuzz.making import MAKERS, Damage
from fuzz.sound import Files


def damage(rng: random.Random, files: Files) -> Damage:
    """Apply one damage of any kind."""
    chosen = rng.choice(MAKERS)
    done = chosen(rng, files)
    done.text = f"{chosen.__name__}: {done.text}"
    return done
