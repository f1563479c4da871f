"""Triton kernels, installed as fastproto.kernels and imported on first use only.

contrast_fwd, contrast_merge   softmax cross-entropy of rows against keys, and the end of it, where parts are merged
contrast_bwd                   its gradients of the keys, their scales and biases
siamese_all_pairs              SPCL's metric loss over all pairs of rows
siamese_pairs                  the same on given pairs
assign, assign_screen          the nearest centre of every row: what is left open by proven bounds, and the bounds
update                         sums and counts of the rows of each cluster, the same bits in any order
_halves                        float32 rows as pairs of float16 rows, for tensor cores
_sets                          several sets of keys in one launch
_tiles                         tile sizes per architecture, how loops are cut into parts, shared lines of Triton
"""
