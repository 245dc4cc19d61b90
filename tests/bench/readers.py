"""A process of reading threads for the transport benchmark: prints a digest of what each one read.

python -m tests.bench.readers ADDRESS THREADS here|afar
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from nearkin_client import NeighbourClient

from tests.bench.afar import from_afar


def read(client: NeighbourClient) -> str:
    ids = client.table(generation=1, timeout=600).ids
    return f"{np.bitwise_xor.reduce(ids.view(np.uint32), axis=None):08x}"


def main() -> None:
    address, count = sys.argv[1], int(sys.argv[2])
    near = sys.argv[3] == "here"
    clients = [
        NeighbourClient(address, run="read") if near else from_afar(address, "read") for _ in range(count)
    ]
    for client in clients:
        client.server_info()
    print("ready", flush=True)
    sys.stdin.readline()
    with ThreadPoolExecutor(count) as threads:
        print("\n".join(threads.map(read, clients)), flush=True)


if __name__ == "__main__":
    main()
