"""Tests of tuning by rewriting."""
