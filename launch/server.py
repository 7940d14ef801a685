"""Imported first by the server that forks the workers: it ends with the node program, and they with it, and by nothing else."""

import signal

from streaming.processes import end_with_parent

end_with_parent()
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # to a whole group of processes: the workers save meanwhile
