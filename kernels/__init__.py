"""Triton kernels, installed as fastproto.kernels and imported on first use only.

contrast_fwd, contrast_bwd   softmax cross-entropy of rows against keys, and its gradients
siamese, siamese_pairs       SPCL's metric loss over all pairs, and on given pairs
assign, assign_screen        the nearest centre of every row: what is left open by proven bounds, and the bounds
update                       sums and counts of the rows of each cluster, the same bits in any order
_tiles                       tile sizes per architecture, how work is split, shared lines of Triton
"""
