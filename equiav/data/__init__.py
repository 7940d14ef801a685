"""Where clips come from, and how they get here."""
