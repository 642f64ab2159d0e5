"""Speed of fewstep and its peers, each with its best settings."""
