import os
import signal
import socket
import threading
import time

import pytest
from accelerate import Accelerator
from torch.utils.data import DataLoader

from hf_thinkingvit.training.stop_signals import StopSignals, ignore_stop_signals


@pytest.fixture
def signals():
    return StopSignals(Accelerator(cpu=True))


@pytest.fixture(autouse=True)
def usual_ctrl_c():
    """Restore the default SIGINT handler, because a shell may ignore SIGINT in background jobs."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


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
    """`nohup` and shells start background jobs with ignored signals."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with signals.listening():
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.agreed() is None


def test_listens_in_the_main_thread_only(signals):
    seen = []

    def listen():
        with signals.listening():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGTERM)]


@pytest.mark.parametrize("on_cpu", [True, False])
def test_processes_agree(monkeypatch, on_cpu):
    """Only the second of two processes receives a signal; they agree `on_cpu` or through tensors on their devices."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    for name, value in {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)

    def agree(rank: int) -> list:
        os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)
        signals = StopSignals(Accelerator(cpu=True))
        if not on_cpu:
            signals._group = None
        with signals.listening():
            answers = [signals.agreed()]
            if rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return [*answers, signals.agreed()]

    children = []
    for rank in range(2):
        children.append(os.fork())
        if not children[-1]:
            code = 2
            try:
                code = int(agree(rank) != [None, signal.SIGTERM])
            finally:
                os._exit(code)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]


class SlowImages:
    def __len__(self):
        return 4

    def __getitem__(self, index):
        if index == 1:  # signal the worker too, as a launcher that signals the process group does
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
        return index


def test_data_workers_outlive_them():
    batches = DataLoader(SlowImages(), batch_size=1, num_workers=1, worker_init_fn=ignore_stop_signals)
    assert [batch.item() for batch in batches] == [0, 1, 2, 3]
