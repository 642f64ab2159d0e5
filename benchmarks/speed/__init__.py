"""Speed beside the peers, each at its best settings, in turn in one run."""
