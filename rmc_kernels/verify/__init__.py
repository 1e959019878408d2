"""Verification of backends: outputs and every gradient against float64, held to the error of eager PyTorch."""

from rmc_kernels.verify.cases import Case
from rmc_kernels.verify.check import CaseResult, check_case
from rmc_kernels.verify.cover import covering, quick_cover, random_case
from rmc_kernels.verify.histogram import Histogram, histograms
from rmc_kernels.verify.limits import Comparison, Errors, criterion
from rmc_kernels.verify.report import Report, reproducer
from rmc_kernels.verify.runner import run

__all__ = [
    "Case",
    "CaseResult",
    "Comparison",
    "Errors",
    "Histogram",
    "Report",
    "check_case",
    "covering",
    "criterion",
    "histograms",
    "quick_cover",
    "random_case",
    "reproducer",
    "run",
]
