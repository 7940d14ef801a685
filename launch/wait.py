"""`python -m launch.wait URL`: ends when there is a dataset. Before a job that starts together with the one that packs it."""

from __future__ import annotations

import signal
import sys
import time

INDEX, PAUSE = "index", 5.0  # as in streaming.dataset; seconds


def main(url: str) -> int:
    from streaming import Store, StoreError

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the kernel spares a container's first process the default

    store = Store(url, patience=60.0)
    print(f"waits for a dataset at {store.url}", flush=True)
    while True:
        try:
            if store.exists(INDEX):
                return 0
        except StoreError as error:  # the store may be starting, too
            print(error, flush=True)
        time.sleep(PAUSE)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
