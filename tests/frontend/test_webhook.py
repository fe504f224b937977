"""Posting alerts: a real HTTP server on this machine's loopback says what it got."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from paceline.config import WebhookTarget
from paceline.frontend.alerts.webhook import Options, Webhook
from tests.frontend.harness import until
from tests.frontend.receiver import Receiver
from tests.ports import nobody

FAST = Options(backoff=0.01)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    found = Receiver()
    yield found
    found.close()


@pytest.fixture
def logged() -> Iterator[list[Any]]:
    with structlog.testing.capture_logs() as lines:
        yield lines


async def done(webhook: Webhook, count: int, timeout: float = 10) -> None:
    """Wait until so many alerts have come to an end."""
    await until(lambda: sum((webhook.counts.delivered, webhook.counts.failed)) >= count, timeout)


async def test_what_is_posted_is_signed(receiver: Receiver) -> None:
    webhook = Webhook(receiver.target(), FAST)
    webhook.post(b'{"a": 1}', "event-1")
    await done(webhook, 1)
    (got,) = receiver.got
    assert (got.method, got.path, got.body) == ("POST", "/hook?token=hunter2", b'{"a": 1}')
    assert got.headers["Content-Type"] == "application/json"
    assert got.headers["Host"] == f"127.0.0.1:{receiver.port}"
    assert got.headers["Paceline-Event"] == "event-1"
    signature = hmac.new(b"s3cret", got.body, hashlib.sha256).hexdigest()
    assert got.headers["Paceline-Signature"] == f"sha256={signature}"
    assert webhook.counts.delivered == 1
    await webhook.close(1)


async def test_without_a_secret_nothing_is_signed(receiver: Receiver) -> None:
    webhook = Webhook(receiver.target(secret=b""), FAST)
    webhook.post(b"{}", "e")
    await done(webhook, 1)
    assert "Paceline-Signature" not in receiver.got[0].headers
    await webhook.close(1)


async def test_order_is_kept(receiver: Receiver) -> None:
    webhook = Webhook(receiver.target(), FAST)
    for number in range(20):
        webhook.post(b"{}", str(number))
    await done(webhook, 20)
    assert [got.headers["Paceline-Event"] for got in receiver.got] == [str(number) for number in range(20)]
    await webhook.close(1)


async def test_a_failure_is_tried_again_with_the_same_event(receiver: Receiver) -> None:
    receiver.statuses = [500, 429, 503, 200]
    webhook = Webhook(receiver.target(), FAST)
    webhook.post(b"{}", "e")
    await done(webhook, 1)
    assert [got.headers["Paceline-Event"] for got in receiver.got] == ["e"] * 4
    assert (webhook.counts.delivered, webhook.counts.failed) == (1, 0)
    await webhook.close(1)


async def test_attempts_are_bounded(receiver: Receiver, logged: list[Any]) -> None:
    receiver.statuses = [500] * 100
    webhook = Webhook(receiver.target(), FAST)
    webhook.post(b"{}", "e")
    await done(webhook, 1)
    assert len(receiver.got) == FAST.attempts == 5
    assert webhook.counts.failed == 1
    (line,) = logged
    assert (line["host"], line["reason"], line["attempts"]) == ("127.0.0.1", "HTTP 500", 5)
    await webhook.close(1)


async def test_what_cannot_succeed_is_not_tried_again(receiver: Receiver, logged: list[Any]) -> None:
    receiver.statuses = [404]
    webhook = Webhook(receiver.target(), FAST)
    webhook.post(b"{}", "e")
    await done(webhook, 1)
    assert (len(receiver.got), webhook.counts.failed) == (1, 1)
    assert logged[0]["reason"] == "HTTP 404"
    await webhook.close(1)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_redirections_are_not_followed(receiver: Receiver, status: int, logged: list[Any]) -> None:
    receiver.statuses = [status]
    webhook = Webhook(receiver.target(), FAST)
    webhook.post(b"{}", "e")
    await done(webhook, 1)
    assert [got.path for got in receiver.got] == ["/hook?token=hunter2"]
    assert webhook.counts.failed == 1
    assert "redirections" in logged[0]["reason"]
    await webhook.close(1)


async def test_an_attempt_has_a_timeout(receiver: Receiver, logged: list[Any]) -> None:
    receiver.pause = 1.0
    webhook = Webhook(receiver.target(timeout=0.15), Options(attempts=2, backoff=0.01))
    webhook.post(b"{}", "e")
    started = time.monotonic()
    await done(webhook, 1)
    assert time.monotonic() - started < 3
    assert (webhook.counts.failed, logged[0]["reason"]) == (1, "timed out")
    await webhook.close(1)


async def test_an_answer_that_drips_is_cut_off(receiver: Receiver, logged: list[Any]) -> None:
    """Each byte comes in time, its first line alone takes longer than the attempt may."""
    receiver.drip = True
    webhook = Webhook(receiver.target(timeout=0.3), Options(attempts=1))
    webhook.post(b"{}", "e")
    started = time.monotonic()
    await done(webhook, 1)
    assert time.monotonic() - started < 4
    assert logged[0]["reason"] == "timed out"
    await webhook.close(1)


async def test_nobody_listens(logged: list[Any]) -> None:
    with nobody() as address:
        webhook = Webhook(WebhookTarget(f"http://{address}/hunter2", b"s3cret", 1_000_000), FAST)
        webhook.post(b"{}", "e")
        await done(webhook, 1)
    assert webhook.counts.failed == 1
    assert logged[0]["reason"] == "Connection refused"
    assert not any(secret in repr(logged) for secret in ("hunter2", "s3cret"))
    await webhook.close(1)


async def test_a_full_queue_drops_the_oldest(receiver: Receiver) -> None:
    receiver.pause = 0.3
    webhook = Webhook(receiver.target(), Options(queued=3))
    webhook.post(b"{}", "first")
    await until(lambda: len(receiver.got) == 1)
    for number in range(10):
        webhook.post(b"{}", str(number))
        assert webhook.queued <= 3
    assert webhook.counts.dropped == 7
    receiver.pause = 0
    await done(webhook, 4)
    assert [got.headers["Paceline-Event"] for got in receiver.got] == ["first", "7", "8", "9"]
    await webhook.close(1)


async def test_posting_never_blocks_the_loop(receiver: Receiver) -> None:
    receiver.pause = 0.5
    webhook = Webhook(receiver.target(), FAST)
    loop = asyncio.get_running_loop()
    started = loop.time()
    for number in range(1_000):
        webhook.post(b"{}", str(number))
    assert loop.time() - started < 0.4
    await webhook.close(0.05)


async def test_the_end_posts_what_waits(receiver: Receiver) -> None:
    webhook = Webhook(receiver.target(), FAST)
    for number in range(5):
        webhook.post(b"{}", str(number))
    await webhook.close(5)
    assert (webhook.counts.delivered, webhook.counts.dropped) == (5, 0)
    webhook.post(b"{}", "late")
    assert webhook.counts.dropped == 1


async def test_the_end_is_bounded(receiver: Receiver) -> None:
    receiver.pause = 2.0
    webhook = Webhook(receiver.target(timeout=30), FAST)
    for number in range(5):
        webhook.post(b"{}", str(number))
    started = time.monotonic()
    await webhook.close(0.2)
    assert time.monotonic() - started < 1.5
    assert webhook.counts.dropped == 4


async def test_the_end_waits_for_no_backoff(receiver: Receiver) -> None:
    receiver.statuses = [500] * 10
    webhook = Webhook(receiver.target(), Options(backoff=60))
    webhook.post(b"{}", "e")
    await until(lambda: len(receiver.got) == 1)
    await webhook.close(5)
    assert webhook.counts.failed == 1
    # A last attempt, unless the end came before the first answer.
    assert len(receiver.got) in (1, 2)


async def test_nothing_was_ever_posted() -> None:
    webhook = Webhook(WebhookTarget("https://127.0.0.1:9/", b"", 1_000_000))
    await webhook.close(1)
    assert threading.active_count() >= 1


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tls")
    key, cert = folder / "key.pem", folder / "cert.pem"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-days",
        "2",
    ]
    command += [
        "-subj",
        "/CN=localhost",
        "-addext",
        "subjectAltName=DNS:localhost",
        "-keyout",
        str(key),
        "-out",
        str(cert),
    ]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    return key, cert


@pytest.fixture
def behind_tls(receiver: Receiver, certificate: tuple[Path, Path]) -> Callable[[], WebhookTarget]:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate[1], certificate[0])
    receiver.server.socket = context.wrap_socket(receiver.server.socket, server_side=True)
    return lambda: WebhookTarget(f"https://localhost:{receiver.port}/hook", b"s3cret", 5_000_000)


async def test_over_tls(
    receiver: Receiver, certificate: tuple[Path, Path], behind_tls: Callable[[], WebhookTarget]
) -> None:
    trusting = ssl.create_default_context(cafile=str(certificate[1]))
    webhook = Webhook(behind_tls(), FAST, trusting)
    webhook.post(b"{}", "e")
    await done(webhook, 1)
    assert (webhook.counts.delivered, receiver.got[0].path) == (1, "/hook")
    await webhook.close(1)


async def test_an_unknown_authority_gets_nothing(
    receiver: Receiver, behind_tls: Callable[[], WebhookTarget], logged: list[Any]
) -> None:
    webhook = Webhook(behind_tls(), Options(attempts=2, backoff=0.01))
    webhook.post(b"{}", "e")
    await done(webhook, 1)
    assert (webhook.counts.failed, receiver.got) == (1, [])
    assert "certificate" in logged[0]["reason"]
    await webhook.close(1)


async def test_a_certificate_of_another_host_gets_nothing(
    receiver: Receiver, certificate: tuple[Path, Path], behind_tls: Callable[[], WebhookTarget]
) -> None:
    trusting = ssl.create_default_context(cafile=str(certificate[1]))
    target = behind_tls()._replace(url=f"https://127.0.0.1:{receiver.port}/hook")
    webhook = Webhook(target, Options(attempts=1), trusting)
    webhook.post(b"{}", "e")
    await done(webhook, 1)
    assert (webhook.counts.failed, receiver.got) == (1, [])
    await webhook.close(1)
