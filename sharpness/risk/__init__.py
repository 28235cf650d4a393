"""The object that is measured: one fixed mean loss over one fixed finite data set."""
