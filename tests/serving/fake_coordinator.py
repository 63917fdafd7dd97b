"""A coordinator of fake engines in a process of its own, to be killed: `python -m tests.serving.fake_coordinator
ADDRESS JOURNAL OPTIONS`, OPTIONS as JSON for `fake_cluster`. Its workers are started elsewhere."""

from __future__ import annotations

import asyncio
import json
import sys

from serving.journal import Journal
from serving.server import Server
from tests.serving.clusters import fake_cluster
from tests.serving.hex_tokenizer import EOS, TOKENIZER, VOCABULARY


async def main(address: str, journal: str, options: str) -> None:
    server = Server(fake_cluster(**json.loads(options)), Journal(journal), TOKENIZER, VOCABULARY, (EOS,), linger=5.0)
    await server.start(address)
    await server.failure


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
