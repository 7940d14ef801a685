"""One file a command. Read top to bottom, it tells what the command does. None imports another."""
