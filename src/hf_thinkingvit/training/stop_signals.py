"""SIGTERM and Ctrl-C as requests to stop, on which all processes of a run agree at the end of a step."""

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
    `worker_init_fn` of a `DataLoader`. Ctrl-C and launchers signal the whole process group; a worker ended by the
    signal would end the training process in the middle of a step. Workers end with their `DataLoader` instead.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class StopSignals:
    """
    Records the signals that ask a run to save and stop.

    Args:
        accelerator (`Accelerator`): its processes agree on when to stop.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.received: signal.Signals | None = None
        self._group = None
        if accelerator.num_processes > 1 and torch.distributed.is_initialized():
            # On the CPU, so that agreeing need not wait for the device.
            try:
                self._group = torch.distributed.new_group(backend="gloo")
            except RuntimeError as error:  # gloo finds no network interface
                logger.warning("processes agree on stop signals on their devices, every step: %s", error)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """
        A context in which the signals are recorded instead of ending the process. Python allows handlers in the main
        thread only: in other threads nothing changes, nor for signals that the process was started to ignore (`nohup`,
        background jobs of a shell).
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
            # The default handler ends the process at the second Ctrl-C, even while native code runs.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            how = "; press Ctrl-C again to end at once, without saving"
        if self.accelerator.is_main_process:  # not `print`, which is not re-entrant
            os.write(2, f"\n{self.received.name}: saving and stopping at the end of this step{how}\n".encode())

    def agreed(self) -> signal.Signals | None:
        """
        The signal that any process has received, or `None`; the same on all processes. Every process calls it. Takes
        about 0.1 ms for two processes on one machine.
        """
        if self.accelerator.num_processes == 1:
            return self.received
        number = torch.tensor([int(self.received or 0)])
        if self._group is not None:
            torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX, group=self._group)
        else:
            number = self.accelerator.gather(number.to(self.accelerator.device)).max()
        return signal.Signals(number.item()) if number.item() else None
