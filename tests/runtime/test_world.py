"""Who a process is by its environment; how ranks agree is tested with real ranks in tests/distributed."""

import os
import signal
import socket
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from osler.cli.main import main
from osler.runtime.errors import UserError
from osler.runtime.log import say
from osler.runtime.world import Place, device_of, joined, place, require_one_process

TORCHRUN = {
    "RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500",
}  # fmt: skip


@pytest.fixture
def torchrun(monkeypatch):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)


def test_one_process_is_a_world_in_which_nothing_happens():
    with joined("cpu") as world:
        assert (world.rank, world.size, world.device, world.is_first) == (0, 1, "cpu", True)
        assert world.broadcast_from_first(lambda: "said") == "said"
        assert world.all_reduce_min(3, -2) == [3, -2] and world.all_reduce_sum(1.5, 2) == [1.5, 2]
        tensor = torch.tensor(7.0)
        assert world.all_reduce_mean(tensor) is tensor and tensor == 7


def test_the_place_is_what_torchrun_says(torchrun, monkeypatch):
    assert place() == Place(rank=5, local_rank=1, size=8, local_size=4)
    with pytest.raises(UserError, match="8 processes were started, but quickstart runs as one"):
        require_one_process("quickstart")
    monkeypatch.delenv("RANK")
    with pytest.raises(UserError, match=r"WORLD_SIZE is 8, but RANK is not set.*torchrun"):
        place()


def test_a_single_gpu_cannot_be_named_for_several_processes():
    with pytest.raises(UserError, match=r"cuda:1|was asked for"):
        device_of("cuda:1", Place(size=2))
    assert device_of("cpu", Place(size=2)) == "cpu"


def test_rank_0_alone_speaks(torchrun, monkeypatch, capsys):
    say("progress")
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "0")
    say("progress")
    assert capsys.readouterr().err == "progress\n"


def test_a_mistake_on_one_rank_is_told_where_ranks_cannot_agree_on_it(torchrun, capsys):
    """Another launcher than torchrun keeps no store: rank 5, the second of its machine, does not know of the others."""
    assert main(["no-such-command"]) == 2
    assert "no command `no-such-command`" in capsys.readouterr().err


def test_the_first_to_find_a_mistake_tells_it_where_torchrun_keeps_a_store(torchrun, monkeypatch, capsys):
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    for name, value in {"MASTER_ADDR": "localhost", "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True}.items():
        monkeypatch.setenv(name, str(value))
    told = []
    for local_rank in ("1", "0"):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        assert main(["no-such-command"]) == 2
        told.append(capsys.readouterr().err)
    assert "no command `no-such-command`" in told[0] and told[1] == ""


@pytest.mark.parametrize("request_to_stop", [signal.SIGTERM, signal.SIGINT])
def test_a_rank_that_waits_for_a_lost_one_can_be_ended(request_to_stop):
    with socket.create_server(("127.0.0.1", 0)) as lost:  # it is there, and never answers
        lost.settimeout(120)
        rank = {**TORCHRUN, "RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(lost.getsockname()[1])}
        command = [sys.executable, "-m", "osler.cli", "pretrain", "device=cpu"]
        with subprocess.Popen(command, env={**os.environ, **rank}, stderr=subprocess.DEVNULL) as waiting:
            try:
                with lost.accept()[0]:
                    waiting.send_signal(request_to_stop)
                    assert waiting.wait(120) == -request_to_stop
            finally:
                waiting.kill()
