"""How hypothesis runs here: no deadlines (nothing asserts on times), and without shrinking when faults are planted."""

from __future__ import annotations

from hypothesis import Phase, settings

settings.register_profile("tabstop", deadline=None, print_blob=True)
settings.register_profile("mutants", parent=settings.get_profile("tabstop"), phases=(Phase.explicit, Phase.generate))
settings.load_profile("tabstop")
