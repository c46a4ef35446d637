"""Fixtures of several files."""

from tests.unit.converting import bert as bert
