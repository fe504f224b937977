"""``python -m bench.fleet``: one caller process, driven by lines of JSON (``bench.fleet.plan``).

The first line is the plan. At the end of its input it exits, so that none outlives whoever started it.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import time

import msgspec

from bench.fleet.application import Application, application, own_time
from bench.fleet.caller import Caller
from bench.fleet.plan import Done, Measure, Measured, Order, Plan, Ready, Report, Start, Stop

_encode = msgspec.json.Encoder().encode
_order = msgspec.json.Decoder(Order)


def tell(report: Report) -> None:
    """Write one message. Blocks when nobody reads: the parent always does, and the pipe holds hundreds."""
    sys.stdout.buffer.write(_encode(report) + b"\n")
    sys.stdout.buffer.flush()


async def serve() -> None:
    """Obey until told to stop, or until the orders end."""
    orders = asyncio.StreamReader(limit=4 * 1024 * 1024)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
    plan = msgspec.json.decode(await orders.readline(), type=Plan)
    async with application(plan) as calls:
        tell(Ready())
        while line := await orders.readline():
            order: Order = _order.decode(line)
            match order:
                case Measure(calls=number):
                    tell(Measured(await own_time(plan, number)))
                case Start():
                    await _run(plan, calls, order, orders)
                    return
                case Stop():
                    return


async def _run(plan: Plan, calls: Application, start: Start, orders: asyncio.StreamReader) -> None:
    caller = Caller(plan, calls, start, tell)
    # Everything loaded stays: walking it in each collection would stall the loop for tens of milliseconds.
    gc.collect()
    gc.freeze()
    running = asyncio.create_task(caller.run())
    # Any line now, and the end of the input, means stop.
    stopping = asyncio.create_task(orders.readline())
    await asyncio.wait({running, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    running.cancel()
    await asyncio.wait({running}, timeout=10.0)
    if running.done() and not running.cancelled() and (error := running.exception()) is not None:
        raise error
    tell(Done(offered=caller.offered, cpu_s=time.process_time()))


def main() -> None:
    """Exit status 0 after a complete run."""
    try:
        import uvloop
    except ImportError:
        asyncio.run(serve())
    else:
        uvloop.run(serve())


if __name__ == "__main__":
    main()
