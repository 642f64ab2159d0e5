"""Files of weights, in and out: diffusers folders, original single files, the hub; strict, and never half loaded."""
