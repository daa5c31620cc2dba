import os
import signal
import threading
import time

import pytest
from accelerate import Accelerator
from torch.utils.data import DataLoader

from hf_thinkingvit.training.stop_signals import StopSignals, ignore_stop_signals


@pytest.fixture
def signals():
    return StopSignals(Accelerator(cpu=True))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_records_and_then_hands_back(signals, number):
    before = signal.getsignal(number)
    assert signals.agreed() is None
    with signals.listening():
        os.kill(os.getpid(), number)
        assert signals.agreed() == number
    assert signal.getsignal(number) == before


def test_a_second_ctrl_c_ends_the_process(signals):
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        with signals.listening():
            os.write(writer, b"listening")
            while signals.received is None:
                time.sleep(0.01)
            os.write(writer, b"received")
            time.sleep(60)
        os._exit(0)
    assert os.read(reader, 100) == b"listening"
    os.kill(child, signal.SIGINT)
    assert os.read(reader, 100) == b"received"
    os.kill(child, signal.SIGINT)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGINT


def test_a_signal_that_is_ignored_stays_so(signals):
    """As `nohup` and a shell's background jobs start a process."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with signals.listening():
            os.kill(os.getpid(), signal.SIGINT)
            assert signals.agreed() is None
    finally:
        signal.signal(signal.SIGINT, before)


def test_listens_in_the_main_thread_only(signals):
    seen = []

    def listen():
        with signals.listening():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGTERM)]


class SlowImages:
    def __len__(self):
        return 4

    def __getitem__(self, index):
        if index == 1:  # the worker itself, as a launcher that signals the whole process group
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
        return index


def test_data_workers_outlive_them():
    batches = DataLoader(SlowImages(), batch_size=1, num_workers=1, worker_init_fn=ignore_stop_signals)
    assert [batch.item() for batch in batches] == [0, 1, 2, 3]
