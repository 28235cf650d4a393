"""The papers, table by table: our number beside theirs, and a verdict."""
