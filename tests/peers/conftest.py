"""Marks that PEFT's tests carry and this project does not use."""


def pytest_configure(config):
    for mark in ("single_gpu_tests", "multi_gpu_tests", "bitsandbytes", "regression"):
        config.addinivalue_line("markers", f"{mark}: of PEFT's own suite")
