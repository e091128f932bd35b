"""Whether this front end takes requests: starting, ready, draining. Plain state, one object a process."""

from __future__ import annotations

from dataclasses import dataclass

from tabstop.errors import UnavailableError
from tabstop.service import Service


@dataclass
class ServerState:
    """Written by server.py, read by the probes and by every request that generates."""

    is_ready: bool = True  # False until a real token was generated
    is_draining: bool = False
    reason: str = "starting: no token has been generated yet"  # why it is not ready

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
