"""One question, one function, one result type a module."""
