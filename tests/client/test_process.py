"""The library in a process of its own: imports, forks, the end of the interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from paceline_client.stubs.google_types import status_pb2
from tests.client.fake import Fake

SOURCE = Path(__file__).resolve().parents[2] / "clients" / "python" / "src"


def run(code: str, *, timeout: float = 45, **environ: str) -> str:
    """Run Python code with nothing but this library's sources on its path."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PACELINE", "GRPC"))}
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", textwrap.dedent(code)],
        env={**environment, "PYTHONPATH": str(SOURCE), **environ},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    noise = [line for line in done.stderr.splitlines() if "fork_posix.cc" not in line]
    assert not noise, done.stderr
    return done.stdout


ONLY = """
    import importlib.abc, sys

    class Only(importlib.abc.MetaPathFinder):
        ALLOWED = {"grpc", "google", "paceline_client", "typing_extensions"}

        def find_spec(self, name, path=None, target=None):
            top = name.partition(".")[0]
            if top not in self.ALLOWED | set(sys.stdlib_module_names) or name.startswith(("google.rpc", "google.type")):
                raise ImportError(f"{name} is not installed")
            if top in BLOCKED:
                raise ImportError(f"{name} is blocked")

    BLOCKED = set()
    sys.meta_path.insert(0, Only())
"""


def test_it_needs_only_grpcio_and_protobuf(server: Fake) -> None:
    out = run(
        ONLY
        + """
    import importlib, pkgutil
    import paceline_client
    for module in pkgutil.walk_packages(paceline_client.__path__, "paceline_client."):
        # Hooks need the SDK that they hook into; nothing else imports them.
        if not module.name.startswith("paceline_client.hooks"):
            importlib.import_module(module.name)
    client = paceline_client.Client(budget=20)
    with client.reserve(model="m") as grant:
        grant.commit_usage(output_tokens=1)
    print(client.flush(), grant.local)
    """,
        PACELINE_ADDRESS=server.address,
    )
    assert out == "True False\n"


def test_disabled_it_needs_nothing() -> None:
    out = run(
        ONLY
        + """
    BLOCKED.update({"grpc", "google"})
    import paceline_client
    client = paceline_client.Client()
    with client.reserve(model="m") as grant:
        grant.commit({"usage": {"output_tokens": 1}})
    print(paceline_client.estimate_tokens("some words") > 0, client.disabled)
    """,
        PACELINE_DISABLED="1",
    )
    assert out == "True True\n"


def test_the_end_of_the_interpreter_sends_what_is_left(server: Fake) -> None:
    run(
        """
        from paceline_client import Client
        client = Client(budget=20)
        for _ in range(100):
            with client.reserve(model="m") as grant:
                grant.commit_usage(output_tokens=1)
        """,
        PACELINE_ADDRESS=server.address,
    )
    assert len(server.items("commit")) == 100


def test_the_end_of_an_event_loop_makes_no_noise(server: Fake) -> None:
    run(
        """
        import asyncio
        from paceline_client import AsyncClient

        client = AsyncClient(budget=20)

        async def main():
            async with client.reserve(model="m") as grant:
                grant.commit_usage(output_tokens=1)
            waiting = asyncio.create_task(client.acquire(model="wait", max_wait=60))
            await asyncio.sleep(0.2)

        asyncio.run(main())
        """,
        PACELINE_ADDRESS=server.address,
    )
    assert len(server.items("commit")) == 1


@pytest.mark.parametrize("mute", [True, False])
def test_the_end_is_bounded_when_nobody_listens(server: Fake, mute: bool) -> None:
    away = status_pb2.Status(code=14, message="the store is away")
    server.on_report = lambda what, request: away
    out = run(
        """
        import atexit, logging, time
        logging.disable()
        atexit.register(lambda: print(f"{time.monotonic() - start:.3f}", flush=True))
        from paceline_client import Client
        client = Client(budget=0.3, policy="open")
        grant = client.acquire(model="m")
        print(grant.local, flush=True)
        grant.commit_usage(output_tokens=1)
        start = time.monotonic()
        """,
        PACELINE_ADDRESS=server.address if mute else "127.0.0.1:9",
    )
    local, took = out.split()
    assert local == str(not mute)
    assert float(took) < 2.0


FORK = """
    import os, sys, threading, time
    from paceline_client import Client
    client = Client(budget=20)

    def call(what):
        with client.reserve(model=what, max_wait=20) as grant:
            assert not grant.local
            grant.commit_usage(output_tokens=1)

    def fork(child):
        pid = os.fork()
        if pid == 0:
            try:
                child()
                assert client.flush(20)
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", flush=True)
                os._exit(1)
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""


def test_a_fork_gets_a_session_of_its_own(server: Fake) -> None:
    out = run(
        FORK
        + """
    call("before")
    assert client.flush(20)
    with client.reserve(model="in the parent") as grant:
        codes = [fork(lambda: call("child")) for _ in range(3)]
        def leave():
            grant.commit_usage(output_tokens=99)  # the parent's business
            call("child")
        codes.append(fork(leave))
        grant.commit_usage(output_tokens=1)
    call("after")
    print(codes)
    """,
        PACELINE_ADDRESS=server.address,
    )
    assert out == "[0, 0, 0, 0]\n"
    reserves = server.items("reserve")
    assert [each.candidates[0].target.model for each in reserves] == [
        "before",
        "in the parent",
        *["child"] * 4,
        "after",
    ]
    assert len({each.reservation_id for each in reserves}) == 7
    assert len(server.items("commit")) == 7
    assert all(each.outcome.usage.output_tokens == 1 for each in server.items("commit"))


def test_forks_in_the_middle_of_traffic(server: Fake) -> None:
    out = run(
        FORK
        + """
    stop = False
    calls = [0] * 4

    def work(n):
        while not stop:
            call("parent")
            calls[n] += 1

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    took, codes = [], []
    for _ in range(15):
        before = time.monotonic()
        codes.append(fork(lambda: call("child")))
        took.append(time.monotonic() - before)
        time.sleep(0.02)
    stop = True
    for thread in threads:
        thread.join()
    assert client.flush(20)
    print(sum(codes), sorted(took)[7] < 1.5, min(calls) > 0)
    """,
        PACELINE_ADDRESS=server.address,
    )
    assert out == "0 True True\n"
    assert max(server.grants.values()) == 1
    committed = {each.reservation_id for each in server.items("commit")}
    assert committed == set(server.grants)


def test_a_child_without_support_goes_on_by_its_policy(server: Fake) -> None:
    code = """
    import grpc, logging, os
    logging.disable()
    from paceline_client import Client
    client = Client(budget=20, policy="open")
    client.acquire(model="m").release()
    client.flush()
    pid = os.fork()
    if pid == 0:
        os._exit(0 if client.acquire(model="m").local else 1)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), client.acquire(model="m").local)
    """
    assert run(code, PACELINE_ADDRESS=server.address) == "0 False\n"


def test_processes_of_multiprocessing(server: Fake) -> None:
    out = run(
        """
        import multiprocessing, sys
        from paceline_client import Client
        client = Client(budget=20)

        def work(n):
            with client.reserve(model="m") as grant:
                grant.commit_usage(output_tokens=n)
            assert client.flush(20)
            return grant.local

        if __name__ == "__main__":
            work(0)
            with multiprocessing.get_context("fork").Pool(2) as pool:
                print(pool.map(work, range(1, 7)))
        """,
        PACELINE_ADDRESS=server.address,
    )
    assert out == f"{[False] * 6}\n"
    assert {each.outcome.usage.output_tokens for each in server.items("commit")} == set(range(7))
