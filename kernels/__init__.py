"""Triton kernels, installed as fastproto.kernels and imported on first use only."""
