"""What changes while a front end serves: starting, ready, draining; which keys are valid. One object a process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from tabstop.api.ceilings import Counts
from tabstop.errors import UnavailableError
from tabstop.keys import KeyRing
from tabstop.service import Service


@dataclass
class ServerState:
    """Written by server.py and by who owns the process, read by the probes and by every request."""

    is_ready: bool = True  # False until a real token was generated
    is_draining: bool = False
    reason: str = "starting: no token has been generated yet"  # why it is not ready
    on_ready: Callable[[], None] = lambda: None  # called once
    keys: KeyRing = field(default_factory=KeyRing)  # of --key-file; --api-key is beside them
    counts: Counts = field(default_factory=Counts)

    def check_admission(self) -> None:
        """Raises UnavailableError while draining."""
        if self.is_draining:
            raise UnavailableError("the server is shutting down; send the request to another one", retry_after=5)

    def check_ready(self, service: Service) -> None:
        """Raises UnavailableError (or EngineDeadError) with the reason why requests should go elsewhere."""
        self.check_admission()
        service.check_alive()
        if not self.is_ready:
            raise UnavailableError(self.reason, retry_after=1)
