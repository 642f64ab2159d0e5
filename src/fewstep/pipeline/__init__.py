"""From a prompt to a picture: the tasks, and what they share."""
