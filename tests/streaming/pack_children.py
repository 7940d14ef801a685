"""What the processes of test_pack.py do: encoders that behave and that do not, and packing that is killed."""

import os
import random
import signal
import time

from streaming import BadSample, Store
from streaming.pack import pack


def members(number):
    """What belongs to this item and to no other; up to 6 kB."""
    rng = random.Random(number)
    names = ["json", "wav", *(f"{k}.jpg" for k in range(rng.randint(1, 3)))]
    return {name: b"%d %s " % (number, name.encode()) + rng.randbytes(rng.randint(0, 1200)) for name in names}


def encode(number):
    if number % 10 == 7:
        raise BadSample("seven", f"{number} ends in 7")
    return members(number)


def encode_slowly(number):
    """The first never."""
    time.sleep(3600 if number == 0 else 0.02)
    return encode(number)


class Dangerous:
    """Three items that no process survives."""

    def __call__(self, number):
        if number == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        if number == 8:  # in the same part
            os._exit(3)
        if number == 23:
            time.sleep(3600)
        return encode(number)

    def __reduce__(self):
        return ready_to_write, ()


def ready_to_write():
    """A process begins its first item with what takes seconds behind it."""
    import webdataset  # noqa: F401

    return Dangerous()


def encode_mended(number):
    """Seven was mended, and three became bad."""
    if number == 3:
        raise BadSample("three", "is bad now")
    return members(number) if number == 7 else encode(number)


def encode_with_a_mistake(number):
    if number == 13:
        raise KeyError("a mistake in the program")
    return encode(number)


def encode_with_a_late_mistake(number):
    if number == 23:
        raise KeyError("a mistake in the program")
    return encode(number)


def encode_or_refuse(number):
    raise BadSample("no good", str(number))


def pack_in(url, items, encode, processes, **arguments):
    pack(items, encode, Store(url), processes=processes, **arguments)


def pack_until(url, items, encode, count, after, arguments):
    """Packs, and dies of SIGKILL right before (or after) the file number `count` comes into its place."""
    replace, done = os.replace, 0

    def last_replace(source, destination):
        nonlocal done
        done += 1
        if done == count and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, destination)
        if done == count:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = last_replace
    pack(items, encode, Store(url), processes=0, **arguments)
