# SPDX-License-Identifier: Apache-2.0
"""The license, an SPDX expression from setuptools 77 on, while Python 3.8 ends at 75. All else is in pyproject.toml."""

import setuptools

KEY = "license_expression" if int(setuptools.__version__.split(".")[0]) >= 77 else "license"
setuptools.setup(**{KEY: "Apache-2.0"})
