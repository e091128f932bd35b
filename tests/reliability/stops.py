"""SIGTERM under load: `python -m tests.reliability.stops --times 100`.

Whatever was accepted before the signal ends in one terminal output, drained or with an error; exit code 0; nothing is
left.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from pathlib import Path

from tests.reliability.client import STAYS, Patience
from tests.reliability.crowd import Crowd, Tally, leaving, never_accepted
from tests.reliability.requests import Ask, long_stream
from tests.reliability.server import serving, write_model

NUM_CLIENTS = 8
PAUSE = 0.02  # seconds of a client between two requests
DRAIN_TIMEOUT = 0.3  # seconds; a long stream takes longer
ENDINGS = {"unavailable"}
"""Codes by which a client may learn of the end."""


def mixed(generator: random.Random) -> tuple[Ask, Patience]:
    """One in three streams lasts longer than the drain."""
    return (long_stream(), STAYS) if generator.random() < 1 / 3 else leaving(generator)


def stop(model: Path, seed: int) -> tuple[Tally, float]:
    """One life of a server that is told to stop under load; what its clients saw, and seconds to its exit."""
    generator = random.Random(seed)
    with serving(model, "--drain-timeout", str(DRAIN_TIMEOUT), "--num-front-ends", "2") as server:
        with Crowd(server.port, NUM_CLIENTS, mixed, seed, pause=PAUSE) as crowd:
            crowd.wait_for(NUM_CLIENTS // 2)
            time.sleep(generator.uniform(0, 0.5))
            start = time.monotonic()
            code = server.stop()
            seconds = time.monotonic() - start
        assert code == 0, f"exit code {code}\n{server.text}"
        crowd.tally.assert_each_ended_once(never_accepted(start))
        assert set(crowd.tally.errors) <= ENDINGS, crowd.tally.errors
        server.assert_nothing_left()
    return crowd.tally, seconds


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--times", type=int, default=100)
    options.add_argument("--seed", type=int, default=0)
    given = options.parse_args()
    whole, longest = Tally(), 0.0
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder) / "tiny")
        for index in range(given.times):
            tally, seconds = stop(model, given.seed + index)
            whole.ends += tally.ends
            longest = max(longest, seconds)
            print(
                f"{index + 1}: {dict(tally.kinds)}, errors {dict(tally.errors)}, exit after {seconds:.1f} s", flush=True
            )
    print(f"stopped {given.times} times: {dict(whole.kinds)}, errors {dict(whole.errors)}; longest way {longest:.1f} s")


if __name__ == "__main__":
    main()
