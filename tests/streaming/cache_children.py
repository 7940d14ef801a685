"""What the processes of test_cache.py do: what they are told, or a bustle of everything at random."""

import os
import random

from streaming.cache import Cache

BLOCK = 4096


def content(name, size):
    return random.Random(name).randbytes(size)


def obey(connection, root, limit):
    """Calls on a cache of its own. Entries stay here, by name."""
    cache, held = Cache(root, limit), {}
    while True:
        what, name, *rest = connection.recv()
        if what in ("create", "use"):
            entry = cache.create(name, rest[0], [(0, rest[0])], lambda _: 0) if what == "create" else cache.use(name)
            if entry:
                held[name] = entry
            answer = entry is not None
        elif what == "write":
            answer = held[name].write(0, rest[0])
        elif what == "commit":
            answer = cache.commit(held[name])
        elif what == "read":
            answer = held[name].read(0)
        elif what == "release":
            answer = held.pop(name).release()
        connection.send(answer)


def bustle(cache, seed, rounds, report):
    """Creates, writes, commits, abandons, uses and releases; what it holds must stay where and as it was written.

    While others hold the whole cache it is refused, so it goes on until it has had its share (or never gets one)."""
    rng, held, counts = random.Random(seed), [], {"created": 0, "used": 0, "refused": 0, "abandoned": 0}

    def release(entry, name, size):
        assert entry.read(0) == content(name, size), f"{name} is not as it was written"
        assert os.stat(entry.path).st_ino == os.fstat(entry.file).st_ino, f"{name} was evicted while in use"
        entry.release()

    for done in range(50 * rounds):
        if done >= rounds and min(counts["created"], counts["used"]) > 20:
            break
        number = rng.randrange(14)
        name, size = f"shards/{number}", (1 + number) * BLOCK - 17
        if len(held) == 2 or (held and rng.random() < 0.3):
            release(*held.pop(rng.randrange(len(held))))
        elif entry := cache.use(name):
            held.append((entry, name, size))
            counts["used"] += 1
        elif entry := cache.create(name, size, [(0, size)], lambda _: rng.random()):
            half = size // 2
            entry.write(half, content(name, size)[half:])
            if rng.random() < 0.2:
                cache.abandon(entry)
                counts["abandoned"] += 1
                continue
            entry.write(0, content(name, size)[:half])
            cache.commit(entry)
            held.append((entry, name, size))
            counts["created"] += 1
        else:
            counts["refused"] += 1
        if done % 50 == 0:
            report(None)
    for one in held:
        release(*one)
    report(counts)


def bustle_alone(connection, root, limit, seed, rounds):
    bustle(Cache(root, limit), seed, rounds, connection.send)
