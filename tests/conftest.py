"""How hypothesis and kernels run here.

Hypothesis: no deadlines (nothing asserts on times); the same examples each time, so that a red run says something of
the change that it ran on (`pytest --hypothesis-profile=random` looks for new ones); and without shrinking when faults
are planted. Kernels: under Triton's interpreter where there is no card, which must be chosen before the first of them
is declared.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

from hypothesis import Phase, settings

# Shells start background jobs with these ignored, and children would inherit it: then no test could send them.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)

if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile("tabstop", deadline=None, print_blob=True, derandomize=True)
settings.register_profile("random", deadline=None, print_blob=True)
settings.register_profile("mutants", parent=settings.get_profile("tabstop"), phases=(Phase.explicit, Phase.generate))
settings.load_profile("tabstop")
