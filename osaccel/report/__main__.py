# SPDX-License-Identifier: Apache-2.0
"""`python -m osaccel.report PATH`."""

import sys

from osaccel.report.page import main

sys.exit(main())
