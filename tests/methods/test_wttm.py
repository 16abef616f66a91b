"""WTTM is tested beside TTM, in test_ttm.py; here are the facts for the contract of all methods."""

CONTRACT = set()
