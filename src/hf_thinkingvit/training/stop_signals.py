"""SIGTERM and Ctrl-C as a wish to stop, which every process of a run sees at the same step boundary."""

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator


logger = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def ignore_stop_signals(worker: int = 0) -> None:
    """
    `worker_init_fn` of a `DataLoader`. Ctrl-C and launchers send their signal to the whole process group; a worker that
    died of it would end the training process in the middle of a step. Workers end when their `DataLoader` does.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class StopSignals:
    """
    The signals that ask a run to save and stop.

    Args:
        accelerator (`Accelerator`): whose processes must agree.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.received: signal.Signals | None = None
        self._group = None
        if accelerator.num_processes > 1 and torch.distributed.is_initialized():
            # Agreeing on the CPU does not wait for what the device still has to compute.
            try:
                self._group = torch.distributed.new_group(backend="gloo")
            except RuntimeError as error:  # a network that it finds no interface of
                logger.warning("processes agree on stop signals on their devices, every step: %s", error)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """
        Record signals instead of being ended by them. Python lets only the main thread do so; in another thread, and
        for a signal that this process was started to ignore (`nohup`, a shell's background jobs), nothing changes.
        """
        previous = {}
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:
                    previous[number] = signal.signal(number, self._on_signal)
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _on_signal(self, number: int, frame: Any) -> None:
        self.received = signal.Signals(number)
        how = ""
        if number == signal.SIGINT:
            # The operating system's own handling ends the process even while it waits in native code.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            how = "; press Ctrl-C again to end at once, without saving"
        if self.accelerator.is_main_process:  # `print` may be what the signal interrupted
            os.write(2, f"\n{self.received.name}: saving and stopping at the end of this step{how}\n".encode())

    def agreed(self) -> signal.Signals | None:
        """
        The signal that any process has received, or `None`: the same answer for all processes, which must all call it.
        Costs about 0.1 ms between two processes on one machine.
        """
        if self.accelerator.num_processes == 1:
            return self.received
        number = torch.tensor([int(self.received or 0)])
        if self._group is not None:
            torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX, group=self._group)
        else:
            number = self.accelerator.gather(number.to(self.accelerator.device)).max()
        return signal.Signals(number.item()) if number.item() else None
