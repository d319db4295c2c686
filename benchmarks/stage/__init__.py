"""The nonlocal stage beside other ways to compute it: python -m benchmarks.stage"""
