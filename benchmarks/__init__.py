"""Speed against what a user would otherwise run. Each module is one command; results are in RESULTS.md."""
