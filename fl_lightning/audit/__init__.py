"""Tests a finished run from outside: how much of ε an attacker shows who sees every release."""
