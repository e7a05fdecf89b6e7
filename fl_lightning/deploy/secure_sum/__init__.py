"""Secure sums: the server learns the sum of the nodes' noised updates and no single one of them.

Pairwise masks with recovery after drop-outs, against a server that lies (active adversary), as in
Bonawitz et al. 2017. docs/secure_sum.md has the protocol, what it protects against, and costs.

Reference:
    Bonawitz, Ivanov, Kreuter, Marcedone, McMahan, Patel, Ramage, Segal, Seth 2017, "Practical
    Secure Aggregation for Privacy-Preserving Machine Learning", CCS, figure 4 and theorem 6.5.
"""
