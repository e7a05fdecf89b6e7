"""The privacy settings by name: whom each protects, and how two neighbouring data sets differ."""

from __future__ import annotations

from typing import Literal

Setting = Literal[
    "record+local", "client+local", "client+aggregator", "client+secure_sum", "abstract", "none"
]
Thresholds = Literal["default", "quantile", "released", "fixed", "raw"]
Allocation = Literal["default", "uniform", "abstract", "mse", "contribution", "snr"]

UNIT_OF = {
    "record+local": "record",
    "client+local": "client",
    "client+aggregator": "client",
    "client+secure_sum": "client",
    "abstract": "none",
    "none": "none",
}
SUMMED = ("client+aggregator", "client+secure_sum")
ADJACENCY_OF = {
    "record+local": "zero_out",
    "client+local": "replace_one",
    "client+aggregator": "zero_out",
    "client+secure_sum": "zero_out",
    "abstract": "replace_one",
    "none": "zero_out",
}
