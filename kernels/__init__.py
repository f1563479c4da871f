"""Triton kernels, installed as fastproto.kernels and imported on first use only.

contrast_fwd, contrast_bwd   softmax cross-entropy of rows against keys, and its gradients
siamese, siamese_pairs       SPCL's metric loss over all pairs, and on given pairs
_tiles                       tile sizes per architecture, how work is split, shared lines of Triton
"""
