"""Fixtures that several tests of the policy share."""

from support.alone import alone

__all__ = ["alone"]
