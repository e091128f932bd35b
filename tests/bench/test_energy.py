"""Energy: its reasons where there is no card. The counter itself needs one and is compared by hand (RESULTS.md)."""

from __future__ import annotations

from pathlib import Path

from tabstop.bench.energy import EnergyMeter, start_metering


def test_a_machine_without_the_drivers_library_has_no_energy_and_says_so() -> None:
    meter = EnergyMeter("libno-such-driver.so.1")
    assert meter.joules() is None
    assert meter.reason == "no NVIDIA driver on this machine (libno-such-driver.so.1 not found)"


def test_a_meter_has_joules_or_a_reason() -> None:
    meter = EnergyMeter()
    assert (meter.joules() is None) == bool(meter.reason)
    used, reason = start_metering("http://127.0.0.1:8000")
    assert (used() is None) == bool(reason) and reason == meter.reason
    if Path("/dev/nvidiactl").exists():
        joules = used()
        assert joules is not None and joules >= 0


def test_local_cards_say_nothing_about_another_machine() -> None:
    used, reason = start_metering("http://10.1.2.3:8000/v1")
    assert used() is None and reason == "10.1.2.3 is another machine"
