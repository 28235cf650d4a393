"""What several test files share: problems with known answers, and trained networks."""
