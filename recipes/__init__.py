"""One file a training run; its docstring says the command, the hardware, the time and the score."""
