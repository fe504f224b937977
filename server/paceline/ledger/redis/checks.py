"""Whether a store is set up to keep a journal, looked at once at the start."""

from __future__ import annotations

import re

import msgspec

from paceline.ledger.redis.client import Client, Primary
from paceline.ledger.redis.settings import Kind, Settings

LEAST_VERSION = (6, 2)


class Finding(msgspec.Struct, frozen=True):
    """What a check found. ``level`` is ``refuse`` (the store cannot be used), ``warn`` or ``note``."""

    level: str
    text: str


async def look(client: Client, settings: Settings, primaries: list[Primary]) -> list[Finding]:
    """Check every primary. Raises :class:`~paceline.ledger.journal.StoreUnavailable` alone: what a store does not tell
    becomes a finding."""
    findings: list[Finding] = []
    for primary in primaries:
        where = settings.name if len(primaries) == 1 else f"{settings.name}, node {primary.address}"
        if not primary.info:
            findings.append(Finding("warn", f"{where} is away: its settings are not known"))
            continue
        findings += _from_info(primary, where)
        findings += await _from_config(client, settings, primary, where)
    return findings


def _from_info(primary: Primary, where: str) -> list[Finding]:
    info = primary.info
    findings = []
    told = str(info.get("redis_version", ""))
    numbers = re.findall(r"\d+", told)
    if not numbers or tuple(int(number) for number in numbers[:2]) < LEAST_VERSION:
        findings.append(
            Finding("refuse", f"{where} is version {told or 'unknown'}: Redis 6.2, Valkey 7.2 or newer is needed")
        )
    role = str(info.get("role", ""))
    if role != "master":
        findings.append(
            Finding(
                "refuse",
                f"{where} is a replica, which takes no writes: name its primary, or use redis+sentinel:// or "
                "redis+cluster://",
            )
        )
    policy = str(info.get("maxmemory_policy", ""))
    if not policy:
        findings.append(Finding("warn", f"{where} does not tell its maxmemory-policy: make sure that it is noeviction"))
    elif policy != "noeviction":
        findings.append(
            Finding(
                "refuse",
                f"{where} has maxmemory-policy {policy}, so that it would throw away journals when memory runs short: "
                "set maxmemory-policy noeviction",
            )
        )
    return findings


async def _from_config(client: Client, settings: Settings, primary: Primary, where: str) -> list[Finding]:
    """What only CONFIG tells. Managed stores often forbid it, and so may an ACL."""
    appendonly = await client.config(primary, "appendonly")
    if appendonly is None:
        return [
            Finding(
                "warn",
                f"{where} does not let this user read its settings (CONFIG GET): make sure that it writes to disk "
                "(appendonly, appendfsync) and waits for replicas (min-replicas-to-write)",
            )
        ]
    findings = []
    fsync = await client.config(primary, "appendfsync")
    save = await client.config(primary, "save")
    if appendonly != "yes" and not save:
        findings.append(
            Finding(
                "warn",
                f"{where} writes nothing to disk (appendonly no, save empty): a restart begins with empty books, "
                "unless a replica takes over first; set appendonly yes",
            )
        )
    elif appendonly != "yes":
        findings.append(
            Finding(
                "warn",
                f"{where} writes to disk now and then only (save {save}): a restart forgets what came after the last "
                "dump; set appendonly yes",
            )
        )
    elif fsync == "no":
        findings.append(
            Finding(
                "warn",
                f"{where} leaves writing to disk to the system (appendfsync no): a crash of its machine forgets about "
                "half a minute; set appendfsync everysec or always",
            )
        )
    elif fsync == "everysec":
        findings.append(
            Finding("note", f"{where} writes to disk every second: a crash of its machine forgets about a second")
        )
    waits = await client.config(primary, "min-replicas-to-write")
    replicated = settings.kind is not Kind.SINGLE or bool(primary.info.get("connected_slaves"))
    if replicated and waits == "0":
        findings.append(
            Finding(
                "warn",
                f"{where} has min-replicas-to-write 0: cut off from its replicas it goes on taking writes, which are "
                "lost when another primary takes over; set 1, with min-replicas-max-lag 10",
            )
        )
    return findings
