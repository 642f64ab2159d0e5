"""The engine for NVIDIA cards: whole networks as CUDA graphs, of few kernels, in half precision."""
