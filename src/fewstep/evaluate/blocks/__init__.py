"""The benchmark of block-world models: prompt following, diversity, FID, and copies of training images."""
