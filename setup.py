# SPDX-License-Identifier: Apache-2.0
"""The license, which setuptools takes as an SPDX expression from 77 on; Python 3.8 ends at 75. All else: pyproject.toml."""

import setuptools

KEY = "license_expression" if int(setuptools.__version__.split(".")[0]) >= 77 else "license"
setuptools.setup(**{KEY: "Apache-2.0"})
