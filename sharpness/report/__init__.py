"""Records into tables and figures; no number is computed here."""
