"""The network. One letter per axis, in names, docstrings and einsums alike.

B sequences          N heads                E experts            L layers
T query tokens       Q query latent         K experts per token  X tokens of all sequences, B * T
S cached tokens      R key/value latent     F expert hidden      Y tiles of tokens, one expert each
C chunk of S         H no-position head     W vocabulary         M tokens in a tile
D model              P rotary head
                     A whole query or key head, H + P
                     V value head         U width that attention sums: V, or R when absorbed

`x_BTD` has shape [B, T, D]. In a kernel a lower-case letter is a tile of that axis.
"""
