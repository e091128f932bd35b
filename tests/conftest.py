"""How hypothesis and kernels run here.

Hypothesis: no deadlines (nothing asserts on times), and without shrinking when faults are planted. Kernels: under
Triton's interpreter where there is no card, which must be chosen before the first of them is declared.
"""

from __future__ import annotations

import os
from pathlib import Path

from hypothesis import Phase, settings

if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile("tabstop", deadline=None, print_blob=True)
settings.register_profile("mutants", parent=settings.get_profile("tabstop"), phases=(Phase.explicit, Phase.generate))
settings.load_profile("tabstop")
