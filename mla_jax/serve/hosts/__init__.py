"""A model on many processes: the first has the front end and says what all compute, the others follow it.

gathering   they find each other, see that they were started alike, and join JAX's own run
relay       JAX's connections go through the port of the first process, and outlive it
line        messages between two processes, and notice of one that is gone
calls       every call of a step, told to all and done by all

What comes over a connection is a number, a text or an array, and is never run. The port is for machines that
trust each other, as are those that JAX's collectives open by themselves: nothing on it is encrypted. A key
that all have keeps others from joining.
"""
