#!/usr/bin/env bash
# pfl 0.6.0: RDPPrivacyAccountant takes a sampling probability with mechanism="laplace" and does not
# use it. No error and no warning; the noise is that of clients that take part in every step.
#
# Packages:  pfl==0.6.0, dp-accounting==0.5.1 (which pfl calls)
# Input:     100 compositions, epsilon 2, delta 1e-6, sampling probabilities 1, 0.1 and 0.01, for
#            mechanisms "laplace" and "gaussian", by RDPPrivacyAccountant and PLDPrivacyAccountant.
# Expected:  rarer sampling needs less noise, as for Gaussian noise and as the PLD accountant says for
#            Laplace noise (parameters of 21.8, 2.1 and 0.33).
# Seen:      RDP with Laplace noise: 23.15 for all three, 70 times the PLD's parameter at 0.01. Its
#            event is a plain LaplaceDpEvent; the other three build a Poisson-sampled one.
# Why here:  Laplace noise is the published AADP-FL's, and sampled clients are the usual case. Privacy
#            is not broken, but whoever compares accountants or trainers by this figure compares with
#            noise that the sampled mechanism does not need. Ours composes sampled Laplace noise by
#            privacy loss distributions.
#
# Exits 0 while pfl behaves so, 1 once it does not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet pfl==0.6.0 dp-accounting==0.5.1
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import sys

from pfl.privacy.privacy_accountant import PLDPrivacyAccountant, RDPPrivacyAccountant


def noise(accountant, mechanism, probability):
    found = accountant(
        num_compositions=100, sampling_probability=probability, mechanism=mechanism,
        epsilon=2.0, delta=1e-6,
    ).cohort_noise_parameter
    print(f"{accountant.__name__}, {mechanism}, sampled with {probability:g}: {found:.4g}")
    return found


kinds = [(RDPPrivacyAccountant, "gaussian"), (PLDPrivacyAccountant, "laplace"),
         (RDPPrivacyAccountant, "laplace")]
found = {kind: [noise(*kind, q) for q in (1.0, 0.1, 0.01)] for kind in kinds}
falls = all(a > 2 * b > 4 * c for a, b, c in (found[kind] for kind in kinds[:2]))
flat = max(found[kinds[2]]) == min(found[kinds[2]])
sys.exit(not (falls and flat))
PYTHON
