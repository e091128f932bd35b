"""How hypothesis and kernels run here.

Hypothesis: no deadlines (nothing asserts on times), and without shrinking when faults are planted. Kernels: under
Triton's interpreter where there is no card, which must be chosen before the first of them is declared.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

from hypothesis import Phase, settings

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Shells start background jobs so, and children would inherit it: then no test could press Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)


if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile("tabstop", deadline=None, print_blob=True)
settings.register_profile("mutants", parent=settings.get_profile("tabstop"), phases=(Phase.explicit, Phase.generate))
settings.load_profile("tabstop")
