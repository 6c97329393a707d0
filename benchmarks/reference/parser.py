# SPDX-License-Identifier: Apache-2.0
"""The parser of the miniature's videos; it is part of the demo, which scores its own samples with it."""

from osaccel.demo.parser import ATTRIBUTES, Reading, Track, attributes, judge, parse, score

__all__ = ["ATTRIBUTES", "Reading", "Track", "attributes", "judge", "parse", "score"]
