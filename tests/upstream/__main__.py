"""Run the fake provider as a process: `python tests/upstream --port 0 --tls`.

Prints one line of JSON, {"http_port", "https_port", "ca_file", "pid"}, and serves until SIGINT,
SIGTERM or, with --with-stdin, the end of its standard input.
"""

import argparse
import asyncio
import json
import os
import signal
import sys
from pathlib import Path

if not __package__:
    # Run as a folder: its modules are ours, not names for everybody's import.
    here = Path(__file__).resolve().parent
    sys.path[:] = [p for p in sys.path if not p or Path(p).resolve() != here]
    sys.path.insert(0, str(here.parent))

from upstream import PROVIDER_HOSTS, Framing, Reply, Upstream


async def _serve(upstream: Upstream, with_stdin: bool) -> None:
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped.set)
    async with upstream.serving():
        ports = {
            "http_port": upstream.http_port,
            "https_port": upstream.https_port or None,
            "ca_file": str(upstream.ca_file) if upstream.https_port else None,
            "pid": os.getpid(),
        }
        print(json.dumps(ports), flush=True)
        if with_stdin:
            loop.add_reader(0, lambda: None if os.read(0, 4096) else stopped.set())
        await stopped.wait()


def main() -> None:
    parser = argparse.ArgumentParser(prog="upstream", description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="plain HTTP; 0 takes a free one")
    parser.add_argument("--tls", action="store_true", help="serve HTTPS too")
    parser.add_argument("--tls-port", type=int, default=0)
    parser.add_argument("--ca-folder", type=Path, help="where ca.pem goes; default: temporary")
    parser.add_argument("--host", action="append", default=[], help="one more certificate name")
    parser.add_argument("--size", type=int, default=120, help="characters of each answer")
    parser.add_argument("--delta-chars", type=int, default=16)
    parser.add_argument("--first-delay-s", type=float, default=0.0)
    parser.add_argument("--delay-s", type=float, default=0.0, help="between the events")
    parser.add_argument("--keep", type=int, default=0, help="requests to remember")
    parser.add_argument("--with-stdin", action="store_true", help="end with standard input")
    given = parser.parse_args()
    framing = Framing(first_delay_s=given.first_delay_s, delay_s=given.delay_s)
    upstream = Upstream(
        hosts=(*PROVIDER_HOSTS, "localhost", "127.0.0.1", *given.host),
        tls=given.tls,
        keep=given.keep,
        http_port=given.port,
        https_port=given.tls_port,
        folder=given.ca_folder,
        default=Reply(size=given.size, delta_chars=given.delta_chars, framing=framing),
    )
    asyncio.run(_serve(upstream, given.with_stdin))


if __name__ == "__main__":
    main()
