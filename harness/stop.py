"""What asks an attempt to end in good order: signals and stop notes."""

from __future__ import annotations

import signal
from types import FrameType

from harness.errors import PreemptedError
from harness.ledger.claim import stop_asked
from harness.ledger.tree import StageFolder


class Stop:
    """Set by TERM, USR2, INT or a stop note: the loop saves a checkpoint and ends in good order."""

    def __init__(self, folder: StageFolder) -> None:
        self.folder = folder
        self.asked = False
        self.end = ("preempted", "preempted")
        """State and reason of an attempt that ends because of this."""
        numbers = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
        for number in numbers:
            signal.signal(number, self._ask)
        # The job's own process blocks them while it imports torch.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if not self.asked and number == signal.SIGUSR2:
            self.end = ("timeout", "timeout")
        self.asked = True

    def look(self) -> None:
        """Obeys a stop note, if there is one now."""
        why = stop_asked(self.folder)
        if why is not None:
            self.end, self.asked = ("cancelled", why), True

    def check_at_start(self) -> None:
        """Raises PreemptedError if the stage is not to begin at all."""
        self.look()
        if self.asked:
            raise PreemptedError("asked to stop before it began")
