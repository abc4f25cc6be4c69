"""`cat-ray doctor`: what a cluster is like, and what is wrong with it, before money is spent.

`facts.py` is what can be known and `findings.py` what follows from it, both without any process;
`node.py`, `links.py`, `all_reduce.py` and `storage_probe.py` find facts out, and `examine.py` has
them do so on every node.
"""
