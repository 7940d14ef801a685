"""Imported first by the server that forks the workers: it ends with the node program, and they with it."""

from streaming.processes import end_with_parent

end_with_parent()
