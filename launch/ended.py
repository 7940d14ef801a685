"""How a run ended, finished or for good, kept beside its checkpoints: whoever starts a node of it looks there first.

Kubernetes starts again whatever fails. A pod failure policy could tell it which ends are for good, but then the pods of a lost
node are never replaced. So the nodes tell each other: the one that sees such an end writes it down, every node looks before it
starts workers, and leaves. What is written counts for one submission alone; whoever submits again has mended the cause. That
the run has finished is written, too: a first node that is lost at the very end begins again when no other is left to join.
"""

from __future__ import annotations

import json
import re
import signal
import time

TERMINATED, SUPERSEDED = 143, 144  # as in equiav.ending
OWNER = "owner"  # as in equiav.train.owner
MANIFEST, CHECKPOINT = "manifest.json", re.compile(r"step-([0-9]{8,15})-[0-9a-f]{8}")  # as in equiav.train.manifest
PATIENCE, QUESTION = 60.0, 10.0  # seconds for a store that does not answer; for one that need not
SMALL = 1 << 16  # bytes of what nodes tell each other
FOR_GOOD = "the run has ended for good: "  # by which `torchx status` knows it, too


class Ended(BaseException):
    """The node leaves, with this status. No Exception: a signal raises it anywhere, and nobody may take it for an error."""

    def __init__(self, status: int, text: str, final: bool = False):
        super().__init__(FOR_GOOD + text if final else text)
        self.status, self.final = status, final

    def status_of(self, index: int) -> int:
        """A run that is over for good has one node that says so, the first; the others have nothing left to do, and are not to
        be started again."""
        return 0 if self.final and index else self.status


class Record:
    """Of one submission of a run, in the folder of its checkpoints. Without a folder, nothing is remembered."""

    def __init__(self, folder: str, submission: str, index: int):
        self.folder, self.submission, self.index = folder, submission, index
        self.name = f"ended-{re.sub('[^A-Za-z0-9-]', '-', submission)}"

    def look(self) -> None:
        """Raises Ended if the run has ended, or its folder refuses this node."""
        if not (self.folder and self.submission):
            return
        from streaming import Store, StoreError
        from streaming.outside import parse, table, whole
        from streaming.outside import text as told
        from streaming.store import Denied, Missing

        try:
            ended = table(parse(Store(self.folder, QUESTION).read(self.name, most=SMALL)), "it")
            text, status = told(ended["error"], "error"), whole(ended["status"], "status", -255, 255)
        except Missing:
            return
        except Denied as error:
            # Nobody can write here that it is final, and whoever mends the credentials need not start the run again.
            raise Ended(1, f"{error}. Mend the credentials: Kubernetes tries again, after pauses that grow") from None
        except (StoreError, ValueError, KeyError, TypeError):
            return  # a silent store keeps the node outside (launch/ready.py); of what is unreadable, the workers tell
        if status == 0:
            raise Ended(0, text)
        raise Ended(status, f"{text}. Mend the cause, and submit it again", final=True)

    def write(self, status: int, error: str) -> bool:
        """Whether the other nodes can know of it now."""
        if not (self.folder and self.submission):
            return False
        from streaming import Store, StoreError

        content = {"status": status, "error": error, "node": self.index, "time": time.strftime("%Y-%m-%d %H:%M:%S %z")}
        try:
            Store(self.folder, PATIENCE).write(self.name, json.dumps(content).encode())
        except StoreError:  # refused or silent, as the error says that is to be written
            return False
        return True

    def greet(self) -> None:
        """Shows that this node can write where the run is saved. Raises StoreError if it cannot."""
        if not self.folder:
            return
        from streaming import Store

        said = {"submission": self.submission, "time": time.strftime("%Y-%m-%d %H:%M:%S %z")}
        Store(self.folder, QUESTION).write(f"node-{self.index}", json.dumps(said).encode())

    def saved(self) -> int | None:
        """The newest step that is saved, 0 where none is; None: nobody knows."""
        if not self.folder:
            return None
        from streaming import Store, StoreError

        try:
            store = Store(self.folder, QUESTION)
            steps = {int(found[1]): name for name in store.list() if (found := CHECKPOINT.fullmatch(name))}
            return next((step for step in sorted(steps, reverse=True) if store.exists(f"{steps[step]}/{MANIFEST}")), 0)
        except StoreError:
            return None

    def replaced(self) -> bool:
        """Whether the run that has taken over is of another submission, not a second node of this index."""
        from streaming import Store, StoreError
        from streaming.outside import parse, table

        try:
            owner = table(parse(Store(self.folder, PATIENCE).read(OWNER, most=SMALL)), OWNER)
            return str(owner["submission"]) != self.submission
        except (StoreError, ValueError, KeyError, TypeError):
            return False


def name_of(number: int) -> str:
    """Of a signal; some have none."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line), type(error).__name__)
